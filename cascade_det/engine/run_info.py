"""What a checkpoint stores about its run besides the weights."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.key import shown
from cascade_det.data.coco import CocoDataset
from cascade_det.data.semantic import SemanticDataset
from cascade_det.errors import CheckpointError
from cascade_det.parallel import distributed
from cascade_det.text import check_name

logger = logging.getLogger(__name__)

_CLASSES = ("class_names", "category_ids")
_MOST_CLASSES = 100_000


@dataclass
class RunInfo:
    """Enough to resume a run, and to name what it detects.

    Attributes:
        seed: of the data order and of everything random; a negative one is replaced by a random
            one.
        class_names: K names.
        category_ids: K ids that the training data set gives these classes.
        host: the host that trains, "standalone" or "detectron2".
    """

    seed: int
    class_names: list[str]
    category_ids: list[int]
    host: str

    def __post_init__(self) -> None:
        if self.seed < 0:
            self.seed = distributed.broadcast(secrets.randbelow(2**31))
            logger.info("SEED is negative: drew %d", self.seed)

    @classmethod
    def of(cls, cfg: CfgNode, dataset: CocoDataset | SemanticDataset, host: str) -> RunInfo:
        """For a configuration and the classes of a data set; the ids of labels are their values."""
        names = list(dataset.class_names)
        ids = dataset.category_ids if isinstance(dataset, CocoDataset) else range(len(names))
        return cls(cfg.SEED, names, list(ids), host)

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the seed of the resumed run.

        Raises:
            CheckpointError: it ran in another host, or its classes are not those of the data.
        """
        if (host := state.get("host", "standalone")) != self.host:
            raise CheckpointError(
                f"the run was trained by --host {host}, and cannot be resumed by --host "
                f"{self.host}; its weights can be used as MODEL.WEIGHTS in either"
            )
        _check_classes(state)
        if list(state["class_names"]) != self.class_names:
            raise CheckpointError(
                f"the checkpoint has the classes {', '.join(state['class_names'])}; the data have "
                f"{', '.join(self.class_names)}"
            )
        seed = state["seed"]
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise CheckpointError(f"its seed is {shown(seed)}, not a whole number from 0 on")
        self.seed = seed


def usable_run_info(run: Any, file: str | Path) -> dict[str, Any]:
    """The entry ``run`` of a file of weights, without class names that cannot be used.

    Either both the names and the ids of the classes are there, and safe to show, or neither. The
    log warns of classes that are left out: the weights are as good without them.

    Args:
        run: the entry, from a file that may come from a stranger; ``None`` where it is missing.
        file: for the warnings.
    """
    if not isinstance(run, dict):
        if run is not None:
            logger.warning("%s: its entry 'run' is ignored, since it is not a dict", file)
        return {}
    try:
        if run.keys() & _CLASSES:
            _check_classes(run)
    except CheckpointError as error:
        logger.warning("%s: its class names are ignored: %s", file, error)
        return {name: value for name, value in run.items() if name not in _CLASSES}
    return run


def class_labels(
    run: Mapping[str, Any], num_classes: int, weights: str
) -> tuple[list[str], list[int]]:
    """Names and category ids of a model's classes.

    Args:
        run: of its checkpoint, from :func:`usable_run_info`.
        num_classes: of the model.
        weights: the checkpoint, for a warning.

    Returns:
        Those of the checkpoint; or ``class 0``, ... and ``1``, ... where it names another number.
    """
    names, ids = (list(run.get(key, ())) for key in _CLASSES)
    if len(names) == num_classes:
        return names, ids
    logger.warning("%s does not name %d classes", weights, num_classes)
    return [f"class {i}" for i in range(num_classes)], list(range(1, num_classes + 1))


def _check_classes(run: Mapping[str, Any]) -> None:
    """Check that a checkpoint names its classes, and gives each a different id.

    Raises:
        CheckpointError: it does not.
    """
    names, ids = (_one_per_class(run, key) for key in _CLASSES)
    for number, name in enumerate(names):
        try:
            check_name(name)
        except ValueError as error:
            raise CheckpointError(f"class_names, number {number}: {error}") from error
    wrong = [i for i in ids if type(i) is not int or not -(2**63) <= i < 2**63]
    if wrong:
        raise CheckpointError(f"category_ids has {shown(wrong[0])}, which is not a whole number")
    if len(ids) != len(names) or len(set(ids)) != len(ids):
        raise CheckpointError(
            f"category_ids has {len(set(ids))} different ids for {len(names)} classes"
        )


def _one_per_class(run: Mapping[str, Any], key: str) -> list[Any]:
    values = run.get(key)
    if not isinstance(values, (list, tuple)) or len(values) > _MOST_CLASSES:
        raise CheckpointError(f"{key} is {shown(values)}, not a list of one value per class")
    return list(values)
