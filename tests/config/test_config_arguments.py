"""Keys to arguments: expected values written out by hand."""

from __future__ import annotations

import pytest

from cascade_det import config


def set_keys(cfg, *opts):
    config.merge_config(cfg, None, opts)
    return cfg


def test_detector(cfg):
    set_keys(cfg, "MODEL.PIXEL_STD", "[57, 57.5, 58]")
    arguments = config.detector_arguments(cfg)
    assert arguments == {"pixel_mean": (103.53, 116.28, 123.675), "pixel_std": (57.0, 57.5, 58.0)}
    assert {type(value) for value in arguments["pixel_std"]} == {float}


def test_resnet_backbone(cfg):
    set_keys(cfg, "MODEL.BACKBONE.FREEZE_AT", "3", "MODEL.RESNETS.STRIDE_IN_1X1", "False")
    assert config.backbone_arguments(cfg) == {
        "name": "resnet",
        "bottom_up": {
            "norm": "FrozenBN",
            "freeze_at": 3,
            "depth": 50,
            "stride_in_1x1": False,
            "num_groups": 1,
            "width_per_group": 64,
        },
        "fpn": {
            "in_features": ("res2", "res3", "res4", "res5"),
            "out_channels": 256,
            "norm": "",
            "fuse_type": "sum",
        },
        "neck": "fpn",
    }


def test_cascade_decoder_as_a_pyramid(cfg):
    fpn = config.backbone_arguments(cfg)
    set_keys(cfg, "MODEL.BACKBONE.NAME", "build_resnet_cascade_fpn_backbone")
    found = config.backbone_arguments(cfg)
    for key in ("norm", "fuse_type"):
        del fpn["fpn"][key]
    assert found == {**fpn, "neck": "cascade_fpn"}
    set_keys(cfg, "MODEL.BACKBONE.NAME", "build_hiervit_cascade_fpn_backbone")
    found = config.backbone_arguments(cfg)
    assert (found["name"], found["neck"], found["fpn"]["extra_convs"]) == (
        *("hiervit", "cascade_fpn"),
        2,
    )


def test_backbones_with_attention(cfg):
    set_keys(cfg, "MODEL.BACKBONE.NAME", "build_efficientvit_fpn_backbone")
    set_keys(cfg, "MODEL.EFFICIENTVIT.NECK", "maskrcnn", "MODEL.BACKBONE.FREEZE_AT", "0")
    found = config.backbone_arguments(cfg)
    assert (found["name"], found["neck"]) == ("efficientvit", "maskrcnn")
    assert found["bottom_up"] == {"freeze_at": 0, "name": "m4", "kernels": (), "norm_eval": True}
    set_keys(cfg, "MODEL.BACKBONE.NAME", "build_hatnet_fpn_backbone")
    found = config.backbone_arguments(cfg)
    assert (found["name"], found["neck"]) == ("hatnet", "fpn")
    assert found["bottom_up"] == {"freeze_at": 0, "name": "tiny", "drop_path": 0.1}
    set_keys(cfg, "MODEL.BACKBONE.NAME", "build_hiervit_fpn_backbone")
    found = config.backbone_arguments(cfg)
    assert found["fpn"]["extra_convs"] == 2
    assert found["bottom_up"] == {
        "freeze_at": 0,
        "patch_sizes": (4, 8, 16),
        "widths": (64, 128, 256),
        "depths": (4, 6, 8),
        "mixer": "window",
        "groups": 8,
        "drop_path": 0.1,
    }


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_large"])
def test_light_backbones_take_norm_and_freezing_alone(cfg, name):
    set_keys(cfg, "MODEL.BACKBONE.NAME", f"build_{name}_fpn_backbone", "MODEL.RESNETS.NORM", "BN")
    arguments = config.backbone_arguments(cfg)
    assert arguments["name"] == name
    assert arguments["bottom_up"] == {"norm": "BN", "freeze_at": 2}


def test_rpn(cfg):
    set_keys(cfg, "MODEL.RPN.LOSS_WEIGHT", "2", "MODEL.RPN.BBOX_REG_LOSS_WEIGHT", "0.25")
    set_keys(cfg, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "4")
    assert config.rpn_arguments(cfg) == {
        "in_features": ("p2", "p3", "p4", "p5", "p6"),
        "anchor_sizes": ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
        "aspect_ratios": ((0.5, 1.0, 2.0),) * 5,
        "anchor_offset": 0.0,
        "conv_dims": (-1,),
        "iou_thresholds": (0.3, 0.7),
        "batch_size_per_image": 256,
        "positive_fraction": 0.5,
        "pre_nms_topk": (2000, 1000),
        "post_nms_topk": (2000, 1000),
        "nms_thresh": 0.7,
        "min_box_size": 4.0,
        "bbox_reg_weights": (1.0, 1.0, 1.0, 1.0),
        "box_reg_loss_type": "smooth_l1",
        "smooth_l1_beta": 0.0,
        # Detectron2 multiplies: the box loss has a weight of its own within the RPN's.
        "loss_weights": {"loss_rpn_cls": 2.0, "loss_rpn_loc": 0.5},
    }


