"""The keys of the detector and its cascade.

All but ``MODEL.CASCADE`` are Detectron2's, with its defaults (a test compares them), so that its
YAML files and the ``config.yaml`` that it dumps can be merged. The defaults describe a C4 model;
``configs/`` has the configurations of cascades.
"""

from __future__ import annotations

import re

from cascade_det.config.backbone_keys import BACKBONE_GROUPS, NORM, NORM_HELP
from cascade_det.config.key import (
    ABOVE_0_TO_1,
    COUNT,
    FRACTION,
    FROM_0_BELOW_1,
    NAMES,
    NOT_NEGATIVE,
    POSITIVE,
    Key,
    Values,
    above,
    at_least,
    between_0_and_1,
    each,
    group,
    is_number,
    one_of,
    rising,
    whole,
    within,
)
from cascade_det.config.segmenter_keys import SEGMENTER_GROUPS

_BOX_LOSS = one_of("smooth_l1", "giou", "diou", "ciou")
_BETA_HELP = "Where the smooth L1 loss turns from L2 to L1; 0 makes it plain L1."
_WEIGHTS = Values(each(above(0), length=4), "Give 4 numbers above 0.")
_OR_SHARED = "or [] for the value of ROI_BOX_HEAD."
_LAYERS = Values(
    each(whole(at_least(0))), f"Give a list of whole numbers, 0 or more each, {_OR_SHARED}"
)
_WIDTHS = Values(
    each(whole(at_least(1))), f"Give a list of whole numbers, 1 or more each, {_OR_SHARED}"
)
_LISTS = Values(
    each(each(above(0), least=1), least=1),
    "Give a list of lists of numbers above 0, such as [[32], [64]].",
)


def _is_device(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"cpu|cuda(:[0-9]+)?", value))


MODEL = group(
    "MODEL",
    "Model",
    DEVICE=Key(
        "cuda",
        "Device of the model.",
        Values(_is_device, 'Supported: "cpu", "cuda" or "cuda:<index>".'),
    ),
    WEIGHTS=Key(
        "",
        "Weights to start from: a .pth, .pkl or .safetensors file, or an https://, detectron2:// "
        'or torchvision:// address; "" is random weights.',
    ),
    PIXEL_MEAN=Key(
        [103.530, 116.280, 123.675],
        "Subtracted from the pixels, in the channel order of `INPUT.FORMAT`.",
        Values(each(is_number, length=3), "Give 3 numbers, one per channel."),
        "pixel values, 0 to 255",
    ),
    PIXEL_STD=Key(
        [1.0, 1.0, 1.0],
        "Divides the pixels: 1 for MSRA weights, about 58 for torchvision's.",
        Values(each(above(0), length=3), "Give 3 numbers above 0, one per channel."),
        "pixel values, 0 to 255",
    ),
    MASK_ON=Key(False, "Adds a mask head: instance segmentation."),
    META_ARCHITECTURE=Key(
        "GeneralizedRCNN",
        "A detector, or a segmenter.",
        one_of("GeneralizedRCNN", "SemanticSegmentor"),
    ),
)

PROPOSAL_GENERATOR = group(
    "MODEL.PROPOSAL_GENERATOR",
    "Proposals",
    MIN_SIZE=Key(0, "Drops proposals with a side of at most this.", NOT_NEGATIVE, "resized pixels"),
)

ANCHOR_GENERATOR = group(
    "MODEL.ANCHOR_GENERATOR",
    "Anchors",
    SIZES=Key(
        [[32, 64, 128, 256, 512]],
        "Square root of the area: one list per level of `RPN.IN_FEATURES`, or one for all.",
        _LISTS,
        "resized pixels",
    ),
    ASPECT_RATIOS=Key([[0.5, 1.0, 2.0]], "Height / width, in lists as in SIZES.", _LISTS),
    OFFSET=Key(0.0, "Centre of the first anchor.", FROM_0_BELOW_1, "strides"),
)

