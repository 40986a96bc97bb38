"""The two nodes of ours: ``MODEL.CASCADE`` and ``CASCADE``.

A tuple "per stage" has one value for each stage, or a single value that holds for all of them.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.exits import EXIT_DEFAULTS
from cascade_det.config.fast import FAST_DEFAULTS
from cascade_det.config.regime import TRAINING_DEFAULTS

_MODEL_CASCADE: dict[str, Any] = {
    "STAGE_LOSS_WEIGHTS": (1.0,),  # per stage, >= 0; of its class and box loss
    # How the stages' opinions become one score: "mean_probs" (mean of their probabilities),
    # "last" (the last stage alone), "mean_logits" (softmax of the mean of their logits) or
    # "last_boxes" (every head judges the last boxes; mean of the probabilities).
    "ENSEMBLE": "mean_probs",
    # RoI pooling: "torchvision", "bags" (weighted sums over a channels-last map, fast on CPUs)
    # or "auto" = whichever is faster on the device.
    "POOLER_KERNEL": "auto",
    # The layers of the box heads, per stage, so that capacity can grow along the cascade.
    # () = the value of the same name under MODEL.ROI_BOX_HEAD, for every stage.
    "BOX_HEAD": {
        "NUM_CONV": (),  # each >= 0
        "CONV_DIM": (),  # channels, each >= 1
        "NUM_FC": (),  # each >= 0
        "FC_DIM": (),  # each >= 1
        "NORM": (),  # of the convolutions: "", "GN", "BN" or "SyncBN"
    },
    "EXIT": EXIT_DEFAULTS,
    "FAST": FAST_DEFAULTS,
    "TRAINING": TRAINING_DEFAULTS,
}

_CASCADE: dict[str, Any] = {
    # Data sets of one's own in COCO format: (name, annotation file, image folder) each. A path
    # is relative to the folder that the command runs in. The name goes to DATASETS.
    "DATASETS": (),
    # Of a record or an image that cannot be used, in training and in test sets: "error" lists
    # them all and stops, "skip" leaves them out and says how many. For that, images of test sets
    # are decoded before a run, and of training sets only their heads and ends are looked at: one
    # that proves broken when it is read stops the training, or ("skip") another takes its place.
    "ON_BAD_DATA": "error",
    # Which symbolic links out of the image folder are followed, of images or of folders of them:
    # "near" those that lead below the folder of the json or the working directory, "all" any,
    # "none" none. An image behind another link is bad data, see above.
    "FOLLOW_LINKS": "near",
    # The length of the training, in passes over the images that are trained on: SOLVER.MAX_ITER
    # becomes as many iterations, and STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and TEST.EVAL_PERIOD
    # are scaled with it. From 0 to 1,000,000; 0 = SOLVER.MAX_ITER as it is. To set
    # SOLVER.MAX_ITER on top of a file with EPOCHS, set EPOCHS to 0 as well.
    "EPOCHS": 0.0,
    "MAX_TO_KEEP": 5,  # latest checkpoints that are kept; 0 = all of them
    # The figure that decides which checkpoint is the best one, and that PATIENCE watches: more is
    # better, but of losses less. Of several test sets, begin with the name of one
    # ("my_val/bbox/AP"); "validation/total_loss" and the like need VALIDATION_LOSS.
    "BEST_METRIC": "bbox/AP",
    "PATIENCE": 0,  # evaluations in a row without a better BEST_METRIC that end training; 0 = never
    # Compute the losses on DATASETS.TEST too, at every evaluation, over all test sets together.
    "VALIDATION_LOSS": False,
    # Equal parts that an iteration's images are computed in, one after another, for less memory;
    # >= 1, and SOLVER.IMS_PER_BATCH is a multiple of it.
    "ACCUMULATION_STEPS": 1,
    # Weights averaged over the iterations, for evaluation and in checkpoints: the share that the
    # average keeps at each one, in [0, 1), such as 0.999; 0 = no averaging.
    "EMA_DECAY": 0.0,
    "OPTIMIZER": "SGD",  # or "AdamW"
    # Under SOLVER.AMP: "bfloat16", "float16", or "auto" = float16 on a GPU, on a
    # CPU bfloat16 where it has instructions for it and float32 where not.
    "AMP_DTYPE": "auto",
    "TEST_IMS_PER_BATCH": 1,  # images per batch and process in inference, >= 1
    # The share of images that take the full cascade too, in evaluation and prediction, to see
    # what exits lose on them; in [0, 1]. Which ones depends on image and SEED alone.
    "SHADOW_SHARE": 0.0,
    "SHADOW_SCORE": 0.5,  # detections below it do not count there, in [0, 1]
    "LOG_PERIOD": 20,  # iterations between lines of the log and metrics, >= 1
}


def add_cascade_config(cfg: CfgNode) -> None:
    """Add ``MODEL.CASCADE`` and ``CASCADE`` to a configuration, in place.

    Works on any yacs configuration, Detectron2's included: new nodes have the type of ``cfg``,
    the only one that its ``merge_from_file`` accepts. Keys that are there keep their values.

    Args:
        cfg: a configuration with a ``MODEL`` node, not frozen.
    """
    add_model_node(cfg)
    _add_missing(cfg, {"CASCADE": _CASCADE}, type(cfg))


def add_model_node(cfg: CfgNode) -> None:
    """Add ``MODEL.CASCADE`` alone, which is all that a model needs; as ``add_cascade_config``."""
    _add_missing(cfg.MODEL, {"CASCADE": _MODEL_CASCADE}, type(cfg))


def _add_missing(node: CfgNode, defaults: dict[str, Any], node_type: type[CfgNode]) -> None:
    for key, value in defaults.items():
        if isinstance(value, dict):
            if key not in node:
                setattr(node, key, node_type())
            _add_missing(node[key], value, node_type)
        elif key not in node:
            setattr(node, key, value)
