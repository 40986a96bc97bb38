"""Keys of data, solver and evaluation as plain keyword arguments. Nothing is checked here."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.augment_keys import AUGMENTATIONS, complete_entries


def input_arguments(cfg: CfgNode, train: bool) -> dict[str, Any]:
    """How images are read and resized; sizes in pixels, 0 in ``min_sizes`` resizes nothing.

    ``masks`` are the format of masks and what to do without one, or None where masks are off.
    ``augment`` is None where nothing but resizing and flipping is asked for.
    """
    source = cfg.INPUT
    masks = None
    if cfg.MODEL.MASK_ON:
        masks = {"mask_format": source.MASK_FORMAT, "maskless": cfg.CASCADE.MASKLESS}
    if train:
        return {
            "min_sizes": tuple(source.MIN_SIZE_TRAIN),
            "max_size": source.MAX_SIZE_TRAIN,
            "sampling": source.MIN_SIZE_TRAIN_SAMPLING,
            "flip": source.RANDOM_FLIP,
            "image_format": source.FORMAT,
            "masks": masks,
            "augment": _augment_arguments(cfg),
        }
    return {
        "min_sizes": (source.MIN_SIZE_TEST,),
        "max_size": source.MAX_SIZE_TEST,
        "image_format": source.FORMAT,
        "masks": masks,
    }


def _augment_arguments(cfg: CfgNode) -> dict[str, Any] | None:
    """The crop (type and size) and the entries (name and arguments) of the augmentation.

    ``resize`` is whether images are resized to the sizes of training at the end, and
    ``boxes_of_masks`` whether objects may be cut or turned, so that boxes follow from masks.
    """
    crop = cfg.INPUT.CROP
    entries = complete_entries(cfg.CASCADE.AUGMENT)
    if not crop.ENABLED and not entries:
        return None
    cuts = crop.ENABLED or any(AUGMENTATIONS[name].cuts for name, _ in entries)
    return {
        "crop": (crop.TYPE, tuple(crop.SIZE)) if crop.ENABLED else None,
        "entries": entries,
        "resize": all(name != "ScaleJitter" for name, _ in entries),
        "boxes_of_masks": cfg.MODEL.MASK_ON and cuts,
    }


def train_loader_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Training batches; ``images_per_batch`` is over all processes, ``seed`` < 0 is random.

    ``repeat`` are arguments of ``data.repeat_factors``, or None where no image is repeated.
    """
    loader, repeat = cfg.DATALOADER, None
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        repeat = {
            "threshold": float(loader.REPEAT_THRESHOLD),
            "square_root": loader.REPEAT_SQRT,
        }
    return {
        "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "num_workers": loader.NUM_WORKERS,
        "aspect_ratio_grouping": loader.ASPECT_RATIO_GROUPING,
        "filter_empty": loader.FILTER_EMPTY_ANNOTATIONS,
        "seed": cfg.SEED,
        "repeat": repeat,
    }


def test_loader_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Inference batches; ``images_per_batch`` is per process."""
    return {
        "images_per_batch": cfg.CASCADE.TEST_IMS_PER_BATCH,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def augmentation_arguments(cfg: CfgNode) -> dict[str, Any] | None:
    """The views of test-time augmentation, in pixels; ``None`` without it."""
    augmentation = cfg.TEST.AUG
    if not augmentation.ENABLED:
        return None
    return {
        "min_sizes": tuple(augmentation.MIN_SIZES),
        "max_size": augmentation.MAX_SIZE,
        "flip": augmentation.FLIP,
    }


def shadow_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Shadow runs of the full cascade; ``expected_loss`` is None without calibration."""
    promised = cfg.MODEL.CASCADE.EXIT
    return {
        "share": cfg.CASCADE.SHADOW_SHARE,
        "min_score": cfg.CASCADE.SHADOW_SCORE,
        "seed": max(cfg.SEED, 0),
        "expected_loss": promised.EXPECTED_LOSS if promised.EXPECTED_LOSS >= 0 else None,
        "expected_deviation": promised.EXPECTED_LOSS_DEVIATION,
    }


def datasets_arguments(cfg: CfgNode, train: bool) -> dict[str, Any]:
    """The ``names`` to load; ``own_datasets`` are (name, annotations, image folder) each.

    ``masks`` is what to do with objects without one, or None where masks are off.
    """
    return {
        "names": tuple(cfg.DATASETS.TRAIN if train else cfg.DATASETS.TEST),
        "own_datasets": tuple(tuple(dataset) for dataset in cfg.CASCADE.DATASETS),
        "on_bad_data": cfg.CASCADE.ON_BAD_DATA,
        "follow_links": cfg.CASCADE.FOLLOW_LINKS,
        "masks": cfg.CASCADE.MASKLESS if cfg.MODEL.MASK_ON else None,
    }


