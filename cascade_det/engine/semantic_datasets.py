"""The data sets for semantic segmentation that a configuration names, checked against it."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.image_names import LinkRule
from cascade_det.data.semantic import (
    SemanticDataset,
    check_same_semantic_classes,
    find_semantic_dataset,
    load_semantic_dataset,
)
from cascade_det.engine.datasets import check_evaluable
from cascade_det.errors import ConfigError
from cascade_det.parallel import distributed


def load_semantic_datasets(cfg: CfgNode, *, train: bool) -> list[SemanticDataset]:
    """Load ``DATASETS.TRAIN`` or ``DATASETS.TEST``, which name sets of ``SEMANTIC_DATASETS``.

    All labels are read. The images of test sets are decoded, so that a damaged one does not end a
    long run at its evaluation. How long a training is, ``engine.datasets.scheduled_for`` says.

    Args:
        cfg: a checked configuration.
        train: which of the two.

    Raises:
        ConfigError: nothing to train on is named, or NUM_CLASSES is not that of the data.
        DatasetError: data are missing or wrong, or two sets have different classes.
    """
    arguments = config.semantic_datasets_arguments(cfg, train)
    if train and not arguments["names"]:
        raise ConfigError("DATASETS.TRAIN is empty: name a data set to train on")
    datasets = [
        load_semantic_dataset(
            find_semantic_dataset(
                name,
                arguments["own_datasets"],
                class_names=arguments["class_names"],
                ignore_value=arguments["ignore_value"],
            ),
            arguments["on_bad_data"],
            decode=not train,
            links=LinkRule(arguments["follow_links"]),
            share=(distributed.rank(), distributed.world_size()),
            gather=distributed.all_gather,
        )
        for name in arguments["names"]
    ]
    for dataset in datasets:
        _check_classes(cfg, dataset)
    check_same_semantic_classes(datasets)
    return datasets


def load_semantic_datasets_to_evaluate(cfg: CfgNode, *, resume: bool) -> list[SemanticDataset]:
    """Load ``DATASETS.TEST`` for an evaluation, which needs weights as well.

    Raises:
        ConfigError: there is no test set, or neither ``MODEL.WEIGHTS`` nor a run to resume.
        DatasetError: as ``load_semantic_datasets``.
    """
    check_evaluable(cfg, resume=resume)
    return load_semantic_datasets(cfg, train=False)


def load_semantic_training_data(
    cfg: CfgNode,
) -> tuple[list[SemanticDataset], list[SemanticDataset]]:
    """Load ``DATASETS.TRAIN`` and ``DATASETS.TEST``, which need the same classes.

    Raises:
        ConfigError: as ``load_semantic_datasets``.
        DatasetError: data are missing or wrong, or two sets have different classes.
    """
    datasets = load_semantic_datasets(cfg, train=True)
    test_datasets = load_semantic_datasets(cfg, train=False)
    check_same_semantic_classes([*datasets, *test_datasets])
    return datasets, test_datasets


def _check_classes(cfg: CfgNode, dataset: SemanticDataset) -> None:
    wanted, names = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, dataset.class_names
    if wanted != len(names):
        shown = f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {wanted}, but data set {dataset.source.name!r} has "
            f"{len(names)} classes ({shown}): set MODEL.SEM_SEG_HEAD.NUM_CLASSES {len(names)}"
        )
