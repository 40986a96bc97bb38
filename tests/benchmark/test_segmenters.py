"""Segmenters in a benchmark: what is compared, its answers, ratios and parts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_det.benchmark import segmenter_peers
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.report import format_benchmark
from cascade_det.benchmark.run import run_benchmark
from cascade_det.benchmark.segmenters import SegmenterSetup, open_segmenters
from cascade_det.commands import benchmark
from cascade_det.errors import ConfigError
from cascade_det.model_zoo import get_config_file
from cascade_det.standalone.preprocess import normalise_and_stack

CONFIG = get_config_file("quick_schedules/segment_shapes.yaml")
STAGES = ["stage0", "stage1", "stage2", "stage3"]
OURS = ("ours", "ours-fast")
LRASPP = "torchvision-lraspp"


def make_options(*keys, **changes):
    small = {"size": (64, 96), "rounds": 2, "warmup": 0, "segmenters": (*OURS, LRASPP)}
    return Options(**{"config_file": (CONFIG,), "opts": keys, **small, **changes})


@pytest.fixture(scope="module")
def setup():
    return SegmenterSetup(make_options())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The results of a run on two images, and its folder."""
    output = tmp_path_factory.mktemp("segmenters")
    names = (*OURS, "ours-fast-exits", LRASPP)
    return run_benchmark(make_options(batches=(2,), segmenters=names, output=output)), output


def test_ratios_are_within_each_round(done):
    results, output = done
    assert set(results["left_out"]) == {"ours-fast-exits"}
    [whole] = results["whole"]
    times = {name: row["ms_per_image"]["samples"] for name, row in whole["contenders"].items()}
    assert list(times) == [*OURS, LRASPP]
    pairs = [(entry["what"], entry["against"]) for entry in whole["ratios"]]
    assert pairs == [("ours", LRASPP), ("ours-fast", LRASPP), ("ours-fast", "ours")]
    for entry, (own, other) in zip(whole["ratios"], pairs, strict=True):
        wanted = [b / a for a, b in zip(times[own], times[other], strict=True)]
        assert entry["ratio"]["samples"] == pytest.approx(wanted)
    assert whole["labels"]["ours-fast"]["same_class"] > 0.999
    assert whole["labels"]["ours-fast"]["difference"] < 1e-4
    [parts] = results["parts"]
    assert list(parts["contenders"]["ours"]) == ["preprocess", "backbone", *STAGES, "postprocess"]
    assert list(parts["contenders"][LRASPP]) == ["preprocess", "backbone", "stage0", "postprocess"]
    assert json.loads((output / "benchmark.json").read_text())["whole"]
    text = format_benchmark(results)
    assert "times as fast as torchvision-lraspp" in text
    assert "Labels compared with ours" in text
    assert (output / "benchmark.png").is_file()


@pytest.mark.parametrize("name", ["torchvision-fcn", LRASPP])
def test_torchvisions_segmenters_are_whole(name, setup, monkeypatch):
    """The parts that are timed are what the model itself computes."""
    make, built = segmenter_peers.TORCHVISION[name], []

    def build(**arguments):
        built.append(make(**arguments))
        return built[-1]

    monkeypatch.setitem(segmenter_peers.TORCHVISION, name, build)
    like = setup.build_ours()
    peer = segmenter_peers.build_torchvision(name, 7, like)
    batch = setup.batches(2)[0]
    images, _ = normalise_and_stack([s["image"] for s in batch], like.pixel_mean, like.pixel_std)
    with torch.no_grad():
        expected = built[0](images)["out"]
    assert expected.shape == (2, 7, 64, 96)
    torch.testing.assert_close(torch.stack(peer.segment(batch)), expected)


def test_exits_of_trained_weights_on_the_test_set(tmp_path, setup):
    weights = tmp_path / "model.pth"
    torch.save({"model": setup.weights}, weights)
    keys = ("MODEL.WEIGHTS", str(weights), *_dataset(tmp_path))
    trained = SegmenterSetup(
        make_options(*keys, "MODEL.CASCADE_DECODER.EXIT.ENABLED", "True", images=3)
    )
    batches = trained.batches(2)
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert batches[0][0]["file_name"] == batches[1][0]["file_name"]  # there are two
    models, left_out = open_segmenters(trained, ("ours", "ours-fast-exits"))
    assert left_out == {}
    assert models["ours-fast-exits"].keeps_memory
    for found, sample in zip(
        models["ours-fast-exits"].segment(batches[0]), batches[0], strict=True
    ):
        assert found.shape == (7, sample["height"], sample["width"])


def _dataset(folder):
    for name, value in (("images", 90), ("labels", 1)):
        (folder / name).mkdir()
        for number in range(2):
            shape = (40, 50, 3) if name == "images" else (40, 50)
            pixels = np.full(shape, value, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    sets = [["small", "folders", str(folder / "images"), str(folder / "labels")]]
    return ("CASCADE.SEMANTIC_DATASETS", repr(sets), "DATASETS.TEST", "('small',)")


def test_mistakes_are_named(tmp_path, capsys):
    for changes, message in (
        ({"measure": ("heads",)}, "--measure: the model is a segmenter. Choose from whole, parts"),
        ({"segmenters": ()}, "--contenders: the model is a segmenter. Choose from ours"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_benchmark(make_options(output=tmp_path / "out", **changes))
    arguments = ["--output", str(tmp_path / "out"), "--config-file", CONFIG]
    assert benchmark.main([*arguments, "--contenders", "torchvision", "ours"]) == 1
    assert "the model is a segmenter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_left_out_models_have_a_reason(setup, monkeypatch):
    monkeypatch.setattr("cascade_det.benchmark.segmenters.why_no_detectron2", lambda: "not today")
    models, left_out = open_segmenters(setup, ("ours-fast-exits", "detectron2-fpn"))
    assert models == {}
    assert left_out["detectron2-fpn"] == "not today"
    assert "EXIT.ENABLED is False" in left_out["ours-fast-exits"]
    exits = SegmenterSetup(make_options("MODEL.CASCADE_DECODER.EXIT.ENABLED", "True"))
    assert "by chance" in open_segmenters(exits, ("ours-fast-exits",))[1]["ours-fast-exits"]


@pytest.mark.needs_detectron2
def test_detectron2s_head_is_whole(setup):
    semantic = pytest.importorskip(
        "detectron2.modeling.meta_arch.semantic_seg", exc_type=ImportError
    )
    like = setup.build_ours()
    kept = []
    original = semantic.SemSegFPNHead.__init__

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            semantic.SemSegFPNHead,
            "__init__",
            lambda self, *args, **kwargs: (kept.append(self), original(self, *args, **kwargs))[1],
        )
        peer = segmenter_peers.build_detectron2(7, like)
    batch = setup.batches(1)[0]
    images, _ = normalise_and_stack([batch[0]["image"]], like.pixel_mean, like.pixel_std)
    with torch.no_grad():
        expected, _ = kept[0](like.backbone(images))
    torch.testing.assert_close(peer.segment(batch)[0], expected[0])