def semantic_input_arguments(cfg: CfgNode, train: bool) -> dict[str, Any]:
    """As ``input_arguments``, for semantic segmentation."""
    arguments = input_arguments(cfg, train)
    del arguments["masks"]
    if train:
        del arguments["augment"]
        arguments["augmentation"] = cfg.CASCADE.SEMANTIC_AUGMENTATION
    return arguments


def semantic_train_loader_arguments(cfg: CfgNode) -> dict[str, Any]:
    """As ``train_loader_arguments``, for semantic segmentation."""
    arguments = train_loader_arguments(cfg)
    del arguments["filter_empty"], arguments["repeat"]
    return arguments


def semantic_datasets_arguments(cfg: CfgNode, train: bool) -> dict[str, Any]:
    """As ``datasets_arguments``, for semantic segmentation.

    ``own_datasets`` are (name, format, folder) or (name, "folders", images, labels) each.
    """
    return {
        "names": tuple(cfg.DATASETS.TRAIN if train else cfg.DATASETS.TEST),
        "own_datasets": tuple(tuple(dataset) for dataset in cfg.CASCADE.SEMANTIC_DATASETS),
        "class_names": tuple(cfg.CASCADE.SEMANTIC_CLASSES),
        "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        "on_bad_data": cfg.CASCADE.ON_BAD_DATA,
        "follow_links": cfg.CASCADE.FOLLOW_LINKS,
    }


def optimizer_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The optimizer; ``clip`` is None, or the type of clipping, its value and p of the p-norm."""
    solver = cfg.SOLVER
    clip = solver.CLIP_GRADIENTS
    return {
        "name": cfg.CASCADE.OPTIMIZER,
        "base_lr": solver.BASE_LR,
        "momentum": solver.MOMENTUM,
        "nesterov": solver.NESTEROV,
        "weight_decay": solver.WEIGHT_DECAY,
        "weight_decay_norm": solver.WEIGHT_DECAY_NORM,
        "bias_lr_factor": solver.BIAS_LR_FACTOR,
        "weight_decay_bias": solver.WEIGHT_DECAY_BIAS,
        "clip": {"type": clip.CLIP_TYPE, "value": clip.CLIP_VALUE, "norm_type": clip.NORM_TYPE}
        if clip.ENABLED
        else None,
    }


def scheduler_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The schedule of the learning rate; ``steps`` and ``warmup_iters`` in iterations."""
    solver = cfg.SOLVER
    return {
        "name": solver.LR_SCHEDULER_NAME,
        "max_iter": solver.MAX_ITER,
        "gamma": solver.GAMMA,
        "steps": tuple(solver.STEPS),
        "base_lr": solver.BASE_LR,
        "base_lr_end": solver.BASE_LR_END,
        "num_decays": solver.NUM_DECAYS,
        "warmup_factor": solver.WARMUP_FACTOR,
        "warmup_iters": solver.WARMUP_ITERS,
        "warmup_method": solver.WARMUP_METHOD,
        "rescale_interval": solver.RESCALE_INTERVAL,
    }


def trainer_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The training loop; periods in iterations, ``patience`` in evaluations (0 never stops).

    ``max_to_keep`` None keeps all checkpoints. ``amp_dtype`` is None (float32),
    "bfloat16", "float16", or "auto", which the host resolves by its device.
    """
    return {
        "max_iter": cfg.SOLVER.MAX_ITER,
        "checkpoint_period": cfg.SOLVER.CHECKPOINT_PERIOD,
        "eval_period": cfg.TEST.EVAL_PERIOD,
        "log_period": cfg.CASCADE.LOG_PERIOD,
        "max_to_keep": cfg.CASCADE.MAX_TO_KEEP or None,
        "amp_dtype": cfg.CASCADE.AMP_DTYPE if cfg.SOLVER.AMP.ENABLED else None,
        "best_metric": cfg.CASCADE.BEST_METRIC,
        "patience": cfg.CASCADE.PATIENCE,
        "validation_loss": cfg.CASCADE.VALIDATION_LOSS,
        "accumulation_steps": cfg.CASCADE.ACCUMULATION_STEPS,
        "ema_decay": cfg.CASCADE.EMA_DECAY,
    }
