"""Dice, HD95, Jaccard and ASSD of volumes that are segmented slice by slice."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_det.data.samples import Sample
from cascade_det.errors import DatasetError
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.semantic import predicted_labels
from cascade_det.evaluation.volumes import Labels, compare_volumes
from cascade_det.segmentation.output import SegmenterOutput

METRICS = ("Dice", "HD95", "Jaccard", "ASSD")  # as in Scores
_CONVENTIONS = ("volumes", "volumes_strict")
_PERCENT = np.array([100, 1, 100, 1])

Rows = npt.NDArray[np.float64]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VolumeSlice:
    """Where a sample belongs.

    Attributes:
        volume: its name.
        index: position in the volume, from 0.
        depth: how many slices the volume has.
        spacing: size of a voxel in mm, between slices, rows and columns; ``None`` if unknown.
    """

    volume: str
    index: int
    depth: int
    spacing: tuple[float, float, float] | None = None


@dataclass
class _State:
    """Scores of whole volumes, and the slices of the others."""

    # By volume: float64 [2, K - 1, 4], by both conventions.
    scores: dict[str, Rows] = field(default_factory=dict)
    # By volume and index: where it belongs, prediction and truth [H, W].
    slices: dict[str, dict[int, tuple[VolumeSlice, Labels, Labels]]] = field(default_factory=dict)


class VolumeEvaluator(Evaluator):
    """Scores of volumes by both conventions of ``cascade_det.evaluation.volumes``.

    A volume is scored and its slices are discarded as soon as it is complete.

    Args:
        class_names: of the classes ``0..K-1``; 0 is the background, which has no scores.
        truth_of: labels of the slice of a sample, integers ``[height, width]``.
        slice_of: where a sample belongs.
    """

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        truth_of: Callable[[Sample], Labels],
        slice_of: Callable[[Sample], VolumeSlice],
    ) -> None:
        self._class_names = tuple(class_names)
        self._truth_of = truth_of
        self._slice_of = slice_of
        self.reset()

    def reset(self) -> None:
        """Discard everything that was processed."""
        self._state = _State()

    def process(self, batch: Sequence[Sample], output: SegmenterOutput) -> None:
        """Add the predictions of a batch of slices.

        Args:
            batch: N samples.
            output: scores ``[K, height, width]`` of each.

        Raises:
            DatasetError: see ``add_volume``; or a slice was processed before.
        """
        smallest = np.min_scalar_type(len(self._class_names) - 1)
        for sample, scores in zip(batch, output.sem_seg, strict=True):
            prediction = predicted_labels(scores).astype(smallest)
            self._add_slice(self._slice_of(sample), prediction, self._truth_of(sample))

    def _add_slice(self, place: VolumeSlice, prediction: Labels, truth: Labels) -> None:
        slices = self._state.slices.setdefault(place.volume, {})
        if place.index in slices:
            raise DatasetError(f"volume {place.volume}: slice {place.index} was processed twice")
        slices[place.index] = place, prediction, truth
        if len(slices) == place.depth:
            del self._state.slices[place.volume]
            ordered = [slices[index] for index in sorted(slices)]
            _, predictions, truths = zip(*ordered, strict=True)
            self.add_volume(place.volume, predictions, truths, spacing=place.spacing)

    def add_volume(
        self,
        name: str,
        prediction: Labels | Sequence[Labels],
        truth: Labels | Sequence[Labels],
        *,
        spacing: Sequence[float] | None = None,
    ) -> None:
        """Add a whole volume.

        Args:
            name: no other volume's.
            prediction: integers ``[D, H, W]`` in ``0..K-1``, or D slices.
            truth: the same.
            spacing: see ``VolumeSlice``.

        Raises:
            DatasetError: there is a volume of this name, or prediction and truth differ in size.
        """
        if name in self._state.scores:
            raise DatasetError(f"volume {name}: it was processed before; give it another name")
        k = len(self._class_names)
        try:
            pair = np.asarray(prediction), np.asarray(truth)
            voxels = compare_volumes(*pair, k)
            sized = voxels if spacing is None else compare_volumes(*pair, k, spacing=spacing)
        except ValueError as error:
            raise DatasetError(f"volume {name}: {error}") from error
        both = [[one.published() for one in voxels], [one.strict() for one in sized]]
        self._state.scores[name] = np.array(both)

    def state(self) -> _State:
        """Scores of whole volumes, and the slices of the others."""
        return self._state

    def merge(self, states: Sequence[_State]) -> None:
        """Continue from the states of all processes; completes volumes that they shared.

        Raises:
            DatasetError: two processes had the same volume or slice.
        """
        self.reset()
        for state in states:
            if twice := self._state.scores.keys() & state.scores.keys():
                raise DatasetError(f"volume {min(twice)} was processed by two processes")
            self._state.scores.update(state.scores)
        for state in states:
            for slices in state.slices.values():
                for part in slices.values():
                    self._add_slice(*part)

    def evaluate(self) -> dict[str, Any]:
        """``{"volumes": {"Dice": ..., "Dice-<class>": ...}, "volumes_strict": {...}}``.

        ``volumes`` is by the published convention in voxels. ``volumes_strict`` is by the strict
        one, in mm for volumes with a spacing; know it of all or of none. Dice and Jaccard are in
        percent. ``Dice``, ``HD95``, ``Jaccard`` and ``ASSD`` are the means over the classes of a
        volume, then over the volumes; ``Dice-<class>`` and so on are means over the volumes;
        ``per_volume`` has both by the volume's name. A nan is left out of every mean; what has
        nothing else is nan. Volumes with missing slices are left out, with a warning.
        """
        for name, slices in self._state.slices.items():
            depth = next(iter(slices.values()))[0].depth
            logger.warning(
                "Volume %s is not scored: %d of %d slices were seen", name, len(slices), depth
            )
        names = sorted(self._state.scores)
        shape = (len(names), 2, len(self._class_names) - 1, len(METRICS))
        scores = np.array([self._state.scores[name] for name in names]).reshape(shape)
        results = {}
        for key, rows in zip(_CONVENTIONS, scores.swapaxes(0, 1) * _PERCENT, strict=True):
            classes, volumes = _mean(rows, 0), _mean(rows, 1)  # [K - 1, 4], [V, 4]
            results[key] = {
                **self._named(_mean(volumes, 0), classes),
                "per_volume": {
                    name: self._named(volumes[row], rows[row]) for row, name in enumerate(names)
                },
            }
        return results

    def _named(self, mean: Rows, classes: Rows) -> dict[str, float]:
        """Metrics by name, from means ``[4]`` and those of the classes ``[K - 1, 4]``."""
        return {
            **dict(zip(METRICS, mean.tolist(), strict=True)),
            **{
                f"{metric}-{name}": float(classes[label, column])
                for column, metric in enumerate(METRICS)
                for label, name in enumerate(self._class_names[1:])
            },
        }


def _mean(values: Rows, axis: int) -> Rows:
    """Mean of what is not nan; nan if there is nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that mean is nan
        mean: Rows = np.nanmean(values, axis=axis)
    return mean
