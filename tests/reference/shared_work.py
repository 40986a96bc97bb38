"""What two processes do in the tests: gradients and metrics; each saves its results."""

import itertools
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from cascade_det.config import load_config
from cascade_det.core.class_losses import ClassLoss
from cascade_det.core.dynamic_targets import DynamicTargets
from cascade_det.core.matching import GroundTruth
from cascade_det.core.structures import CascadeStats, Detections, DetectorOutput, StageOutput
from cascade_det.engine.inference import run_inference
from cascade_det.evaluation import default_evaluators
from cascade_det.parallel import distributed
from cascade_det.parallel.processes import PeerError
from cascade_det.standalone.build import build_detector
from tests.reference.training_passes import make_pass

ROOT = Path(__file__).parents[2]
# Nothing is drawn at random: every anchor and every proposal is a sample.
_EVERYTHING = ("BATCH_SIZE_PER_IMAGE", 100_000, "POSITIVE_FRACTION", 1.0)
KEYS = [
    *(f"MODEL.RPN.{x}" if isinstance(x, str) else x for x in _EVERYTHING),
    *(f"MODEL.ROI_HEADS.{x}" if isinstance(x, str) else x for x in _EVERYTHING),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0),
    # Nothing reads the finest level: its convolutions get no gradient.
    *("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"]),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]]),
]


def make_detector(seed):
    """A small real detector in training mode."""
    torch.manual_seed(seed)
    cfg = load_config(ROOT / "configs" / "quick_schedules" / "instant_test.yaml", KEYS)
    return build_detector(cfg).train()


def make_batch(seed, num_objects):
    """One image of noise with boxes in it."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_objects, 2, generator=generator) * 30
    sides = 20 + torch.rand(num_objects, 2, generator=generator) * 30
    return [
        {
            "image": torch.randint(256, (3, 64, 96), generator=generator).to(torch.uint8),
            "gt_boxes": torch.cat([corners, corners + sides], dim=1),
            "gt_classes": torch.randint(6, (num_objects,), generator=generator),
        }
    ]


def gradients(detector):
    return {n: p.grad.clone() for n, p in detector.named_parameters() if p.grad is not None}


def backward(model, batch):
    """Gradients of the sum of the losses; the losses themselves."""
    model.zero_grad()
    losses = model(batch)
    sum(losses.values()).backward()
    return {name: float(value.detach()) for name, value in losses.items()}


class NoisyOracle(nn.Module):
    """Finds what is there, more or less: a function of the image's id, and of nothing else."""

    def __init__(self, objects, num_classes):
        super().__init__()
        self.objects, self.num_classes = objects, num_classes

    def detect(self, batch, *, stages=False, timer=None):
        with nullcontext() if timer is None else timer.part("backbone"):
            outputs = [self._stages(sample["image_id"]) for sample in batch]
        per_stage = [
            StageOutput(*map(list, zip(*s, strict=True))) for s in zip(*outputs, strict=True)
        ]
        regions = sum(len(boxes) for boxes in per_stage[0].boxes_before)
        stats = CascadeStats([regions, regions - 1], [{"confident": 1}, {"completed": regions - 1}])
        return DetectorOutput(per_stage[-1].detections, stats, per_stage)

    def _stages(self, image_id):
        """Detections, boxes before and after, of two stages."""
        generator = torch.Generator().manual_seed(image_id)
        boxes, classes = self.objects[image_id]
        steps = [boxes + sd * torch.randn(boxes.shape, generator=generator) for sd in (9, 5, 2)]
        steps = [torch.cat([b[:, :2], torch.maximum(b[:, 2:], b[:, :2] + 1)], 1) for b in steps]
        result = []
        for before, after in itertools.pairwise(steps):
            scores = torch.rand(len(boxes), generator=generator).sort(descending=True).values
            wrong = torch.rand(len(boxes), generator=generator) < 0.3
            found = torch.where(wrong, (classes + 1) % self.num_classes, classes)
            stage = torch.full_like(classes, len(result))
            result.append((Detections(after, scores, found, stage), before, after))
        return result


