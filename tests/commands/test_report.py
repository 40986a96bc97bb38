"""The command on folders of evaluations and calibrations, and on what is neither."""

import json
import shutil

import cv2
import pytest
from page_dom import Page
from reported_runs import HOSTILE, make_data, noisy_results, write_run

from cascade_det.commands import eval_json
from cascade_det.commands.main import main
from cascade_det.evaluation import score_results
from cascade_det.evaluation.ground_truth import load_ground_truth
from cascade_det.files import write_csv

NAMES = ("cat", "dog")


@pytest.fixture
def case(tmp_path):
    """Data, and the runs a and b on them."""
    content = make_data(tmp_path / "data", NAMES)
    for name, seed in (("a", 1), ("b", 2)):
        found = noisy_results(content, seed=seed)
        write_run(tmp_path / name, tmp_path / "data", content, found)
    return tmp_path


def page_of(path):
    page = Page(path.read_text(encoding="utf-8"))
    page.assert_inert()
    return page


def report(*arguments):
    return main(["report", *map(str, arguments)])


def edit(folder, change):
    file = folder / "results.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_report_is_made_again_without_a_model(case):
    assert report(case / "a") == 0
    first = (case / "a" / "report.html").read_bytes()
    page = page_of(case / "a" / "report.html")
    assert len(page.all("img")) > 4
    assert report(case / "a", "--output", case / "other.html") == 0
    assert (case / "other.html").read_bytes() == first


def test_names_that_leave_the_image_folder_are_not_read(case):
    shutil.copytree(case / "data", case / "elsewhere")

    def move(content):
        first, second, *_ = content["analysis"]["worst_images"]
        first["file_name"] = str(case / "elsewhere" / first["file_name"])
        second["file_name"] = f"../elsewhere/{second['file_name']}"
        assert cv2.imread(str(case / "data" / second["file_name"])) is not None

    assert report(case / "a") == 0
    pictures = len(page_of(case / "a" / "report.html").all("img"))
    edit(case / "a", move)
    assert report(case / "a") == 0
    page = page_of(case / "a" / "report.html")
    assert len(page.all("img")) == pictures - 4  # two halves each
    assert page.text.count("leaves the image folder") == 2


def test_results_of_an_earlier_version_get_their_curves_from_the_predictions(case, capsys):
    assert report(case / "a") == 0
    whole = page_of(case / "a" / "report.html")

    def age(content):
        del content["analysis"]["curves"], content["data"], content["config"]
        for image in content["analysis"]["worst_images"]:
            for box in image["boxes"]:
                box.pop("detection", None)

    edit(case / "a", age)
    assert report(case / "a", "--output", case / "bare.html") == 0
    bare = page_of(case / "bare.html")
    assert "without curves" in bare.text
    assert bare.all("img") == []
    data = ["--json", case / "data" / "truth.json", "--images", case / "data"]
    assert report(case / "a", "--output", case / "again.html", *data) == 0
    again = page_of(case / "again.html")
    paths = [attrs["d"] for attrs in whole.all("path")]
    assert [attrs["d"] for attrs in again.all("path")] == paths
    assert [a["src"] for a in again.all("img")] == [a["src"] for a in whole.all("img")]
    assert report("--compare", case / "a", case / "b", "--output", case / "x.html") == 1
    assert "results of an earlier version. Give the annotations" in capsys.readouterr().err


