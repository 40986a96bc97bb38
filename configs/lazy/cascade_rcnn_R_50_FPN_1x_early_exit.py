"""COCO-Detection/cascade_rcnn_R_50_FPN_1x_early_exit.yaml as a LazyConfig of Detectron2.

Its ``tools/lazyconfig_train_net.py`` trains and evaluates it. Without exits:
``model.roi_heads.exits=null``. With your own data, in a file beside this one:

    from detectron2.data.datasets import register_coco_instances
    from .cascade_rcnn_R_50_FPN_1x_early_exit import dataloader, model, optimizer
    from .cascade_rcnn_R_50_FPN_1x_early_exit import lr_multiplier, train

    register_coco_instances("cells_train", {}, "cells/train.json", "cells/train")
    register_coco_instances("cells_val", {}, "cells/val.json", "cells/val")
    dataloader.train.dataset.names = "cells_train"
    dataloader.test.dataset.names = "cells_val"  # the evaluator follows
    model.roi_heads.num_classes = 3  # the predictors follow
    dataloader.train.total_batch_size = 4
    optimizer.lr = 0.005  # 0.02 is for 16 images
    train.max_iter = 5000  # the schedule scales with it
    train.eval_period = 1000

Starting from random weights (``train.init_checkpoint = ""``) also needs ``freeze_at=0`` and
trainable norms.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, GeneralizedRCNN, ResNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from cascade_det.core import ExitPolicy
from cascade_det.d2 import EarlyExitCascadeROIHeads

# Weights of (dx, dy, dw, dh) and the matching IoU of each stage.
_STAGES = [((10, 10, 5, 5), 0.5), ((20, 20, 10, 10), 0.6), ((30, 30, 15, 15), 0.7)]

model = L(GeneralizedRCNN)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
            out_features=["res2", "res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
    ),
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],  # pixels
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),  # in training and in inference
        post_nms_topk=(2000, 1000),
        nms_thresh=0.7,
    ),
    roi_heads=L(EarlyExitCascadeROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(ROIPooler)(
            output_size=7,
            scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_heads=[
            L(FastRCNNConvFCHead)(
                input_shape=ShapeSpec(channels=256, height=7, width=7),
                conv_dims=[],
                fc_dims=[1024, 1024],
            )
            for _ in _STAGES
        ],
        box_predictors=[
            L(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=1024),
                box2box_transform=L(Box2BoxTransform)(weights=weights),
                num_classes="${...num_classes}",
                cls_agnostic_bbox_reg=True,
                test_score_thresh=0.05,
            )
            for weights, _ in _STAGES
        ],
        proposal_matchers=[L(Matcher)(thresholds=[iou], labels=[0, 1]) for _, iou in _STAGES],
        # Starting points, not results: calibrate them on your own data.
        exits=L(ExitPolicy)(num_stages=3, prune_thresholds=[0.02, 0.02], redundancy_iou=0.9),
    ),
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=(640, 672, 704, 736, 768, 800),
                    max_size=1333,
                    sample_style="choice",
                ),
                L(T.RandomFlip)(),
            ],
            image_format="BGR",
        ),
        total_batch_size=16,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")
            ],
            image_format="${...train.mapper.image_format}",
        ),
        num_workers=4,
    ),
    "evaluator": L(COCOEvaluator)(dataset_name="${..test.dataset.names}"),
}

optimizer = L(torch.optim.SGD)(
    # The training script sets params.model to the model.
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[60000, 80000], num_updates=90000
    ),
    warmup_factor=0.001,
    warmup_length=1000 / 90000,
    warmup_method="linear",
)

train = {
    "output_dir": "./output",
    "init_checkpoint": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "max_iter": 90000,
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False},
    "checkpointer": {"period": 5000},
    "eval_period": 0,  # only after the last iteration
    "log_period": 20,
    "device": "cuda",
}
