"""Default values of ``MODEL`` for what a box cascade is made of, as in Detectron2."""

from __future__ import annotations

from typing import Any

from cascade_det.config.other_model_defaults import OTHER_PARTS

_BACKBONE: dict[str, Any] = {
    # "build_resnet_fpn_backbone", or ours: "build_mobilenet_v2_fpn_backbone",
    # "build_mobilenet_v3_large_fpn_backbone"
    "NAME": "build_resnet_backbone",
    "FREEZE_AT": 2,  # parts that are not trained: 0 = none, 1 = the stem, 2 = and res2, ... 5
}

_RESNETS: dict[str, Any] = {
    "DEPTH": 50,  # 18, 34, 50, 101 or 152
    "OUT_FEATURES": ["res4"],  # of "res2".."res5" (strides 4..32); all four for an FPN
    "NUM_GROUPS": 1,  # > 1 makes a ResNeXt
    "NORM": "FrozenBN",  # "FrozenBN", "BN", "SyncBN" or "GN"; of the MobileNets as well
    "WIDTH_PER_GROUP": 64,  # channels of the 3x3 convolution of res2, per group
    "STRIDE_IN_1X1": True,  # True for the MSRA and Caffe weights, False for torchvision's
    "RES5_DILATION": 1,
    "RES2_OUT_CHANNELS": 256,  # 64 for depths 18 and 34; doubles from stage to stage
    "STEM_OUT_CHANNELS": 64,
    "DEFORM_ON_PER_STAGE": [False, False, False, False],  # deformable convolution in res2..res5
    "DEFORM_MODULATED": False,
    "DEFORM_NUM_GROUPS": 1,
}

_FPN: dict[str, Any] = {
    "IN_FEATURES": [],  # neighbouring levels up to "res5"; "res3" in gives "p3" out, and "p6"
    "OUT_CHANNELS": 256,  # of every level
    "NORM": "",  # "" = none, "GN", "BN" or "SyncBN"
    "FUSE_TYPE": "sum",  # of a level with the coarser one: "sum" or "avg"
}

_ANCHOR_GENERATOR: dict[str, Any] = {
    "NAME": "DefaultAnchorGenerator",
    # Square root of the area, pixels of the resized image: one list per level of
    # RPN.IN_FEATURES, or one list for all of them.
    "SIZES": [[32, 64, 128, 256, 512]],
    "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],  # height / width; one list per level, or one for all
    "ANGLES": [[-90, 0, 90]],  # degrees; of rotated anchors only
    "OFFSET": 0.0,  # of the first anchor's centre, in strides, in [0, 1)
}

_RPN: dict[str, Any] = {
    "HEAD_NAME": "StandardRPNHead",
    "IN_FEATURES": ["res4"],  # levels with anchors, finest first
    "BOUNDARY_THRESH": -1,  # pixels by which an anchor may leave the image; -1 = any
    "IOU_THRESHOLDS": [0.3, 0.7],  # background below the first, object from the second on
    "IOU_LABELS": [0, -1, 1],  # background, ignored, object
    "BATCH_SIZE_PER_IMAGE": 256,  # anchors per image that the loss sees
    "POSITIVE_FRACTION": 0.5,  # most of them that may be objects, in [0, 1]
    "BBOX_REG_LOSS_TYPE": "smooth_l1",  # "smooth_l1", "giou", "diou" or "ciou"
    "BBOX_REG_LOSS_WEIGHT": 1.0,  # >= 0
    "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),  # scale of the targets (dx, dy, dw, dh), > 0
    "SMOOTH_L1_BETA": 0.0,  # where the loss turns from L2 to L1; 0 = L1
    "LOSS_WEIGHT": 1.0,  # of both losses, >= 0
    "PRE_NMS_TOPK_TRAIN": 12000,  # proposals per level that enter NMS
    "PRE_NMS_TOPK_TEST": 6000,
    "POST_NMS_TOPK_TRAIN": 2000,  # proposals per image that leave it
    "POST_NMS_TOPK_TEST": 1000,
    "NMS_THRESH": 0.7,  # IoU in (0, 1]
    "CONV_DIMS": [-1],  # channels of the 3x3 convolutions; -1 = as many as come in
}

