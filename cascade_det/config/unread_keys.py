"""Detectron2's keys that the standalone host does not read.

They are accepted, so that Detectron2's configurations can be merged, unless they ask for a part
that the standalone host does not have.
"""

from __future__ import annotations

import yaml

from cascade_det.config.key import Key, Values, at_least, one_of

_OTHERS = "Other values need the Detectron2 host."
_NO_PROPOSALS = "Proposals come from the RPN."
_SOFTMAX = one_of(False, why="The class loss is softmax cross-entropy.")

# Defaults of the keys that may have any value of their type.
_ANY_VALUE = """
MODEL.ANCHOR_GENERATOR: {ANGLES: [[-90, 0, 90]]}
MODEL.ROI_BOX_HEAD: {FED_LOSS_FREQ_WEIGHT_POWER: 0.5, FED_LOSS_NUM_CLASSES: 50}
MODEL.RESNETS: {DEFORM_MODULATED: false, DEFORM_NUM_GROUPS: 1}
MODEL.ROI_KEYPOINT_HEAD: {NAME: KRCNNConvDeconvUpsampleHead, POOLER_RESOLUTION: 14,
  POOLER_SAMPLING_RATIO: 0, NUM_KEYPOINTS: 17, MIN_KEYPOINTS_PER_IMAGE: 1,
  NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS: true, LOSS_WEIGHT: 1.0, POOLER_TYPE: ROIAlignV2}
MODEL.SEM_SEG_HEAD: {CONVS_DIM: 128, COMMON_STRIDE: 4, NORM: GN}
MODEL.PANOPTIC_FPN: {INSTANCE_LOSS_WEIGHT: 1.0}
MODEL.PANOPTIC_FPN.COMBINE: {ENABLED: true, OVERLAP_THRESH: 0.5, STUFF_AREA_LIMIT: 4096,
  INSTANCES_CONFIDENCE_THRESH: 0.5}
MODEL.RETINANET: {NUM_CLASSES: 80, IN_FEATURES: [p3, p4, p5, p6, p7], NUM_CONVS: 4, NORM: "",
  IOU_THRESHOLDS: [0.4, 0.5], IOU_LABELS: [0, -1, 1], PRIOR_PROB: 0.01, SCORE_THRESH_TEST: 0.05,
  TOPK_CANDIDATES_TEST: 1000, NMS_THRESH_TEST: 0.5, FOCAL_LOSS_GAMMA: 2.0,
  FOCAL_LOSS_ALPHA: 0.25, SMOOTH_L1_LOSS_BETA: 0.1, BBOX_REG_LOSS_TYPE: smooth_l1}
DATASETS: {PRECOMPUTED_PROPOSAL_TOPK_TRAIN: 2000, PRECOMPUTED_PROPOSAL_TOPK_TEST: 1000}
TEST: {KEYPOINT_OKS_SIGMAS: []}
TEST.PRECISE_BN: {NUM_ITER: 200}
"""


def _only(default: object) -> Key:
    return Key(default, values=one_of(default, why=_OTHERS, standalone_only=True))


# By full name.
UNREAD_KEYS = {
    **{
        f"{node}.{name}": Key(default)
        for node, defaults in yaml.safe_load(_ANY_VALUE).items()
        for name, default in defaults.items()
    },
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": Key((10.0, 10.0, 5.0, 5.0)),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": Key((512,) * 8),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": Key((1.0, 1.0, 1.0, 1.0)),
    "MODEL.LOAD_PROPOSALS": Key(False, values=one_of(False, why=_NO_PROPOSALS)),
    "MODEL.KEYPOINT_ON": Key(False, values=one_of(False, why="There is no keypoint head.")),
    "MODEL.PROPOSAL_GENERATOR.NAME": _only("RPN"),
    "MODEL.ANCHOR_GENERATOR.NAME": _only("DefaultAnchorGenerator"),
    "MODEL.RPN.HEAD_NAME": _only("StandardRPNHead"),
    "MODEL.RPN.BOUNDARY_THRESH": Key(
        -1,
        values=Values(
            lambda value: not at_least(0)(value),
            f"Supported: -1, which keeps all anchors. {_OTHERS}",
        ),
    ),
    "MODEL.RPN.IOU_LABELS": _only([0, -1, 1]),
    "MODEL.ROI_HEADS.IOU_LABELS": Key(
        [0, 1], values=one_of([0, 1], why="A cascade ignores no region.")
    ),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": Key(
        False, values=one_of(False, why="A cascade always does.", standalone_only=True)
    ),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": Key(False, values=_SOFTMAX),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": Key(False, values=_SOFTMAX),
    "MODEL.RESNETS.RES5_DILATION": _only(1),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _only(64),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": Key(
        [False, False, False, False],
        values=Values(
            lambda value: isinstance(value, list) and not any(value),
            f"Supported: [False, False, False, False]. {_OTHERS}",
            standalone_only=True,
        ),
    ),
    "DATASETS.PROPOSAL_FILES_TRAIN": Key(
        (), values=one_of((), why=_NO_PROPOSALS, standalone_only=True)
    ),
    "DATASETS.PROPOSAL_FILES_TEST": Key(
        (), values=one_of((), why=_NO_PROPOSALS, standalone_only=True)
    ),
    "TEST.EXPECTED_RESULTS": _only([]),
    "TEST.PRECISE_BN.ENABLED": _only(False),
    "VIS_PERIOD": _only(0),
    "GLOBAL.HACK": Key(1.0, values=one_of(1.0, why="Nothing reads it.")),
}
