"""A model of the milliseconds of a detector by the regions that enter each stage.

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

    Attributes:
        constant: milliseconds that do not depend on exits, such as those of the backbone.
        per_call: S milliseconds that a stage takes if any region enters it.
        per_region: S milliseconds for each region that enters a stage.
        device_name: of the measurement.
        batch_size: images per call.
        samples: M.
        spread: the median of the absolute relative errors on the fitted calls.
    """

    constant: float
    per_call: tuple[float, ...]
    per_region: tuple[float, ...]
    device_name: str
    batch_size: int
    samples: int
    spread: float

    @classmethod
    def fit(
        cls,
        entered: npt.ArrayLike,
        milliseconds: npt.ArrayLike,
        *,
        device_name: str,
        batch_size: int,
    ) -> LatencyModel:
        """Fit by non-negative least squares of relative errors.

        The fixed part of a stage is only determined if some calls leave the stage empty.

        Args:
            entered: ``[M, S]``, regions of all images of a call that entered each stage; they
                should differ widely.
            milliseconds: ``[M]``, of the whole call, better the median of several runs.
            device_name: of the measurement.
            batch_size: images per call.

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
        parts = np.hstack([np.ones((count, 1)), regions > 0, regions])
        # Relative errors: a few long calls would dominate absolute ones.
        weighted = parts / times[:, None]
        scales = np.linalg.norm(weighted, axis=0)
        scales[scales == 0] = 1.0  # a stage that nothing ever entered
        solution = nnls(weighted / scales, np.ones(count))[0] / scales
        errors = np.abs(weighted @ solution - 1)
        return cls(
            constant=float(solution[0]),
            per_call=tuple(solution[1 : 1 + num_stages].tolist()),
            per_region=tuple(solution[1 + num_stages :].tolist()),
            device_name=device_name,
            batch_size=batch_size,
            samples=count,
            spread=float(np.median(errors)),
        )

    def predict(self, entered: npt.ArrayLike) -> Any:
        """Milliseconds of calls.

        Args:
            entered: regions that enter each stage, ``[S]`` of one call or ``[S, N]`` of N calls.

        Returns:
            A float, or float64 ``[N]``.
        """
        regions = np.asarray(entered, np.float64)
        by_call = np.array(self.per_call) @ (regions > 0)
        return self.constant + by_call + np.array(self.per_region) @ regions

    def per_image(self, entered: npt.ArrayLike) -> float:
        """Mean milliseconds per image in batches of the measured size.

        Args:
            entered: ``[S, N]``, regions of N > 0 images that enter each stage. A last batch that is
                not full counts as part of a full one with as many regions per image.
        """
        regions = np.asarray(entered, np.float64)
        firsts = np.arange(0, regions.shape[1], self.batch_size)
        sizes = np.diff(firsts, append=regions.shape[1])
        in_batches = np.add.reduceat(regions, firsts, axis=1) * (self.batch_size / sizes)
        return float(self.predict(in_batches) @ sizes / (sizes.sum() * self.batch_size))

    def __str__(self) -> str:
        stages = "; ".join(
            f"stage {stage}: {fixed:.1f} ms and {1000 * each:.0f} us per region"
            for stage, (fixed, each) in enumerate(zip(self.per_call, self.per_region, strict=True))
        )
        return (
            f"{self.constant:.1f} ms for a call with {self.batch_size} image(s) on "
            f"{self.device_name}, and for each stage that is entered, "
            f"{stages}. Fitted to {self.samples} calls; half of them are predicted to within "
            f"{100 * self.spread:.0f} %."
        )
