"""The points of a front that become profiles: each keeps its promise, and no two are equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cascade_det.calibration.front import FAST_DROP, QUALITY_DROP, FrontPoint
from cascade_det.calibration.search import Setting

# The most percent points of AP that each profile may lose.
PROMISES = {"quality": QUALITY_DROP, "balanced": FAST_DROP, "fast": FAST_DROP}


@dataclass
class Profiles:
    """The profiles to write, and why the others are left out.

    Attributes:
        written: points on the images that they were not chosen on, by name.
        left_out: reasons, by name.
    """

    written: dict[str, FrontPoint] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, points: Mapping[str, FrontPoint], chosen: Setting) -> Profiles:
        """Check the point of each name in ``PROMISES``.

        Args:
            points: by name, on the images that they were not chosen on.
            chosen: the setting chosen for the target, which has its own file.
        """
        profiles = cls()
        settings = {"exits": chosen} if chosen else {}
        for name, most in PROMISES.items():
            point = points[name]
            twin = next((other for other, s in settings.items() if s == point.setting), None)
            if not point.setting:
                reason = "no setting that was tried saves work at so small a loss"
            elif twin is not None:
                reason = f"it is the same as {twin}.yaml"
            elif point.drop > most:
                reason = (
                    f"on the images that it was not chosen on it loses {point.drop:.2f} points of "
                    f"AP, not at most {most:g}"
                )
            else:
                profiles.written[name] = point
                settings[name] = point.setting
                continue
            profiles.left_out[name] = reason
        return profiles
