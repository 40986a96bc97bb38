"""The data sets for semantic segmentation that a configuration names, and their loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from cascade_det import config
from cascade_det.data.image_names import LinkRule
from cascade_det.data.samples import Sample
from cascade_det.data.semantic import (
    SemanticDataset,
    SemanticSource,
    build_semantic_test_loader,
    build_semantic_train_loader,
    check_same_semantic_classes,
    find_semantic_dataset,
    load_semantic_dataset,
)
from cascade_det.engine.datasets import check_evaluable
from cascade_det.errors import ConfigError
from cascade_det.parallel import distributed

# Arguments as those of ``find_semantic_dataset``.
Find = Callable[..., SemanticSource]


def load_semantic_datasets(
    cfg: CfgNode, *, train: bool, find: Find = find_semantic_dataset
) -> list[SemanticDataset]:
    """Load ``DATASETS.TRAIN`` or ``DATASETS.TEST``, which name sets of ``SEMANTIC_DATASETS``.

    All labels are read. The images of test sets are decoded, so that a damaged one does not end a
    long run at its evaluation. How long a training is, ``engine.datasets.scheduled_for`` says.

    Args:
        cfg: a checked configuration.
        train: which of the two.
        find: locates a data set by its name and the user's own data sets.

    Raises:
        ConfigError: nothing to train on is named, or NUM_CLASSES is not that of the data.
        DatasetError: data are missing or wrong, or two sets have different classes.
    """
    arguments = config.semantic_datasets_arguments(cfg, train)
    if train and not arguments["names"]:
        raise ConfigError("DATASETS.TRAIN is empty: name a data set to train on")
    datasets = [
        load_semantic_dataset(
            find(
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


def load_semantic_datasets_to_evaluate(
    cfg: CfgNode, find: Find = find_semantic_dataset, *, resume: bool
) -> list[SemanticDataset]:
    """Load ``DATASETS.TEST`` for an evaluation, which needs weights as well.

    Raises:
        ConfigError: there is no test set, or neither ``MODEL.WEIGHTS`` nor a run to resume.
        DatasetError: as ``load_semantic_datasets``.
    """
    check_evaluable(cfg, resume=resume)
    return load_semantic_datasets(cfg, train=False, find=find)


def load_semantic_training_data(
    cfg: CfgNode, find: Find = find_semantic_dataset
) -> tuple[list[SemanticDataset], list[SemanticDataset]]:
    """Load ``DATASETS.TRAIN`` and ``DATASETS.TEST``, which need the same classes.

    Raises:
        ConfigError: as ``load_semantic_datasets``.
        DatasetError: data are missing or wrong, or two sets have different classes.
    """
    datasets = load_semantic_datasets(cfg, train=True, find=find)
    test_datasets = load_semantic_datasets(cfg, train=False, find=find)
    check_same_semantic_classes([*datasets, *test_datasets])
    return datasets, test_datasets


def semantic_train_loader(
    cfg: CfgNode, datasets: Sequence[SemanticDataset], *, seed: int, start_batch: int
) -> DataLoader[Sample]:
    """Endless batches of this process, see ``build_semantic_train_loader``."""
    return build_semantic_train_loader(
        datasets,
        **config.semantic_input_arguments(cfg, train=True),
        **{**config.semantic_train_loader_arguments(cfg), "seed": seed},
        start_batch=start_batch,
        share=(distributed.rank(), distributed.world_size()),
        on_bad_data=cfg.CASCADE.ON_BAD_DATA,
    )


def semantic_test_loader(
    cfg: CfgNode, dataset: SemanticDataset, *, annotated: bool = False
) -> DataLoader[Sample]:
    """Batches of this process's share of a test set, with labels if ``annotated``."""
    return build_semantic_test_loader(
        dataset,
        **config.semantic_input_arguments(cfg, train=False),
        **config.test_loader_arguments(cfg),
        share=(distributed.rank(), distributed.world_size()),
        annotated=annotated,
    )


def _check_classes(cfg: CfgNode, dataset: SemanticDataset) -> None:
    wanted, names = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, dataset.class_names
    if wanted != len(names):
        shown = f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {wanted}, but data set {dataset.source.name!r} has "
            f"{len(names)} classes ({shown}): set MODEL.SEM_SEG_HEAD.NUM_CLASSES {len(names)}"
        )
