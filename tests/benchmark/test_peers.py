"""The peers: the real Detectron2 on our weights, and torchvision."""

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from cascade_det.benchmark.agreement import compare_detections
from cascade_det.benchmark.comparison import compare_training, compare_whole
from cascade_det.benchmark.contenders import open_contenders
from cascade_det.benchmark.options import CONTENDERS
from cascade_det.benchmark.training import open_training_steps, trainable

pytestmark = pytest.mark.needs_detectron2

CASCADES = ("ours", "plugin", "plugin-fast", "detectron2-cascade")
STAGES = [f"stage{number}" for number in range(3)]


@pytest.fixture(scope="module")
def contenders(setup):
    names = [name for name in CONTENDERS if name != "torchvision"]
    opened, left_out = open_contenders(setup, names)
    assert not left_out
    return opened


@pytest.fixture(scope="module")
def in_heads(setup, contenders):
    """What every contender makes of the same regions of the same images."""
    batch = setup.batches(2)[0]
    regions = setup.regions(batch, 40)
    return {
        name: contender.outcome(contender.heads(contender.prepare(batch, regions)))
        for name, contender in contenders.items()
    }


@pytest.mark.parametrize("name", CASCADES)
def test_detections_of_the_same_regions_are_those_of_detectron2(in_heads, name):
    figures = compare_detections(
        in_heads[name].detections, in_heads["detectron2-cascade"].detections
    )
    assert figures["in_common"] == figures["detections"] == figures["of_the_other"] > 20
    assert figures["box_difference"] < 1e-2
    assert figures["score_difference"] < 1e-4


@pytest.mark.parametrize("name", CASCADES)
def test_detections_of_the_same_images_are_those_of_detectron2(setup, contenders, name):
    found = {}
    for each in (name, "detectron2-cascade"):
        contenders[each].limit_proposals(40)
        inputs = contenders[each].inputs(setup.batches(2)[0])
        found[each] = contenders[each].outcome(contenders[each].whole(inputs))
    assert found[name].arrived == 80
    figures = compare_detections(found[name].detections, found["detectron2-cascade"].detections)
    assert figures["in_common"] == figures["detections"] == figures["of_the_other"] > 20


def test_in_bfloat16_our_heads_detect_nearly_what_detectron2_does(in_heads, bfloat16_setup):
    opened, _ = open_contenders(bfloat16_setup, ("plugin-fast",))
    fast = opened["plugin-fast"]
    batch = bfloat16_setup.batches(2)[0]
    outcome = fast.outcome(fast.heads(fast.prepare(batch, bfloat16_setup.regions(batch, 40))))
    figures = compare_detections(outcome.detections, in_heads["detectron2-cascade"].detections)
    assert figures["in_common"] > 0.9 * figures["of_the_other"] > 20
    assert 0 < figures["score_difference"] < 0.05
    assert 0 < figures["box_difference"] < 1.0


def test_every_head_gets_the_given_regions(in_heads):
    for name, outcome in in_heads.items():
        assert outcome.arrived == 80
        stages = 1 if "one-stage" in name else 3
        if not name.endswith("exits"):
            assert outcome.entered == [80] * stages
    assert in_heads["plugin-fast-exits"].entered == [40, 20, 6]


def test_autocast_computes_in_another_type(in_heads):
    for heads in ("cascade", "one-stage"):
        plain, cast = (in_heads[f"detectron2-{heads}{end}"] for end in ("", "-autocast"))
        scores = [each.detections[0].scores[:5].float() for each in (plain, cast)]
        assert not torch.equal(*scores)
        torch.testing.assert_close(*scores, rtol=0.1, atol=0.02)


def test_the_single_stage_has_the_weights_of_stage_0(setup, contenders):
    heads = contenders["detectron2-one-stage"].model.model.roi_heads
    wanted = setup.weights["roi_heads.box_head.0.fc1.weight"]
    torch.testing.assert_close(heads.box_head.fc1.weight, wanted, rtol=0, atol=0)
    wanted = setup.weights["roi_heads.box_predictor.0.cls_score.weight"]
    torch.testing.assert_close(heads.box_predictor.cls_score.weight, wanted, rtol=0, atol=0)


def test_parts_of_the_peers_have_our_names(setup, contenders):
    batch = setup.batches(1)[0]
    for name, stages in (("detectron2-cascade", STAGES), ("detectron2-one-stage", STAGES[:1])):
        contender = contenders[name]
        parts = contender.parts(contender.inputs(batch))
        assert list(parts) == ["preprocess", "backbone", "rpn", *stages, "postprocess"]
    assert list(contenders["plugin"].parts(batch)) == [
        *("preprocess", "backbone", "rpn", *STAGES, "postprocess")
    ]


def test_peers_are_what_ours_is_compared_with(setup, contenders):
    chosen = {name: contenders[name] for name in ("ours", "plugin", "detectron2-cascade")}
    figures = compare_whole(setup, chosen, 1, 40)
    pairs = [(entry["what"], entry["against"]) for entry in figures["ratios"]]
    assert pairs == [("ours", "detectron2-cascade"), ("plugin", "detectron2-cascade")]
    assert figures["agreement"]["with"] == "detectron2-cascade"


def test_steps_of_training_run_in_turn(setup):
    names, left_out = trainable(setup)
    assert {"ours", "detectron2-cascade"} <= set(names)
    assert set(names) | set(left_out) == {"ours", "ours-amp", "detectron2-cascade"}
    steps = open_training_steps(setup, names, setup.training_batch(2))
    figures = compare_training(setup, steps, 2)
    assert list(figures["contenders"]) == names
    assert figures["ratios"][0]["against"] == "detectron2-cascade"
