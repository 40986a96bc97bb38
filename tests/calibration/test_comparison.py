"""The comparison of exits: which rows there are, their arithmetic, the table and the file."""

import csv

import numpy as np
import pytest
from recorded_trials import STAGE_FLOPS, make_trials

from cascade_det.calibration.bootstrap import paired_bootstrap
from cascade_det.calibration.comparison import (
    baselines,
    compare,
    format_comparison,
    write_comparison,
)
from cascade_det.core.exits import ExitPolicy

TIMES = {"full cascade": 50.0, "pruning": 40.25}
PRUNING = {"prune_thresholds": (0.5, 0.6)}


@pytest.fixture(scope="module")
def trials():
    return make_trials(seeds=(3, 4), num_proposals=(70, 55))


@pytest.fixture(scope="module")
def policies():
    return {
        "pruning": ExitPolicy(num_stages=3, **PRUNING),
        "before": ExitPolicy(num_stages=3, proposal_threshold=0.5),
    }


@pytest.fixture(scope="module")
def rows(trials, policies):
    like = trials.replay(policies["pruning"])
    return compare(trials, {**policies, **baselines(trials, like)}, TIMES, rounds=40)


def by_name(rows):
    return {row.name: row for row in rows}


def test_all_baselines_are_there(rows):
    assert [row.name for row in rows] == [
        "full cascade",
        "pruning",
        "before",
        "1 stage",
        "2 stages",
        "50 proposals",  # there are no more than 70
        "random exits",
        "random drops",
        "oracle of drops",
        "oracle of drops before stage 0",
        "oracle",
        "oracle, drops before stage 0",
    ]


def test_metrics_of_a_policy(rows, trials, policies):
    row, trial = by_name(rows)["pruning"], trials.replay(policies["pruning"])
    assert row.metrics == trial.metrics
    wanted = paired_bootstrap(trials.full.matched, trial.matched, rounds=40)
    assert row.differences == wanted
    entered = trial.entered.sum(axis=1)
    assert row.entered == tuple(entered / 4)
    assert 0 < entered[2] < entered[1] < entered[0] == 250
    assert row.later_skipped == pytest.approx(1 - (entered[1] + entered[2]) / 500)
    assert row.regions_left == pytest.approx(entered.sum() / 750)
    flops = sum(n * f for n, f in zip(entered.tolist(), STAGE_FLOPS, strict=True))
    assert row.gigaflops == pytest.approx(flops / 4 / 1e9)
    assert row.work == pytest.approx(flops / (250 * sum(STAGE_FLOPS)))
    assert row.lost == pytest.approx(np.mean(trial.lost))
    assert row.milliseconds == 40.25


def test_the_trivial_rows(rows):
    named = by_name(rows)
    full = named["full cascade"]
    assert (full.later_skipped, full.regions_left, full.work, full.lost) == (0, 1, 1, 0)
    assert full.milliseconds == 50.0
    assert {(d.value, d.low, d.high) for d in full.differences.values()} == {(0, 0, 0)}
    assert named["1 stage"].entered == (62.5, 0, 0)
    assert named["1 stage"].later_skipped == 1
    assert named["2 stages"].entered == (62.5, 62.5, 0)
    assert named["2 stages"].later_skipped == 0.5
    assert named["50 proposals"].entered == (50, 50, 50)
    assert named["50 proposals"].milliseconds is None


def test_random_exits_are_as_many_as_those_of_the_chosen_policy(rows):
    named = by_name(rows)
    for name in ("random exits", "random drops"):
        assert named[name].entered == pytest.approx(named["pruning"].entered, abs=0.5)
    assert named["random drops"].metrics != named["random exits"].metrics


def test_the_oracle_of_drops_loses_nothing_and_the_other_does_less(rows):
    named = by_name(rows)
    for suffix, drops in ((" before stage 0", "oracle, drops before stage 0"), ("", "oracle")):
        row, settled = named[f"oracle of drops{suffix}"], named[drops]
        assert row.differences["AP"].value == row.lost == 0
        assert (row.differences["AP"].low, row.differences["AP"].high) == (0, 0)
        assert settled.entered[0] == row.entered[0]
        assert settled.entered[1] < row.entered[1] < 62.5
    assert named["oracle of drops before stage 0"].entered[0] < 62.5


def test_the_table(rows):
    lines = format_comparison(rows).splitlines()
    assert len(lines) == 3 + len(rows)  # with two lines of headers
    line = next(line for line in lines if line.startswith("pruning"))
    row = by_name(rows)["pruning"]
    change = row.differences["AP"]
    for text in (
        f"{row.metrics['AP90']:.2f}",
        f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]",
        " / ".join(f"{number:.0f}" for number in row.entered),
        f"{100 * row.later_skipped:.1f}",
        "40.2",
    ):
        assert text in line
    assert len({len(line.rstrip()) for line in lines[3:]}) == 1, "the last column is ragged"


def test_the_file(rows, tmp_path):
    path = tmp_path / "new" / "comparison.csv"
    write_comparison(rows, path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["exits"] for line in read] == [row.name for row in rows]
    for line, row in zip(read, rows, strict=True):
        assert float(line["AP75 (%)"]) == row.metrics["AP75"]
        assert float(line["AP change low"]) == row.differences["AP"].low
        assert float(line["AP90 change"]) == row.differences["AP90"].value
        assert float(line["regions/image in stage 2"]) == row.entered[2]
        assert float(line["later work skipped"]) == row.later_skipped
        assert line["ms/image"] == ("" if row.milliseconds is None else str(row.milliseconds))
