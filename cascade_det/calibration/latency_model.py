"""A model of the milliseconds of a detector by the regions of each stage and by its masks.

S stages, M measured calls with the same number of images each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a call: a constant, and for each stage a fixed part and a part per region.

    The mask heads have a fixed part and a part per mask. The finest map has a part per tile, by
    how the tile is computed, if calls with a tile gate were measured.

    Attributes:
        constant: milliseconds that do not depend on exits, such as those of the backbone.
        per_call: S milliseconds that a stage takes, with the gate after it, if any region enters.
        per_region: S milliseconds for each region that enters a stage.
        device_name: of the measurement.
        batch_size: images per call.
        samples: M.
        spread: the median of the absolute relative errors on the fitted calls.
        per_mask_call: milliseconds of the mask heads if any detection gets a mask.
        per_mask: milliseconds for each mask.
        per_tile: milliseconds for each tile, by ``TILE_WORK``; empty without a tile gate, where the
            finest map is part of ``constant``.
    """

    constant: float
    per_call: tuple[float, ...]
    per_region: tuple[float, ...]
    device_name: str
    batch_size: int
    samples: int
    spread: float
    per_mask_call: float = 0.0
    per_mask: float = 0.0
    per_tile: tuple[float, ...] = ()

    @classmethod
    def fit(
        cls,
        entered: npt.ArrayLike,
        milliseconds: npt.ArrayLike,
        *,
        device_name: str,
        batch_size: int,
        masks: npt.ArrayLike = 0,
        mask_milliseconds: npt.ArrayLike = 0,
        tiles: npt.ArrayLike | None = None,
        map_milliseconds: npt.ArrayLike = 0,
    ) -> LatencyModel:
        """Fit by non-negative least squares of relative errors.

        The fixed part of a stage is only determined if some calls leave the stage empty. The mask
        heads have a time of their own and are fitted to it, as is what computes maps and tiles.

        Args:
            entered: ``[M, S]``, regions of all images of a call that entered each stage; they
                should differ widely.
            milliseconds: ``[M]``, of the whole call, better the median of several runs.
            device_name: of the measurement.
            batch_size: images per call.
            masks: ``[M]``, of all images of a call.
            mask_milliseconds: ``[M]``, the part of ``milliseconds`` in the mask heads.
            tiles: ``[M, 4]``, of all images of a call, by ``TILE_WORK``; ``None`` if no call has a
                tile gate.
            map_milliseconds: with tiles, ``[M]``, the part of ``milliseconds`` in the backbone,
                the RPN and tiles.

        Raises:
            ValueError: fewer than 2 S + 1 calls.
        """
        regions, times = np.asarray(entered, np.float64), np.asarray(milliseconds, np.float64)
        count, num_stages = regions.shape
        if count < 2 * num_stages + 1:
            raise ValueError(
                f"{count} measured calls for {num_stages} stages: measure at least "
                f"{2 * num_stages + 1}, with different numbers of regions"
            )
        made = np.broadcast_to(np.asarray(masks, np.float64), count)
        in_masks = np.broadcast_to(np.asarray(mask_milliseconds, np.float64), count)
        parts = np.hstack([np.ones((count, 1)), regions > 0, regions])
        in_maps, of_maps, map_solution = np.zeros(count), np.zeros((count, 1)), np.zeros(1)
        if tiles is not None:
            in_maps = np.asarray(map_milliseconds, np.float64)
            of_maps = np.hstack([np.ones((count, 1)), np.asarray(tiles, np.float64)])
            map_solution = _fit_maps(of_maps, in_maps)
        solution = _fit(parts, times - in_masks - in_maps)
        of_masks = np.stack([made > 0, made], axis=1)
        mask_solution = _fit(of_masks[made > 0], in_masks[made > 0]) if made.any() else np.zeros(2)
        predicted = parts @ solution + of_masks @ mask_solution + of_maps @ map_solution
        errors = np.abs(predicted / times - 1)
        return cls(
            constant=float(solution[0] + map_solution[0]),
            per_call=tuple(solution[1 : 1 + num_stages].tolist()),
            per_region=tuple(solution[1 + num_stages :].tolist()),
            device_name=device_name,
            batch_size=batch_size,
            samples=count,
            spread=float(np.median(errors)),
            per_mask_call=float(mask_solution[0]),
            per_mask=float(mask_solution[1]),
            per_tile=tuple(map_solution[1:].tolist()),
        )

    def predict(
        self, entered: npt.ArrayLike, masks: npt.ArrayLike = 0, tiles: npt.ArrayLike | None = None
    ) -> Any:
        """Milliseconds of calls.

        Args:
            entered: regions that enter each stage, ``[S]`` of one call or ``[S, N]`` of N calls.
            masks: a number, or ``[N]``.
            tiles: ``[4]`` or ``[4, N]``, by ``TILE_WORK``; counts only where ``per_tile`` is known.

        Returns:
            A float, or float64 ``[N]``.
        """
        regions, made = np.asarray(entered, np.float64), np.asarray(masks, np.float64)
        by_call = np.array(self.per_call) @ (regions > 0) + self.per_mask_call * (made > 0)
        by_region = np.array(self.per_region) @ regions + self.per_mask * made
        by_tile: Any = 0.0
        if self.per_tile and tiles is not None:
            by_tile = np.array(self.per_tile) @ np.asarray(tiles, np.float64)
        return self.constant + by_call + by_region + by_tile

    def per_image(
        self, entered: npt.ArrayLike, masks: npt.ArrayLike = 0, tiles: npt.ArrayLike | None = None
    ) -> float:
        """Mean milliseconds per image in batches of the measured size.

        Args:
            entered: ``[S, N]``, regions of N > 0 images that enter each stage. A last batch that is
                not full counts as part of a full one with as many regions per image.
            masks: a number for every image, or ``[N]``.
            tiles: ``[4, N]``, as of ``predict``.
        """
        regions = np.asarray(entered, np.float64)
        made = np.broadcast_to(np.asarray(masks, np.float64), regions.shape[1:])
        firsts = np.arange(0, regions.shape[1], self.batch_size)
        sizes = np.diff(firsts, append=regions.shape[1])
        stages, none = len(regions), np.zeros((0, regions.shape[1]))
        counts = np.vstack([regions, made, none if tiles is None else np.asarray(tiles)])
        in_batches = np.add.reduceat(counts, firsts, axis=1) * (self.batch_size / sizes)
        predicted = self.predict(
            in_batches[:stages],
            in_batches[stages],
            None if tiles is None else in_batches[stages + 1 :],
        )
        return float(predicted @ sizes / (sizes.sum() * self.batch_size))

    def __str__(self) -> str:
        stages = "; ".join(
            f"stage {stage}: {fixed:.1f} ms and {1000 * each:.0f} us per region"
            for stage, (fixed, each) in enumerate(zip(self.per_call, self.per_region, strict=True))
        )
        if self.per_mask_call or self.per_mask:
            stages += (
                f"; for masks {self.per_mask_call:.1f} ms and {1000 * self.per_mask:.0f} us each"
            )
        if self.per_tile:
            dense, opened, later, whole = (1000 * each for each in self.per_tile)
            stages += (
                f"; for each tile of the finest map {dense:.1f} us without a tile gate, "
                f"{opened:.1f} us where it is open, {later:.1f} us for regions alone, and "
                f"{whole:.1f} us for them in the whole map"
            )
        return (
            f"{self.constant:.1f} ms for a call with {self.batch_size} image(s) on "
            f"{self.device_name}, and for each stage that is entered, "
            f"{stages}. Fitted to {self.samples} calls; half of them are predicted to within "
            f"{100 * self.spread:.0f} %."
        )


def _fit_maps(
    parts: npt.NDArray[np.float64], times: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """As ``_fit``, of a constant and of tiles by ``TILE_WORK``.

    An open tile takes no less than one of the whole map. Tiles of a kind that no call had, too, are
    not expected to be free.
    """
    others = parts.copy()
    others[:, 1] += parts[:, 2]  # then the next column has what an open tile takes beyond
    solution = _fit(others, times)
    solution[2] += solution[1]
    unseen = ~parts.any(axis=0)
    solution[unseen] = solution[1]
    return solution


def _fit(parts: npt.NDArray[np.float64], times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Milliseconds of each part: non-negative, of least squared relative errors.

    Absolute errors would be dominated by a few long calls.

    Args:
        parts: ``[M, P]``.
        times: ``[M]``.
    """
    weighted = parts / times[:, None]
    scales = np.linalg.norm(weighted, axis=0)
    scales[scales == 0] = 1.0  # a stage that nothing ever entered
    solution: npt.NDArray[np.float64] = nnls(weighted / scales, np.ones(len(times)))[0] / scales
    return solution