RPN = group(
    "MODEL.RPN",
    "Region proposal network",
    IN_FEATURES=Key(["res4"], "Levels with anchors, finest first.", NAMES),
    IOU_THRESHOLDS=Key(
        [0.3, 0.7],
        "IoU with an object below which an anchor is background, and from which it is foreground.",
        Values(
            rising(each(within(0, 1), length=2), strictly=False),
            "Give two numbers from 0 to 1: background below the first, object from the second on.",
        ),
    ),
    BATCH_SIZE_PER_IMAGE=Key(256, "Anchors per image in the loss.", COUNT),
    POSITIVE_FRACTION=Key(0.5, "Largest share of foreground among them.", FRACTION),
    BBOX_REG_LOSS_TYPE=Key("smooth_l1", "Box loss.", _BOX_LOSS),
    BBOX_REG_LOSS_WEIGHT=Key(1.0, "Weight of the box loss.", NOT_NEGATIVE),
    BBOX_REG_WEIGHTS=Key((1.0, 1.0, 1.0, 1.0), "Scale of the targets (dx, dy, dw, dh).", _WEIGHTS),
    SMOOTH_L1_BETA=Key(0.0, _BETA_HELP, NOT_NEGATIVE),
    LOSS_WEIGHT=Key(1.0, "Weight of both losses.", NOT_NEGATIVE),
    PRE_NMS_TOPK_TRAIN=Key(12000, "Proposals per level before NMS, in training.", COUNT),
    PRE_NMS_TOPK_TEST=Key(6000, "The same in inference.", COUNT),
    POST_NMS_TOPK_TRAIN=Key(2000, "Proposals per image after NMS, in training.", COUNT),
    POST_NMS_TOPK_TEST=Key(1000, "The same in inference.", COUNT),
    NMS_THRESH=Key(0.7, "IoU above which NMS drops a proposal.", ABOVE_0_TO_1),
    CONV_DIMS=Key(
        [-1],
        "Widths of the 3x3 convolutions.",
        Values(
            each(lambda dim: dim == -1 or whole(at_least(1))(dim), least=1),
            "Give a list of channel counts; -1 keeps the number of input channels.",
        ),
    ),
)

ROI_HEADS = group(
    "MODEL.ROI_HEADS",
    "RoI heads",
    NAME=Key(
        "Res5ROIHeads",
        "The cascade with exits, or without.",
        one_of("EarlyExitCascadeROIHeads", "CascadeROIHeads", standalone_only=True),
    ),
    NUM_CLASSES=Key(80, "Classes, without background.", COUNT),
    IN_FEATURES=Key(["res4"], "Levels to pool regions from, finest first.", NAMES),
    IOU_THRESHOLDS=Key(
        [0.5],
        "IoU from which a proposal is foreground at stage 0.",
        Values(
            each(between_0_and_1, length=1),
            "Give one number between 0 and 1, the first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS.",
        ),
    ),
    BATCH_SIZE_PER_IMAGE=Key(512, "Regions per image in training.", COUNT),
    POSITIVE_FRACTION=Key(0.25, "Largest share of foreground among them at stage 0.", FRACTION),
    SCORE_THRESH_TEST=Key(0.05, "Detections score above this.", FRACTION),
    NMS_THRESH_TEST=Key(0.5, "IoU above which NMS drops a detection, per class.", ABOVE_0_TO_1),
    PROPOSAL_APPEND_GT=Key(True, "Adds the ground truth to the proposals in training."),
)

ROI_BOX_HEAD = group(
    "MODEL.ROI_BOX_HEAD",
    "Box heads",
    NAME=Key(
        "",
        "Kind of the box heads of all stages.",
        one_of("FastRCNNConvFCHead", standalone_only=True),
    ),
    BBOX_REG_LOSS_TYPE=Key("smooth_l1", "Box loss.", _BOX_LOSS),
    BBOX_REG_LOSS_WEIGHT=Key(1.0, "Weight of the box loss.", NOT_NEGATIVE),
    SMOOTH_L1_BETA=Key(0.0, _BETA_HELP, NOT_NEGATIVE),
    POOLER_RESOLUTION=Key(14, "Side of a pooled region.", COUNT, "cells"),
    POOLER_SAMPLING_RATIO=Key(0, "Samples per cell and side; 0: adaptive.", NOT_NEGATIVE),
    POOLER_TYPE=Key(
        "ROIAlignV2", "ROIAlign is half a pixel off.", one_of("ROIAlignV2", "ROIAlign")
    ),
    NUM_FC=Key(0, "Fully connected layers, after the convolutions.", NOT_NEGATIVE),
    FC_DIM=Key(1024, "Width of the fully connected layers.", COUNT, "features"),
    NUM_CONV=Key(0, "3x3 convolutions.", NOT_NEGATIVE),
    CONV_DIM=Key(256, "Width of the convolutions.", COUNT, "channels"),
    NORM=Key("", NORM_HELP, Values(NORM.accepts, NORM.remedy, standalone_only=True)),
    CLS_AGNOSTIC_BBOX_REG=Key(False, "One box per region, instead of one per class."),
)

