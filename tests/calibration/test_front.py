"""The front: which points are chosen of it, its file, and its plot."""

import csv
import dataclasses
import json

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from recorded_trials import STAGE_FLOPS, make_trials

from cascade_det.calibration.bootstrap import Difference
from cascade_det.calibration.comparison import ComparedExits
from cascade_det.calibration.front import (
    FrontPoint,
    choose_points,
    front_point,
    read_front,
    spread_out,
    write_front,
)
from cascade_det.calibration.front_plot import plot_front
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.core.exits import ExitPolicy
from cascade_det.errors import CascadeDetError

LATENCY = LatencyModel(5.0, (1.0, 1.0, 1.0), (0.1, 0.1, 0.1), "some CPU", 1, 99, 0.0)
NOTHING_ELSE = {"profiles": {}, "tried": (), "compared": (), "chosen": ""}


def point(work, drop, milliseconds=None, **setting):
    return FrontPoint(setting, 57.5 - drop, drop, work, (work, work, work / 2), milliseconds)


def row(name, work, change, milliseconds=None):
    difference = Difference(change, 0.1, change - 0.2, change + 0.3)
    return ComparedExits(name, {}, {"AP": difference}, (), 0.0, work, work, 0.1, 0.0, milliseconds)


def test_a_trial_as_a_point():
    trials = make_trials(num_proposals=(70, 55))
    trial = trials.replay(ExitPolicy(num_stages=3, prune_thresholds=(0.5, 0.6)))
    setting = {"PRUNE_THRESHOLDS": (0.5, 0.6)}
    got = front_point(setting, trial, trials.full, LATENCY, chosen=True)
    entered = trial.entered.sum(axis=1)
    assert got.region_shares == pytest.approx(entered / 250)
    wanted_work = entered @ np.array(STAGE_FLOPS) / (250 * sum(STAGE_FLOPS))
    assert got.work == pytest.approx(wanted_work)
    assert got.ap == trial.metrics["AP"]
    assert got.drop == pytest.approx(trials.full.metrics["AP"] - got.ap)
    assert (got.setting, got.milliseconds, got.chosen) == (setting, None, True)
    assert got.predicted == LATENCY.per_image(trial.entered)
    full = front_point({}, trials.full, trials.full, LATENCY, chosen=False)
    assert full.region_shares == (1, 1, 1)


class TestChosenPoints:
    def test_by_hand(self):
        # Over log2 of work, from (-6, 0.9) to (-3, 0.1): the line is at 0.37 and 0.63 between.
        full, quality = point(1.0, 0.0), point(1 / 8, 0.1)
        knee, below = point(1 / 16, 0.15), point(1 / 32, 0.7)
        fast, too_fast = point(1 / 64, 0.9), point(1 / 128, 1.2)
        front = [full, point(1 / 2, 0.02), quality, knee, below, fast, too_fast]
        assert tuple(choose_points(front, 2, 5).values()) == (quality, knee, fast)
        # Without the knee nothing is above the line.
        front.remove(knee)
        assert choose_points(front, 2, 4)["balanced"] == quality

    def test_no_work_at_all(self):
        front = [point(1.0, 0.0), point(0.0, 0.9)]
        assert tuple(choose_points(front, 0, 1).values())[::2] == (front[0], front[1])

    def test_of_one(self):
        only = point(1.0, 0.0)
        assert tuple(choose_points([only], 0, 0).values()) == (only,) * 3


@pytest.mark.parametrize(("most", "works"), [(2, [0.1, 1.0]), (3, [0.1, 0.6, 1.0]), (9, None)])
def test_some_points_from_one_end_to_the_other(most, works):
    front = [point(work, 1 - work) for work in (1.0, 0.2, 0.6, 0.9, 0.1)]
    found = [p.work for p in spread_out(front, most)]
    assert found == (works or [0.1, 0.2, 0.6, 0.9, 1.0])


def test_the_file(tmp_path):
    path = tmp_path / "new" / "front.csv"
    setting = {"REDUNDANCY_IOU": 0.8, "PRUNE_THRESHOLDS": (0.02, 0.0)}
    chosen = dataclasses.replace(point(0.1, 0.05, 31.5, **setting), chosen=True, predicted=28.0)
    front = [point(1.0, 0.0), chosen]
    write_front(front, path)
    with path.open(newline="") as file:
        full, chosen = csv.DictReader(file)
    assert json.loads(full["setting"]) == {}
    assert json.loads(chosen["setting"]) == {**setting, "PRUNE_THRESHOLDS": [0.02, 0.0]}
    assert (full["chosen"], chosen["chosen"]) == ("0", "1")
    assert (full["ms/image (measured)"], chosen["ms/image (measured)"]) == ("", "31.5")
    assert (full["ms/image (predicted)"], chosen["ms/image (predicted)"]) == ("", "28.0")
    assert float(chosen["AP (%)"]) == 57.45
    assert float(chosen["AP drop"]) == 0.05
    assert float(chosen["head FLOPs left"]) == 0.1
    assert float(chosen["regions in stage 2"]) == 0.05


