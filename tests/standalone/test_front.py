"""Trunk, pyramid and RPN up to its NMS in one compiled call, and what leaves a detector then."""

import pytest
import torch
from small_detectors import random_image

from cascade_det.benchmark.pretended_gpu import PartCounter, PretendedGPU
from cascade_det.standalone import build_detector, optimize
from cascade_det.standalone.front import Front

# Maps of one row or column, and squares, are compiled on their own.
SIZES = ((160, 240), (240, 160), (160, 300))


@pytest.fixture
def detector(instant_cfg):
    torch._dynamo.reset()
    instant_cfg.merge_from_list(["MODEL.RPN.PRE_NMS_TOPK_TEST", 20])
    detector = build_detector(instant_cfg)
    for predictor in detector.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
    return detector


def batch_of(*sizes):
    return [{"image": random_image(*size, seed=i)} for i, size in enumerate(sizes)]


def assert_equal(found, wanted):
    assert sum(map(len, wanted.detections)) > 5
    for one, other in zip(found.detections, wanted.detections, strict=True):
        for name in ("boxes", "scores", "classes"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


@pytest.mark.slow
def test_one_graph_serves_all_sizes(detector):
    optimize(detector, dtype="float32")
    batches = [batch_of(size) for size in SIZES] + [batch_of(*SIZES), batch_of(*SIZES[:2])]
    detector.use_front(Front(detector.backbone, detector.proposal_generator))
    wanted = [detector.detect(batch) for batch in batches]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    front = Front(detector.backbone, detector.proposal_generator)
    front.compile(dynamic=True, fullgraph=True, backend=backend)
    detector.use_front(front)
    for batch, output in zip(batches, wanted, strict=True):
        assert_equal(detector.detect(batch), output)
    assert len(graphs) == 2  # for single images, and for batches of several


def test_sizes_are_rounded_up_as_beside_a_larger_image(detector):
    """A batch is as large as its largest image, so padding is nothing new to a detector."""
    batch, largest = batch_of((72, 100)), {"image": random_image(128, 128)}
    expected = detector.detect([*batch, largest]).detections[:1]
    sizes = []
    detector.backbone.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[2:]))
    detector.use_front(Front(detector.backbone, detector.proposal_generator))
    got = detector.detect(batch).detections
    assert sizes == [(128, 128)]
    assert len(got[0]) > 5
    for name in ("boxes", "scores", "classes"):
        ours = getattr(got[0], name)
        torch.testing.assert_close(ours, getattr(expected[0], name), rtol=1e-4, atol=1e-3)


def test_few_recordings_serve_many_sizes(detector):
    detector.use_front(Front(detector.backbone, detector.proposal_generator))
    images = [random_image(800, width) for width in range(800, 1334, 3)]
    shapes = {tuple(detector.preprocess([image])[0].shape) for image in images}
    assert shapes == {(1, 3, 832, width) for width in range(832, 1345, 64)}


class Recording(Front):
    """Writes its results to the same memory at every call, as a CUDA graph does."""

    def forward(self, images):
        maps, candidates = super().forward(images)
        if not hasattr(self, "kept"):
            self.kept = maps, candidates
        for name, value in maps.items():
            self.kept[0][name].copy_(value)
        for kept, value in zip(self.kept[1], candidates, strict=True):
            kept.copy_(value)
        return self.kept


def test_nothing_that_leaves_is_overwritten_by_the_next_call(detector):
    detector.use_front(Recording(detector.backbone, detector.proposal_generator))
    first, second = batch_of((64, 96)), [{"image": random_image(64, 96, seed=9)}]
    output, inputs = detector.detect(first, stages=True), detector.cascade_inputs(first)
    tensors = [
        *inputs.features,
        *inputs.proposals,
        *inputs.objectness,
        *(found.boxes for found in output.detections),
        *(found.scores for stage in output.stages for found in stage.detections),
    ]
    before = [tensor.clone() for tensor in tensors]
    assert not torch.equal(detector.cascade_inputs(second).features[0], before[0])
    for tensor, value in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, value, rtol=0, atol=0)


def test_on_a_gpu_the_rest_of_the_rpn_is_a_quarter_of_it(detector, monkeypatch):
    monkeypatch.setattr(Front, "compile", lambda self, **_: None)  # only counted here
    detector.roi_heads.pooler.kernel = "torchvision"
    launches = []
    with PretendedGPU() as gpu:
        optimize(gpu.move(detector), dtype="float32", compile=True)
        front, batch = detector.compiled_front, batch_of((64, 96))
        assert "Backbone, pyramid and RPN" in "".join(detector.optimizations)
        for used in (front, None):
            detector.use_front(used)
            detector.detect(batch)
            gpu.reset()
            detector.detect(batch, timer=PartCounter(gpu))
            launches.append(gpu.parts["rpn"]["launches"])
    assert launches[0] * 4 <= launches[1]


def test_a_compiled_front_is_no_part_of_the_state(detector):
    names = list(detector.state_dict())
    detector.use_front(Front(detector.backbone, detector.proposal_generator))
    assert list(detector.state_dict()) == names
    assert not any(isinstance(module, Front) for module in detector.modules())