def test_two_runs_side_by_side(case):
    assert report("--compare", case / "a", case / "b", "--output", case / "page.html") == 0
    page = page_of(case / "page.html")
    content = json.loads((case / "data" / "truth.json").read_text())
    coco_gt = load_ground_truth(content)
    aps = []
    for name in "ab":
        file = case / name / "inference" / "coco_instances_results.json"
        found = json.loads(file.read_text())
        aps.append(score_results(coco_gt, found, sorted(coco_gt.imgs))["bbox"])
    for metric in ("AP", "AP50", "AP75"):
        (row,) = (row for row in page.rows if row[0] == metric and len(row) == 4)
        assert row[1:3] == [f"{ap[metric]:.2f}" for ap in aps]
    for name in NAMES:
        (row,) = (row for row in page.rows if row[0] == name)
        assert row[2:4] == [f"{ap[f'AP-{name}']:.1f}" for ap in aps]
    assert report("--compare", case / "a", case / "a", "--output", case / "same.html") == 0
    same = page_of(case / "same.html")
    (row,) = (row for row in same.rows if row[0] == "AP" and len(row) == 4)
    assert row[3] == "+0.00 [+0.00, +0.00]"


def test_other_data_are_an_error_and_a_copy_of_the_same_is_not(case, capsys):
    other = make_data(case / "more", NAMES, seed=9)
    write_run(case / "c", case / "more", other, noisy_results(other))
    output = ["--output", case / "page.html"]
    assert report("--compare", case / "a", case / "c", *output) == 1
    assert "their AP cannot be compared" in capsys.readouterr().err
    shutil.copytree(case / "data", case / "copy")
    edit(case / "b", lambda r: r["data"].update(json_file=str(case / "copy" / "truth.json")))
    assert report("--compare", case / "a", case / "b", *output) == 0


def test_what_changed_since_is_an_error(case, capsys):
    output = ["--output", case / "page.html"]
    file = case / "b" / "inference" / "coco_instances_results.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found[: len(found) // 2]))
    assert report("--compare", case / "a", case / "b", *output) == 1
    assert "have changed since. Evaluate again." in capsys.readouterr().err
    found[0]["image_id"] = 99
    file.write_text(json.dumps(found))
    assert report("--compare", case / "a", case / "b", *output) == 1
    assert "prediction with an unknown 'image_id': number 1 (99)" in capsys.readouterr().err
    file.unlink()
    assert report("--compare", case / "a", case / "b", *output) == 1
    assert "An evaluation writes its predictions there" in capsys.readouterr().err
    edit(case / "a", lambda r: r["data"].update(images=5))
    assert report("--compare", case / "a", case / "a", *output) == 1
    assert "has 6 usable images now, and had 5" in capsys.readouterr().err
    (case / "data" / "truth.json").unlink()
    assert report("--compare", case / "a", case / "a", *output) == 1
    assert "which does not exist" in capsys.readouterr().err
    assert not (case / "page.html").exists()


def test_segmenters_are_not_compared(case, capsys):
    sem_seg = {"mIoU": 50.0, "fwIoU": 50.0, "mACC": 50.0, "pACC": 50.0}
    (case / "a" / "results.json").write_text(json.dumps({"sem_seg": sem_seg}))
    assert report("--compare", case / "a", case / "b", "--output", case / "page.html") == 1
    assert "is of a segmenter" in capsys.readouterr().err
    assert report(case / "a") == 0
    assert "Semantic segmentation (%)" in page_of(case / "a" / "report.html").text


def test_folders_that_are_neither(case, capsys):
    empty = case / "empty"
    empty.mkdir()
    for folder, message in (
        (empty, "has neither results.json of an evaluation nor calibration.json"),
        (case / "nothing", "is not a folder"),
        (case, f"has results of several data sets. Give one of {case / 'a'}, {case / 'b'}"),
    ):
        assert report(folder) == 1
        assert message in capsys.readouterr().err
    (empty / "results.json").write_text("[]")
    assert report(empty) == 1
    assert "has neither the key 'bbox' nor 'sem_seg'" in capsys.readouterr().err
    edit(case / "a", lambda r: r.update(analysis=3))
    assert report(case / "a") == 1
    assert "is not of an evaluation of this version" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a", "--compare", "b", "c"], ["--compare", "a", "b"]])
def test_arguments_that_do_not_go_together(arguments):
    with pytest.raises(SystemExit):
        report(*arguments)


