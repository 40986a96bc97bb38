"""Options and their errors."""

import json

import pytest

from cascade_det.benchmark.options import read_survivors
from cascade_det.errors import ConfigError


def test_survivors_are_rounded_up_to_budgets():
    survivors = read_survivors(["300", "146.7", "0.2"])
    assert survivors.per_stage == (300.0, 146.7, 0.2)
    # A budget of 0 would mean no limit.
    assert survivors.budgets == [300, 147, 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["300", "301"], "do not grow"),
        (["0", "0"], "not numbers of regions"),
        (["300", "-1"], "not numbers of regions"),
        (["inf", "3"], "not numbers of regions"),
        (["300", "nan"], "not numbers of regions"),
        (["300", "many"], "one number for each stage"),
        (["nowhere.json"], "neither numbers nor a results.json"),
    ],
)
def test_wrong_survivors_are_errors(values, words):
    with pytest.raises(ConfigError, match=words):
        read_survivors(values)


def test_survivors_of_an_evaluation(tmp_path):
    exits = {"images": 2, "stage0": {"entered_per_image": 300.0}}
    exits["stage1"] = {"entered_per_image": 100.5}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"exits": exits}))
    survivors = read_survivors([str(path)])
    assert survivors.per_stage == (300.0, 100.5)
    assert survivors.origin == str(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"exits": {"stage0": {}}}'])
def test_a_file_without_survivors_is_an_error(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"results\.json"):
        read_survivors([str(path)])