@pytest.mark.parametrize(("kind", "aligned"), [("ROIAlignV2", True), ("ROIAlign", False)])
def test_pooler(cfg, kind, aligned):
    set_keys(cfg, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind, "MODEL.CASCADE.POOLER_KERNEL", "bags")
    assert config.pooler_arguments(cfg) == {
        "in_features": ("p2", "p3", "p4", "p5"),
        "output_size": 7,
        "sampling_ratio": 0,
        "aligned": aligned,
        "kernel": "bags",
    }


def test_box_heads_are_alike_by_default(cfg):
    head = {"conv_dims": (), "fc_dims": (1024, 1024), "norm": ""}
    assert config.box_head_arguments(cfg) == [head] * 3


def test_box_heads_can_grow_along_the_cascade(cfg):
    set_keys(cfg, "MODEL.CASCADE.BOX_HEAD.NUM_CONV", "(0, 1, 2)", "MODEL.ROI_BOX_HEAD.NORM", "GN")
    set_keys(cfg, "MODEL.CASCADE.BOX_HEAD.CONV_DIM", "(64,)")
    set_keys(cfg, "MODEL.CASCADE.BOX_HEAD.FC_DIM", "(128, 256, 512)")
    assert config.box_head_arguments(cfg) == [
        {"conv_dims": (), "fc_dims": (128, 128), "norm": "GN"},
        {"conv_dims": (64,), "fc_dims": (256, 256), "norm": "GN"},
        {"conv_dims": (64, 64), "fc_dims": (512, 512), "norm": "GN"},
    ]


def test_cascade(cfg):
    set_keys(cfg, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)")
    weights = "([10, 10, 5, 5], [20, 20, 10, 10])"
    set_keys(cfg, "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", weights)
    assert config.cascade_arguments(cfg) == {
        "num_classes": 80,
        "ious": (0.5, 0.6),
        "bbox_reg_weights": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0)),
        "cls_agnostic_bbox_reg": True,
        "box_reg_loss_type": "smooth_l1",
        "smooth_l1_beta": 0.0,
        "box_reg_loss_weight": 1.0,
        "stage_loss_weights": (1.0, 1.0),
        "batch_size_per_image": 512,
        "positive_fraction": 0.25,
        "proposal_append_gt": True,
        "ensemble": "mean_probs",
        "score_thresh": 0.05,
        "nms_thresh": 0.5,
        "detections_per_image": 100,
        "suppression": "nms",
        "suppression_sigma": 0.5,
    }


def test_stage_loss_weights_of_their_own(cfg):
    set_keys(cfg, "MODEL.CASCADE.STAGE_LOSS_WEIGHTS", "(1, 0.5, 0.25)")
    assert config.cascade_arguments(cfg)["stage_loss_weights"] == (1.0, 0.5, 0.25)


EARLY_EXIT = ("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads")


def test_exits_are_off_unless_enabled_in_the_right_heads(cfg):
    assert config.exit_arguments(cfg) is None
    assert config.exit_arguments(set_keys(cfg, *EARLY_EXIT)) is None
    set_keys(cfg, "MODEL.CASCADE.EXIT.ENABLED", "True")
    assert config.exit_arguments(cfg) is not None
    assert config.exit_arguments(set_keys(cfg, EARLY_EXIT[0], "CascadeROIHeads")) is None


def test_fast_inference(cfg):
    assert config.fast_arguments(cfg) is None
    node = "MODEL.CASCADE.FAST"
    set_keys(cfg, f"{node}.ENABLED", "True", f"{node}.DTYPE", "bfloat16", f"{node}.COMPILE", "True")
    set_keys(cfg, f"{node}.FLOAT32_PARTS", "['stem', 'fpn']")
    config.check_config(cfg)
    expected = {"dtype": "bfloat16", "float32_parts": ("stem", "fpn"), "compile": True}
    assert config.fast_arguments(cfg) == expected
    assert config.fast_heads_dtype(cfg) == "bfloat16"
    set_keys(cfg, f"{node}.DTYPE", "int8")  # for whole models
    assert config.fast_heads_dtype(cfg) == "auto"


