"""Stages of Detectron2's optimised model behind a tile gate: those of the model without one."""

import copy

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from two_hosts import BACKBONES, EXITS, FAST_KERNEL, build_two, make_batch

from cascade_det.core import PartTimer
from cascade_det.d2 import optimize
from cascade_det.d2.detector import Detector

pytestmark = pytest.mark.needs_detectron2

PROPOSALS = 25
OPTIONS = (
    *(*BACKBONES["R-18"], *FAST_KERNEL, *EXITS, "MODEL.CASCADE.EXIT.TILE_THRESHOLD", 1.0),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", PROPOSALS),
)


@pytest.mark.parametrize("chosen", [[True, True, True], [True, False, True]])
def test_stages_are_those_of_whole_maps(chosen):
    model = build_two(*OPTIONS)[0].model.eval()
    # An objectness that differs from place to place.
    torch.nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight, std=0.1)
    optimize(model, dtype="float32")
    batch = make_batch(3, sizes=((250, 320),) * 3)
    dense = Detector(copy.deepcopy(model))
    dense.cascade.exits.tile_threshold = 0.0
    timer = PartTimer()
    found = Detector(model).detect(batch, stages=chosen, timer=timer)
    wanted = dense.detect(batch, stages=chosen)
    assert (found.stats.tiles > 0, found.stats.tiles_open, wanted.stats.tiles) == (True, 0, 0)
    assert {"tile gate", "full/tile gate", "full/rpn"} <= timer.milliseconds.keys()
    # The gate loses something.
    counts = [[len(own) for own in output.detections] for output in (found, wanted)]
    assert counts[0] != counts[1]
    for ours, theirs in zip(found.stages, wanted.stages, strict=True):
        triples = zip(ours.boxes_after, theirs.boxes_after, chosen, strict=True)
        for one, other, is_chosen in triples:
            assert len(one) == len(other) == (PROPOSALS if is_chosen else 0)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