def test_a_file_is_read_as_it_was_written(tmp_path):
    front = [
        point(1.0, 0.0),
        dataclasses.replace(point(0.1, 0.05, 31.5, REDUNDANCY_IOU=0.8), chosen=True, predicted=2.0),
    ]
    for points in (
        front,
        [dataclasses.replace(p, metric="segm/AP", masks=7.5) for p in front],
    ):
        write_front(points, tmp_path / "front.csv")
        assert read_front(tmp_path / "front.csv") == points


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{}", "[1]"),
        ("{}", "{"),
        ("{}", "[" * 100_000),
        ("AP (%)", "AR (%)"),
        ("head FLOPs left", "work"),
        ("57.5,", "good,"),
        ("57.5,", ""),
    ],
)
def test_another_file_is_an_error_that_names_the_line(tmp_path, old, new):
    path = tmp_path / "front.csv"
    write_front([point(1.0, 0.0)], path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CascadeDetError, match=r"front\.csv, line 2: is not a row"):
        read_front(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"AP (%)\n"])
def test_a_file_without_rows_is_an_error(tmp_path, content):
    path = tmp_path / "front.csv"
    path.write_bytes(content)
    with pytest.raises(CascadeDetError, match=r"front\.csv: "):
        read_front(path)


class TestPlot:
    @pytest.fixture
    def drawn(self, monkeypatch):
        """The figures that are saved."""
        figures, save = [], Figure.savefig

        def keep(figure, *args, **kwargs):
            figures.append(figure)
            save(figure, *args, **kwargs)

        monkeypatch.setattr(Figure, "savefig", keep)
        return figures

    def test_one_panel_for_each_known_cost(self, tmp_path, drawn):
        path = tmp_path / "new" / "front.png"
        predicted = [dataclasses.replace(p, predicted=9.0) for p in (point(1, 0), point(0.1, 0.05))]
        plot_front(predicted, path, **NOTHING_ELSE)
        picture = cv2.imread(str(path))
        # What a model says is not held against what was measured.
        assert len(drawn[0].axes) == 1
        plot_front([point(1.0, 0.0, 90.0), point(0.1, 0.05, 40.0)], path, **NOTHING_ELSE)
        assert [axes.get_xlabel()[-14:] for axes in drawn[1].axes][1] == "(ms, measured)"
        assert cv2.imread(str(path)).shape[1] > 1.5 * picture.shape[1]

    def test_marks_are_where_they_belong(self, tmp_path, drawn):
        compared = [
            row("full cascade", 1.0, 0.0, 90.0),
            row("wanted", 0.2, -0.05, 45.0),
            row("1 stage", 0.33, -3.5, 50.0),
            row("oracle", 0.05, 0.0),
        ]
        front = [point(1.0, 0.0, 90.0), point(0.1, 0.05, 40.0), point(0.02, 0.5, 35.0)]
        # Two of these were not measured.
        front.append(dataclasses.replace(point(0.01, 0.6), predicted=1.0))
        tried = [dataclasses.replace(point(0.5, 2.0), predicted=60.0)]
        plot_front(
            front,
            tmp_path / "a.png",
            profiles={"fast": front[2]},
            tried=tried,
            compared=compared,
            chosen="wanted",
        )
        for axes, costs, seen in zip(drawn[0].axes, ((33, 2), (50, 35)), (4, 3), strict=True):
            lines = {line.get_label(): line for line in axes.get_lines()}
            assert lines["fewer stages or proposals"].get_xydata().tolist() == [[costs[0], -3.5]]
            assert lines["profile, by its name"].get_xydata().tolist() == [[costs[1], -0.5]]
            assert len(lines["front"].get_xydata()) == seen
            assert ("all trials" in lines) == ("oracles" in lines) == (seen == 4)
            (bar,) = axes.containers
            assert bar.get_label() == "wanted (95 %)"
            (segment,) = bar.lines[2][0].get_segments()
            np.testing.assert_allclose(segment[:, 1], [-0.25, 0.25])
            written = {note.get_text(): list(note.xy) for note in axes.texts}
            full = 90 if seen == 3 else 100
            assert written == {"full cascade": [full, 0], "fast": [costs[1], -0.5]}

    def test_the_legend_is_short_however_much_is_compared(self, tmp_path, drawn):
        names = [
            *("full cascade", "chosen", "pruning alone", "redundant at 0.9"),
            *("1 stage", "2 stages", "100 proposals", "fewer proposals alone", "random exits"),
            *("random drops", "oracle", "oracle of drops before stage 0", "prune 0.5 below 50th"),
        ]
        compared = [row(name, 0.9 - i / 20, -0.1 * i, 90.0 - i) for i, name in enumerate(names)]
        front = [point(1.0, 0.0, 90.0), point(0.1, 0.05, 40.0)]
        plot_front(
            front,
            tmp_path / "a.png",
            profiles={"quality": front[0], "fast": front[1]},
            tried=front,
            compared=compared,
            chosen="chosen",
        )
        named = [text.get_text() for text in drawn[0].legends[0].get_texts()]
        assert sorted(named) == sorted(
            [
                "all trials",
                "front",
                "profile, by its name",
                "chosen (95 %)",
                "one rule",
                "fewer stages or proposals",
                "random",
                "oracles",
            ]
        )

    def test_a_loss_far_below_is_inside(self, tmp_path, drawn):
        compared = [row("random drops", 0.1, -50.0)]
        options = {**NOTHING_ELSE, "compared": compared}
        plot_front([point(1.0, 0.0), point(0.1, 0.05)], tmp_path / "a.png", **options)
        low, high = drawn[0].axes[0].get_ylim()
        assert low < -50
        assert high > 0
