"""The points of a front that become profiles: each keeps its promise, and no two are equal."""

from __future__ import annotations

from collections.abc import Mapping

from cascade_det.calibration.front import FrontPoint
from cascade_det.calibration.search import Setting
from cascade_det.calibration.target import FAST_DROP, QUALITY_DROP

# The most percent points of AP that each profile may lose.
PROMISES = {"quality": QUALITY_DROP, "balanced": FAST_DROP, "fast": FAST_DROP}


def kept_profiles(
    points: Mapping[str, FrontPoint], chosen: Setting
) -> tuple[dict[str, FrontPoint], dict[str, str]]:
    """Check the point of each name in ``PROMISES``.

    Args:
        points: by name, on the images that judge.
        chosen: the setting chosen for the target, which has its own file.

    Returns:
        The profiles to write, and the reasons why the others are left out, by name.
    """
    profiles: dict[str, FrontPoint] = {}
    left_out: dict[str, str] = {}
    settings = {"exits": chosen} if chosen else {}
    for name, most in PROMISES.items():
        point = points[name]
        twin = next((other for other, s in settings.items() if s == point.setting), None)
        if not point.setting:
            left_out[name] = "no setting that was tried saves work at so small a loss"
        elif twin is not None:
            left_out[name] = f"it is the same as {twin}.yaml"
        elif point.drop > most:
            left_out[name] = (
                f"it loses {point.drop:.2f} points of {point.metric}, not at most {most:g}"
            )
        else:
            profiles[name] = point
            settings[name] = point.setting
    return profiles, left_out
