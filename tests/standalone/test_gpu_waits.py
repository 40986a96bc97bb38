"""How often a GPU makes the CPU wait, and that no part mixes devices, on a pretended GPU.

The numbers are those of the second call: image sizes are sent with the first.
"""

import sys

import pytest
import torch
from pretended_gpu import GPUTensor, PretendedGPU
from random_records import make_parts
from small_cascades import NUM_CLASSES
from small_detectors import make_detector, make_masks, random_image

from cascade_det.core import ExitPolicy
from cascade_det.core.ensemble import ENSEMBLES
from cascade_det.core.exits.confidence import MEASURES
from cascade_det.engine.solver import build_optimizer
from cascade_det.engine.step import TrainingStep
from cascade_det.standalone import build_detector, optimize

optimization = sys.modules[optimize.__module__]  # the package has a function of this name
SIZES = ((96, 128), (80, 100))
DEFAULT = {"prune_thresholds": (0.02, 0.02), "redundancy_iou": 0.9}
BUDGETED = {"proposal_threshold": 1e-30, "region_budget": (30, 20, 10)} | DEFAULT
FIELDS = ("boxes", "scores", "classes", "exit_stages", "masks")


def make_batch(images, **more):
    sizes = [SIZES[i % 2] for i in range(images)]
    return [
        {"image": random_image(*size, seed=i), "height": 2 * size[0], "width": 3 * size[1], **more}
        for i, size in enumerate(sizes)
    ]


def exits_of(arguments):
    return None if arguments is None else ExitPolicy(num_stages=3, **arguments)


def detect_on_both(detector, batch, *, exact=True, warmup=0, **arguments):
    """The output on the pretended GPU, and the GPU; equal to that of the CPU, bit for bit."""
    detector.roi_heads.pooler.kernel = "torchvision"
    wanted = detector.detect(batch, **arguments)
    with PretendedGPU() as gpu:
        gpu.move(detector)
        for _ in range(warmup):
            detector.detect(batch, **arguments)
        gpu.reset()
        got = detector.detect(batch, **arguments)
    assert got.stats == wanted.stats or not exact
    pairs = [(got.detections, wanted.detections)]
    stages = zip(got.stages or (), wanted.stages or (), strict=True)
    pairs += [(ours.detections, theirs.detections) for ours, theirs in stages]
    assert sum(map(len, wanted.detections)) > 5
    for ours, theirs in pairs:
        for one, other in zip(ours, theirs, strict=True):
            for field in FIELDS:
                value, expected = getattr(one, field), getattr(other, field)
                assert type(value) is (GPUTensor if expected is not None else type(None))
                if exact and expected is not None:
                    assert torch.equal(value.held, expected)
    return got, gpu


@pytest.mark.parametrize(
    ("exits", "most"), [(None, (7, 8)), (DEFAULT, (12, 13)), (BUDGETED, (16, 17))]
)
@pytest.mark.parametrize("images", [1, 8])
def test_waits_of_inference(exits, most, images):
    detector = make_detector(exits=exits_of(exits))
    found, gpu = detect_on_both(detector, make_batch(images), warmup=1)
    assert all(found.stats.entered)
    print(f"{gpu.waits['nms']} waits of NMS, {gpu.launches} operations")
    assert gpu.waits_but_nms == most[images > 1], gpu.places


