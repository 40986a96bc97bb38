"""The page of an evaluation: its numbers, its structure, and names that try to break out of it."""

import base64
import copy
import json
import math

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_dom import Page
from reported_runs import HOSTILE, make_data, noisy_results, write_run

from cascade_det.errors import CascadeDetError
from cascade_det.report.pages.bar_charts import bar_chart, interval_chart, row_chart
from cascade_det.report.pages.evaluation import write_evaluation_page
from cascade_det.report.pages.line_charts import Line, line_chart
from cascade_det.report.pages.page import Grid, Heat, Plots, Section, render
from cascade_det.report.pages.pictures import side_by_side
from cascade_det.report.pages.training import read_metrics
from cascade_det.text import printable

NAMES = ("cat", "dog", "owl")


def page_of(folder, **options):
    return Page(write_evaluation_page(folder, **options).read_text(encoding="utf-8"))


def reader(data):
    return lambda name: cv2.imread(str(data / name))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an evaluation, of its data, and the results."""
    folder, data = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("data")
    content = make_data(data, NAMES)
    results = write_run(folder, data, content, noisy_results(content))
    lines = [{"iteration": i, "total_loss": 3 - i / 10, "lr": 0.1} for i in range(10)]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return folder, data, results


def test_numbers_are_those_of_the_results(run):
    folder, data, results = run
    page = page_of(folder, read_image=reader(data))
    for row in results["analysis"]["per_class"]:
        (cells,) = (r for r in page.rows if r[0] == row["class"] and len(r) == 9)
        best = row["best"]
        numbers = [row[k] for k in ("AP", "AP50", "precision", "recall", "F1")]
        assert cells[1] == str(row["objects"])
        assert cells[2:] == [*(f"{x:.1f}" for x in [*numbers, best["F1"]]), f"{best['score']:.2f}"]
    counts = results["analysis"]["confusion_matrix"]["counts"]
    matrix = [row for row in page.rows if row[0] in (*NAMES, "background") and len(row) == 5]
    assert [[int(cell or 0) for cell in row[1:]] for row in matrix] == counts
    assert ["SOLVER.BASE_LR", "0.001", "0.02"] in page.rows
    assert ["device_name", "test"] in page.rows
    ap = [row for row in page.rows if row[0] == f"{results['bbox']['AP']:.1f}"]
    assert ap[0][3] == f"{results['bbox']['AP90']:.1f}"
    assert ["computed", "215.9", "25.4"] in page.rows  # tiles
    assert "chosen on these same images" in page.text
    # Of a part that was not measured.
    assert "unknown" in page.text


def test_the_table_of_contents_leads_to_every_section(run):
    folder, data, _ = run
    page = page_of(folder, read_image=reader(data))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids) >= 10
    assert [attrs["href"] for attrs in page.all("a")] == [f"#{key}" for key in ids]
    page.assert_inert()
    assert {"curves", "confusion", "worst", "exits", "latency", "training"} <= set(ids)


def test_pictures_are_the_worst_images_with_objects_and_detections(run):
    folder, data, results = run
    page = page_of(folder, read_image=reader(data))
    worst = results["analysis"]["worst_images"]
    assert len(page.all("img")) == 2 * len(worst) > 4
    first = page.all("img")[0]["src"].partition(",")[2]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(first), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[:2] == (270, 360)  # Enlarged three times.
    assert picture.shape[1] == int(page.all("img")[0]["width"])


def test_colours_tell_what_was_found_and_missed():
    def box(kind, left, **more):
        return {"kind": kind, "class": "a", "bbox": [left, 10, 20, 60], **more}

    found = box("found", 5, detection={"class": "a", "bbox": [6, 12, 22, 60], "score": 0.9})
    boxes = [found, box("false positive", 40, score=0.6), box("missed", 80)]
    image = np.full((90, 120, 3), 128, np.uint8)
    picture = side_by_side(image, {"boxes": boxes}, "x")
    halves = [
        cv2.imdecode(
            np.frombuffer(base64.b64decode(source.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR
        ).astype(int)
        for source in picture.sources
    ]

    def colored(half, left):
        """Mean blue, green and red of the left border of a box, below its label."""
        return half[120:200, 3 * left].mean(axis=0)

    objects, detections = halves
    assert (np.abs(objects - 128).max(axis=(0, 2))[3 * 40 - 9 : 3 * 40 + 9] < 30).all()
    blue, green, red = colored(objects, 5)
    assert green > red + 30
    blue, green, red = colored(objects, 80)
    assert min(green, red) > blue + 30
    blue, green, red = colored(detections, 6)
    assert green > red + 30
    blue, green, red = colored(detections, 40)
    assert red > green + 30


def test_large_images_become_small_ones():
    image = np.zeros((3000, 4000, 3), np.uint8)
    picture = side_by_side(image, {"boxes": []}, "x")
    assert (picture.width, picture.height) == (560, 420)
    thin = side_by_side(np.zeros((1, 5000, 3), np.uint8), {"boxes": []}, "x")
    assert (thin.width, thin.height) == (560, 1)


def test_hostile_names_change_no_structure(tmp_path):
    shapes = []
    for names in (HOSTILE, [f"class {i}" for i in range(len(HOSTILE))]):
        folder, data = tmp_path / str(len(shapes)), tmp_path / f"data{len(shapes)}"
        content = make_data(data, names)
        for image, name in zip(content["images"], names, strict=False):
            image["file_name"] = name
        found = noisy_results(content)
        more = {
            "notes": [names[0], names[2]],
            "data": {"name": names[1], "json_file": names[0]},
            "config": {"MODEL.WEIGHTS": ["", names[2]], names[4]: [None, names[1]]},
        }
        write_run(folder, data, content, found, **more)
        grey = np.full((90, 120, 3), 128, np.uint8)
        page = page_of(folder, read_image=lambda name, grey=grey: grey)
        page.assert_inert()
        shapes.append(page.shape())
        for name in names:
            assert printable(name) in page.text
        assert "\u202e" not in page.text
    assert shapes[0] == shapes[1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_any_text_is_shown_as_it_is(name, other):
    def of(first, second):
        chart = row_chart(first, [second], [(first, "blue", [1.0])], x_label=second)
        blocks = [first, Grid(second, (first, second), [(second, first)]), Plots([chart])]
        blocks.append(Heat.of([first, second], [[1, 2], [3, 4]], first))
        return Page(render(first, [(first, second)], [Section("a", second, blocks)]))

    page = of(name, other)
    page.assert_inert()
    assert page.shape() == of("x", "y").shape()
    assert page.rows[1] == [_normal(other), _normal(name)]


def _normal(text):
    """As a parser gives text back: some characters end lines."""
    return printable(text, lines=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r["analysis"].update(per_class=5),
        lambda r: r["analysis"]["curves"].pop("scores"),
        lambda r: r.update(config=[1]),
        lambda r: r["stages"]["stage0"].pop("AP"),
        lambda r: r["latency"].update(parts={"a": 3}),
        lambda r: r.update(data=3),
    ],
)
def test_broken_results_are_an_error_and_leave_the_old_page(run, tmp_path, edit):
    _, _, results = run
    results = copy.deepcopy(results)
    edit(results)
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(CascadeDetError, match="is not of an evaluation of this version"):
        write_evaluation_page(tmp_path, results=results)
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', "[" * 5000])
def test_other_files_are_no_results(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(CascadeDetError, match=r"results.json: (is not JSON|has neither)"):
        write_evaluation_page(tmp_path)
    with pytest.raises(CascadeDetError, match="there is no such file"):
        write_evaluation_page(tmp_path / "nothing")


def test_images_that_are_gone_cost_only_their_pictures(run, tmp_path):
    folder, data, results = run
    target = tmp_path / "page.html"
    page = page_of(folder, path=target)
    assert page.all("img") == []
    assert "no folder of images is known" in page.text

    def fail_for_one(name):
        if name == results["analysis"]["worst_images"][0]["file_name"]:
            raise OSError("gone")
        return reader(data)(name)

    page = page_of(folder, path=target, read_image=fail_for_one)
    assert len(page.all("img")) == 2 * (len(results["analysis"]["worst_images"]) - 1)
    assert "1 images cannot be shown" in page.text


def test_results_without_curves_or_anything_else(run, tmp_path):
    _, _, results = run
    older = copy.deepcopy(results)
    del older["analysis"]["curves"]
    page = page_of(tmp_path, results=older)
    assert "of an earlier version, without curves" in page.text
    page = page_of(tmp_path, results={"bbox": {}, "analysis": {}, "notes": ["no annotations"]})
    assert "no annotations" in page.text


def test_many_classes_keep_the_page_small():
    size = 200
    counts = np.random.default_rng(0).integers(0, 9, (size, size)).tolist()
    heat = Heat.of([f"class {i}" for i in range(size)], counts, "detected as")
    assert len(heat.rows) == len(heat.classes) == 30
    assert heat.classes[-1] == "class 199"
    wrong = [sum(row) - row[i] for i, row in enumerate(counts[:-1])]
    worst = sorted(range(size - 1), key=lambda i: -wrong[i])[:29]
    assert {name for name, _ in heat.rows[:-1]} == {f"class {i}" for i in worst}


def test_lines_of_metrics_that_are_damaged_or_repeated(tmp_path):
    file = tmp_path / "metrics.json"
    entries = [{"iteration": i, "a": float(i)} for i in (0, 1, 2, 1)]
    entries[-1]["a"] = 7.0  # Trained again after a kill.
    lines = [*map(json.dumps, entries), '{"iteration": 3, "a": NaN}', '{"iter', "3", '{"a": 1}']
    file.write_text("\n".join(lines))
    series, broken = read_metrics(file)
    assert broken == 3
    assert series["a"][:3] == [(0, 0.0), (1, 7.0), (2, 2.0)]
    assert math.isnan(series["a"][3][1])


class TestCharts:
    def test_positions_follow_the_axes(self):
        points = [(0, 0), (50, 100), (100, 25), (70, math.nan)]
        line = Line("a", points, "blue", dots="all")
        chart = line_chart("t", [line], x_label="", y_label="", x_range=(0, 100), y_range=(0, 100))
        dots = [(mark.x, mark.y) for mark in chart.marks if mark.kind == "dot"]
        middle = (chart.left + chart.right) / 2
        height = chart.bottom - chart.top
        assert dots == [
            (chart.left, chart.bottom),
            (middle, chart.top),
            (chart.right, pytest.approx(chart.bottom - height / 4, abs=0.06)),
        ]
        assert {tick.text: tick.at for tick in chart.x_ticks}["100"] == chart.right

    def test_a_decade_has_one_length(self):
        line = Line("", [(1, 0), (10, 0), (100, 0), (0, 0)], "blue", dots="only")
        chart = line_chart("t", [line], x_label="", y_label="", x_range=(1, 100), log_x=True)
        left, middle, right = (mark.x for mark in chart.marks)
        assert middle - left == pytest.approx(right - middle, abs=0.11)

    def test_bars_are_as_long_as_their_values(self):
        values = [1.0, 4.0, math.nan]
        upright = bar_chart("t", list("abc"), [("x", "blue", values)], y_label="")
        heights = [mark.height for mark in upright.marks if mark.kind == "bar"]
        assert heights == [pytest.approx(heights[1] / 4, abs=0.2), heights[1], 0]
        stacked = bar_chart(
            "t", ["a"], [("x", "blue", [1.0]), ("y", "red", [2.0])], y_label="", stacked=True
        )
        first, second = (mark for mark in stacked.marks if mark.kind == "bar")
        assert second.y + second.height == pytest.approx(first.y, abs=0.11)
        assert second.height == pytest.approx(2 * first.height, abs=0.2)
        rows = row_chart("t", list("abc"), [("x", "blue", values)], x_label="")
        widths = [mark.width for mark in rows.marks if mark.kind == "bar"]
        assert widths == [pytest.approx(widths[1] / 4, abs=0.1), widths[1]]

    def test_an_interval_is_coloured_if_it_leaves_zero_out(self):
        values = [(1, 0.5, 2), (-1, -2, -0.5), (1, -1, 3), (math.nan, 0, 0)]
        chart = interval_chart("t", list("abcd"), values, x_label="")
        dots = [mark for mark in chart.marks if mark.kind == "dot"]
        assert [dot.color for dot in dots] == ["green", "red", "grey"]
        assert dots[0].x == dots[2].x > dots[1].x

    def test_nothing_to_draw(self):
        assert line_chart("t", [Line("", [], "blue")], x_label="", y_label="").marks == []
        assert row_chart("t", [], [("x", "blue", [])], x_label="").marks == []


def test_of_many_classes_the_common_ones_have_charts(tmp_path):
    names = [f"class {i:02d}" for i in range(40)]
    content = make_data(tmp_path / "data", names, images=30)
    results = write_run(tmp_path, tmp_path / "data", content, noisy_results(content))
    page = page_of(tmp_path)
    counts = {row["class"]: row["objects"] for row in results["analysis"]["per_class"]}
    shown = [text[:8] for text in page.texts if ": AP " in text and " objects" in text]
    shown = list(dict.fromkeys(shown))
    assert len(shown) == 12
    least = min(counts[name] for name in shown)
    assert all(counts[name] <= least for name in counts.keys() - set(shown))
    aps = {row["class"]: row["AP"] for row in results["analysis"]["per_class"]}
    assert [aps[name] for name in shown] == sorted(aps[name] for name in shown)
