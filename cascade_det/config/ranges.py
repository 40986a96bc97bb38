"""Which numbers and lists make sense, key by key."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cascade_det.config.exits import EXIT_RULES
from cascade_det.config.fast import FAST_RULES
from cascade_det.config.regime import TRAINING_RULES
from cascade_det.config.rules import (
    Condition,
    Rule,
    above,
    at_least,
    each,
    is_number,
    is_text,
    rising,
    whole,
    within,
)

_POSITIVE = "Give a number above 0."
_NOT_NEGATIVE = "Give 0 or more."
_FRACTION = "Give a number from 0 to 1."
_COUNT = "Give 1 or more."


def _above_0_to_1(value: object) -> bool:
    return above(0)(value) and within(0, 1)(value)


def _in_0_to_below_1(value: object) -> bool:
    return within(0, 1)(value) and value != 1


def _strictly_within_0_and_1(value: object) -> bool:
    return _above_0_to_1(value) and value != 1


_GROUPS: tuple[tuple[Condition, str, tuple[str, ...]], ...] = (
    (
        whole(at_least(1)),
        _COUNT,
        (
            "MODEL.FPN.OUT_CHANNELS",
            "MODEL.RESNETS.NUM_GROUPS",
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
            "MODEL.RPN.PRE_NMS_TOPK_TEST",
            "MODEL.RPN.POST_NMS_TOPK_TRAIN",
            "MODEL.RPN.POST_NMS_TOPK_TEST",
            "MODEL.ROI_HEADS.NUM_CLASSES",
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
            "MODEL.ROI_BOX_HEAD.FC_DIM",
            "MODEL.ROI_BOX_HEAD.CONV_DIM",
            "INPUT.MAX_SIZE_TRAIN",
            "INPUT.MAX_SIZE_TEST",
            "SOLVER.MAX_ITER",
            "SOLVER.IMS_PER_BATCH",
            "SOLVER.CHECKPOINT_PERIOD",
            "SOLVER.NUM_DECAYS",
            "TEST.DETECTIONS_PER_IMAGE",
            "CASCADE.TEST_IMS_PER_BATCH",
            "CASCADE.LOG_PERIOD",
            "CASCADE.ACCUMULATION_STEPS",
        ),
    ),
    (
        at_least(0),
        _NOT_NEGATIVE,
        (
            "MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
            "MODEL.RPN.BBOX_REG_LOSS_WEIGHT",
            "MODEL.RPN.SMOOTH_L1_BETA",
            "MODEL.RPN.LOSS_WEIGHT",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
            "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
            "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO",
            "MODEL.ROI_BOX_HEAD.NUM_FC",
            "MODEL.ROI_BOX_HEAD.NUM_CONV",
            "INPUT.MIN_SIZE_TEST",
            "DATALOADER.NUM_WORKERS",
            "SOLVER.BASE_LR_END",
            "SOLVER.WEIGHT_DECAY",
            "SOLVER.WEIGHT_DECAY_NORM",
            "SOLVER.WARMUP_ITERS",
            "SOLVER.REFERENCE_WORLD_SIZE",
            "TEST.EVAL_PERIOD",
            "CASCADE.MAX_TO_KEEP",
            "CASCADE.PATIENCE",
        ),
    ),
    (
        above(0),
        _POSITIVE,
        (
            "SOLVER.BASE_LR",
            "SOLVER.BIAS_LR_FACTOR",
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        ),
    ),
    (
        within(0, 1),
        _FRACTION,
        (
            "MODEL.RPN.POSITIVE_FRACTION",
            "MODEL.ROI_HEADS.POSITIVE_FRACTION",
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            "SOLVER.WARMUP_FACTOR",
            "CASCADE.SHADOW_SHARE",
            "CASCADE.SHADOW_SCORE",
        ),
    ),
    (
        _above_0_to_1,
        "Give a number above 0 and up to 1.",
        ("MODEL.RPN.NMS_THRESH", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "SOLVER.GAMMA"),
    ),
    (
        _in_0_to_below_1,
        "Give a number from 0 to below 1.",
        ("MODEL.ANCHOR_GENERATOR.OFFSET", "SOLVER.MOMENTUM", "CASCADE.EMA_DECAY"),
    ),
    (
        each(is_text),
        "Give a list of names, such as [a, b].",
        (
            "MODEL.FPN.IN_FEATURES",
            "MODEL.RPN.IN_FEATURES",
            "MODEL.ROI_HEADS.IN_FEATURES",
            "MODEL.RESNETS.OUT_FEATURES",
            "DATASETS.TRAIN",
            "DATASETS.TEST",
        ),
    ),
    (
        each(each(above(0), least=1), least=1),
        "Give a list of lists of numbers above 0, such as [[32], [64]].",
        ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"),
    ),
    (
        each(whole(at_least(0))),
        "Give a list of whole numbers, 0 or more each, or [] for the value of ROI_BOX_HEAD.",
        ("MODEL.CASCADE.BOX_HEAD.NUM_CONV", "MODEL.CASCADE.BOX_HEAD.NUM_FC"),
    ),
    (
        each(lambda name: name in ("", "GN", "BN", "SyncBN")),
        'Give a list of "", "GN", "BN" or "SyncBN", or [] for the value of ROI_BOX_HEAD.',
        ("MODEL.CASCADE.BOX_HEAD.NORM",),
    ),
    (
        each(whole(at_least(1))),
        "Give a list of whole numbers, 1 or more each, or [] for the value of ROI_BOX_HEAD.",
        ("MODEL.CASCADE.BOX_HEAD.CONV_DIM", "MODEL.CASCADE.BOX_HEAD.FC_DIM"),
    ),
)

_SINGLE: tuple[Rule, ...] = (
    Rule("MODEL.PIXEL_MEAN", each(is_number, length=3), "Give 3 numbers, one per channel."),
    Rule("MODEL.PIXEL_STD", each(above(0), length=3), "Give 3 numbers above 0, one per channel."),
    Rule(
        "MODEL.RPN.BOUNDARY_THRESH",
        lambda value: not at_least(0)(value),
        "Supported: -1, which keeps all anchors. Other values need the Detectron2 host.",
    ),
    Rule(
        "MODEL.RPN.IOU_THRESHOLDS",
        rising(each(within(0, 1), length=2), strictly=False),
        "Give two numbers from 0 to 1: background below the first, object from the second on.",
    ),
    Rule(
        "MODEL.RPN.CONV_DIMS",
        each(lambda dim: dim == -1 or whole(at_least(1))(dim), least=1),
        "Give a list of channel counts; -1 stands for as many as come in.",
    ),
    Rule("MODEL.RPN.BBOX_REG_WEIGHTS", each(above(0), length=4), "Give 4 numbers above 0."),
    Rule(
        "MODEL.ROI_HEADS.IOU_THRESHOLDS",
        each(_strictly_within_0_and_1, length=1),
        "Give one number between 0 and 1, the first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS.",
    ),
    Rule(
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
        rising(each(_strictly_within_0_and_1, least=1), strictly=True),
        "Give one number between 0 and 1 per stage, each larger than the one before.",
    ),
    Rule(
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
        each(each(above(0), length=4), least=1),
        "Give 4 numbers above 0 per stage, such as [[10, 10, 5, 5], [20, 20, 10, 10]].",
    ),
    Rule(
        "MODEL.CASCADE.STAGE_LOSS_WEIGHTS",
        each(at_least(0)),
        "Give a list of numbers, 0 or more each.",
    ),
    Rule(
        "INPUT.MIN_SIZE_TRAIN",
        each(whole(at_least(1)), least=1),
        "Give a list of sizes in pixels, 1 or more each.",
    ),
    Rule(
        "SOLVER.STEPS",
        rising(each(whole(at_least(1))), strictly=True),
        "Give increasing iterations, 1 or more each.",
    ),
    Rule(
        "SOLVER.WEIGHT_DECAY_BIAS",
        lambda value: value is None or at_least(0)(value),
        "Give 0 or more, or null for the value of SOLVER.WEIGHT_DECAY.",
    ),
    Rule(
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
        lambda value: value == math.inf or above(0)(value),
        "Give a number above 0, or .inf for the largest element.",
    ),
    Rule(
        "CASCADE.DATASETS",
        each(each(is_text, length=3)),
        "Give [name, annotation file, image folder] for each data set.",
    ),
    Rule("CASCADE.EPOCHS", within(0, 1e6), "Give a number from 0 to 1,000,000."),
    Rule("CASCADE.BEST_METRIC", is_text, "Give the name of a metric, such as bbox/AP."),
    Rule("OUTPUT_DIR", is_text, "Give a folder."),
)


def _rules() -> Iterator[Rule]:
    for condition, remedy, keys in _GROUPS:
        for key in keys:
            yield Rule(key, condition, remedy)
    yield from _SINGLE
    yield from EXIT_RULES
    yield from FAST_RULES
    yield from TRAINING_RULES


RANGES: tuple[Rule, ...] = tuple(_rules())