RULES = {
    **{f"confident by {name}": {"thresholds": (0.6, 0.5), "confidence": name} for name in MEASURES},
    "agreement": {"thresholds": (1.0, 1.0), "confidence": "agreement"},
    "refined": {
        "thresholds": (0.3, 0.3),
        "localisation": "refinement",
        "localisation_thresholds": (0.5, 0.5),
    },
    "accepted cover": {"thresholds": (0.6, 0.5), "redundancy_iou": 0.5},
    "margins": {"prune_margins": (0.3, 0.3, 0.3), "prune_best": 5},
    "learned": {
        "thresholds": (0.4, 0.4),
        "confidence": "learned",
        "localisation": "predicted_iou",
        "localisation_thresholds": (0.4, 0.4),
        "pruner_thresholds": (0.01, 0.01, 0.01),
    },
    "time": {"time_budget_ms": 1e6},
    "scores": {"score_scales": (1.1, 1.0, 0.9), "score_shifts": (0.1, 0.0, 0.1)},
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_stays_on_its_device(name):
    arguments = dict(RULES[name])
    if name == "learned":
        arguments["learned"] = make_parts(hidden=12)
    detect_on_both(make_detector(exits=exits_of(arguments)), make_batch(2))


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("cls_agnostic", [True, False])
def test_every_ensemble_stays_on_its_device(ensemble, cls_agnostic):
    exits = exits_of(DEFAULT | {"thresholds": (0.6, 0.5)})
    detector = make_detector(exits=exits, ensemble=ensemble, cls_agnostic=cls_agnostic)
    detect_on_both(detector, make_batch(2), stages=True)


@pytest.mark.parametrize("per_stage", [True, False])
def test_masks_stay_on_their_device(per_stage):
    masks = make_masks(per_stage=per_stage, score_threshold=0.3, redundancy_iou=0.9)
    detect_on_both(make_detector(masks=masks), make_batch(2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_stays_on_its_device(instant_cfg, dtype, monkeypatch):
    # Optimised on the CPU, which refuses float16.
    monkeypatch.setattr(optimization, "resolve_fast_dtype", lambda name, _: getattr(torch, name))
    detector = build_detector(instant_cfg)
    for predictor in detector.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
    optimize(detector, dtype=dtype)
    # A GPU adds shortcuts and levels by other operations than a CPU, with other roundings.
    detect_on_both(detector, make_batch(2), exact=False)


def train(options, images):
    detector = make_detector(**options).train()
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(images)
    for sample in batch:
        corners = torch.rand(3, 2, generator=generator) * 50
        sample["gt_boxes"] = torch.cat([corners, corners + 30], dim=1)
        sample["gt_classes"] = torch.randint(NUM_CLASSES, (3,), generator=generator)
    with PretendedGPU() as gpu:
        gpu.move(detector)
        optimizer = build_optimizer(detector, name="SGD", base_lr=1e-4)
        step = TrainingStep(detector, optimizer, device="cuda:0")
        step.run(batch, 0)
        gpu.reset()
        metrics, _ = step.run(batch, 1)
    assert metrics["gradient_norm"] > 0
    assert metrics["stage2/roi_head/num_fg_samples"] > 0
    return gpu


@pytest.mark.parametrize(("images", "most"), [(1, 24), (2, 31)])
def test_waits_of_a_training_step(images, most):
    gpu = train({}, images)
    assert gpu.waits_but_nms == most, gpu.places


def test_training_of_learned_exits_stays_on_its_device():
    policy = exits_of({"pruner_thresholds": (0.3, 0.3, 0.3), "learned": make_parts(hidden=12)})
    assert train({"exits": policy}, 2).launches > 500


class TestPretendedGPU:
    """The waits of single operations, as PyTorch's CUDA kernels have them."""

    @pytest.mark.parametrize(
        ("call", "waits"),
        [
            (lambda x, _: x + 1, 0),
            (lambda x, _: x.sum().item(), 1),
            (lambda x, _: x.tolist(), 1),
            (lambda x, _: x.cpu(), 1),
            (lambda x, _: x.nonzero(), 1),
            (lambda x, _: x[x > 1], 1),
            (lambda x, _: x[x.long()], 0),
            (lambda x, _: x.masked_select(x > 1), 1),
            (lambda x, _: x.repeat_interleave(x.long()), 1),
            (lambda x, _: x.repeat_interleave(2), 0),
            (lambda x, _: torch.bincount(x.long()), 2),
            (lambda x, _: x.where(x > 1, 0.0), 0),
            (lambda x, _: x.new_tensor([1.0]), 1),
            (lambda x, _: torch.tensor([1.0], device=x.device), 1),
            (lambda x, _: torch.zeros(3, device=x.device), 0),
            (lambda x, _: x.new_zeros(3), 0),
            (lambda x, host: host.to(x.device), 1),
            (lambda x, host: x.copy_(host), 1),
            (lambda x, _: x.to(x.device).to(torch.int64), 0),
            (lambda x, _: bool((x > 1).any()), 1),
            (lambda x, _: torch.cuda.synchronize(), 1),
        ],
    )
    def test_waits(self, call, waits):
        with PretendedGPU() as gpu:
            call(gpu.move(torch.tensor([0.0, 1.0, 2.0])), torch.ones(3))
            assert gpu.waits.total() == waits

    def test_assignments(self):
        with PretendedGPU() as gpu:
            x = gpu.move(torch.tensor([0.0, 1.0, 2.0]))
            x[x > 1] = 5.0
            assert gpu.waits.total() == 0
            x[x.clamp(max=2).long()] = 3.0
            assert gpu.waits == {"to the GPU": 1}
        assert x.held.tolist() == [3.0, 3.0, 3.0]

    def test_two_devices_fail(self):
        with PretendedGPU() as gpu, pytest.raises(AssertionError, match="on the GPU"):
            gpu.move(torch.ones(3)) + torch.ones(3)

    def test_views_are_no_operations(self):
        with PretendedGPU() as gpu:
            x = gpu.move(torch.ones(2, 3))
            assert (x.t()[0].is_cuda, gpu.launches) == (True, 0)
            assert ((x * 2).sum().device.type, gpu.launches) == ("cuda", 2)
