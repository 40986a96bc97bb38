"""The whole key tree with its default values: Detectron2's, and the two nodes of ours.

Names and values are Detectron2's (a test compares them), so that its YAML files and the
``config.yaml`` that it dumps can be merged. Comments give meaning, unit and range.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.cascade import add_cascade_config
from cascade_det.config.model_defaults import MODEL
from cascade_det.config.solver_defaults import SOLVER


def get_cfg() -> CfgNode:
    """A fresh configuration with all default values, ours included.

    The defaults are Detectron2's and describe its C4 model; ``configs/`` holds the
    configurations of cascades.
    """
    cfg = CfgNode(
        {
            "VERSION": 2,  # of the key tree; no other is read
            "MODEL": MODEL,
            "INPUT": _INPUT,
            "DATASETS": _DATASETS,
            "DATALOADER": _DATALOADER,
            "SOLVER": SOLVER,
            "TEST": _TEST,
            **_RUN,
        }
    )
    add_cascade_config(cfg)
    return cfg


_INPUT: dict[str, Any] = {
    "MIN_SIZE_TRAIN": (800,),  # shorter edge after resizing, pixels; one is drawn per image
    "MIN_SIZE_TRAIN_SAMPLING": "choice",  # "choice" of the values, or "range" between the two
    "MAX_SIZE_TRAIN": 1333,  # the longer edge never exceeds this, pixels
    "MIN_SIZE_TEST": 800,  # pixels; 0 leaves test images as they are
    "MAX_SIZE_TEST": 1333,  # pixels
    "RANDOM_FLIP": "horizontal",  # in training, half of the time: "horizontal" "vertical" "none"
    "CROP": {  # random crops in training
        "ENABLED": False,
        "TYPE": "relative_range",
        "SIZE": [0.9, 0.9],  # (height, width): fraction of the image, or pixels
    },
    "FORMAT": "BGR",  # channel order of the image tensor, and of PIXEL_MEAN and PIXEL_STD
    "MASK_FORMAT": "polygon",
}

_DATASETS: dict[str, Any] = {
    "TRAIN": (),  # names; several are joined into one data set
    "PROPOSAL_FILES_TRAIN": (),  # precomputed proposals, one file per name
    "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
    "TEST": (),  # names; each is evaluated on its own
    "PROPOSAL_FILES_TEST": (),
    "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
}

_DATALOADER: dict[str, Any] = {
    "NUM_WORKERS": 4,  # processes that read images; 0 = the training process itself
    "ASPECT_RATIO_GROUPING": True,  # wide images are batched with wide ones: less padding
    "SAMPLER_TRAIN": "TrainingSampler",
    "REPEAT_THRESHOLD": 0.0,  # of the repeat-factor sampler: class frequency in [0, 1]
    "REPEAT_SQRT": True,
    "FILTER_EMPTY_ANNOTATIONS": True,  # train without the images that hold no object
}

_TEST: dict[str, Any] = {
    "EXPECTED_RESULTS": [],  # [task, metric, value, tolerance] each
    "EVAL_PERIOD": 0,  # iterations between evaluations in training; 0 = only at the end
    "KEYPOINT_OKS_SIGMAS": [],
    # The best this many are returned, >= 1. Above 100, which is COCO's limit, an evaluation counts
    # as many of each class in an image.
    "DETECTIONS_PER_IMAGE": 100,
    "AUG": {  # test-time augmentation
        "ENABLED": False,
        "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),  # pixels
        "MAX_SIZE": 4000,  # pixels
        "FLIP": True,
    },
    "PRECISE_BN": {  # recomputing batch-norm statistics before an evaluation
        "ENABLED": False,
        "NUM_ITER": 200,  # batches
    },
}

_RUN: dict[str, Any] = {
    "OUTPUT_DIR": "./output",  # folder for logs, checkpoints and results
    "SEED": -1,  # >= 0: same seed, same batches and same initial weights; negative = random
    "CUDNN_BENCHMARK": False,  # let cuDNN try its algorithms; pays where image sizes repeat
    "FLOAT32_PRECISION": "",  # matrix products: "highest" "high" "medium"; "" = torch's default
    "VIS_PERIOD": 0,  # iterations between pictures of training batches; 0 = none
    "GLOBAL": {"HACK": 1.0},
}
