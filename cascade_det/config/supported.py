"""Which parts are built: by the standalone host, and, where the key is ours, by both hosts."""

from __future__ import annotations

import re

from cascade_det.config.rules import Rule, only

_D2_ONLY = "Other values need the Detectron2 host."
_SOFTMAX = "The class loss is softmax cross-entropy."
_NORMS = ("", "GN", "BN", "SyncBN")
_LOSSES = ("smooth_l1", "giou", "diou", "ciou")


def _is_device(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"cpu|cuda(:[0-9]+)?", value))


SUPPORTED: tuple[Rule, ...] = (
    only("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
    only("MODEL.MASK_ON", False, why="There is no mask head."),
    only("MODEL.KEYPOINT_ON", False, why="There is no keypoint head."),
    only("MODEL.LOAD_PROPOSALS", False, why="Proposals come from the RPN."),
    Rule("MODEL.DEVICE", _is_device, 'Supported: "cpu", "cuda" or "cuda:<index>".'),
    only(
        "MODEL.BACKBONE.NAME",
        "build_resnet_fpn_backbone",
        "build_mobilenet_v2_fpn_backbone",
        "build_mobilenet_v3_large_fpn_backbone",
    ),
    only("MODEL.BACKBONE.FREEZE_AT", 0, 1, 2, 3, 4, 5),
    only("MODEL.RESNETS.DEPTH", 18, 34, 50, 101, 152),
    only("MODEL.RESNETS.NORM", "FrozenBN", "BN", "SyncBN", "GN"),
    only("MODEL.RESNETS.RES5_DILATION", 1, why=_D2_ONLY),
    only("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, why=_D2_ONLY),
    Rule(
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
        lambda value: isinstance(value, list) and not any(value),
        f"Supported: [False, False, False, False]. {_D2_ONLY}",
    ),
    only("MODEL.FPN.NORM", *_NORMS),
    only("MODEL.FPN.FUSE_TYPE", "sum", "avg"),
    only("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", why=_D2_ONLY),
    only("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator", why=_D2_ONLY),
    only("MODEL.RPN.HEAD_NAME", "StandardRPNHead", why=_D2_ONLY),
    only("MODEL.RPN.IOU_LABELS", [0, -1, 1], why=_D2_ONLY),
    only("MODEL.RPN.BBOX_REG_LOSS_TYPE", *_LOSSES),
    only("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads", "CascadeROIHeads"),
    only("MODEL.ROI_HEADS.IOU_LABELS", [0, 1], why="A cascade ignores no region."),
    only("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    only("MODEL.ROI_BOX_HEAD.NORM", *_NORMS),
    only("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2", "ROIAlign"),
    only("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", *_LOSSES),
    only("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", False, why="A cascade does so by itself."),
    only("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", False, why=_SOFTMAX),
    only("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", False, why=_SOFTMAX),
    only("MODEL.CASCADE.ENSEMBLE", "mean_probs", "last", "mean_logits", "last_boxes"),
    only("MODEL.CASCADE.POOLER_KERNEL", "auto", "bags", "torchvision"),
    only("INPUT.FORMAT", "BGR", "RGB"),
    only("INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice", "range"),
    only("INPUT.RANDOM_FLIP", "horizontal", "vertical", "none"),
    only("INPUT.CROP.ENABLED", False, why=_D2_ONLY),
    only("DATASETS.PROPOSAL_FILES_TRAIN", (), why="Proposals come from the RPN."),
    only("DATASETS.PROPOSAL_FILES_TEST", (), why="Proposals come from the RPN."),
    only("DATALOADER.SAMPLER_TRAIN", "TrainingSampler", why=_D2_ONLY),
    only(
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    only("SOLVER.WARMUP_METHOD", "linear", "constant"),
    only("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value", "norm", "full_model"),
    only("TEST.EXPECTED_RESULTS", [], why=_D2_ONLY),
    only("TEST.AUG.ENABLED", False, why=_D2_ONLY),
    only("TEST.PRECISE_BN.ENABLED", False, why=_D2_ONLY),
    only("FLOAT32_PRECISION", "", "highest", "high", "medium"),
    only("VIS_PERIOD", 0, why=_D2_ONLY),
    only("GLOBAL.HACK", 1.0, why="Nothing reads it."),
    only("CASCADE.ON_BAD_DATA", "error", "skip"),
    only("CASCADE.FOLLOW_LINKS", "near", "all", "none"),
    only("CASCADE.OPTIMIZER", "SGD", "AdamW"),
    only("CASCADE.AMP_DTYPE", "auto", "bfloat16", "float16"),
)

# Of these Detectron2 takes more than we do.
DETECTRON2_ALONE = (
    *(rule.key for rule in SUPPORTED if rule.remedy.endswith(_D2_ONLY)),
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
)
