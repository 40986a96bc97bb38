"""What ``check_config`` accepts, refuses, and says."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det import config
from cascade_det.config.augment_keys import AUGMENTATIONS
from cascade_det.errors import ConfigError
from cascade_det.standalone.build import build_detector

CONFIGS = Path(__file__).parents[2] / "configs"
# But for presets, which are no configurations by themselves: see test_presets.
PRESETS = ("exits", "augment")
SHIPPED = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name not in PRESETS)
LIGHT = "build_mobilenet_v2_fpn_backbone"
PLAIN = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
EARLY_EXIT = ("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads")
R18 = ("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64")


def problems(cfg, *opts) -> list[str]:
    """What is wrong once ``opts`` are merged, one problem each."""
    config.merge_config(cfg, None, opts)
    with pytest.raises(ConfigError) as caught:
        config.check_config(cfg)
    return str(caught.value).split("\n  - ")[1:]


def problem(cfg, *opts) -> str:
    (only,) = problems(cfg, *opts)
    return only


# ---- what is accepted


def test_there_are_configurations_to_check():
    assert {file.stem for file in SHIPPED} == {
        "Base-Cascade-RCNN-FPN",
        "Base-Cascade-RCNN-ViT-FPN",
        "Base-Cascade-Segmenter",
        "cascade_pvtv2_b2",
        "cascade_resnet50",
        "merit_small",
        "segment_shapes",
        "cascade_rcnn_EfficientViT_M0_FPN_1x",
        "cascade_rcnn_EfficientViT_M0_FPN_1x_early_exit",
        "cascade_rcnn_EfficientViT_M4_FPN_1x",
        "cascade_rcnn_EfficientViT_M4_FPN_1x_early_exit",
        "cascade_rcnn_HATNet_tiny_FPN_1x",
        "cascade_rcnn_HATNet_tiny_FPN_1x_early_exit",
        "cascade_rcnn_HierViT_FPN_1x",
        "cascade_rcnn_HierViT_FPN_1x_early_exit",
        "cascade_rcnn_R_50_FPN_1x",
        "cascade_rcnn_R_50_FPN_3x",
        "cascade_rcnn_R_101_FPN_3x",
        "cascade_rcnn_R_50_FPN_1x_early_exit",
        "cascade_rcnn_R_50_FPN_3x_early_exit",
        "cascade_rcnn_R_101_FPN_3x_early_exit",
        "cascade_mask_rcnn_R_50_FPN_1x",
        "cascade_mask_rcnn_R_50_FPN_3x",
        "cascade_mask_rcnn_R_101_FPN_3x",
        "cascade_mask_rcnn_R_50_FPN_1x_early_exit",
        "cascade_mask_rcnn_R_50_FPN_3x_early_exit",
        "cascade_mask_rcnn_R_101_FPN_3x_early_exit",
        "demo",
        "demo_masks",
        "finetune_efficientvit",
        "finetune_small",
        "instant_test",
    }


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_configuration_passes(file):
    cfg = config.load_config(file)
    before = cfg.clone()
    config.check_config(cfg)
    assert cfg == before


@pytest.mark.parametrize("file", [file for file in SHIPPED if file.stem.endswith("early_exit")])
def test_early_exit_twins_differ_in_nothing_but_the_exits(file):
    twin = file.with_name(file.name.replace("_early_exit", ""))
    ours, theirs = config.flat(config.load_config(file)), config.flat(config.load_config(twin))
    assert {key for key in ours if ours[key] != theirs[key]} <= {
        "MODEL.ROI_HEADS.NAME",
        "MODEL.CASCADE.EXIT.ENABLED",
        "MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS",
        "MODEL.CASCADE.EXIT.REDUNDANCY_IOU",
    }
    assert config.exit_arguments(config.load_config(file)) is not None
    assert config.exit_arguments(config.load_config(twin)) is None


def levels(finest, coarsest):
    """Options that read the levels from ``finest`` to ``coarsest``."""
    names = [f"p{level}" for level in range(finest, coarsest + 1)]
    options = (f"MODEL.{part}.IN_FEATURES {names}" for part in ("RPN", "ROI_HEADS"))
    anchors = [[8 * 2**level] for level in range(finest, coarsest + 1)]
    return f"{' '.join(options)} MODEL.ANCHOR_GENERATOR.SIZES {anchors}".replace(", ", ",")


EFFICIENTVIT = "MODEL.BACKBONE.NAME build_efficientvit_fpn_backbone"
HIERVIT = "MODEL.BACKBONE.NAME build_hiervit_fpn_backbone"
CASCADE_FPN = "MODEL.BACKBONE.NAME build_resnet_cascade_fpn_backbone"
STAGES = "MODEL.FPN.IN_FEATURES ['res4','res5','res6']"
GOOD = (
    "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64",
    "MODEL.RESNETS.NUM_GROUPS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8",
    "MODEL.BACKBONE.NAME build_mobilenet_v2_fpn_backbone MODEL.RESNETS.NORM BN",
    "MODEL.BACKBONE.NAME build_hatnet_fpn_backbone MODEL.RESNETS.NORM GN",
    f"{EFFICIENTVIT} MODEL.FPN.IN_FEATURES ['res5','res6'] {levels(5, 7)}",
    f"{EFFICIENTVIT} MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5','res6']",
    f"{EFFICIENTVIT} {STAGES} MODEL.EFFICIENTVIT.NECK retinanet {levels(3, 7)}",
    f"{EFFICIENTVIT} {STAGES} MODEL.EFFICIENTVIT.NECK maskrcnn {levels(2, 6)}",
    f"{EFFICIENTVIT} {STAGES} {levels(4, 7)} MODEL.EFFICIENTVIT.KERNELS (7,5,3,3)",
    f"{HIERVIT} MODEL.FPN.IN_FEATURES ['res3','res4'] {levels(3, 6)}",
    f"{HIERVIT} MODEL.HIERVIT.PATCH_SIZES [16,32] MODEL.HIERVIT.WIDTHS [32,64] "
    f"MODEL.HIERVIT.DEPTHS [1,1] MODEL.FPN.IN_FEATURES ['res5'] {levels(5, 7)}",
    f"{CASCADE_FPN} MODEL.FPN.OUT_CHANNELS 16 MODEL.RESNETS.NORM BN",
    f"{CASCADE_FPN} MODEL.FPN.IN_FEATURES ['res4','res5'] {levels(4, 6)}",
    f"{EFFICIENTVIT} MODEL.BACKBONE.NAME build_efficientvit_cascade_fpn_backbone "
    "MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5','res6']",
    f"{HIERVIT} MODEL.BACKBONE.NAME build_hiervit_cascade_fpn_backbone "
    f"MODEL.FPN.IN_FEATURES ['res3','res4'] {levels(3, 6)}",
    "MODEL.DEVICE cuda:1",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG False",
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS (0.5,0.51,0.52)",
    "MODEL.CASCADE.BOX_HEAD.NORM ('GN','','BN')",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model",
    "MODEL.ROI_HEADS.NAME EarlyExitCascadeROIHeads MODEL.CASCADE.EXIT.THRESHOLDS (1.5,0.5)",
    "MODEL.ROI_HEADS.NAME EarlyExitCascadeROIHeads MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS (0,1)",
    "MODEL.CASCADE.BOX_HEAD.NUM_CONV (0,1,2) MODEL.CASCADE.BOX_HEAD.NUM_FC (1,)",
    "MODEL.ROI_HEADS.NAME EarlyExitCascadeROIHeads MODEL.CASCADE.EXIT.ENABLED True",
    "MODEL.ANCHOR_GENERATOR.SIZES [[16,32]]",
    "MODEL.RPN.IN_FEATURES ['p3','p4','p5','p6'] MODEL.ANCHOR_GENERATOR.SIZES [[9],[20],[40],[80]]",
    "INPUT.MIN_SIZE_TEST 0",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING range INPUT.MIN_SIZE_TRAIN (640,800)",
    "DATASETS.TRAIN () DATASETS.TEST ()",
    "SOLVER.STEPS ()",
    "SOLVER.WEIGHT_DECAY_BIAS 0",
    "MODEL.RPN.CONV_DIMS [-1,64]",
    "MODEL.ROI_MASK_HEAD.NUM_CONV 4",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS (1,1,1,1)",
    "DATALOADER.REPEAT_THRESHOLD 0.1",
    "DATALOADER.REPEAT_THRESHOLD 0.1 DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler",
    "CASCADE.ACCUMULATION_STEPS 4 SOLVER.IMS_PER_BATCH 12",
    "CASCADE.EMA_DECAY 0.9998",
    "CASCADE.VALIDATION_LOSS True CASCADE.PATIENCE 3 TEST.EVAL_PERIOD 10",
    "INPUT.CROP.ENABLED True INPUT.CROP.TYPE absolute_range INPUT.CROP.SIZE [200,300]",
    "INPUT.CROP.TYPE absolute INPUT.CROP.SIZE [0.5,0.5]",
    "CASCADE.AUGMENT [['JPEG'],['RandomAffine',{'degrees':[-5,10],'shear':[-5,5,0,0]}]]",
    "CASCADE.ON_BAD_DATA skip",
    "MODEL.CASCADE.FAST.ENABLED True MODEL.CASCADE.FAST.DTYPE float16 MODEL.DEVICE cuda",
)


@pytest.mark.parametrize("opts", GOOD)
def test_good_values_pass(cfg, opts):
    config.merge_config(cfg, None, opts.split())
    config.check_config(cfg)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_any_number_of_stages(cfg, stages):
    opts = ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", repr(tuple(0.5 + 0.05 * i for i in range(stages)))]
    opts += ["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", repr(((10.0,) * 4,) * stages)]
    config.merge_config(cfg, None, [*opts, *EARLY_EXIT])
    config.check_config(cfg)
    config.merge_config(cfg, None, ["MODEL.CASCADE.EXIT.THRESHOLDS", repr((0.5,) * (stages - 1))])
    config.check_config(cfg)


# ---- one key


NOT_BUILT = {
    "CASCADE.SEMANTIC_AUGMENTATION": ["crop"],
    "MODEL.META_ARCHITECTURE": ["RetinaNet"],
    "MODEL.CASCADE_DECODER.EXIT.KIND": ["pixel"],
    "MODEL.CASCADE_DECODER.EXIT.CONFIDENCE": ["margin"],
    "MODEL.CASCADE_DECODER.EXIT.CHANNEL_GATES": ["none"],
    "MODEL.KEYPOINT_ON": ["True"],
    "MODEL.LOAD_PROPOSALS": ["True"],
    "MODEL.DEVICE": ["gpu", "cuda:"],
    "MODEL.BACKBONE.NAME": ["build_resnet_backbone"],
    "MODEL.BACKBONE.FREEZE_AT": ["6"],
    "MODEL.RESNETS.DEPTH": ["51"],
    "MODEL.RESNETS.NORM": ["LN", ""],
    "MODEL.RESNETS.RES5_DILATION": ["2"],
    "MODEL.RESNETS.STEM_OUT_CHANNELS": ["32"],
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ["[False, False, False, True]"],
    "MODEL.EFFICIENTVIT.NAME": ["m6", "M4"],
    "MODEL.EFFICIENTVIT.NECK": ["bifpn"],
    "MODEL.HATNET.NAME": ["huge"],
    "MODEL.HIERVIT.MIXER": ["pool"],
    "MODEL.MAXVIT.NAME": ["base"],
    "MODEL.DUAL_SCALE.MODE": ["both", "cascaded"],
    "MODEL.FPN.NORM": ["LN"],
    "MODEL.FPN.FUSE_TYPE": ["max"],
    "MODEL.PROPOSAL_GENERATOR.NAME": ["RRPN"],
    "MODEL.ANCHOR_GENERATOR.NAME": ["RotatedAnchorGenerator"],
    "MODEL.RPN.HEAD_NAME": ["OtherHead"],
    "MODEL.RPN.BOUNDARY_THRESH": ["0"],
    "MODEL.RPN.IOU_LABELS": ["[0, 1, 1]"],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ["iou"],
    "MODEL.ROI_HEADS.NAME": ["StandardROIHeads"],
    "MODEL.ROI_HEADS.IOU_LABELS": ["[1, 0]"],
    "MODEL.ROI_BOX_HEAD.NAME": ["OtherHead"],
    "MODEL.ROI_BOX_HEAD.NORM": ["FrozenBN"],
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ["ROIPool"],
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ["l2"],
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": ["True"],
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": ["True"],
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": ["True"],
    "MODEL.CASCADE.ENSEMBLE": ["max"],
    "MODEL.CASCADE.POOLER_KERNEL": ["cuda"],
    "MODEL.CASCADE.SUPPRESSION": ["soft"],
    "MODEL.CASCADE.FAST.DTYPE": ["int4"],
    "MODEL.CASCADE.TRAINING.CLASS_LOSS": ["equalized"],
    "MODEL.CASCADE.TRAINING.GATING": ["firm"],
    "MODEL.CASCADE.TRAINING.STAGE_WEIGHTING": ["random"],
    "INPUT.FORMAT": ["YUV-BT.601"],
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ["random"],
    "INPUT.RANDOM_FLIP": ["both"],
    "INPUT.CROP.TYPE": ["center"],
    "DATASETS.PROPOSAL_FILES_TRAIN": ["('a.pkl',)"],
    "DATASETS.PROPOSAL_FILES_TEST": ["('a.pkl',)"],
    "DATALOADER.SAMPLER_TRAIN": ["RandomSubsetTrainingSampler"],
    "SOLVER.LR_SCHEDULER_NAME": ["Plateau"],
    "SOLVER.WARMUP_METHOD": ["cubic"],
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ["adaptive"],
    "TEST.EXPECTED_RESULTS": ["[['bbox', 'AP', 38.5, 0.2]]"],
    "TEST.PRECISE_BN.ENABLED": ["True"],
    "FLOAT32_PRECISION": ["low"],
    "VIS_PERIOD": ["100"],
    "GLOBAL.HACK": ["2.0"],
    "CASCADE.ON_BAD_DATA": ["ignore"],
    "CASCADE.OPTIMIZER": ["Adam"],
    "CASCADE.AMP_DTYPE": ["float8"],
}
OUT_OF_RANGE = {
    "MODEL.CASCADE_DECODER.EXIT.THRESHOLDS": ["()", "(0.0,)"],
    "MODEL.CASCADE_DECODER.EXIT.PATCH": ["0"],
    "MODEL.ROI_HEADS.NUM_CLASSES": ["0"],
    "MODEL.FPN.OUT_CHANNELS": ["-1"],
    "MODEL.EFFICIENTVIT.KERNELS": ["(4, 4, 4, 4)", "(0, 3, 3, 3)"],
    "MODEL.HATNET.DROP_PATH": ["1.0", "-0.1"],
    "MODEL.HIERVIT.PATCH_SIZES": ["()", "(4, 0)"],
    "MODEL.HIERVIT.DEPTHS": ["(4, 6, 0)"],
    "MODEL.HIERVIT.GROUPS": ["0"],
    "MODEL.DUAL_SCALE.SIZES": ["[224, 256]", "[224]", "[224, 0]"],
    "MODEL.PIXEL_MEAN": ["[1.0]"],
    "MODEL.PIXEL_STD": ["[1.0, 0.0, 1.0]", "[1.0, True, 1.0]"],
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": [
        "()",
        "(0.5, 0.7, 0.6)",
        "(0.5, 0.5, 0.5)",
        "(0.5, 0.6, 1.0)",
        "(0.0, 0.6, 0.7)",
        "(0.5, 'a', 0.7)",
    ],
    "MODEL.CASCADE.BOX_HEAD.NORM": ["('LN',)"],
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [
        "((10, 10, 5), (1, 1, 1), (1, 1, 1))",
        "(10, 10, 5, 5)",
    ],
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": ["[0.5, 0.6]"],
    "MODEL.CASCADE.STAGE_LOSS_WEIGHTS": ["(-1.0,)"],
    "MODEL.CASCADE.SUPPRESSION_SIGMA": ["0.0"],
    "MODEL.CASCADE.BOX_HEAD.FC_DIM": ["(0,)"],
    "MODEL.CASCADE.BOX_HEAD.NUM_CONV": ["(1.5,)"],
    "MODEL.CASCADE.FAST.FLOAT32_PARTS": ["['neck']"],
    "MODEL.CASCADE.FAST.IMAGES": ["-1"],
    "MODEL.CASCADE.TRAINING.CLASS_WEIGHTS": ["(-1.0,)"],
    "MODEL.CASCADE.TRAINING.FOCAL_GAMMA": ["-0.5"],
    "MODEL.CASCADE.TRAINING.SEESAW_P": ["-0.5"],
    "MODEL.CASCADE.TRAINING.SEESAW_Q": ["-0.5"],
    "MODEL.CASCADE.TRAINING.GATE_THRESHOLD": ["0.0", "1.5"],
    "MODEL.CASCADE.TRAINING.GATE_SCALE": ["0.0"],
    "MODEL.CASCADE.TRAINING.STAGE_LOSS_WEIGHTS_END": ["(0.5, -0.5, 1.0)"],
    "MODEL.CASCADE.TRAINING.PREFIX_LOSS_WEIGHT": ["-1.0"],
    "MODEL.CASCADE.TRAINING.DYNAMIC.PERIOD": ["0"],
    "MODEL.CASCADE.TRAINING.DYNAMIC.K_I": ["-1"],
    "MODEL.CASCADE.TRAINING.DYNAMIC.IOU_FLOOR": ["1.0"],
    "MODEL.CASCADE.TRAINING.DYNAMIC.BETA_START": ["0.0"],
    "MODEL.ANCHOR_GENERATOR.SIZES": ["[32, 64]", "[[]]"],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ["[[0.0]]"],
    "MODEL.ANCHOR_GENERATOR.OFFSET": ["1.0"],
    "MODEL.RPN.NMS_THRESH": ["0.0"],
    "MODEL.RPN.POST_NMS_TOPK_TEST": ["0"],
    "MODEL.RPN.IOU_THRESHOLDS": ["[0.7, 0.3]"],
    "MODEL.RPN.CONV_DIMS": ["[0]"],
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": ["1.5"],
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": ["-0.1"],
    "INPUT.MIN_SIZE_TRAIN": ["()", "(0,)"],
    "INPUT.MIN_SIZE_TEST": ["-1"],
    "INPUT.CROP.SIZE": ["[0.5]", "[0.0, 0.5]"],
    "CASCADE.AUGMENT": [
        "('JPEG',)",
        "(['JPEG', 5],)",
        "([{}],)",
        "(['JPEG', {}, {}],)",
        "([],)",
    ],
    "DATASETS.TRAIN": ["(1,)"],
    "DATALOADER.NUM_WORKERS": ["-1"],
    "DATALOADER.REPEAT_THRESHOLD": ["-0.1"],
    "SOLVER.MAX_ITER": ["0"],
    "SOLVER.BASE_LR": ["0", "1e999"],
    "SOLVER.STEPS": ["(20, 10)", "(10, 10)", "(1.5,)"],
    "SOLVER.IMS_PER_BATCH": ["-1"],
    "SOLVER.MOMENTUM": ["1.0"],
    "SOLVER.WEIGHT_DECAY_BIAS": ["-0.1"],
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": ["0"],
    "TEST.DETECTIONS_PER_IMAGE": ["0"],
    "TEST.AUG.MIN_SIZES": ["()", "(-1,)", "(1.5,)"],
    "TEST.AUG.MAX_SIZE": ["0"],
    "CASCADE.DATASETS": ["(('a', 'a.json'),)", "('a', 'a.json', 'a/')", "(('', 'a.json', 'a/'),)"],
    "CASCADE.SEMANTIC_DATASETS": [
        "(('a', 'folders', 'a/'),)",
        "(('a', 'acdc', 'a/', 'b/'),)",
        "(('a', 'voc', 'a/'),)",
        "('a', 'acdc', 'a/')",
        "(('', 'acdc', 'a/'),)",
        "(('a', ['acdc'], 'a/'),)",
    ],
    "CASCADE.SEMANTIC_CLASSES": ["('a', '')", "(1,)"],
    "CASCADE.TEST_IMS_PER_BATCH": ["0"],
    "CASCADE.LOG_PERIOD": ["0"],
    "CASCADE.LOGGERS": ["('tensorboard',)"],
    "CASCADE.BEST_METRIC": [""],
    "CASCADE.ACCUMULATION_STEPS": ["0"],
    "CASCADE.EMA_DECAY": ["1.0", "-0.1"],
    "CASCADE.PATIENCE": ["-1"],
    "CASCADE.MAX_TO_KEEP": ["-1"],
    "CASCADE.SHADOW_SHARE": ["1.1"],
    "CASCADE.SHADOW_SCORE": ["-0.1"],
    "OUTPUT_DIR": [""],
}


def each_value(table):
    return [(key, value) for key, values in table.items() for value in values]


@pytest.mark.parametrize(("key", "value"), each_value(NOT_BUILT))
def test_a_part_that_is_not_built_is_refused_by_name(cfg, key, value):
    message = problem(cfg, key, value)
    assert message.startswith(f"{key} is ")
    assert value.strip("'") in message
    assert "Supported: " in message


@pytest.mark.parametrize(("key", "value"), each_value(OUT_OF_RANGE))
def test_a_value_out_of_range_names_itself_and_a_remedy(cfg, key, value):
    message = problem(cfg, key, value)
    assert message.startswith(f"{key} is ")
    assert "Give " in message


# An argument out of range for every kind of check.
BAD_ARGUMENTS = {
    "RandomPhotometricDistort": [("brightness", 0.5), ("hue", [-0.6, 0.1]), ("p", 1.5)],
    "ColorJitter": [("brightness", -0.1), ("contrast", [2, 1]), ("hue", 0.6), ("hue", "a")],
    "RandomGrayscale": [("p", True)],
    "GaussianBlur": [("kernel_size", 4), ("kernel_size", 3.0), ("sigma", [0, 1]), ("sigma", 1)],
    "GaussianNoise": [("sigma", -0.1), ("mean", 2)],
    "JPEG": [("quality", 0), ("quality", [90, 10]), ("quality", [10.5, 20])],
    "RandomAffine": [
        *[("degrees", -5), ("degrees", [10, -10]), ("translate", 0.1), ("scale", [0, 1])],
        *[("shear", 90), ("shear", [5, -5]), ("shear", [0, 1, 2]), ("fill", 256), ("fill", 0.5)],
    ],
    "RandomRotation": [("degrees", 200), ("expand", 1)],
    "RandomIoUCrop": [("sampler_options", [0.5]), ("trials", 0), ("max_aspect_ratio", 0.5)],
    "ScaleJitter": [("target_size", 1024), ("target_size", [0, 5]), ("scale_range", [2, 1])],
    "RandomCrop": [("size", [1.5, 2]), ("pad_if_needed", "yes")],
    "RandomHorizontalFlip": [("p", -1)],
    "RandomVerticalFlip": [("p", [0, 1])],
    "CopyPaste": [("share", 2), ("p", None)],
    "Mosaic": [("size", [3, 9]), ("center", 0.5), ("center", [0.5, 1.5])],
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_arguments_of_augmentations_are_checked(cfg, name):
    good = [
        name,
        {key: argument.default for key, argument in AUGMENTATIONS[name].arguments.items()},
    ]
    config.merge_config(cfg, None, ["MODEL.MASK_ON", True, "CASCADE.AUGMENT", [[name]]])
    config.check_config(cfg)
    config.merge_config(cfg, None, ["CASCADE.AUGMENT", [good]])
    config.check_config(cfg)
    for key, value in BAD_ARGUMENTS[name]:
        message = problem(cfg.clone(), "CASCADE.AUGMENT", [["JPEG"], [name, {key: value}]])
        assert message.startswith(f"CASCADE.AUGMENT[1]: {key} of {name} is {value!r}. Give ")


def test_nan_is_no_number(cfg):
    cfg.SOLVER.BASE_LR = float("nan")
    assert problem(cfg).startswith("SOLVER.BASE_LR is nan.")


# ---- keys against each other

TILES = "MODEL.CASCADE.EXIT.ENABLED True MODEL.CASCADE.EXIT.TILE_THRESHOLD 0.1"

# Options, and what the message about them has.
CONTRADICTIONS = {
    "INPUT.CROP.ENABLED True INPUT.CROP.SIZE [300,0.5]": (
        "CROP.SIZE is [300, 0.5] | 'relative_range' | shares of the image, up to 1"
    ),
    "INPUT.CROP.ENABLED True INPUT.CROP.TYPE absolute": (
        "CROP.SIZE is [0.9, 0.9] | 'absolute' | in pixels"
    ),
    "INPUT.CROP.ENABLED True INPUT.CROP.TYPE absolute_range INPUT.CROP.SIZE [300,200]": (
        "CROP.SIZE is [300, 200] | 'absolute_range' | [smallest, largest]"
    ),
    "CASCADE.AUGMENT [['JPEG'],['RandomCop']]": (
        "CASCADE.AUGMENT[1] is 'RandomCop', which is no augmentation | Did you mean RandomCrop?"
    ),
    "CASCADE.AUGMENT [['zzz']]": "AUGMENT[0] is 'zzz' | Give one of RandomPhotometricDistort, Col",
    "CASCADE.AUGMENT [['JPEG',{'qualty':5}]]": (
        "CASCADE.AUGMENT[0]: JPEG has no argument 'qualty' | Give some of quality, p"
    ),
    "CASCADE.AUGMENT [['CopyPaste']]": (
        "AUGMENT[0] is CopyPaste | MODEL.MASK_ON is False | Set it to True, or take the entry out"
    ),
    "CASCADE.AUGMENT [['Mosaic'],['JPEG'],['Mosaic']]": "AUGMENT has Mosaic 2 times | Name it once",
    "CASCADE.AUGMENT [['RandomIoUCrop',{'min_scale':0.9,'max_scale':0.5}]]": (
        "min_scale of RandomIoUCrop is 0.9, above max_scale, 0.5"
    ),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS (0.5,0.6)": (
        "BBOX_REG_WEIGHTS | of length 3 | has 2 stages | Give 2 values"
    ),
    "MODEL.CASCADE.STAGE_LOSS_WEIGHTS (1,1)": (
        "STAGE_LOSS_WEIGHTS | of length 2 | has 3 stages | Give 1 or 3 values"
    ),
    "MODEL.CASCADE.STAGE_LOSS_WEIGHTS ()": "STAGE_LOSS_WEIGHTS | of length 0 | Give 1 or 3 values",
    "MODEL.CASCADE.BOX_HEAD.FC_DIM (64,128)": (
        "BOX_HEAD.FC_DIM | of length 2 | Give 0 or 1 or 3 values"
    ),
    "MODEL.CASCADE.BOX_HEAD.NUM_FC (1,0,1)": (
        "NUM_CONV and NUM_FC are both 0 at stage 1 | at least one layer"
    ),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS [0.4]": "IOU_THRESHOLDS is [0.4] | IOUS is 0.5 | same value",
    "MODEL.BACKBONE.NAME build_mobilenet_v2_fpn_backbone MODEL.RESNETS.NORM GN": (
        "RESNETS.NORM is GN | mobilenet_v2 | BN"
    ),
    "MODEL.RESNETS.DEPTH 18": "RES2_OUT_CHANNELS is 256 | depth 18 has 64 | Set it to 64",
    "MODEL.RESNETS.RES2_OUT_CHANNELS 64": "RES2_OUT_CHANNELS is 64 | depth 50 has 256",
    "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NUM_GROUPS 2": (
        "NUM_GROUPS is 2 | depth 18"
    ),
    "MODEL.RESNETS.OUT_FEATURES ['res4','res5']": (
        "OUT_FEATURES is ['res4', 'res5'] | needs res2, res3"
    ),
    "MODEL.FPN.IN_FEATURES []": "FPN.IN_FEATURES is [] | neighbouring levels",
    "MODEL.FPN.IN_FEATURES ['res2','res3']": (
        "FPN.IN_FEATURES is ['res2', 'res3'] | up to the coarsest"
    ),
    f"{EFFICIENTVIT} MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5']": (
        "FPN.IN_FEATURES is ['res2', 'res3', 'res4', 'res5'] | up to the coarsest | 'res6']"
    ),
    f"{EFFICIENTVIT} MODEL.FPN.IN_FEATURES ['res3','res4','res5','res6'] {levels(3, 7)} "
    "MODEL.RPN.IN_FEATURES ['p2','p3','p4','p5','p6']": (
        "RPN.IN_FEATURES is ['p2', 'p3', | ['p3', 'p4', 'p5', 'p6', 'p7']"
    ),
    f"{EFFICIENTVIT} MODEL.EFFICIENTVIT.NECK maskrcnn MODEL.FPN.IN_FEATURES ['res5','res6']": (
        "FPN.IN_FEATURES is ['res5', 'res6'] | Give ['res4', 'res5', 'res6']"
    ),
    f"{EFFICIENTVIT} {STAGES} MODEL.EFFICIENTVIT.NECK retinanet {levels(3, 7)} "
    "MODEL.ROI_HEADS.IN_FEATURES ['p2','p3','p4']": (
        "ROI_HEADS.IN_FEATURES is ['p2', 'p3', 'p4'] | ['p3', 'p4', 'p5', 'p6', 'p7']"
    ),
    f"{EFFICIENTVIT} {STAGES} {levels(4, 7)} MODEL.EFFICIENTVIT.KERNELS (7,5,3)": (
        "EFFICIENTVIT.KERNELS is [7, 5, 3] | 4 kernels"
    ),
    f"{HIERVIT} MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5']": (
        "FPN.IN_FEATURES is ['res2', 'res3', 'res4', 'res5'] | such as ['res2', 'res3', 'res4']"
    ),
    f"{HIERVIT} MODEL.HIERVIT.PATCH_SIZES (4,16,8)": (
        "HIERVIT.PATCH_SIZES is [4, 16, 8] | neighbours out of [4, 8, 16, 32]"
    ),
    f"{HIERVIT} MODEL.HIERVIT.PATCH_SIZES (2,4,8)": "HIERVIT.PATCH_SIZES is [2, 4, 8]",
    f"{HIERVIT} MODEL.HIERVIT.DEPTHS (1,1)": "HIERVIT.DEPTHS is [1, 1] | 3 stages | one value",
    f"{HIERVIT} MODEL.HIERVIT.WIDTHS (64,100,256)": "HIERVIT.WIDTHS is [64, 100, 256] | of 32",
    f"{CASCADE_FPN} MODEL.FPN.NORM GN MODEL.FPN.OUT_CHANNELS 40": (
        "FPN.NORM is 'GN', but build_resnet_cascade_fpn_backbone | Set it to ''"
    ),
    f"{CASCADE_FPN} MODEL.FPN.FUSE_TYPE avg": (
        "FPN.FUSE_TYPE is 'avg' | Set it to 'sum', or take build_resnet_fpn_backbone"
    ),
    f"{CASCADE_FPN} MODEL.FPN.OUT_CHANNELS 8": "FPN.OUT_CHANNELS is 8 | Give 16 or more",
    f"{CASCADE_FPN} MODEL.FPN.IN_FEATURES ['res5'] {levels(5, 6)}": (
        "FPN.IN_FEATURES is ['res5'] | two levels"
    ),
    f"{CASCADE_FPN} MODEL.RESNETS.OUT_FEATURES ['res4','res5']": (
        "OUT_FEATURES is ['res4', 'res5'] | needs res2, res3"
    ),
    "MODEL.BACKBONE.NAME build_mobilenet_v2_cascade_fpn_backbone MODEL.RESNETS.NORM GN": (
        "RESNETS.NORM is GN | mobilenet_v2_cascade | BN"
    ),
    "MODEL.BACKBONE.NAME build_efficientvit_cascade_fpn_backbone MODEL.EFFICIENTVIT.NECK "
    f"retinanet {STAGES} {levels(3, 7)}": (
        "EFFICIENTVIT.NECK is 'retinanet' | Set it to 'fpn' | build_efficientvit_fpn_backbone"
    ),
    "MODEL.ROI_HEADS.IN_FEATURES ['p3','p2']": (
        "ROI_HEADS.IN_FEATURES is ['p3', 'p2'] | finest first"
    ),
    "MODEL.ROI_HEADS.IN_FEATURES ['p2','p4']": (
        "ROI_HEADS.IN_FEATURES is ['p2', 'p4'] | neighbouring"
    ),
    "MODEL.ROI_HEADS.IN_FEATURES []": "ROI_HEADS.IN_FEATURES is []",
    "MODEL.ANCHOR_GENERATOR.SIZES [[32],[64]]": (
        "SIZES is [[32], [64]], with 2 lists | Give 1 list, or 5"
    ),
    "MODEL.ANCHOR_GENERATOR.SIZES [[8,16],[64],[128],[256],[512]]": (
        "make [6, 3, 3, 3, 3] anchors | Give every level the same number"
    ),
    "MODEL.FPN.NORM GN MODEL.FPN.OUT_CHANNELS 48": "FPN.OUT_CHANNELS is 48 | multiple of 32",
    "MODEL.ROI_BOX_HEAD.NORM GN MODEL.ROI_BOX_HEAD.CONV_DIM 40": (
        "ROI_BOX_HEAD.CONV_DIM is 40 | multiple of 32"
    ),
    "MODEL.ROI_BOX_HEAD.NORM GN MODEL.CASCADE.BOX_HEAD.CONV_DIM (40,)": (
        "CASCADE.BOX_HEAD.CONV_DIM is 40 | multiple of 32"
    ),
    "MODEL.RESNETS.NORM GN MODEL.RESNETS.WIDTH_PER_GROUP 24": (
        "WIDTH_PER_GROUP x NUM_GROUPS is 24 | multiple of 32"
    ),
    f"{TILES} {CASCADE_FPN}": (
        "NAME is 'build_resnet_cascade_fpn_backbone', but MODEL.CASCADE.EXIT.TILE_THRESHOLD is 0.1"
        " | need a backbone with an FPN, such as build_resnet_fpn_backbone | to 0 for the"
    ),
    "MODEL.CASCADE.EXIT.ENABLED True MODEL.CASCADE.EXIT.LEARNED ['tile_head'] MODEL.FPN.NORM GN": (
        "FPN.NORM is 'GN', but MODEL.CASCADE.EXIT.LEARNED has 'tile_head' | need another norm | "
        "Leave that part out."
    ),
    f"{TILES} MODEL.FPN.NORM GN": "FPN.NORM is 'GN' | need another norm, or none | to 0 for the",
    f"{TILES} MODEL.RPN.IN_FEATURES ['p3','p4','p5','p6'] MODEL.ANCHOR_GENERATOR.SIZES [[32]]": (
        "RPN.IN_FEATURES is ['p3', 'p4', 'p5', 'p6'] | need p2 and the next level, or more"
    ),
    f"{TILES} MODEL.RPN.IN_FEATURES ['p2'] MODEL.ANCHOR_GENERATOR.SIZES [[32]]": (
        "RPN.IN_FEATURES is ['p2'] | need p2 and the next level, or more"
    ),
    f"{TILES} {EFFICIENTVIT} {STAGES} {levels(4, 7)}": (
        "FPN.IN_FEATURES is ['res4', 'res5', 'res6'] | need four levels"
    ),
    f"{TILES} MODEL.RPN.CONV_DIMS (64,64)": "RPN.CONV_DIMS is [64, 64] | need one convolution",
    f"{TILES} MODEL.ROI_HEADS.IN_FEATURES ['p3','p4','p5']": (
        "ROI_HEADS.IN_FEATURES is ['p3', 'p4', 'p5'] | need a list that begins with p2"
    ),
    f"{TILES} MODEL.CASCADE.FAST.ENABLED True MODEL.CASCADE.FAST.COMPILE True": (
        "FAST.COMPILE is True | need False. Set the threshold to 0"
    ),
    "MODEL.DEVICE cpu MODEL.CASCADE.FAST.ENABLED True MODEL.CASCADE.FAST.DTYPE float16": (
        "FAST.DTYPE is 'float16', but MODEL.DEVICE is cpu"
    ),
    "MODEL.CASCADE.FAST.ENABLED True MODEL.CASCADE.FAST.DTYPE int8": (
        "FAST.DTYPE is 'int8', but MODEL.CASCADE.FAST.IMAGES is 0 | such as 32"
    ),
    "MODEL.CASCADE.FAST.ENABLED True MODEL.CASCADE.FAST.IMAGES 8 DATASETS.TRAIN ()": (
        "FAST.IMAGES is 8, but DATASETS.TRAIN is empty"
    ),
    "INPUT.MAX_SIZE_TRAIN 700": (
        "MIN_SIZE_TRAIN is 800, above INPUT.MAX_SIZE_TRAIN, 700 | raise the second"
    ),
    "INPUT.MAX_SIZE_TEST 700": "MIN_SIZE_TEST is 800, above INPUT.MAX_SIZE_TEST",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING range": (
        "MIN_SIZE_TRAIN is (640, 672 | 'range' | smallest and the largest"
    ),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING range INPUT.MIN_SIZE_TRAIN (800,640)": (
        "MIN_SIZE_TRAIN is (800, 640)"
    ),
    "MODEL.CASCADE.MASK.STAGES every": "MASK.STAGES is 'every', but MODEL.MASK_ON is False",
    "MODEL.CASCADE.MASK.SCORE_THRESHOLD 0.3": "SCORE_THRESHOLD is 0.3, but MODEL.MASK_ON | at 0.0",
    "CASCADE.BEST_METRIC segm/AP": "BEST_METRIC is 'segm/AP', but MODEL.MASK_ON is False",
    "MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.NORM GN MODEL.ROI_MASK_HEAD.CONV_DIM 48": (
        "MODEL.ROI_MASK_HEAD.CONV_DIM is 48 | 32 groups"
    ),
    "DATASETS.TEST ('a','b','a')": "DATASETS.TEST names a more than once",
    "CASCADE.DATASETS (('a','x','y'),('a','z','w'))": "CASCADE.DATASETS names a more than once",
    "CASCADE.DATASETS (('a','x','y'),) CASCADE.SEMANTIC_DATASETS (('a','acdc','z'),)": (
        "CASCADE.DATASETS with SEMANTIC_DATASETS names a more than once"
    ),
    "SOLVER.LR_SCHEDULER_NAME WarmupCosineLR SOLVER.BASE_LR_END 1.0": (
        "BASE_LR_END is 1.0, above SOLVER.BASE_LR, 0.02"
    ),
    "SOLVER.NESTEROV True SOLVER.MOMENTUM 0": "NESTEROV is True, but SOLVER.MOMENTUM is 0",
    "CASCADE.ACCUMULATION_STEPS 3": "ACCUMULATION_STEPS is 3 | SOLVER.IMS_PER_BATCH, 16 | divisor",
    "SOLVER.REFERENCE_WORLD_SIZE 8 SOLVER.IMS_PER_BATCH 0": (
        "REFERENCE_WORLD_SIZE is 8 | IMS_PER_BATCH is 0"
    ),
    "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler": (
        "DATALOADER.REPEAT_THRESHOLD is 0 | such as 0.1"
    ),
    "CASCADE.PATIENCE 2": "PATIENCE is 2 evaluations, but TEST.EVAL_PERIOD is 0",
    "DATASETS.TEST () CASCADE.VALIDATION_LOSS True": (
        "VALIDATION_LOSS is True | DATASETS.TEST is empty"
    ),
    "DATASETS.TEST () CASCADE.PATIENCE 2 TEST.EVAL_PERIOD 9": (
        "PATIENCE is 2 | DATASETS.TEST is empty"
    ),
}


@pytest.mark.parametrize(("opts", "words"), CONTRADICTIONS.items())
def test_keys_that_contradict_each_other(cfg, opts, words):
    message = problem(cfg, *opts.split())
    for word in words.split(" | "):
        assert word in message


@pytest.mark.parametrize("key", ["CASCADE.LVIS_AP", "CASCADE.FAST_AP"])
def test_a_scorer_that_is_not_installed_is_named_with_its_extra(cfg, key, monkeypatch):
    monkeypatch.setattr("cascade_det.config.run_checks.find_spec", lambda _: None)
    message = problem(cfg.clone(), key, "True")
    assert f"{key} is True, but faster-coco-eval is not installed" in message
    assert "[lvis]" in message
    monkeypatch.setattr("cascade_det.config.run_checks.find_spec", lambda _: object())
    config.merge_config(cfg, None, [key, "True"])
    config.check_config(cfg)


def test_heads_that_are_not_ours_may_have_faster_inference(cfg):
    """So that the same YAML runs in both hosts."""
    config.merge_config(cfg, None, ["MODEL.CASCADE.FAST.ENABLED", "True"])
    config.check_unread_cascade(cfg)


def test_a_best_metric_that_there_will_be(cfg):
    losses = ("CASCADE.VALIDATION_LOSS", "True")
    metric = "CASCADE.BEST_METRIC"
    watch = ("CASCADE.PATIENCE", "1", "TEST.EVAL_PERIOD", "9", "DATASETS.TEST", "('a', 'b')")
    good = [
        (*losses, metric, "validation/total_loss"),
        (*losses, metric, "validation/loss_box_reg_stage2"),
        (*watch, metric, "a/bbox/AP50"),
        (*watch, *losses, metric, "validation/loss_rpn_cls"),
        ("DATASETS.TEST", "('a', 'b')"),  # without patience a metric is only looked for
    ]
    for opts in good:
        passing = cfg.clone()
        config.merge_config(passing, None, opts)
        config.check_config(passing)
    message = problem(cfg.clone(), metric, "validation/total_loss")
    assert "BEST_METRIC is 'validation/total_loss'" in message
    assert "CASCADE.VALIDATION_LOSS is False" in message
    message = problem(cfg.clone(), *losses, metric, "validation/loss_cls_stage3")
    assert "validation/loss_cls_stage3" in message
    assert "validation/loss_cls_stage2" in message
    message = problem(cfg.clone(), *watch)
    assert "'bbox/AP', but DATASETS.TEST has 2 sets" in message
    assert "a/bbox/AP" in message


@pytest.mark.parametrize("masks", ["", "last", "every"])
def test_validation_losses_have_the_names_of_the_detectors_losses(cfg, masks):
    if masks:
        on = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8")
        config.merge_config(cfg, None, [*on, "MODEL.CASCADE.MASK.STAGES", masks])
    small = ("MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8", *R18)
    config.merge_config(cfg, None, [*small, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    sample = {
        "image": torch.zeros(3, 64, 64, dtype=torch.uint8),
        "gt_boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "gt_classes": torch.tensor([0]),
        "gt_masks": [torch.ones(64, 64, dtype=torch.bool)],
    }
    names = build_detector(cfg).losses([sample])
    for name in [*names, "total_loss"]:
        opts = ("CASCADE.VALIDATION_LOSS", "True", "CASCADE.BEST_METRIC", f"validation/{name}")
        config.merge_config(cfg, None, opts)
        config.check_config(cfg)
    listed = problem(cfg, "CASCADE.BEST_METRIC", "validation/none").split("losses are ")[1]
    assert len(listed.split(", ")) == len(names) + 1


@pytest.mark.parametrize("value", [None, 1, -1, 0.5, "a", [], [None], [[1]], {}, object(), 10**400])
def test_values_that_python_code_put_there(value):
    """Loading would have refused most of these; code that sets keys itself is told as well."""
    for key in config.flat(config.get_cfg()):
        cfg = BASE.clone()
        *groups, name = key.split(".")
        node = cfg
        for group in groups:
            node = node[group]
        node[name] = value
        with contextlib.suppress(ConfigError):
            config.check_config(cfg)


def test_all_problems_are_listed_at_once(cfg):
    found = problems(
        cfg,
        *("MODEL.KEYPOINT_ON", "True", "SOLVER.BASE_LR", "-1", "INPUT.MAX_SIZE_TEST", "10"),
        *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.7, 0.6, 0.5)"),
    )
    keys = [message.split(" is ")[0] for message in found]
    assert sorted(keys) == [
        "INPUT.MIN_SIZE_TEST",
        "MODEL.KEYPOINT_ON",
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
        "SOLVER.BASE_LR",
    ]


def test_detectron2s_own_default_is_refused_in_words():
    cfg = config.get_cfg()
    found = "\n".join(problems(cfg))
    for key in ("MODEL.BACKBONE.NAME", "MODEL.ROI_HEADS.NAME", "MODEL.FPN.IN_FEATURES"):
        assert key in found


# ---- whatever is written, nothing but a ConfigError comes out

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.sampled_from(["", "res5", "p3"])
)
NUMBERS = st.lists(st.sampled_from([0.5, 0.6, 1, 2, 32]), max_size=5)
JUNK = NUMBERS | st.lists(NUMBERS | SCALARS, max_size=5)
BASE = config.load_config(CONFIGS / "Base-Cascade-RCNN-FPN.yaml")
LIST_KEYS = [name for name, value in config.flat(BASE).items() if isinstance(value, (list, tuple))]


@settings(max_examples=200)
@given(junk=st.dictionaries(st.sampled_from(LIST_KEYS), JUNK, min_size=1, max_size=3))
def test_what_passes_the_checks_can_be_translated(junk):
    cfg = BASE.clone()
    for key, value in junk.items():
        config.merge_config(cfg, None, [key, value])
    try:
        config.check_config(cfg)
    except ConfigError:
        return
    assert len(config.box_head_arguments(cfg)) == len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    rpn = config.rpn_arguments(cfg)
    assert len(rpn["anchor_sizes"]) == len(rpn["in_features"]) == len(rpn["aspect_ratios"])
    arguments = config.cascade_arguments(cfg)
    assert len(arguments["stage_loss_weights"]) == len(arguments["bbox_reg_weights"])
    for translate in (config.detector_arguments, config.backbone_arguments):
        translate(cfg)
    config.exit_arguments(cfg)
    config.datasets_arguments(cfg, train=True)