def test_nothing_that_it_reads_is_replaced(case, capsys):
    before = (case / "a" / "results.json").read_bytes()
    assert report(case / "a", "--output", case / "a" / "results.json") == 1
    file = case / "b" / "inference" / "coco_instances_results.json"
    assert report("--compare", case / "a", case / "b", "--output", file) == 1
    truth = case / "data" / "truth.json"
    assert report(case / "a", "--output", truth) == 1
    assert report("--compare", case / "a", case / "b", "--output", truth) == 1
    assert capsys.readouterr().err.count("would replace") == 4
    assert (case / "a" / "results.json").read_bytes() == before


def test_scores_of_a_file_have_a_report_too(case):
    data = case / "data"
    predictions = case / "a" / "inference" / "coco_instances_results.json"
    arguments = ["--json", data / "truth.json", "--images", data, "--predictions", predictions]
    output = case / "scored"
    assert eval_json.main([str(a) for a in (*arguments, "--output", output)]) == 0
    first = (output / "report.html").read_bytes()
    assert len(page_of(output / "report.html").all("img")) > 4
    assert report(output) == 0
    assert (output / "report.html").read_bytes() == first
    assert report("--compare", case / "a", output, "--output", case / "page.html") == 0
    assert cv2.imread(str(data / "1.png")) is not None


RECORD = {
    "target": {"max_ap_drop": 0.5, "delta": 0.1, "metric": "bbox/AP", "loss": "boxes"},
    "setting": {"REDUNDANCY_IOU": 0.9, "GATES_OFF": [2]},
    "expected": {
        "AP": 50.0, "AP_change": -0.2, "AP_change_low": -0.4, "AP_change_high": 0.1, "work": 0.25
    },
    "images": {"chosen_on": 40, "reported_on": 41},
    "profiles": {"written": ["fast"], "left_out": {"quality": HOSTILE[2]}},
    "trials": 12,
    "machine": {"device": HOSTILE[1]},
    "weights": {"file": HOSTILE[0], "sha256": "1", "file_sha256": "2"},
    "data": {"name": HOSTILE[3], "images": 81},
}  # fmt: skip


@pytest.fixture
def calibration(tmp_path):
    folder = tmp_path / "exits"
    folder.mkdir()
    (folder / "calibration.json").write_text(json.dumps(RECORD))
    (folder / "exits.yaml").write_text(f"# {HOSTILE[0]}\nMODEL: {{}}\n")
    headers = ["AP (%)", "AP drop", "head FLOPs left", "ms/image (measured)", "chosen", "setting"]
    rows = [[50, 0.2, 0.25, 30, 1, "{}"], [49, 1.2, 0.1, None, 0, "{}"]]
    write_csv(folder / "front.csv", headers, rows)
    headers = [
        *("exits", "AP (%)", "AP change", "AP change low", "AP change high"),
        *("regions/image in stage 0", "head FLOPs left", "ms/image", "lost"),
    ]
    rows = [
        ["full cascade", 50.2, 0, 0, 0, 300, 1, 60, 0],
        ["chosen", 50, -0.2, -0.4, 0.1, 300, 0.25, 30, 0.01],
        ["random exits", 40, -10.2, -12, -8, 300, 0.25, None, 0.2],
    ]
    write_csv(folder / "comparison.csv", headers, rows)
    return folder


def test_a_calibration(calibration):
    assert report(calibration) == 0
    page = page_of(calibration / "report.html")
    assert "loses at most 0.5 points of bbox/AP" in page.text
    assert "the change is -0.20 points: the target is kept" in page.text
    assert "Gates that would cost more than they save are off: 2." in page.text
    assert ["AP change", "-0.200 [-0.400, +0.100]"] in page.rows
    assert ["chosen", "50.00", "-0.20 [-0.40, +0.10]", "300", "25.0", "30.0", "1.00"] in page.rows
    assert ["random exits", "40.00", "-10.20 [-12.00, -8.00]", "300", "25.0", "-", "20.00"] in (
        page.rows
    )
    marked = [attrs for attrs in page.all("tr") if attrs.get("class") == "marked"]
    assert len(marked) == 1
    # Over work and over time.
    assert len(page.all("figure")) == 2
    for name in HOSTILE[:4]:
        assert name in page.text


