"""Videos and folders that are watched, as predict reads and writes them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_videos import GREY_STEP, make_video

from cascade_det.commands import predict as command
from cascade_det.commands import prediction, prediction_videos
from cascade_det.commands.prediction_outputs import Choice, MoreFiles
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.streams.sources import find_sources
from cascade_det.streams.video import VideoSource
from cascade_det.streams.video_file import has_sound

pytest.importorskip("av")
ROOT = Path(__file__).resolve().parents[2]


class Follower:
    """Finds a box that moves a pixel to the right with each 10 of grey; and one of a low score."""

    batch_size, class_names, category_ids = 3, ["thing", "other"], [7, 8]

    def __init__(self, before=lambda name: None):
        self.before = before

    def __call__(self, images, *, names):
        for name in names:
            self.before(name)
        return [self.found(round(float(image.mean()) / GREY_STEP)) for image in images]

    def found(self, step):
        return ArrayDetections(
            boxes=np.array([[10 + step, 20, 30 + step, 44], [2, 2, 6, 6]], np.float32),
            scores=np.array([0.9, 0.2], np.float32),
            classes=np.array([0, 1]),
            exit_stages=np.array([0, 1]),
        )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*inputs, finder=None, **options):
    options = prediction.Options(**options)
    return prediction.predict(finder or Follower(), find_sources(inputs), Path("out"), options)


def results(folder):
    return json.loads((folder / "out" / "predictions.json").read_text())


def test_a_video_becomes_a_video_with_boxes_and_its_sound(folder, capsys):
    make_video(folder / "a.mp4", sound="aac")
    Image.fromarray(np.full((48, 64, 3), 0, np.uint8)).save("a.png")
    files = MoreFiles(crops=True, texts=True, csv=True)
    assert run("a.mp4", "a.png", files=files, choice=Choice(score_threshold=0.5)) == 0
    found = results(folder)
    assert found["videos"] == [{"file_name": "a.mp4", "video": "a.mp4", "frames": 10}]
    frames = found["images"][:10]
    assert [frame["id"] for frame in found["images"]] == list(range(1, 12))
    assert [frame["frame"] for frame in frames] == list(range(10))
    assert [frame["seconds"] for frame in frames] == pytest.approx(np.arange(10) / 10)
    assert found["images"][10]["picture"] == "a_2.jpg"
    best = [a["bbox"][0] for a in found["annotations"] if a["score"] > 0.5]
    assert best == [*range(10, 20), 10]
    video = VideoSource(folder / "out" / "a.mp4")
    assert has_sound(video)
    pictures = list(video.frames())
    assert len(pictures) == 10
    # The sides of the box have the colour of the class; the rest has that of the frame.
    for step, frame in enumerate(pictures):
        assert abs(frame.pixels[30:46, 50:].mean() - GREY_STEP * step) < 4
        side = frame.pixels[38, 10 + step].astype(int)
        assert np.ptp(side) > 40
    names = {p.name for p in (folder / "out/labels/a").iterdir()}
    assert names == {f"{number:06d}.txt" for number in range(10)}
    assert (folder / "out/labels/a_2.txt").is_file()
    assert len(list((folder / "out/crops/thing/a").iterdir())) == 10
    assert len((folder / "out/predictions.csv").read_text().splitlines()) == 12
    assert "11 frames, 22 detections" in capsys.readouterr().out


def test_what_is_broken_is_told_and_the_rest_is_done(folder, capsys):
    make_video(folder / "a.avi", codec="mjpeg", sound="pcm_mulaw")
    content = bytearray((folder / "a.avi").read_bytes())
    at = [i for i in range(len(content)) if content[i : i + 4] == b"00dc"][4]
    size = int.from_bytes(content[at + 4 : at + 8], "little")
    content[at + 8 : at + 8 + size] = bytes(size)
    (folder / "a.avi").write_bytes(content)
    (folder / "b.mp4").write_bytes(b"no video")
    assert run("b.mp4", "a.avi") == 1
    broken, failure = results(folder)["failed"]
    assert broken["file_name"] == "b.mp4"
    assert (failure["file_name"], failure["reason"]) == ("a.avi", "the frame is broken")
    assert results(folder)["videos"][0]["frames"] == 9
    printed = capsys.readouterr()
    assert f"a.avi, frame {failure['frame']}: the frame is broken" in printed.err
    assert "a.avi: the sound is lost: an mp4 file cannot hold it" in printed.out
    times = [frame.seconds for frame in VideoSource(folder / "out" / "a.mp4").frames()]
    kept = [number / 10 for number in range(10) if number != failure["frame"]]
    np.testing.assert_allclose(times, kept, atol=1e-3)


def test_a_run_that_is_interrupted_keeps_a_whole_video(folder):
    make_video(folder / "a.mp4", frames=12)

    def stop(name):
        if name == "a.mp4#6":
            os.kill(os.getpid(), signal.SIGTERM)

    assert run("a.mp4", finder=Follower(stop)) == 128 + signal.SIGTERM
    assert {p.name for p in (folder / "out").iterdir()} == {"a.mp4", "predictions.json"}
    assert len(list(VideoSource(folder / "out" / "a.mp4").frames())) == 6
    assert len(results(folder)["images"]) == results(folder)["videos"][0]["frames"] == 6


def test_a_video_that_cannot_be_written_costs_no_detections(folder, monkeypatch):
    make_video(folder / "a.mp4")

    def full(self, picture, seconds):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prediction_videos.VideoFile, "add", full)
    assert run("a.mp4") == 1
    found = results(folder)
    assert len(found["images"]) == 10
    (failure,) = found["failed"]
    assert failure["reason"] == "no video: a.mp4: No space left on device"
    assert {p.name for p in (folder / "out").iterdir()} == {"predictions.json"}


def test_no_video_is_replaced_that_a_run_did_not_make(folder):
    make_video(folder / "a.avi", frames=2)
    assert run("a.avi") == run("a.avi") == 0
    (folder / "out" / "a.mp4").rename(folder / "a.mp4")
    (folder / "out" / "predictions.json").unlink()
    (folder / "out" / "a.mp4").write_bytes(b"a holiday")
    with pytest.raises(DatasetError, match=r"a\.mp4 would be replaced"):
        run("a.avi")
    with pytest.raises(DatasetError, match=r"would replace the input a\.mp4"):
        prediction.predict(Follower(), find_sources(["a.mp4"]), Path())


def test_objects_have_numbers(folder):
    pytest.importorskip("trackers")
    make_video(folder / "a.mp4", frames=12)
    for tracker in ("bytetrack", "sort"):
        assert run("a.mp4", track=tracker, files=MoreFiles(csv=True)) == 0
        found = results(folder)["annotations"]
        things = [a.get("track_id") for a in found if a["category_id"] == 7]
        # Not before it was seen in some frames; then always the same.
        first = next(i for i, number in enumerate(things) if number is not None)
        assert first <= 3
        assert len(set(things[first:])) == 1
        assert all("track_id" not in a for a in found if a["category_id"] == 8)
        rows = (folder / "out/predictions.csv").read_text().splitlines()
        assert rows[-1].endswith(f",{things[-1]}")


def test_tracking_needs_its_package_and_a_video(folder, monkeypatch):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("a.png")
    with pytest.raises(ConfigError, match="--track is for videos"):
        run("a.png", track="sort")
    make_video(folder / "a.mp4", frames=2)
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ConfigError, match=r"cascade_det\[track\].*opencv-python"):
        run("a.mp4", track="sort")


def test_the_watched_folder_is_not_the_output(folder, capsys):
    (folder / "in").mkdir()
    arguments = ["--onnx", "a.onnx", "--input", "in", "--output", "in", "--watch"]
    assert command.main(arguments) == 1
    assert "is the folder that is watched" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_watched_folder_until_a_signal(folder, number):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cascade_det.commands import prediction\n"
        "from cascade_det.streams.sources import watch\n"
        "from tests.commands.test_predict_videos import Follower\n"
        "sys.exit(prediction.predict(Follower(), [watch(['in'])], Path('out')))\n"
    )
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    image = Image.fromarray(np.full((48, 64, 3), 50, np.uint8))
    image.save("in/a.png")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "reference")])
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = folder / "out" / "predictions.jsonl"

    def wait_for(text):
        while not (lines.is_file() and text in lines.read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)

    wait_for('"file_name": "in/a.png"')
    image.save("in/b.png")
    (folder / "in" / "broken.png").write_bytes(b"half")
    wait_for('"file_name": "in/b.png"')
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert "Interrupted." in printed
    assert [image["picture"] for image in results(folder)["images"]] == ["a.jpg", "b.jpg"]
    assert {p.name for p in (folder / "out").iterdir()} == {"a.jpg", "b.jpg", "predictions.json"}


def test_a_new_image_never_replaces_a_file(folder):
    (folder / "out").mkdir()
    (folder / "out" / "a.jpg").write_bytes(b"a photo")
    one = prediction.PredictionFolder(Path("out"), [], [])
    with one:
        assert one.stem_of(Path("in/a.png")) == "a_2"
        assert one.stem_of(Path("in/a.png")) == "a_3"
    assert (folder / "out" / "a.jpg").read_bytes() == b"a photo"
