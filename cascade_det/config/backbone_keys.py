"""The keys of backbones and their pyramids.

``BACKBONE``, ``FPN`` and ``RESNETS`` are Detectron2's, with its defaults.
"""

from __future__ import annotations

from cascade_det.config.backbone_arguments import BACKBONES, TRUNKS
from cascade_det.config.key import (
    COUNT,
    FROM_0_BELOW_1,
    NAMES,
    Key,
    Values,
    at_least,
    each,
    group,
    one_of,
    whole,
)

NORM = one_of("", "GN", "BN", "SyncBN")
NORM_HELP = 'Normalisation of the convolutions; "" is none.'
_DROP_PATH_HELP = "Chance to skip a branch in training at the last layer; rises to it from 0."
_COUNTS = Values(each(whole(at_least(1)), least=1), "Give a list of whole numbers, 1 or more each.")

BACKBONE = group(
    "MODEL.BACKBONE",
    "Backbone",
    NAME=Key(
        "build_resnet_backbone",
        "The backbone with its feature pyramid: Detectron2's (`fpn`), or the CASCADE decoder "
        "(`cascade_fpn`); of a segmenter also without.",
        one_of(*BACKBONES, *TRUNKS),
    ),
    FREEZE_AT=Key(
        2,
        "Frozen parts: 0 none, 1 the stem, 2 also the first stage, and so on.",
        one_of(0, 1, 2, 3, 4, 5),
    ),
)

FPN = group(
    "MODEL.FPN",
    "Feature pyramid",
    IN_FEATURES=Key(
        [],
        "Neighbouring levels up to the backbone's coarsest (res5; EfficientViT res6, HierViT that "
        "of its last patch size); res3 gives p3. One coarser level is added, two to HierViT.",
        NAMES,
    ),
    OUT_CHANNELS=Key(
        256, "Width of every level; the CASCADE decoder needs 16 or more.", COUNT, "channels"
    ),
    NORM=Key("", f"{NORM_HELP} Of `fpn` backbones; the CASCADE decoder has BN.", NORM),
    FUSE_TYPE=Key(
        "sum",
        "How a level is merged with the coarser one, in `fpn` backbones.",
        one_of("sum", "avg"),
    ),
)

RESNETS = group(
    "MODEL.RESNETS",
    "ResNets; `NORM` applies to MobileNets too",
    DEPTH=Key(50, "Layers.", one_of(18, 34, 50, 101, 152)),
    OUT_FEATURES=Key(["res4"], "Output levels, including all of `FPN.IN_FEATURES`.", NAMES),
    NUM_GROUPS=Key(1, "Groups of the 3x3 convolutions; above 1 makes a ResNeXt.", COUNT),
    NORM=Key("FrozenBN", "Normalisation.", one_of("FrozenBN", "BN", "SyncBN", "GN")),
    WIDTH_PER_GROUP=Key(64, "Width of a group in res2.", COUNT, "channels"),
    STRIDE_IN_1X1=Key(True, "True for MSRA and Caffe weights, False for torchvision's."),
    RES2_OUT_CHANNELS=Key(256, "Width of res2: 64 for depths 18, 34, else 256.", unit="channels"),
)

EFFICIENTVIT = group(
    "MODEL.EFFICIENTVIT",
    "EfficientViT, with `BACKBONE.NAME` `build_efficientvit_fpn_backbone` or `…_cascade_fpn_…`",
    NAME=Key("m4", "Size.", one_of("m0", "m1", "m2", "m3", "m4", "m5")),
    KERNELS=Key(
        (),
        "Kernels of the query convolutions of the heads; () takes those of the classifier of this "
        "size. The published detection code has (7, 5, 3, 3) for m0 too.",
        Values(
            each(one_of(*range(1, 16, 2)).accepts),
            "Give a list of odd numbers up to 15, such as (5, 5, 5, 5), or ().",
        ),
    ),
    NECK=Key(
        "fpn",
        "The pyramid: `MODEL.FPN` over maps of the stem and of the stages, or a published one that "
        "makes its finer levels of the stages alone: p3 to p7 (retinanet) or p2 to p6 (maskrcnn). "
        "fpn with the CASCADE decoder.",
        one_of("fpn", "retinanet", "maskrcnn"),
    ),
    NORM_EVAL=Key(
        True,
        "Keeps the statistics of the batch norms fixed in training and trains their weights and "
        "biases, as published; False for random weights.",
    ),
)

HATNET = group(
    "MODEL.HATNET",
    "HAT-Net, with `BACKBONE.NAME` `build_hatnet_fpn_backbone` or `…_cascade_fpn_…`",
    NAME=Key("tiny", "Size.", one_of("tiny", "small", "medium", "large")),
    DROP_PATH=Key(0.1, _DROP_PATH_HELP, FROM_0_BELOW_1),
)

HIERVIT = group(
    "MODEL.HIERVIT",
    "Hierarchical ViT, with `BACKBONE.NAME` `build_hiervit_fpn_backbone` or "
    "`…_cascade_fpn_…`; lists have one value per stage",
    PATCH_SIZES=Key((4, 8, 16), "Sides of the image patches: the strides.", _COUNTS, "pixels"),
    WIDTHS=Key((64, 128, 256), "Multiples of 32, the width of a head.", _COUNTS, "channels"),
    DEPTHS=Key((4, 6, 8), "Layers.", _COUNTS),
    MIXER=Key(
        "window",
        "Attention inside windows of 7 x 7 tokens, or cascaded through groups of all tokens.",
        one_of("window", "token_groups"),
    ),
    GROUPS=Key(8, "Groups of tokens, with the mixer token_groups.", COUNT),
    DROP_PATH=Key(0.1, _DROP_PATH_HELP, FROM_0_BELOW_1),
)

PVTV2 = group(
    "MODEL.PVTV2",
    "PVTv2 of a segmenter, with `BACKBONE.NAME` `build_pvtv2_backbone`; needs the extra timm",
    NAME=Key("b2", "Size.", one_of("b0", "b1", "b2", "b3", "b4", "b5")),
)

MAXVIT = group(
    "MODEL.MAXVIT",
    "MaxViT and MaxxViT of a segmenter with `DUAL_SCALE`, with `BACKBONE.NAME` "
    "`build_maxvit_backbone`; needs the extra timm",
    NAME=Key("small", "Size of both encoders, which differ as in MERIT.", one_of("tiny", "small")),
)

BACKBONE_GROUPS = (BACKBONE, FPN, RESNETS, EFFICIENTVIT, HATNET, HIERVIT, PVTV2, MAXVIT)
