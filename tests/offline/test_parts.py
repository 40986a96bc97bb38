"""Runs in parts against ``predict`` on one machine, and after every kind of end."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from offline_runs import (
    detect,
    drawn,
    in_this_process,
    rows_of,
    served,
    with_other_weights,
    write_images,
)

from cascade_det.commands import eval_json, prediction
from cascade_det.errors import CascadeDetError, CheckpointError, ConfigError, DatasetError
from cascade_det.offline.folder import OutputFolder
from cascade_det.offline.images import Entry
from cascade_det.offline.reading import Reader
from cascade_det.offline.results import Results, merge, read_predictions
from cascade_det.offline.worker import detected
from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.standalone import Predictor
from cascade_det.streams.sources import find_sources

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
fsspec = pytest.importorskip("fsspec")


def predicted(cfg, images, output):
    """The json of ``predict`` on the same images."""
    sources = find_sources([str(image) for image in images])
    prediction.predict(Predictor(cfg), sources, output)
    content = json.loads((output / "predictions.json").read_text())
    for image in content["images"]:
        del image["picture"]
    return {key: content[key] for key in ("images", "annotations", "failed", "categories")}


def nothing(job, parts):
    """An engine that ends before its first part."""
    yield from ()


def unwanted(job, parts):
    pytest.fail("all is done")
    yield


def merged(output):
    merge(OutputFolder(str(output)))
    return json.loads((output / "predictions.json").read_text())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_parts_have_the_numbers_of_predict(detector_cfg, photos, tmp_path, batch_size):
    """Bit for bit where the batches are the same, as they are at batch size 1 in any parts."""
    cfg = detector_cfg("CASCADE.TEST_IMS_PER_BATCH", batch_size)
    images = [photos, photos / "night", photos / "a.png"]
    wanted = predicted(cfg, images, tmp_path / "plain")
    summary = detect(cfg, images, tmp_path / "out", part_size=3 if batch_size == 1 else 4)
    assert (summary.parts, summary.missing, summary.images, summary.failed) == (2, 0, 6, 1)
    assert summary.detections == len(wanted["annotations"]) == 5 * 8
    assert merged(tmp_path / "out") == wanted == read_predictions(str(tmp_path / "out"))
    assert any("segmentation" in entry for entry in wanted["annotations"])
    (failed,) = wanted["failed"]
    assert failed["file_name"].endswith("c broken.png")


def test_rows_are_what_the_documentation_says(detector_cfg, photos, tmp_path, detector_weights):
    predictor = Predictor(detector_cfg())
    detect(detector_cfg(), [photos], tmp_path / "out")
    for row, name in zip(rows_of(tmp_path / "out"), sorted(photos.glob("*.*g")), strict=True):
        assert row.pop("path") == str(name)
        if row["error"] is not None:
            assert "cannot be read as an image" in row["error"]
            assert row["boxes"] == row["scores"] == row["category_ids"] == []
            assert row["height"] is row["masks"] is None
            continue
        found = predictor(str(name))
        assert (row["height"], row["width"]) == ((64, 48) if "turned" in str(name) else (48, 64))
        assert row["boxes"] == found.boxes.tolist()
        assert row["scores"] == found.scores.tolist()
        assert row["classes"] == found.classes.tolist()
        assert row["category_ids"] == [3 * i + 5 for i in row["classes"]]
        assert row["exit_stages"] == found.exit_stages.tolist()
        assert [mask["size"] for mask in row["masks"]] == [[row["height"], row["width"]]] * len(
            found
        )
    part = next((tmp_path / "out" / "parts").iterdir())
    metadata = json.loads(parquet.read_schema(part).metadata[b"cascade_det"])
    assert metadata["class_names"][:2] == ["thing 0", "thing 1"]
    assert metadata["configuration"]["CASCADE.TEST_IMS_PER_BATCH"] == 1
    assert len(metadata["weights"]) == 64
    assert metadata["format"] == 1


def test_images_at_addresses_and_in_parquet_are_detected_in_as_files_are(
    detector_cfg, photos, tmp_path
):
    pytest.importorskip("aiohttp")
    files = sorted(path for path in photos.iterdir() if path.suffix in (".png", ".jpg"))
    contents = [path.read_bytes() for path in files]
    for number, content in enumerate(contents):
        fsspec.filesystem("memory").pipe_file(f"/pictures/{number}.png", content)
        (tmp_path / f"{number}.png").write_bytes(content)
    columns = {"path": ["odd \0 \n name"] * len(files) + ["none"], "bytes": [*contents, None]}
    parquet.write_table(pa.table(columns), tmp_path / "packed.parquet", row_group_size=2)

    with served(tmp_path) as host:
        detect(detector_cfg(), files, tmp_path / "plain")
        detect(detector_cfg(), ["memory://pictures"], tmp_path / "memory")
        names = [f"{host}/{number}.png" for number in range(len(files))]
        detect(detector_cfg(), [*names, f"{host}/missing.png"], tmp_path / "http")
        detect(detector_cfg(), [tmp_path / "packed.parquet"], tmp_path / "packed")
    wanted = rows_of(tmp_path / "plain")
    for name, more in (("memory", 0), ("http", 1), ("packed", 1)):
        rows = rows_of(tmp_path / name)
        assert len(rows) == len(wanted) + more
        for row, other in zip(rows, wanted, strict=False):
            for key in row.keys() - {"path", "error"}:
                assert row[key] == other[key], (name, key)
            assert (row["error"] is None) == (other["error"] is None)
            assert "BytesIO" not in (row["error"] or "")
        assert not more or rows[-1]["error"]


def test_a_name_that_is_no_unicode_is_read_and_written_escaped(detector_cfg, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(drawn(1))
    detect(detector_cfg(), [os.fsdecode(odd)], tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert row["path"] == f"{tmp_path}/\\udce9.png"
    assert row["error"] is None
    assert merged(tmp_path / "out")["images"][0]["file_name"] == row["path"]


def test_an_empty_list_gives_an_empty_result(detector_cfg, tmp_path):
    (tmp_path / "none.json").write_text('{"images": []}')
    summary = detect(detector_cfg(), [tmp_path / "none.json"], tmp_path / "out")
    assert (summary.parts, summary.missing) == (0, 0)
    content = merged(tmp_path / "out")
    assert content["images"] == content["annotations"] == content["failed"] == []
    assert content["categories"][0] == {"id": 5, "name": "thing 0"}


@pytest.fixture
def many(tmp_path):
    """A folder of small images."""
    return write_images(tmp_path / "many", 12)


def killed_soon(run, seconds):
    """Run it in a copy of this process, which SIGKILL ends after some seconds."""
    child = os.fork()
    if not child:
        try:
            run()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_run_killed_at_any_moment_goes_on_without_loss_or_repetition(
    detector_cfg, many, tmp_path
):
    start = time.monotonic()
    detect(detector_cfg(), [many], tmp_path / "whole", part_size=1)
    duration = time.monotonic() - start
    cfg, output, random_ = detector_cfg(), tmp_path / "out", random.Random(0)
    for _ in range(5):
        before = {path.name: path.stat() for path in output.glob("parts/part-*")}
        killed_soon(
            lambda: detect(cfg, [many], output, part_size=1), random_.uniform(0, 0.6 * duration)
        )
        for name, status in before.items():
            after = (output / "parts" / name).stat()
            assert (after.st_ino, after.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    done = len(list(output.glob("parts/part-*")))
    summary = detect(cfg, [many], output, part_size=1)
    assert (summary.found_done, summary.images, summary.missing) == (done, 12 - done, 0)
    assert rows_of(output) == rows_of(tmp_path / "whole")
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []
    again = detect(cfg, [many], output, unwanted, part_size=1)
    assert again.images == 0


def test_only_a_complete_run_is_merged(detector_cfg, many, tmp_path):
    cfg, output = detector_cfg(), tmp_path / "out"

    def stopping(job, parts):
        yield from in_this_process(job, parts[:2])

    assert detect(cfg, [many], output, stopping, part_size=5).missing == 1
    with pytest.raises(DatasetError, match="1 of 3 parts are not done"):
        merge(OutputFolder(str(output)))
    with pytest.raises(DatasetError, match="1 of 3 parts are not done"):
        read_predictions(str(output))
    assert not (output / "predictions.json").exists()
    detect(cfg, [many], output, part_size=5)
    (tmp_path / "out" / "parts" / "part-foreign.parquet").write_bytes(b"of another run")
    assert [image["id"] for image in merged(output)["images"]] == list(range(1, 13))
    part = sorted(output.glob("parts/part-0*"))[1]
    content = part.read_bytes()
    part.write_bytes(content[:-20])
    with pytest.raises(CascadeDetError, match=part.name):
        merge(OutputFolder(str(output)))
    # Rows of other images under the name of this part.
    part.write_bytes(sorted(output.glob("parts/part-0*"))[2].read_bytes())
    with pytest.raises(DatasetError, match="2 images, not 5"):
        list(Results(str(output)).images())


def test_another_run_in_the_same_folder_is_refused(detector_cfg, many, tmp_path, detector_weights):
    cfg, output = detector_cfg(), tmp_path / "out"
    detect(cfg, [many], output, nothing)
    with_other_weights(detector_weights, tmp_path / "other.pth")
    for changed, images, size, what in (
        (detector_cfg("MODEL.WEIGHTS", str(tmp_path / "other.pth")), [many], 2, "weights"),
        (detector_cfg("INPUT.MIN_SIZE_TEST", 72), [many], 2, "INPUT.MIN_SIZE_TEST"),
        (detector_cfg("CASCADE.TEST_IMS_PER_BATCH", 4), [many], 2, "CASCADE.TEST_IMS_PER_BATCH"),
        (cfg, [many / "00.png"], 2, "the list of images"),
        (cfg, [many], 3, "--part-size"),
    ):
        with pytest.raises(DatasetError, match=f"another run.*{what}"):
            detect(changed, images, output, nothing, part_size=size)
    # What results do not depend on may change: the place of the weights, and training.
    (tmp_path / "moved.pth").write_bytes(detector_weights.read_bytes())
    moved = detector_cfg("MODEL.WEIGHTS", str(tmp_path / "moved.pth"), "SOLVER.MAX_ITER", 5)
    assert detect(moved, [many], output).missing == 0
    (output / "run.json").unlink()
    with pytest.raises(DatasetError, match="parts of another run"):
        detect(cfg, [many], output)
    (output / "run.json").write_text('{"format": 1}')
    with pytest.raises(DatasetError, match=r"run\.json is damaged"):
        detect(cfg, [many], output)


def test_a_process_with_other_weights_does_nothing(detector_cfg, many, tmp_path, detector_weights):
    (tmp_path / "mine.pth").write_bytes(detector_weights.read_bytes())

    def replaced(job, parts):
        with_other_weights(detector_weights, tmp_path / "mine.pth")
        yield from in_this_process(job, parts)

    with pytest.raises(CheckpointError, match="other weights in this process"):
        detect(
            detector_cfg("MODEL.WEIGHTS", str(tmp_path / "mine.pth")),
            [many],
            tmp_path / "out",
            replaced,
        )
    assert not (tmp_path / "out" / "parts").exists()


def test_keys_that_need_one_process_are_refused(detector_cfg, many, tmp_path):
    for options, key in (
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS"),
        (["CASCADE.SHADOW_SHARE", 0.5], "CASCADE.SHADOW_SHARE"),
        (["MODEL.CASCADE.FAST.ENABLED", True, "MODEL.CASCADE.FAST.IMAGES", 4], "FAST.IMAGES"),
    ):
        with pytest.raises(ConfigError, match=key):
            detect(detector_cfg(*options), [many], tmp_path / "out")


def test_shares_are_all_parts_and_each_is_done_once(detector_cfg, many, tmp_path):
    done = []

    def engine(job, parts):
        done.extend(part.name for part in parts)
        yield from in_this_process(job, parts)

    for k in (2, 3, 1):
        summary = detect(detector_cfg(), [many], tmp_path / "out", engine, share=(k, 3))
    assert summary.missing == 0
    assert len(done) == len(set(done)) == summary.parts == 6


def test_a_continued_run_still_tells_of_images_that_failed(detector_cfg, many, tmp_path):
    (many / "broken.png").write_bytes(b"no image")
    first = detect(detector_cfg(), [many], tmp_path / "out")
    again = detect(detector_cfg(), [many], tmp_path / "out")
    assert (first.failed, first.failed_before) == (1, 0)
    assert (again.failed, again.failed_before) == (0, 1)


def test_results_at_an_address(detector_cfg, many, tmp_path):
    detect(detector_cfg(), [many], tmp_path / "out", part_size=5)
    address = "memory://results/run"
    summary = detect(detector_cfg(), [many], address, part_size=5)
    assert (summary.parts, summary.missing) == (3, 0)
    assert detect(detector_cfg(), [many], address, part_size=5).found_done == 3
    assert merge(OutputFolder(address)) == (f"{address}/predictions.json", 0)
    content = json.loads(fsspec.filesystem("memory").cat_file("/results/run/predictions.json"))
    assert content == merged(tmp_path / "out")


def test_a_batch_that_does_not_fit_into_memory_is_split(many):
    """Only images that do not fit alone are without results."""
    one = ArrayDetections(
        boxes=np.array([[1, 2, 3, 4]], np.float32),
        scores=np.array([0.5], np.float32),
        classes=np.array([0]),
        exit_stages=np.array([2]),
    )

    class Large:
        batch_size, category_ids = 4, (7,)

        def __call__(self, images, *, names):
            if len(images) > 1 or Path(names[0]).name == "03.png":
                raise torch.OutOfMemoryError("too large")
            return [one]

    entries = [Entry(i, str(many / f"{i:02}.png")) for i in range(6)]
    rows = list(detected(Large(), Reader(2), entries))
    assert [row["id"] for row in rows] == list(range(6))
    assert [row["scores"] for row in rows] == [[0.5], [0.5], [0.5], [], [0.5], [0.5]]
    assert "does not fit into memory" in rows[3]["error"]
    assert (rows[0]["category_ids"], rows[0]["exit_stages"]) == ([7], [2])


def test_scores_of_rows_are_those_of_the_json(detector_cfg, photos, tmp_path, capsys):
    images = [photos / name for name in ("a.png", "b turned.jpg", "night/a.png")]
    detect(detector_cfg(), images, tmp_path / "out", part_size=9)
    content = merged(tmp_path / "out")
    truth = {
        "images": [
            {**image, "file_name": os.path.relpath(image["file_name"], photos)}
            for image in content["images"]
        ],
        "annotations": [{**e, "bbox": [int(x) for x in e["bbox"]]} for e in content["annotations"]],
        "categories": content["categories"],
    }
    truth["annotations"] = [e for e in truth["annotations"] if min(e["bbox"][2:]) > 0][::2]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    reports = []
    part = next((tmp_path / "out" / "parts").iterdir())
    for source in (tmp_path / "out" / "predictions.json", tmp_path / "out", part):
        arguments = ["--json", str(tmp_path / "truth.json"), "--predictions", str(source)]
        assert eval_json.main([*arguments, "--on-bad-data", "skip"]) == 0
        lines = capsys.readouterr().out.splitlines()
        reports.append([line for line in lines if not line.startswith("[")])  # of the log
    assert reports[0] == reports[1] == reports[2]
    assert any("mask" in line.lower() for line in reports[0])
    lists = tmp_path / "list.parquet"
    parquet.write_table(pa.table({"path": ["a.png"]}), lists)
    assert eval_json.main(["--json", str(tmp_path / "truth.json"), "--predictions", str(lists)])
    assert "holds no predictions" in capsys.readouterr().err


def test_rows_from_elsewhere_are_checked(detector_cfg, photos, tmp_path):
    detect(detector_cfg(), [photos / "a.png"], tmp_path / "out")
    source = str(next((tmp_path / "out" / "parts").iterdir()))
    table = parquet.read_table(source)
    (row,) = table.to_pylist()

    def entries(row=row, metadata=table.schema.metadata):
        schema = table.schema.with_metadata(metadata)
        parquet.write_table(pa.Table.from_pylist([row], schema=schema), source)
        return list(Results(source).annotations())

    assert len(entries()) == 8
    for changes in (
        {"boxes": row["boxes"][1:]},
        {"boxes": [[1.0]] * 8},
        {"scores": None},
        {"scores": [None] * 8, "boxes": None},
        {"classes": [99] * 8},
        {"classes": [None] * 8},
        {"masks": row["masks"][1:]},
        {"masks": [{"size": [48, 64], "counts": "~~~"}] * 8},
        {"masks": [{"size": [9999, 9999], "counts": "0"}] * 8},
        {"masks": [{"size": None, "counts": None}] * 8},
        {"height": None},
    ):
        with pytest.raises(DatasetError, match=r"part-.*(image 1|cannot be used)"):
            entries(row | changes)
    about = json.loads(table.schema.metadata[b"cascade_det"])
    for changes in ({"category_ids": 3}, {"class_names": ["x"]}, {"category_ids": ["1"] * 6}):
        metadata = {b"cascade_det": json.dumps(about | changes).encode()}
        with pytest.raises(DatasetError, match="names and ids"):
            entries(metadata=metadata)
    for text in ("3", "{", '{"format": 2}'):
        with pytest.raises(CascadeDetError, match="part-"):
            entries(metadata={b"cascade_det": text.encode()})
    parquet.write_table(table.drop_columns(["scores"]), source)
    with pytest.raises(DatasetError, match="other columns"):
        list(Results(source).annotations())