def evaluate_share(ground_truth, image_ids, share):
    """Metrics of the oracle on the images; this process sees ``share`` (index, count)."""
    ids = [category["id"] for category in ground_truth["categories"]]
    objects = {}
    for image_id in image_ids:
        found = [a for a in ground_truth["annotations"] if a["image_id"] == image_id]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        objects[image_id] = boxes, torch.tensor([ids.index(a["category_id"]) for a in found])
    index, count = share
    mine = image_ids[index * len(image_ids) // count : (index + 1) * len(image_ids) // count]
    evaluators = default_evaluators(
        ground_truth=ground_truth,
        category_ids=ids,
    )
    loader = [[{"image_id": image_id, "file_name": f"{image_id}.jpg"}] for image_id in mine]
    return run_inference(NoisyOracle(objects, len(ids)), loader, evaluators, stages=True)


class Failing:
    """An evaluator that fails."""

    def process(self, batch, output):
        pass

    def state(self):
        return None

    def merge(self, states):
        pass

    def evaluate(self):
        raise ZeroDivisionError("no metrics")


def observe_together(rank):
    """Thresholds and states after each of two passes; in the second, process 0 has no objects."""
    dynamic = DynamicTargets(num_stages=1, k_iou=1, k_beta=0, period=2, iou_floor=0.1)
    found = []
    for best, has_objects in (((0.4, 0.6)[rank], True), (0.7, rank == 1)):
        none = torch.zeros(0, dtype=torch.int64)
        dynamic.observe_proposals(
            torch.tensor([best]), none.new_zeros(1), torch.tensor([has_objects])
        )
        dynamic.finish_pass([], [], GroundTruth(torch.zeros(0, 4), none, none), 1)
        state = {name: value.clone() for name, value in dynamic.state_dict().items()}
        found.append((dynamic.ious((0.9,)), state))
    return found


def count_together(rank):
    """Labels that a seesaw loss has counted in two passes; process 1 has none in the second."""
    loss = ClassLoss("seesaw", num_stages=1, num_classes=2)
    for labels in (([0, 0, 2], [1, 2])[rank], ([0, 1], [])[rank]):
        loss([make_pass([*range(len(labels))], torch.zeros(len(labels), 3), labels)])
    return loss.counts


def work_together(folder, ground_truth):
    """Everything that two processes can do, in one launch; results go to ``rank<r>.pt``."""
    torch.set_num_threads(1)
    rank = distributed.rank()
    found = {
        "places": (rank, distributed.world_size(), distributed.is_main()),
        "gathered": distributed.all_gather({"rank": rank}),
        "gathered on main": distributed.gather(rank),
        "broadcast": distributed.broadcast(f"from {rank}"),
        "mean": distributed.mean_over_processes(torch.tensor([rank, 4.0])),
        "on main": distributed.on_main(lambda: f"computed by {rank}"),
    }
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(2, 3, 4, 4) + rank)
    distributed.synchronise_buffers(norm)
    found["buffers"] = dict(norm.named_buffers())

    found["dynamic targets"] = observe_together(rank)
    found["counts"] = count_together(rank)

    # Each process starts from weights of its own: those of the main one count.
    detector = make_detector(seed=rank)
    model = distributed.wrap(detector)
    backward(model, make_batch(rank, num_objects=2 + rank))
    found["gradients"] = gradients(detector)

    if rank == 1:
        # No proposal is large enough, and no object joins them.
        detector.proposal_generator.min_box_size = 1e6
    found["losses without regions"] = [
        backward(model, make_batch(rank, num_objects=2 * (1 - rank))) for _ in range(2)
    ]
    found["finite"] = all(grad.isfinite().all() for grad in gradients(detector).values())

    image_ids = [image["id"] for image in ground_truth["images"]]
    found["metrics"] = evaluate_share(ground_truth, image_ids, (rank, 2))
    found["metrics of one image"] = evaluate_share(ground_truth, image_ids[:1], (rank, 2))
    try:
        run_inference(NoisyOracle({}, 1), [], [Failing()])
    except (PeerError, ZeroDivisionError) as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"rank{rank}.pt")
    return 0
