"""The data sets that a configuration names, checked against it and against each other."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.catalog import DatasetSource, find_dataset
from cascade_det.data.coco import CocoDataset, load_dataset
from cascade_det.data.image_names import LinkRule
from cascade_det.data.loader import build_test_loader, training_records
from cascade_det.data.samples import Batch
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)

Find = Callable[[str, Iterable[tuple[str, str, str]]], DatasetSource]


def load_datasets(cfg: CfgNode, *, train: bool, find: Find = find_dataset) -> list[CocoDataset]:
    """Load ``DATASETS.TRAIN`` or ``DATASETS.TEST``.

    The images of test sets are decoded, so that a damaged one does not end a long run at its
    evaluation: unlike in training, no other image can stand in for it.

    Args:
        cfg: a checked configuration.
        train: which of the two.
        find: locates a data set by its name and the user's own data sets.

    Raises:
        ConfigError: nothing to train on is named, or NUM_CLASSES is not that of the data.
        DatasetError: data are missing or wrong.
    """
    config.require_detector(cfg)
    arguments = config.datasets_arguments(cfg, train)
    if train and not arguments["names"]:
        raise ConfigError("DATASETS.TRAIN is empty: name a data set to train on")
    datasets = [
        load_dataset(
            find(name, arguments["own_datasets"]),
            arguments["on_bad_data"],
            masks=arguments["masks"],
            keep_ground_truth=not train,
            links=LinkRule(arguments["follow_links"]),
            decode=not train,
            share=(distributed.rank(), distributed.world_size()),
            gather=distributed.all_gather,
        )
        for name in arguments["names"]
    ]
    for dataset in datasets:
        _check_classes(cfg, dataset)
    return datasets


def images_to_optimise_with(cfg: CfgNode, find: Find = find_dataset) -> list[Batch] | None:
    """``MODEL.CASCADE.FAST.IMAGES`` images of ``DATASETS.TRAIN``, resized as in a test.

    They are spread evenly over the first data set, and all processes get the same.

    Returns:
        Batches of one image; ``None`` where the number is 0.

    Raises:
        ConfigError, DatasetError: as ``load_datasets``.
    """
    count = cfg.MODEL.CASCADE.FAST.IMAGES
    if not count:
        return None
    dataset = load_datasets(cfg, train=True, find=find)[0]
    count = min(count, len(dataset.records))
    records = [dataset.records[i * len(dataset.records) // count] for i in range(count)]
    loader = build_test_loader(
        dataclasses.replace(dataset, records=records),
        **config.input_arguments(cfg, train=False),
        images_per_batch=1,
        num_workers=0,
    )
    return list(loader)


def load_datasets_to_evaluate(
    cfg: CfgNode, find: Find = find_dataset, *, resume: bool
) -> list[CocoDataset]:
    """Load ``DATASETS.TEST`` for an evaluation, which needs weights as well.

    Raises:
        ConfigError: there is no test set, or neither ``MODEL.WEIGHTS`` nor a run to resume.
        DatasetError: data are missing or wrong.
    """
    check_evaluable(cfg, resume=resume)
    return load_datasets(cfg, train=False, find=find)


def check_evaluable(cfg: CfgNode, *, resume: bool) -> None:
    """Check that an evaluation has a test set, and weights or a run to resume.

    Raises:
        ConfigError: it has not.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name a data set to evaluate on")
    if not cfg.MODEL.WEIGHTS and not resume:
        raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to evaluate")


def load_training_data(
    cfg: CfgNode, find: Find = find_dataset
) -> tuple[list[CocoDataset], list[CocoDataset]]:
    """Load ``DATASETS.TRAIN`` and ``DATASETS.TEST``, which need the same classes.

    Raises:
        ConfigError: as ``load_datasets``.
        DatasetError: data are missing or wrong, or a test set has other classes.
    """
    datasets = load_datasets(cfg, train=True, find=find)
    test_datasets = load_datasets(cfg, train=False, find=find)
    for dataset in test_datasets:
        _check_class_names(datasets[0], dataset)
    return datasets, test_datasets


def scheduled(cfg: CfgNode, datasets: Sequence[CocoDataset]) -> CfgNode:
    """Scale the schedule to ``CASCADE.EPOCHS``, where that is set, and log its length.

    Args:
        cfg: a checked configuration.
        datasets: those of ``DATASETS.TRAIN``.

    Raises:
        DatasetError: no image has a box to train on, or no object a mask.
    """
    records = training_records(datasets, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    if cfg.MODEL.MASK_ON and not cfg.MODEL.CASCADE.TRAINING.FREEZE_DETECTOR:
        _check_masks(datasets)
    found = sum(len(dataset.records) for dataset in datasets)
    if found > len(records):
        logger.info("%s of %s images have boxes to train on", f"{len(records):,}", f"{found:,}")
    return scheduled_for(cfg, len(records))


def scheduled_for(cfg: CfgNode, num_images: int) -> CfgNode:
    """As ``scheduled``, for that many training images."""
    before, cfg = cfg, config.scale_to_epochs(cfg, num_images)
    changes = config.changed_keys(before, cfg)
    if changes:
        changed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items())
        logger.info("CASCADE.EPOCHS is %g: %s", cfg.CASCADE.EPOCHS, changed)
    iterations, images = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    epochs = iterations * images / num_images
    logger.info(
        "%s iterations x %d images = %s epochs of %s images",
        f"{iterations:,}",
        images,
        f"{epochs:,.0f}" if epochs >= 1000 else f"{epochs:.3g}",
        f"{num_images:,}",
    )
    return cfg


def _check_masks(datasets: Sequence[CocoDataset]) -> None:
    records = (record for dataset in datasets for record in dataset.records)
    if all(mask is None for record in records for mask in record.masks or ()):
        files = ", ".join(str(dataset.source.json_file) for dataset in datasets)
        raise DatasetError(
            f"{files}: no object has a mask to train on (key 'segmentation'), but MODEL.MASK_ON is "
            "True. Add masks, or set it to False."
        )


def _check_classes(cfg: CfgNode, dataset: CocoDataset) -> None:
    wanted, found = cfg.MODEL.ROI_HEADS.NUM_CLASSES, len(dataset.class_names)
    if wanted != found:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {wanted}, but {dataset.source.json_file} has {found} "
            f"categories ({', '.join(dataset.class_names[:10])}{', ...' if found > 10 else ''}): "
            f"set MODEL.ROI_HEADS.NUM_CLASSES {found}"
        )


def _check_class_names(trained: CocoDataset, tested: CocoDataset) -> None:
    if tuple(trained.class_names) != tuple(tested.class_names):
        raise DatasetError(
            f"{tested.source.json_file} has the classes {', '.join(tested.class_names)}, but "
            f"{trained.source.json_file} has {', '.join(trained.class_names)} (by category id): "
            "test on the classes that are trained, in the same order"
        )
