"""The comparison of masks: the same boxes and classes for all, and what is reported beside it."""

import pytest
import torch

from cascade_det.benchmark import comparison
from cascade_det.benchmark.comparison import compare_masks
from cascade_det.benchmark.models import open_models
from cascade_det.benchmark.report import format_benchmark
from cascade_det.benchmark.run import run_benchmark
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.targets import SpeedTarget, hold_targets
from cascade_det.benchmark.training import trainable

SMALL = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16")


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(comparison, "MASKS", 12)


@pytest.fixture(scope="module")
def setup(make_options):
    return Setup(make_options(*SMALL))


def test_ours_alone(setup):
    models, _ = open_models(setup, ("ours", "ours-fast", "ours-fast-exits"))
    results = compare_masks(setup, models, 2)
    assert list(results["contenders"]) == ["ours", "ours-fast"]  # exits change no mask
    assert (results["masks"], results["dtype"], results["rules"]) == (12, "float32", None)
    assert results["differences"]["with"] == "ours"
    assert 0 < results["differences"]["contenders"]["ours-fast"] < 1e-4


def test_trained_weights_have_their_detections_and_rules(make_options, setup, monkeypatch):
    options = make_options(*SMALL, "MODEL.CASCADE.MASK.REDUNDANCY", "0.5", "MODEL.WEIGHTS", "some")
    trained = Setup(options)
    monkeypatch.setattr(Setup, "weights", setup.weights)
    monkeypatch.setattr(trained, "batches", setup.batches)
    models, _ = open_models(trained, ("ours",))
    results = compare_masks(trained, models, 1)
    detector = trained.build_ours()
    detector.proposal_generator.post_nms_topk = (0, max(options.proposals))
    [found] = detector.detect(setup.batches(1)[0]).detections
    assert results["masks"] == len(found[:12])
    made = sum(bool(masks.any()) for masks in found.masks[:12])
    assert made < 12
    assert results["rules"] == made


def test_the_run_names_what_is_missing(make_options, tmp_path):
    options = {"contenders": ("ours", "ours-fast"), "measure": ("masks",)}
    plain = run_benchmark(make_options(output=tmp_path / "plain", **options))
    assert plain["masks"] == []
    assert "MASK_ON" in plain["left_out"]["masks"]
    results = run_benchmark(make_options(*SMALL, output=tmp_path / "masks", **options))
    text = format_benchmark(results)
    assert "Masks of given boxes: batch of 1, 12 masks" in text
    assert "Masks compared with ours" in text


def test_drawn_objects_have_no_masks_to_train(setup):
    names, left_out = trainable(setup)
    assert names == []
    assert "MASK_ON" in left_out["training"]


def test_the_target_is_that_of_the_type():
    spread = {"median": 3.0}
    masks = [
        {
            **{"batch": 1, "masks": 100, "dtype": "bfloat16"},
            "ratios": [{"what": "ours-fast", "against": "peer", "ratio": spread}],
        }
    ]
    targets = [
        SpeedTarget(dtype, "masks", "ours-fast", "peer", least, dtype)
        for dtype, least in (("float32", 1.8), ("bfloat16", 2.4))
    ]
    results = {"machine": {"device": "cpu"}, "contenders": {}, "masks": masks}
    assert [(row["what"], row["least"]) for row in hold_targets(results, targets)] == [
        ("bfloat16", 2.4)
    ]


def test_torchvision_makes_masks_of_the_same_boxes(make_options):
    setup = Setup(
        make_options(*SMALL, "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256")
    )
    models, _ = open_models(setup, ("torchvision",))
    adapter, batch = models["torchvision"].adapter, setup.batches(1)[0]
    given = setup.detections(batch, 5)
    with torch.no_grad():
        [masks] = adapter.masks(adapter.prepare_masks(batch, given, None))
    assert masks.shape == (5, 28, 28)
    assert masks.std() > 0


@pytest.mark.needs_detectron2
def test_detectron2_makes_the_same_masks(setup):
    pytest.importorskip("detectron2.engine", exc_type=ImportError)
    names = ("ours", "ours-fast", "plugin", "plugin-fast", "detectron2-cascade")
    models, left_out = open_models(setup, names)
    assert not left_out
    results = compare_masks(setup, models, 1)
    differences = results["differences"]
    assert differences["with"] == "detectron2-cascade"
    assert list(differences["contenders"]) == list(names[:-1])
    assert max(differences["contenders"].values()) < 1e-4
    assert ("plugin-fast", "detectron2-cascade") in [
        (entry["what"], entry["against"]) for entry in results["ratios"]
    ]
