"""Profiles: each keeps its promise where it was not chosen, and no two are alike."""

from cascade_det.calibration.front import FrontPoint
from cascade_det.calibration.profiles import kept_profiles


def point(drop, **setting):
    return FrontPoint(setting, 60.0 - drop, drop, 0.5, (1.0, 0.5, 0.5))


def judged(quality, balanced, fast, chosen=None):
    points = {"quality": quality, "balanced": balanced, "fast": fast}
    return kept_profiles(points, chosen or {})


CAREFUL, MIDDLE, QUICK = ({"REGION_BUDGET": (n, 0, 0)} for n in (300, 100, 50))


def test_three_that_hold():
    points = point(0.1, **CAREFUL), point(0.5, **MIDDLE), point(1.0, **QUICK)
    written, left_out = judged(*points)
    assert tuple(written.values()) == points
    assert left_out == {}


def test_a_broken_promise_is_not_written():
    written, left_out = judged(point(0.11, **CAREFUL), point(-2.0, **MIDDLE), point(4.1, **QUICK))
    assert [*written] == ["balanced"]
    assert "loses 0.11 points of AP, not at most 0.1" in left_out["quality"]
    assert "loses 4.10 points of AP, not at most 1" in left_out["fast"]


def test_of_several_that_are_alike_one_is_written():
    written, left_out = judged(*[point(0.0, **CAREFUL)] * 3)
    assert [*written] == ["quality"]
    assert left_out == dict.fromkeys(("balanced", "fast"), "it is the same as quality.yaml")
    written, left_out = judged(point(0.0, **CAREFUL), *[point(0.5, **QUICK)] * 2, chosen=QUICK)
    assert [*written] == ["quality"]
    assert left_out["fast"] == "it is the same as exits.yaml"


def test_what_breaks_the_promise_of_one_may_keep_that_of_another():
    written, left_out = judged(*[point(0.3, **CAREFUL)] * 3)
    assert [*written] == ["balanced"]
    assert set(left_out) == {"quality", "fast"}


def test_no_exits_are_no_profile():
    written, left_out = judged(*[point(0.0)] * 3)
    assert written == {}
    assert all("no setting that was tried" in reason for reason in left_out.values())
