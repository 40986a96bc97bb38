"""The baselines: the real Detectron2 with our weights."""

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from cascade_det.benchmark.agreement import compare_detections
from cascade_det.benchmark.comparison import compare_training, compare_whole
from cascade_det.benchmark.models import open_models
from cascade_det.benchmark.options import MODELS
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.training import open_training_steps, trainable

pytestmark = pytest.mark.needs_detectron2

CASCADES = ("ours", "plugin", "plugin-fast")
STAGES = ["stage0", "stage1", "stage2"]


@pytest.fixture(scope="module")
def models(setup):
    opened, left_out = open_models(setup, [name for name in MODELS if name != "torchvision"])
    assert not left_out
    return opened


@pytest.fixture(scope="module")
def in_heads(models, heads_output):
    """The outputs of all heads for the same regions of the same images."""
    return {name: heads_output(model) for name, model in models.items()}


@pytest.mark.parametrize("name", CASCADES)
def test_detections_of_the_same_regions_are_those_of_detectron2(in_heads, name):
    compared = compare_detections(
        in_heads[name].detections, in_heads["detectron2-cascade"].detections
    )
    assert compared["in_common"] == compared["detections"] == compared["of_the_other"] > 20
    assert compared["box_difference"] < 1e-2
    assert compared["score_difference"] < 1e-4


@pytest.mark.parametrize("name", CASCADES)
def test_detections_of_the_same_images_are_those_of_detectron2(models, whole_output, name):
    ours, wanted = whole_output(models[name]), whole_output(models["detectron2-cascade"])
    assert ours.arrived == wanted.arrived == 80
    compared = compare_detections(ours.detections, wanted.detections)
    assert compared["in_common"] == compared["detections"] == compared["of_the_other"] > 20


def test_in_bfloat16_our_heads_detect_nearly_the_same(in_heads, make_options, heads_output):
    """Eight bits of a number are left: some hundredths of a score, a part of a pixel of 96."""
    setup = Setup(make_options("MODEL.CASCADE.FAST.DTYPE", "bfloat16"))
    opened, _ = open_models(setup, ("plugin-fast",))
    output = heads_output(opened["plugin-fast"], setup)
    compared = compare_detections(output.detections, in_heads["detectron2-cascade"].detections)
    assert compared["in_common"] > 0.9 * compared["of_the_other"] > 20
    assert 0 < compared["score_difference"] < 0.05
    assert 0 < compared["box_difference"] < 1.0


def test_every_head_gets_the_given_regions(in_heads):
    for name, output in in_heads.items():
        assert output.arrived == 80
        stages = 1 if "one-stage" in name else 3
        if not name.endswith("exits"):
            assert output.entered == [80] * stages
    assert in_heads["plugin-fast-exits"].entered == [40, 20, 6]


def test_autocast_computes_in_another_dtype(in_heads):
    for heads in ("cascade", "one-stage"):
        plain, cast = (in_heads[f"detectron2-{heads}{end}"] for end in ("", "-autocast"))
        scores = [each.detections[0].scores[:5].float() for each in (plain, cast)]
        assert not torch.equal(*scores)
        torch.testing.assert_close(*scores, rtol=0.1, atol=0.02)


def test_the_single_stage_has_the_weights_of_stage_0(setup, models):
    state = models["detectron2-one-stage"].adapter.model.roi_heads.state_dict()
    for single, ours in (
        ("box_head.fc1.weight", "roi_heads.box_head.0.fc1.weight"),
        ("box_predictor.cls_score.weight", "roi_heads.box_predictor.0.cls_score.weight"),
    ):
        torch.testing.assert_close(state[single], setup.weights[ours], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "stages"),
    [("detectron2-cascade", STAGES), ("detectron2-one-stage", STAGES[:1]), ("plugin", STAGES)],
)
def test_parts_have_our_names(setup, models, name, stages):
    parts = models[name].parts(setup.batches(1)[0])
    assert list(parts) == ["preprocess", "backbone", "rpn", *stages, "postprocess"]


def test_ours_is_compared_with_baselines(setup, models):
    chosen = {name: models[name] for name in ("ours", "plugin", "detectron2-cascade")}
    results = compare_whole(setup, chosen, 1, 40)
    pairs = [(entry["what"], entry["against"]) for entry in results["ratios"]]
    assert pairs == [("ours", "detectron2-cascade"), ("plugin", "detectron2-cascade")]
    assert results["agreement"]["with"] == "detectron2-cascade"


def test_training_steps_take_turns(setup):
    names, left_out = trainable(setup)
    assert {"ours", "detectron2-cascade"} <= set(names)
    assert set(names) | set(left_out) == {"ours", "ours-amp", "detectron2-cascade"}
    steps = open_training_steps(setup, names, setup.training_batch(2))
    results = compare_training(setup, steps, 2)
    assert list(results["contenders"]) == names
    assert results["ratios"][0]["against"] == "detectron2-cascade"
