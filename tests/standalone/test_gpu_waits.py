"""How often a GPU makes the CPU wait, and that no part mixes devices, on a pretended GPU.

The numbers are those of the second call: image sizes are sent with the first.
"""

import pytest
import torch
from process_settings import process_settings
from random_records import make_parts
from small_cascades import NUM_CLASSES
from small_detectors import make_detector, make_masks, random_image

from cascade_det.benchmark.pretended_gpu import GPUTensor, PretendedGPU
from cascade_det.core import ExitPolicy
from cascade_det.core.ensemble import ENSEMBLES
from cascade_det.core.exits.confidence import MEASURES
from cascade_det.engine.solver import build_optimizer
from cascade_det.engine.step import TrainingStep
from cascade_det.layers.tiles import windows_of
from cascade_det.standalone import build_detector, optimize
from cascade_det.standalone.preprocess import send

SIZES = ((96, 128), (80, 100))
DEFAULT = {"prune_thresholds": (0.02, 0.02), "redundancy_iou": 0.9}
LIMITED = {"region_budget": (30, 20, 10)}  # of known sizes
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


def detect_on_both(detector, batch, *, warmup=0, **arguments):
    """The output on the pretended GPU, and the GPU; equal to that of the CPU, bit for bit."""
    detector.roi_heads.pooler.kernel = "torchvision"
    wanted = detector.detect(batch, **arguments)
    with PretendedGPU() as gpu:
        gpu.move(detector)
        for _ in range(warmup):
            detector.detect(batch, **arguments)
        gpu.reset()
        got = detector.detect(batch, **arguments)
    assert got.stats == wanted.stats
    pairs = [(got.detections, wanted.detections)]
    stages = zip(got.stages or (), wanted.stages or (), strict=True)
    pairs += [(ours.detections, theirs.detections) for ours, theirs in stages]
    assert sum(map(len, wanted.detections)) > 5
    for ours, theirs in pairs:
        for one, other in zip(ours, theirs, strict=True):
            for field in FIELDS:
                value, expected = getattr(one, field), getattr(other, field)
                assert type(value) is (GPUTensor if expected is not None else type(None))
                if expected is not None:
                    assert torch.equal(value.held, expected)
    return got, gpu


@pytest.mark.parametrize(
    ("exits", "most"), [(None, 7), (LIMITED, 8), (DEFAULT, 10), (BUDGETED, 11)]
)
@pytest.mark.parametrize("images", [1, 8])
def test_waits_of_inference(exits, most, images):
    detector = make_detector(exits=exits_of(exits))
    found, gpu = detect_on_both(detector, make_batch(images), warmup=1)
    assert all(found.stats.entered)
    print(f"{gpu.launches} operations")
    assert gpu.waits.total() == most, gpu.places


@pytest.mark.parametrize(("threshold", "most"), [(1e-30, 3), (0.505, 4), (1.0, 3)])
@pytest.mark.parametrize("images", [1, 8])
def test_waits_of_a_tile_gate(threshold, most, images):
    exits = exits_of(DEFAULT | {"tile_threshold": threshold})
    _, plain = detect_on_both(make_detector(exits=exits_of(DEFAULT)), make_batch(images), warmup=1)
    found, gpu = detect_on_both(make_detector(exits=exits), make_batch(images), warmup=1)
    assert found.stats.tiles_computed
    assert gpu.waits.total() - plain.waits.total() <= most, gpu.places


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_tiles_are_computed_in_one_shape(count):
    tiles = torch.zeros(2, 10, 20, dtype=torch.bool)
    tiles.view(-1)[torch.randperm(400)[:count]] = True
    with PretendedGPU() as gpu:
        windows = [x.held for x in windows_of(gpu.move(tiles), count)]
    assert {len(x) for x in windows} == {64}
    assert torch.equal(torch.cat(windows)[:count], tiles.nonzero())


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
@pytest.mark.parametrize(("kernel", "waits"), [("auto", 7), ("torchvision", 10)])
def test_optimising_for_a_gpu_stays_on_its_device(instant_cfg, dtype, kernel, waits):
    detector = build_detector(instant_cfg)
    for predictor in detector.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
    detector.roi_heads.pooler.kernel = kernel
    wanted = detector.detect(make_batch(2)).detections
    before = process_settings()
    with PretendedGPU() as gpu:
        optimize(gpu.move(detector), dtype=dtype)
        assert detector.dtype == dtype
        assert not any("Winograd" in done for done in detector.optimizations)
        detector.detect(make_batch(2))
        gpu.reset()
        found = detector.detect(make_batch(2)).detections
        # The kernel for all levels waits for nothing, torchvision's once in each stage.
        assert gpu.waits.total() == waits, gpu.places
    assert process_settings() == before
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(type(value) is GPUTensor for value in (ours.boxes, ours.scores, ours.classes))
        if dtype == "float32":
            torch.testing.assert_close(ours.scores.held, theirs.scores, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.boxes.held, theirs.boxes, atol=1e-2, rtol=1e-4)


