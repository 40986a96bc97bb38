"""The heads of Detectron2 with ``MODEL.CASCADE.FAST``: its answers, its weights, its training."""

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.utils.events import EventStorage
from small_cascades import make_scene
from small_plugin import (
    EXITS,
    THEIRS,
    assert_same_instances,
    build_heads,
    detect,
    features_of,
    proposals_of,
    targets_of,
    twins,
)

from cascade_det.core.fast_heads import FastBoxHead
from cascade_det.engine.solver import build_optimizer

pytestmark = pytest.mark.needs_detectron2

ROUNDING = {"rtol": 1e-4, "atol": 1e-3}
PLAIN_SGD = {
    **{"momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "weight_decay_norm": None},
    **{"bias_lr_factor": 1.0, "weight_decay_bias": None},
}
FAST = ["MODEL.CASCADE.FAST.ENABLED", True, "MODEL.CASCADE.FAST.DTYPE", "float32"]


def test_detections_are_detectron2s():
    ours, theirs = twins(FAST)
    wanted = detect(theirs, make_scene())
    assert min(map(len, wanted)) > 5
    assert_same_instances(detect(ours, make_scene()), wanted, **ROUNDING)
    assert all(isinstance(head, FastBoxHead) for head in ours.cascade.box_head)


def test_exits_leave_alike():
    plain, fast = build_heads(options=EXITS), build_heads(options=[*EXITS, *FAST])
    wanted = detect(plain, make_scene())
    assert_same_instances(detect(fast, make_scene()), wanted, **ROUNDING)
    assert fast.stats == plain.stats


def test_parameters_are_detectron2s_after_inference():
    ours, theirs = build_heads(options=FAST), build_heads(THEIRS)
    detect(ours, make_scene())
    shapes = [[(k, v.shape) for k, v in h.state_dict().items()] for h in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters())


def test_float32_heads_of_a_bfloat16_model():
    options = [*FAST[:2], "MODEL.CASCADE.FAST.DTYPE", "bfloat16"]
    parts = ["MODEL.CASCADE.FAST.FLOAT32_PARTS", ("roi_heads",)]
    heads = [build_heads(options=opts) for opts in (options, [*options, *parts])]
    for each in heads:
        detect(each, make_scene())
    assert [h.cascade.box_head[0].dtype for h in heads] == [torch.bfloat16, torch.float32]


def test_training_is_that_of_plain_heads_and_inference_follows_it():
    plain, fast = build_heads(), build_heads(options=FAST)
    detect(fast, make_scene())
    losses = []
    for heads in (plain, fast):
        optimizer = build_optimizer(heads.train(), name="SGD", base_lr=0.01, **PLAIN_SGD)
        torch.manual_seed(0)
        scene = make_scene()
        with EventStorage():
            losses.append(
                heads(None, features_of(scene), proposals_of(scene), targets_of(scene))[1]
            )
        sum(losses[-1].values()).backward()
        optimizer.step()
    assert losses[0] == losses[1]
    wanted = detect(plain.eval(), make_scene())
    assert_same_instances(detect(fast.eval(), make_scene()), wanted, **ROUNDING)