_ROI_HEADS: dict[str, Any] = {
    # "EarlyExitCascadeROIHeads", or "CascadeROIHeads": the same without exits
    "NAME": "Res5ROIHeads",
    "NUM_CLASSES": 80,  # without background, >= 1
    "IN_FEATURES": ["res4"],  # levels that regions are pooled from, finest first
    "IOU_THRESHOLDS": [0.5],  # a region is an object from here on; equals the first of IOUS
    "IOU_LABELS": [0, 1],
    "BATCH_SIZE_PER_IMAGE": 512,  # regions per image in training
    "POSITIVE_FRACTION": 0.25,  # most of them that may be objects at stage 0, in [0, 1]
    "SCORE_THRESH_TEST": 0.05,  # detections at or below this score are dropped, in [0, 1]
    "NMS_THRESH_TEST": 0.5,  # IoU in (0, 1], per class
    "PROPOSAL_APPEND_GT": True,  # ground truth is among the proposals in training
}

_ROI_BOX_HEAD: dict[str, Any] = {
    "NAME": "",  # "FastRCNNConvFCHead"
    "BBOX_REG_LOSS_TYPE": "smooth_l1",  # "smooth_l1", "giou", "diou" or "ciou"
    "BBOX_REG_LOSS_WEIGHT": 1.0,  # >= 0
    "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),  # of a single head; a cascade has its own
    "SMOOTH_L1_BETA": 0.0,  # where the loss turns from L2 to L1; 0 = L1
    "POOLER_RESOLUTION": 14,  # cells per side of a pooled region
    "POOLER_SAMPLING_RATIO": 0,  # samples per cell and side; 0 = by the size of the region
    "POOLER_TYPE": "ROIAlignV2",  # or "ROIAlign", which lacks the half-pixel shift
    "NUM_FC": 0,  # fully connected layers, after the convolutions
    "FC_DIM": 1024,
    "NUM_CONV": 0,  # 3x3 convolutions
    "CONV_DIM": 256,
    "NORM": "",  # of the convolutions: "" = none, "GN", "BN" or "SyncBN"
    "CLS_AGNOSTIC_BBOX_REG": False,  # one box per region, or one per class
    "TRAIN_ON_PRED_BOXES": False,
    "USE_FED_LOSS": False,
    "USE_SIGMOID_CE": False,
    "FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    "FED_LOSS_NUM_CLASSES": 50,
}

_ROI_BOX_CASCADE_HEAD: dict[str, Any] = {
    # Scale of the targets (dx, dy, dw, dh), > 0, one per stage: later stages correct less.
    "BBOX_REG_WEIGHTS": (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    ),
    # What counts as an object at each stage, in (0, 1), never falling. As many as stages.
    "IOUS": (0.5, 0.6, 0.7),
}

MODEL: dict[str, Any] = {
    "LOAD_PROPOSALS": False,
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    "DEVICE": "cuda",  # "cpu", "cuda" or "cuda:<index>"
    "META_ARCHITECTURE": "GeneralizedRCNN",
    # to start from: a .pth, .pkl or .safetensors file, or an https://, detectron2:// or
    # torchvision:// address; "" = random weights
    "WEIGHTS": "",
    "PIXEL_MEAN": [103.530, 116.280, 123.675],  # subtracted; 0..255, in the order INPUT.FORMAT
    "PIXEL_STD": [1.0, 1.0, 1.0],  # divided by; 1 for MSRA weights, about 58 for torchvision's
    "BACKBONE": _BACKBONE,
    "FPN": _FPN,
    "PROPOSAL_GENERATOR": {
        "NAME": "RPN",
        "MIN_SIZE": 0,  # proposals have both sides above this, pixels of the resized image
    },
    "ANCHOR_GENERATOR": _ANCHOR_GENERATOR,
    "RPN": _RPN,
    "ROI_HEADS": _ROI_HEADS,
    "ROI_BOX_HEAD": _ROI_BOX_HEAD,
    "ROI_BOX_CASCADE_HEAD": _ROI_BOX_CASCADE_HEAD,
    "RESNETS": _RESNETS,
    **OTHER_PARTS,
}