def test_a_calibration_is_not_compared(calibration, capsys):
    other = calibration.parent / "a.html"
    assert report("--compare", calibration, calibration, "--output", other) == 1
    assert "is of a calibration. --compare is for evaluations" in capsys.readouterr().err


def test_a_target_that_is_missed_says_so(calibration):
    record = {**RECORD, "expected": {**RECORD["expected"], "AP_change": -0.7}}
    (calibration / "calibration.json").write_text(json.dumps(record))
    assert report(calibration) == 0
    assert "the target is missed" in page_of(calibration / "report.html").text
    record = {**RECORD, "target": {"latency_ms": 25.0, "metric": "bbox/AP"}}
    (calibration / "calibration.json").write_text(json.dumps(record))
    assert report(calibration) == 0
    assert "30.0 ms were measured: the target is missed" in (
        page_of(calibration / "report.html").text
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("calibration.json", "{"),
        ("calibration.json", "[]"),
        ("calibration.json", '{"expected": {}}'),
        ("comparison.csv", ""),
        ("comparison.csv", "exits\nchosen\n"),
        ("front.csv", ""),
        ("front.csv", "a\nb\n"),
        ("front.csv", None),
        ("exits.yaml", None),
    ],
)
def test_damaged_calibrations(calibration, capsys, name, text):
    file = calibration / name
    file.unlink() if text is None else file.write_text(text)
    assert report(calibration) == 1
    said = capsys.readouterr().err
    expected = "there is no such file" if text is None else "not of a calibration of this version"
    assert expected in said
    assert not (calibration / "report.html").exists()


@pytest.mark.parametrize(
    ("target", "expected", "verdict"),
    [
        ({"max_ap_drop": 1.0}, {"change": -0.5}, "the change is -0.50 points: the target is kept"),
        (
            {"exit_rate": 0.6},
            {"later levels computed": 0.5},
            "50.0 % is skipped: the target is m",
        ),
        ({"latency_ms": 40.0}, {}, "30.0 ms were measured: the target is kept"),
        (
            {"risk": 0.1, "delta": 0.1},
            {"right pixels lost": 0.2},
            "20.00 % is lost: the target is m",
        ),
    ],
)
def test_a_calibration_of_a_segmenter(calibration, target, expected, verdict):
    record = {
        **RECORD,
        "setting": {"kind": HOSTILE[0]},
        "target": {**target, "metric": "sem_seg/mIoU"},
        "expected": {"decoder": HOSTILE[1], "mIoU (%)": 70.0, "change": 0.0, **expected},
    }
    (calibration / "calibration.json").write_text(json.dumps(record))
    columns = [
        *("decoder", "mIoU (%)", "change", "change low", "change high", "later levels computed"),
        *("decoder ms/image", "model ms/image", "model share", "right pixels lost", "chosen"),
    ]
    rows = [
        ["no exits", 71, 0, 0, 0, 1, 20, 60, 1, 0, 0],
        [HOSTILE[0], 70, -1, -2, 0, 0.5, 10, 30, 0.5, 0.02, 1],
    ]
    write_csv(calibration / "comparison.csv", columns, rows)
    assert report(calibration) == 0
    page = page_of(calibration / "report.html")
    assert verdict in page.text
    numbers = ["70.00", "-1.00 [-2.00, +0.00]", "50.0", "10.0", "30.0", "50.0", "2.00"]
    assert [HOSTILE[0], *numbers] in page.rows
    assert len(page.all("figure")) == 1