def test_input(cfg):
    assert config.input_arguments(cfg, train=True) == {
        "min_sizes": (640, 672, 704, 736, 768, 800),
        "max_size": 1333,
        "sampling": "choice",
        "flip": "horizontal",
        "image_format": "BGR",
        "masks": None,
        "augment": None,
    }
    set_keys(cfg, "INPUT.MAX_SIZE_TEST", "999", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    assert config.input_arguments(cfg, train=False) == {
        "min_sizes": (800,),
        "max_size": 999,
        "image_format": "BGR",
        "masks": None,
    }
    set_keys(cfg, "MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask")
    for train in (True, False):
        masks = config.input_arguments(cfg, train)["masks"]
        assert masks == {"mask_format": "bitmask", "maskless": "keep"}


def test_augmentation(cfg):
    def augment(*options):
        config.merge_config(cfg, None, options)
        return config.input_arguments(cfg, train=True)["augment"]

    crop = {"crop": ("absolute", (30, 40)), "entries": [], "resize": True}
    options = ("INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute")
    assert augment(*options, "INPUT.CROP.SIZE", "[30, 40]") == {**crop, "boxes_of_masks": False}
    assert augment("MODEL.MASK_ON", "True") == {**crop, "boxes_of_masks": True}
    jpeg = ("JPEG", {"quality": [5, 9], "p": 1.0})
    entries = "[['JPEG', {'quality': [5, 9]}]]"
    assert augment("INPUT.CROP.ENABLED", "False", "CASCADE.AUGMENT", entries) == {
        "crop": None,
        "entries": [jpeg],
        "resize": True,
        "boxes_of_masks": False,  # colours move nothing
    }
    jitter = ("ScaleJitter", {"target_size": (1024, 1024), "scale_range": (0.1, 2.0)})
    crop = ("RandomCrop", {"size": (1024, 1024), "pad_if_needed": True, "fill": 114})
    entries = "[['ScaleJitter'], ['RandomCrop', {'pad_if_needed': True}]]"
    assert augment("CASCADE.AUGMENT", entries) == {
        "crop": None,
        "entries": [jitter, crop],
        "resize": False,
        "boxes_of_masks": True,
    }


def test_loaders(cfg):
    set_keys(cfg, "SEED", "3", "CASCADE.TEST_IMS_PER_BATCH", "2")
    assert config.train_loader_arguments(cfg) == {
        "images_per_batch": 16,
        "num_workers": 4,
        "aspect_ratio_grouping": True,
        "filter_empty": True,
        "seed": 3,
        "repeat": None,
    }
    set_keys(cfg, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    set_keys(cfg, "DATALOADER.REPEAT_THRESHOLD", "0.1", "DATALOADER.REPEAT_SQRT", "False")
    repeat = config.train_loader_arguments(cfg)["repeat"]
    assert repeat == {"threshold": 0.1, "square_root": False}
    assert config.test_loader_arguments(cfg) == {"images_per_batch": 2, "num_workers": 4}


def test_shadow_runs(cfg):
    expected = {
        "share": 0.0,
        "min_score": 0.5,
        "seed": 0,
        "expected_loss": None,
        "expected_deviation": 0.0,
    }
    assert config.shadow_arguments(cfg) == expected
    set_keys(cfg, "CASCADE.SHADOW_SHARE", "0.1", "CASCADE.SHADOW_SCORE", "0.3", "SEED", "7")
    set_keys(cfg, "MODEL.CASCADE.EXIT.EXPECTED_LOSS", "0.0")
    set_keys(cfg, "MODEL.CASCADE.EXIT.EXPECTED_LOSS_DEVIATION", "0.01")
    assert config.shadow_arguments(cfg) == {
        "share": 0.1,
        "min_score": 0.3,
        "seed": 7,
        "expected_loss": 0.0,
        "expected_deviation": 0.01,
    }


def test_datasets(cfg):
    set_keys(cfg, "CASCADE.DATASETS", "[['a', 'a.json', 'a/'], ('b', 'b.json', 'b/')]")
    own = (("a", "a.json", "a/"), ("b", "b.json", "b/"))
    for train, names in ((True, ("coco_2017_train",)), (False, ("coco_2017_val",))):
        assert config.datasets_arguments(cfg, train) == {
            "names": names,
            "own_datasets": own,
            "on_bad_data": "error",
            "follow_links": "near",
            "masks": None,
        }
    set_keys(cfg, "MODEL.MASK_ON", "True", "CASCADE.MASKLESS", "drop")
    assert config.datasets_arguments(cfg, train=False)["masks"] == "drop"


def test_datasets_for_semantic_segmentation(cfg):
    own = (("a", "folders", "i/", "l/"), ("b", "acdc", "b/"))
    set_keys(cfg, "CASCADE.SEMANTIC_DATASETS", str(own), "DATASETS.TRAIN", "('a',)")
    set_keys(cfg, "CASCADE.SEMANTIC_CLASSES", "['ground', 'tree']")
    assert config.semantic_datasets_arguments(cfg, train=True) == {
        "names": ("a",),
        "own_datasets": own,
        "class_names": ("ground", "tree"),
        "ignore_value": 255,
        "on_bad_data": "error",
        "follow_links": "near",
    }


def test_input_and_loader_for_semantic_segmentation(cfg):
    set_keys(cfg, "MODEL.MASK_ON", "True", "CASCADE.SEMANTIC_AUGMENTATION", "rotate")
    train = config.input_arguments(cfg, train=True) | {"augmentation": "rotate"}
    del train["masks"], train["augment"]
    assert config.semantic_input_arguments(cfg, train=True) == train
    test = config.input_arguments(cfg, train=False)
    del test["masks"]
    assert config.semantic_input_arguments(cfg, train=False) == test
    loader = config.train_loader_arguments(cfg)
    del loader["filter_empty"], loader["repeat"]
    assert config.semantic_train_loader_arguments(cfg) == loader


def test_optimizer(cfg):
    expected = {
        "name": "SGD",
        "base_lr": 0.02,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0001,
        "weight_decay_norm": 0.0,
        "bias_lr_factor": 1.0,
        "weight_decay_bias": None,
        "clip": None,
    }
    assert config.optimizer_arguments(cfg) == expected
    set_keys(cfg, "SOLVER.CLIP_GRADIENTS.ENABLED", "True", "CASCADE.OPTIMIZER", "AdamW")
    clip = {"type": "value", "value": 1.0, "norm_type": 2.0}
    assert config.optimizer_arguments(cfg) == {**expected, "name": "AdamW", "clip": clip}


def test_scheduler(cfg):
    assert config.scheduler_arguments(cfg) == {
        "name": "WarmupMultiStepLR",
        "max_iter": 90000,
        "gamma": 0.1,
        "steps": (60000, 80000),
        "base_lr": 0.02,
        "base_lr_end": 0.0,
        "num_decays": 3,
        "warmup_factor": 0.001,
        "warmup_iters": 1000,
        "warmup_method": "linear",
        "rescale_interval": False,
    }


def test_trainer(cfg):
    expected = {
        "max_iter": 90000,
        "checkpoint_period": 5000,
        "eval_period": 0,
        "log_period": 20,
        "max_to_keep": 5,
        "amp_dtype": None,
        "best_metric": "bbox/AP",
        "patience": 0,
        "validation_loss": False,
        "accumulation_steps": 1,
        "ema_decay": 0.0,
    }
    assert config.trainer_arguments(cfg) == expected
    set_keys(cfg, "SOLVER.AMP.ENABLED", "True", "CASCADE.MAX_TO_KEEP", "0")
    assert config.trainer_arguments(cfg) == {**expected, "amp_dtype": "auto", "max_to_keep": None}
    set_keys(cfg, "CASCADE.AMP_DTYPE", "float16")
    assert config.trainer_arguments(cfg)["amp_dtype"] == "float16"


ALL_ARGUMENTS = [
    config.detector_arguments,
    config.backbone_arguments,
    config.rpn_arguments,
    config.pooler_arguments,
    config.box_head_arguments,
    config.cascade_arguments,
    config.exit_arguments,
    config.shadow_arguments,
    lambda cfg: config.input_arguments(cfg, train=True),
    config.train_loader_arguments,
    config.test_loader_arguments,
    lambda cfg: config.datasets_arguments(cfg, train=True),
    lambda cfg: config.semantic_datasets_arguments(cfg, train=True),
    lambda cfg: config.semantic_input_arguments(cfg, train=True),
    config.semantic_train_loader_arguments,
    config.optimizer_arguments,
    config.scheduler_arguments,
    config.trainer_arguments,
]


def test_arguments_change_nothing_and_share_nothing_that_can_change(cfg):
    before = cfg.clone()
    cfg.freeze()
    for arguments in ALL_ARGUMENTS:
        assert not contains_list(arguments(cfg))
    assert cfg == before


def contains_list(value: object) -> bool:
    """Whether a list of the configuration itself got out; box heads are a list of ours."""
    if isinstance(value, dict):
        return any(isinstance(item, list) or contains_list(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return any(isinstance(item, list) or contains_list(item) for item in value)
    return False