def train(options, images, amp_dtype=None):
    """The GPU after a second step, and the strides of the maps and the metrics of that step."""
    before = process_settings()
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
        step = TrainingStep(detector, optimizer, device="cuda:0", amp_dtype=amp_dtype)
        step.run(batch, 0)
        gpu.reset()
        maps = []
        hook = detector.backbone.register_forward_hook(lambda *call: maps.append(call[2]))
        metrics, _ = step.run(batch, 1)
        hook.remove()
    assert process_settings() == before
    assert metrics["gradient_norm"] > 0
    assert metrics["stage2/roi_head/num_fg_samples"] > 0
    channels_last = {
        x.held.is_contiguous(memory_format=torch.channels_last) for x in maps[0].values()
    }
    return gpu, channels_last, metrics


@pytest.mark.parametrize(("images", "most"), [(1, 21), (2, 26)])
def test_waits_of_a_training_step(images, most):
    gpu, channels_last, _ = train({}, images)
    assert gpu.waits.total() == most, gpu.places
    assert channels_last == {False}


def test_training_of_learned_exits_stays_on_its_device():
    policy = exits_of({"pruner_thresholds": (0.3, 0.3, 0.3), "learned": make_parts(hidden=12)})
    assert train({"exits": policy}, 2)[0].launches > 500


def test_maps_of_half_precision_are_channels_last():
    """The pretended GPU computes in float32 all the same, so that numbers can be compared."""
    planes, plain, wanted = train({}, 1)
    gpu, half, metrics = train({}, 1, torch.bfloat16)
    assert (plain, half) == ({False}, {True})
    assert gpu.waits == planes.waits
    assert metrics == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "waits"),
    [
        ([], [], 0),
        ([(2, 3)], [torch.uint8], 0),
        ([(2, 3), (0, 4), (5,)], [torch.float32] * 3, 0),
        ([(2, 3), (4,)], [torch.float32, torch.uint8], 2),  # one by one
    ],
)
def test_tensors_are_sent_in_one_transfer(shapes, dtypes, waits):
    tensors = [
        (100 * torch.rand(*shape)).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    with PretendedGPU() as gpu:
        found = send(tensors, torch.device("cuda:0"))
        assert gpu.waits.total() == waits
    assert [x.held.dtype for x in found] == dtypes
    for x, wanted in zip(found, tensors, strict=True):
        assert torch.equal(x.held, wanted)
    assert all(x is y for x, y in zip(send(tensors, torch.device("cpu")), tensors, strict=True))


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
            (lambda x, host: host.to(x.device, non_blocking=True), 1),
            (lambda x, _: torch.empty(3, pin_memory=True).to(x.device, non_blocking=True), 0),
            (lambda x, _: torch.empty(3, pin_memory=True).to(x.device), 1),
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

    def test_parts(self):
        with PretendedGPU() as gpu:
            x = gpu.move(torch.tensor([0.0, 1.0]))
            with gpu.part("outer"):
                x.sum().item()
                with gpu.part("inner"):
                    (x + 1).nonzero()
                (x * 2).exp()
            x.neg()
        assert {name: (c["waits"], c["launches"]) for name, c in gpu.parts.items()} == {
            "outer": (1, 3),
            "inner": (1, 2),
            "rest": (0, 1),
        }

    def test_two_devices_fail(self):
        with PretendedGPU() as gpu, pytest.raises(AssertionError, match="on the GPU"):
            gpu.move(torch.ones(3)) + torch.ones(3)

    def test_views_are_no_operations(self):
        with PretendedGPU() as gpu:
            x = gpu.move(torch.ones(2, 3))
            assert (x.t()[0].is_cuda, gpu.launches) == (True, 0)
            assert ((x * 2).sum().device.type, gpu.launches) == ("cuda", 2)
