"""Targets and options that a calibration refuses before any work."""

import pytest

from cascade_det.calibration.risk_control import SampleTooSmallError
from cascade_det.calibration.target import Options, Target
from cascade_det.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["0 targets", "--max-ap-drop", "--risk"]),
        ({"max_ap_drop": 0.1, "risk": 0.02}, ["2 targets"]),
        ({"max_ap_drop": -0.1}, ["--max-ap-drop is -0.1"]),
        ({"max_ap_drop": float("nan")}, ["--max-ap-drop is nan"]),
        ({"latency_ms": 0.0}, ["--latency-ms is 0.0", "above 0"]),
        ({"latency_ms": float("inf")}, ["--latency-ms is inf"]),
        ({"exit_rate": 1.5}, ["--exit-rate is 1.5", "0 to 1"]),
        ({"risk": 0.0}, ["--risk is 0.0", "between 0 and 1"]),
        ({"risk": 1.0}, ["--risk is 1.0"]),
        ({"risk": 0.02, "delta": 0.0}, ["--delta is 0.0"]),
        ({"risk": 0.02, "delta": 1.0}, ["--delta is 1.0"]),
    ],
)
def test_targets_without_a_meaning(arguments, words):
    with pytest.raises(ConfigError) as caught:
        Target(**arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"images": 1}, "--images is 1"),
        ({"trials": 0}, "--trials is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"score": 1.5}, "--score-threshold is 1.5"),
        ({"score": float("nan")}, "--score-threshold is nan"),
    ],
)
def test_options_out_of_range(arguments, word):
    with pytest.raises(ConfigError, match=word):
        Options(**arguments)


def test_a_guarantee_needs_images():
    target = Target(risk=0.02, delta=0.1)
    with pytest.raises(SampleTooSmallError, match=r"at least 114 images .* are 113\."):
        target.check_images(113)
    target.check_images(114)
    with pytest.raises(SampleTooSmallError, match=r"at least 114 .*228 in all, .* are 227\."):
        target.check_images(227, halves=True)
    target.check_images(228, halves=True)
    with pytest.raises(SampleTooSmallError, match="3 are too few"):
        Target(max_ap_drop=0.1).check_images(3)
    Target(max_ap_drop=0.1).check_images(4)
