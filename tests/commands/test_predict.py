"""What predict.py reads and writes, with a detector that needs no weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from cascade_det.commands import prediction, prediction_files
from cascade_det.commands.file_stems import UniqueStems
from cascade_det.data.given_files import find_images
from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.report.colors import class_color
from cascade_det.streams.sources import find_sources

ROOT = Path(__file__).resolve().parents[2]


ONE_BOX = ArrayDetections(
    boxes=np.array([[1.0, 2.0, 11.0, 22.0]], np.float32),
    scores=np.array([0.75], np.float32),
    classes=np.array([0]),
    exit_stages=np.array([1]),
)


class Finder:
    """Finds one box in every image, or what it is given; ``before(name)`` is called first."""

    batch_size = 2
    class_names = ("thing",)
    category_ids = (7,)

    def __init__(self, before=lambda name: None, found=ONE_BOX):
        self.before, self.found = before, found

    def __call__(self, images, *, names):
        for name in names:
            self.before(Path(name).name)
        return [self.found for _ in images]


def draw(folder, *names, size=(40, 30)):
    """Images of these names."""
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        content = cv2.imencode(".png", np.full((*size, 3), 128, np.uint8))[1].tobytes()
        (folder / name).write_bytes(content)
    return [folder / name for name in names]


def run(inputs, output, finder=None):
    return prediction.predict(finder or Finder(), find_sources([*map(str, inputs)]), output)


def results(output):
    return json.loads((output / "predictions.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with inputs of all kinds."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_input_is_replaced_whatever_it_is_called(folder):
    draw(folder / "other", "b.png")
    draw(folder / "dir", "b.jpg", "a.png", "c.png", "c.jpg", "d.png")
    (folder / "link").symlink_to("dir")
    os.link(folder / "dir" / "b.jpg", folder / "b.png")
    (folder / "dir" / "d.jpg").symlink_to("../other/b.png")
    before = contents(folder / "dir")
    for inputs, output, named in (
        (["other/b.png", "dir/b.jpg"], "dir", "dir/b.jpg"),
        (["dir/b.jpg", "other/b.png"], "dir", "dir/b.jpg"),
        (["other/b.png", "dir/b.jpg"], "link", "dir/b.jpg"),
        (["other/b.png", "b.png"], "dir", "b.png"),
        (["dir/d.png", "other/b.png"], "dir", "other/b.png"),
        (["dir"], "dir", "dir/b.jpg"),
    ):
        with pytest.raises(DatasetError, match=f"would replace the input {named}"):
            run(inputs, Path(output))
    # Files that are no inputs: as dir/*.png, of which c.png gives c.jpg.
    with pytest.raises(DatasetError, match=r"c\.jpg.* would be replaced"):
        run(["dir/a.png", "dir/c.png"], Path("dir"))
    assert contents(folder / "dir") == before


@pytest.mark.parametrize("name", ["predictions.json", "predictions.jsonl"])
@pytest.mark.parametrize("content", ["{}", '{"images": [], "annotations": []}', "[1]", "text"])
def test_a_result_file_of_somebody_else_is_not_replaced(folder, name, content):
    draw(folder, "a.png")
    output = folder / "out"
    output.mkdir()
    (output / name).write_text(content)
    with pytest.raises(DatasetError, match=f"{name} would be replaced"):
        run(["a.png"], output)
    assert contents(output) == {name: content.encode()}


def test_pictures_of_earlier_runs_are_replaced_and_no_others(folder):
    draw(folder, "a.png", "b.png", "c.png")
    output = folder / "out"
    assert run(["a.png", "b.png"], output) == 0
    (output / "c.jpg").write_bytes(b"a photo")
    assert run(["b.png"], output) == 0
    assert [image["file_name"] for image in results(output)["images"]] == ["b.png"]
    assert results(output)["older_pictures"] == ["a.jpg"]
    assert run(["a.png"], output) == 0
    with pytest.raises(DatasetError, match=r"c\.jpg would be replaced"):
        run(["a.png", "c.png"], output)
    assert (output / "c.jpg").read_bytes() == b"a photo"
    assert results(output)["older_pictures"] == ["b.jpg"]


def test_what_the_detector_writes_beside_the_results_replaces_nothing_either(folder):
    """Such as metrics.json of shadow runs, beside which a training may have one of its own."""
    draw(folder, "a.png")
    output = folder / "out"
    output.mkdir()
    (output / "metrics.json").write_text("a training")

    def watched():
        figures = Finder(lambda name: (output / "metrics.json").write_text("figures"))
        options = prediction.Options(others=["metrics.json"])
        return prediction.predict(figures, find_sources(["a.png"]), output, options)

    with pytest.raises(DatasetError, match=r"metrics\.json would be replaced"):
        watched()
    assert contents(output) == {"metrics.json": b"a training"}
    (output / "metrics.json").unlink()
    # It is known as made by an earlier run, also where a run in between does not write it.
    assert watched() == watched() == run(["a.png"], output) == watched() == 0
    assert results(output)["others"] == ["metrics.json"]
    assert results(output)["older_pictures"] == []


def test_an_old_result_can_name_nothing_outside_its_folder(folder):
    draw(folder, "a.png")
    output = folder / "out"
    output.mkdir()
    (folder / "x.jpg").write_bytes(b"a photo")
    hostile = ["../x.jpg", "/etc/passwd", "..", 5, None, "\ud800.jpg", "a\0.jpg", ["a.jpg"]]
    content = {"images": [{"picture": name} for name in hostile], "failed": []}
    (output / "predictions.json").write_text(json.dumps({**content, "older_pictures": hostile}))
    assert run(["a.png"], output) == 0
    assert results(output)["older_pictures"] == []
    assert (folder / "x.jpg").read_bytes() == b"a photo"


def test_what_exists_is_no_glob(folder):
    draw(folder, "scan1.png", "scan[1].png")
    draw(folder / "set2", "wrong.png")
    draw(folder / "set[2]", "right.png", "a[b].png")
    for patterns, wanted in (
        (["scan[1].png"], ["scan[1].png"]),
        (["scan1.png", "scan[1].png"], ["scan1.png", "scan[1].png"]),
        (["scan[12].png"], ["scan1.png"]),
        (["set[2]"], ["set[2]/a[b].png", "set[2]/right.png"]),
        (["set[2]/r*.png"], ["set[2]/right.png"]),
        (["set[23]/*.png"], ["set2/wrong.png"]),
        (["s*/*.png"], ["set2/wrong.png", "set[2]/a[b].png", "set[2]/right.png"]),
        ([str(folder / "set[2]" / "*t.png")], [str(folder / "set[2]" / "right.png")]),
        (["*.png", "scan1.png"], ["scan1.png", "scan[1].png"]),
    ):
        assert [str(path) for path in find_images(patterns)] == wanted
    for missing in ("scan[3].png", "set[2]/x*.png", "nothing"):
        with pytest.raises(DatasetError, match="is neither an existing file"):
            find_images([missing])


def test_a_pipe_is_told_and_not_waited_for(folder):
    draw(folder / "in", "a.png")
    os.mkfifo(folder / "in" / "b.png")
    (folder / "in" / "c.png").mkdir()
    with pytest.raises(DatasetError, match="neither an existing file"):
        find_images(["in/b.png"])
    assert run(["in"], folder / "out") == 1
    assert [failure["reason"] for failure in results(folder / "out")["failed"]] == [
        "is not a file"
    ] * 2
    output = folder / "pipes"
    output.mkdir()
    for name in ("predictions.json", "predictions.jsonl"):
        os.mkfifo(output / name)
        with pytest.raises(DatasetError, match=name):
            run(["in/a.png"], output)
        (output / name).unlink()


def test_a_picture_that_cannot_be_written_costs_no_detections(folder, capsys, monkeypatch):
    latin = os.fsdecode(b"gr\xf6\xdfe\x1b[2J.png")
    names = ["a.png", latin, "long.png", "z.png"]
    draw(folder / "in", *names)
    draw(folder / "in", "wide.png", size=(2, 65_501))
    atomic = prediction_files.atomic_path

    def full_disk(path, **options):
        if path.name == "long.jpg":
            raise OSError(28, "No space left on device")
        return atomic(path, **options)

    monkeypatch.setattr(prediction_files, "atomic_path", full_disk)
    assert run(["in"], folder / "out") == 1
    found = results(folder / "out")
    assert len(found["images"]) == len(found["annotations"]) == 5
    assert [i["id"] for i in found["images"]] == [a["image_id"] for a in found["annotations"]]
    reasons = {Path(failure["file_name"]).stem: failure["reason"] for failure in found["failed"]}
    assert list(reasons) == ["long", "wide"]
    assert "No space left" in reasons["long"]
    assert "65,501" in reasons["wide"]
    (strange,) = (i for i in found["images"] if Path(i["file_name"]).name.startswith("gr"))
    assert os.fsencode(strange["file_name"]) == os.fsencode(f"in/{latin}")
    assert (folder / "out" / strange["picture"]).is_file()
    assert [i["file_name"] for i in found["images"] if "picture" not in i] == [
        *("in/long.png", "in/wide.png")
    ]
    printed = capsys.readouterr()
    assert "2 files could not be read, or their pictures written" in printed.err
    assert "5 images, 5 detections" in printed.out


def test_file_names_on_the_terminal_obey_nobody(folder, capsys):
    draw(folder / "in", "a.png")
    (folder / "in" / os.fsdecode(b"\x1b[2Jx\xf6.png")).write_bytes(b"no image")
    assert run(["in"], folder / "out") == 1
    assert "\\x1b[2Jx\\udcf6.png: " in capsys.readouterr().err


def test_names_of_pictures():
    def named(*files):
        unique = UniqueStems()
        return [unique.add(Path(file).stem) + ".jpg" for file in files]

    assert named("a.png", "x/a.jpg", "y/a.png", "a_2.png") == [
        *("a.jpg", "a_2.jpg", "a_3.jpg", "a_2_2.jpg")
    ]
    # One file to some file systems.
    assert named("A.png", "a.png", "\u00e9.png", "e\u0301.png") == [
        *("A.jpg", "a_2.jpg", "\u00e9.jpg", "e\u0301_2.jpg")
    ]
    assert named("...mp4", "..png", "_.png") == ["__.jpg", "_.jpg", "__2.jpg"]
    for letter in "m\u00e9":
        first, second = named(f"{letter * 255}.x", f"d/{letter * 255}.y")
        assert max(len(os.fsencode(name)) for name in (first, second)) <= 255
        assert first != second


def test_the_results_grow_with_the_run(folder):
    files = draw(folder, *(f"{i:02}.png" for i in range(20)))
    output = folder / "out"
    assert run(files[:2], output) == 0
    seen = []

    def look(name):
        lines = (output / "predictions.jsonl").read_text().splitlines()
        seen.append(len(lines) - 1)
        assert not (output / "predictions.json").exists()

    assert run(map(str, files), output, Finder(look)) == 0
    # Batches of two: what is found is drawn and written while the next ones run, three waiting for
    # each of these steps at most.
    found = [number // 2 * 2 for number in range(20)]
    assert all(most - 6 <= lines <= most for lines, most in zip(seen, found, strict=True))
    assert not (output / "predictions.jsonl").exists()
    assert len(results(output)["images"]) == 20


def test_a_killed_run_loses_no_more_than_its_last_batches(folder):
    files = draw(folder, *(f"{i:02}.png" for i in range(12)))
    program = (
        "import os, sys\n"
        "from tests.commands import test_predict\n"
        "def kill(name):\n"
        "    if name.startswith('10'): os.kill(os.getpid(), 9)\n"
        "test_predict.run(sys.argv[1:], test_predict.Path('out'), test_predict.Finder(kill))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *(file.name for file in files)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    output = folder / "out"
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    kept = [line["image"]["file_name"] for line in lines[1:]]
    assert 4 <= len(kept) <= 10
    assert kept == [f"{i:02}.png" for i in range(len(kept))]
    assert all(len(line["annotations"]) == 1 for line in lines[1:])
    # What it left is no obstacle, and is not there afterwards.
    (output / ".cascade_det-0123456789abcdef.tmp").write_bytes(b"half a picture")
    with (output / "predictions.jsonl").open("a") as file:
        file.write('{"image": {"id"')
    assert run(["00.png", "11.png"], output) == 0
    names = [path.name for path in sorted(output.iterdir())]
    assert {f"{i:02}.jpg" for i in (*range(len(kept)), 11)} <= set(names)
    assert names[-1] == "predictions.json"
    assert results(output)["older_pictures"] == names[1:-2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_what_is_there(folder, number, capsys):
    files = draw(folder, *(f"{i}.png" for i in range(6)))

    def stop(name):
        if name == "2.png":
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    assert run(map(str, files), folder / "out", Finder(stop)) == 128 + number
    assert signal.getsignal(number) is before
    assert "4 images are not done" in capsys.readouterr().err
    found = results(folder / "out")
    assert [i["picture"] for i in found["images"]] == ["0.jpg", "1.jpg"]
    assert found["failed"] == []
    assert found["annotations"][1] == {
        "id": 2,
        "image_id": 2,
        "category_id": 7,
        "bbox": [1.0, 2.0, 10.0, 20.0],
        "score": 0.75,
        "exit_stage": 1,
        "area": 200.0,
        "iscrowd": 0,
    }
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"0.jpg", "1.jpg", "predictions.json"}


def test_masks_are_drawn_and_written_as_coco_reads_them(folder):
    draw(folder, "a.png", "b.png", size=(400, 300))
    rows, columns = np.mgrid[:28, :28] - 13.5
    disc = (np.hypot(rows, columns) < 10).astype(np.float32)
    found = ArrayDetections(
        boxes=10 * np.array([[2, 4, 20, 34], [10, 0, 30, 10], [25, 15, 29, 39]], np.float32),
        scores=np.array([0.9, 0.8, 0.7], np.float32),
        classes=np.array([0, 0, 0]),
        exit_stages=np.array([1, 2, 2]),
        masks=np.stack([disc, 0 * disc, 0.2 * disc]),
    )
    assert run(["a.png", "b.png"], folder / "out", Finder(found=found)) == 0
    truth = COCO(str(folder / "out" / "predictions.json"))
    pasted = found.paste(400, 300)
    for image_id in (1, 2):
        masked, without, empty = truth.loadAnns(truth.getAnnIds(image_id))
        np.testing.assert_array_equal(truth.annToMask(masked), pasted[0])
        assert masked["segmentation"]["size"] == [400, 300]
        assert masked["area"] == pasted[0].sum() > 10_000
        assert "segmentation" not in without
        assert without["area"] == 20_000
        # It has a mask, of which no pixel is certain enough.
        assert truth.annToMask(empty).sum() == empty["area"] == 0
    picture = cv2.imread(str(folder / "out" / "b.jpg")).astype(int)
    inside = cv2.erode(pasted[0].astype(np.uint8), np.ones((25, 25))) > 0
    inside[:120] = False  # labels
    mixed = (128 + np.array(class_color(0))) / 2
    assert abs(picture[inside] - mixed).max() < 12
    assert abs(picture[360:, 40:200] - 128).max() < 12


def test_an_ignored_hangup_stays_ignored_and_a_late_signal_waits(folder, monkeypatch):
    files = draw(folder, "0.png", "1.png")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = Finder(lambda name: os.kill(os.getpid(), signal.SIGHUP))
        assert run(map(str, files), folder / "out", hang_up) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    compose = prediction_files.PredictionFolder._compose

    def interrupted(self, file):
        os.kill(os.getpid(), signal.SIGTERM)
        compose(self, file)

    monkeypatch.setattr(prediction_files.PredictionFolder, "_compose", interrupted)
    assert run(map(str, files), folder / "out") == 0
    assert len(results(folder / "out")["images"]) == 2


def test_two_runs_do_not_mix(folder):
    files = draw(folder, "0.png", "1.png")
    refused = []

    def second(name):
        with pytest.raises(DatasetError, match="another run") as error:
            run(["1.png"], folder / "out")
        refused.append(error)

    assert run(map(str, files), folder / "out", Finder(second)) == 0
    assert len(refused) == 2
    assert len(results(folder / "out")["images"]) == 2
    assert run(["1.png"], folder / "out") == 0


def test_a_full_disk_names_the_file_and_keeps_what_there_is(folder, monkeypatch):
    draw(folder, "0.png")

    def full(self, file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prediction_files.PredictionFolder, "_compose", full)
        with pytest.raises(
            CascadeDetError, match=r"predictions\.json: No space.*predictions\.jsonl"
        ):
            run(["0.png"], folder / "out")
    assert (folder / "out" / "predictions.jsonl").is_file()
    assert run(["0.png"], folder / "out") == 0


def test_an_error_of_the_detector_keeps_what_there_is(folder):
    files = draw(folder, *(f"{i}.png" for i in range(4)))

    def fail(name):
        if name == "2.png":
            raise MemoryError

    with pytest.raises(MemoryError):
        run(map(str, files), folder / "out", Finder(fail))
    assert len(results(folder / "out")["images"]) == 2