ROI_MASK_HEAD = group(
    "MODEL.ROI_MASK_HEAD",
    "Mask head, where `MODEL.MASK_ON`",
    NAME=Key(
        "MaskRCNNConvUpsampleHead",
        "Kind of the mask head.",
        one_of("MaskRCNNConvUpsampleHead", standalone_only=True),
    ),
    POOLER_RESOLUTION=Key(14, "Side of a pooled region; a mask has twice as many.", COUNT, "cells"),
    POOLER_SAMPLING_RATIO=Key(0, "Samples per cell and side; 0: adaptive.", NOT_NEGATIVE),
    POOLER_TYPE=Key(
        "ROIAlignV2",
        "ROIAlign is half a pixel off.",
        one_of("ROIAlignV2", "ROIAlign", standalone_only=True),
    ),
    NUM_CONV=Key(0, "3x3 convolutions before the upsampling.", NOT_NEGATIVE),
    CONV_DIM=Key(256, "Width of all layers.", COUNT, "channels"),
    NORM=Key("", NORM_HELP, Values(NORM.accepts, NORM.remedy, standalone_only=True)),
    CLS_AGNOSTIC_MASK=Key(False, "One mask per region, instead of one per class."),
)

ROI_BOX_CASCADE_HEAD = group(
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "Stages",
    BBOX_REG_WEIGHTS=Key(
        ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
        "Scale of the regression targets (dx, dy, dw, dh) at each stage; later ones correct less.",
        Values(
            each(each(above(0), length=4), least=1),
            "Give 4 numbers above 0 per stage, such as [[10, 10, 5, 5], [20, 20, 10, 10]].",
        ),
    ),
    IOUS=Key(
        (0.5, 0.6, 0.7),
        "IoU from which a region is foreground at each stage; as many values as stages.",
        Values(
            rising(each(between_0_and_1, least=1), strictly=True),
            "Give one number between 0 and 1 per stage, each larger than the one before.",
        ),
    ),
)

CASCADE = group(
    "MODEL.CASCADE",
    "Cascade",
    STAGE_LOSS_WEIGHTS=Key(
        (1.0,),
        "Weight of the class and box loss, per stage.",
        Values(each(at_least(0)), "Give a list of numbers, 0 or more each."),
    ),
    ENSEMBLE=Key(
        "mean_probs",
        "How the stages make one score: mean of their probabilities, the last stage alone, softmax "
        "of the mean of their logits, or mean of the probabilities that all heads give to the last "
        "boxes.",
        one_of("mean_probs", "last", "mean_logits", "last_boxes"),
    ),
    POOLER_KERNEL=Key(
        "auto",
        "RoI pooling by torchvision, or as weighted sums over a channels-last map (bags, fast on "
        "CPUs); auto takes the fastest one on the device: for optimised heads on GPUs a kernel in "
        "Triton, if it runs there.",
        one_of("auto", "bags", "torchvision"),
    ),
    SUPPRESSION=Key(
        "nms",
        "What detections of a class that overlap go through in inference: NMS; soft-NMS, which "
        "lowers their scores instead, linearly or by a Gaussian; or weighted box fusion (wbf), "
        "which averages them. The IoU is `ROI_HEADS.NMS_THRESH_TEST`.",
        one_of("nms", "soft_linear", "soft_gaussian", "wbf"),
    ),
    SUPPRESSION_SIGMA=Key(
        0.5, "Width of soft_gaussian: scores fall by exp(-IoU^2 / SUPPRESSION_SIGMA).", POSITIVE
    ),
)

BOX_HEAD = group(
    "MODEL.CASCADE.BOX_HEAD",
    "Layers of the box heads, per stage; () takes the value of `MODEL.ROI_BOX_HEAD`",
    NUM_CONV=Key((), "3x3 convolutions.", _LAYERS),
    CONV_DIM=Key((), "Width of the convolutions.", _WIDTHS, "channels"),
    NUM_FC=Key((), "Fully connected layers.", _LAYERS),
    FC_DIM=Key((), "Width of the fully connected layers.", _WIDTHS, "features"),
    NORM=Key(
        (),
        NORM_HELP,
        Values(each(NORM.accepts), f'Give a list of "", "GN", "BN" or "SyncBN", {_OR_SHARED}'),
    ),
)

MODEL_GROUPS = (
    MODEL,
    *BACKBONE_GROUPS,
    PROPOSAL_GENERATOR,
    ANCHOR_GENERATOR,
    RPN,
    ROI_HEADS,
    ROI_BOX_HEAD,
    ROI_MASK_HEAD,
    ROI_BOX_CASCADE_HEAD,
    *SEGMENTER_GROUPS,
)
