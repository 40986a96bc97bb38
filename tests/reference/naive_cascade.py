"""The cascade once more, slow and plain, to compare the real one with.

One region at a time, in double precision, by the letter of the design. It shares no code with
``cascade_det``: it knows the weights by their names in a state dict and nothing else.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from torchvision.ops import roi_align


@dataclass
class NaiveRegion:
    image: int
    row: int
    box: tuple[float, float, float, float]
    logits: list[list[float]] = field(default_factory=list)


@dataclass
class NaiveDetection:
    box: tuple[float, float, float, float]
    score: float
    label: int
    exit_stage: int


@dataclass
class NaiveResult:
    """``survivors[s]`` holds the (image, row) of the regions that stage s computes, in order."""

    detections: list[list[NaiveDetection]]
    survivors: list[list[tuple[int, int]]]
    left: list[dict[str, int]]


@dataclass
class NaiveCascade:
    state: dict[str, torch.Tensor]
    num_classes: int
    bbox_reg_weights: list[tuple[float, float, float, float]]
    strides: list[int]
    output_size: int
    sampling_ratio: int
    aligned: bool
    ensemble: str
    score_thresh: float
    nms_thresh: float
    detections_per_image: int
    thresholds: list[float] | None = None
    prune_thresholds: list[float] | None = None

    def __post_init__(self):
        self.state = {name: value.detach().double() for name, value in self.state.items()}
        self.num_stages = len(self.bbox_reg_weights)

    def detect(self, features, proposals, image_sizes):
        features = [f.detach().double() for f in features]
        live = []
        for image, boxes in enumerate(proposals):
            for row, box in enumerate(boxes.tolist()):
                live.append(NaiveRegion(image, row, tuple(box)))
        scored = [[] for _ in image_sizes]
        survivors = [[] for _ in range(self.num_stages)]
        left = [{} for _ in range(self.num_stages)]
        for stage in range(self.num_stages):
            staying = []
            for region in live:
                survivors[stage].append((region.image, region.row))
                crop = self.pool(features, region.image, region.box)
                logits, deltas = self.run_head(stage, crop)
                region.logits.append(logits)
                boxes = [
                    self.move(region.box, deltas[i : i + 4], stage, image_sizes[region.image])
                    for i in range(0, len(deltas), 4)
                ]
                reason = self.reason_to_leave(stage, region)
                if reason is not None:
                    left[stage][reason] = left[stage].get(reason, 0) + 1
                if reason in ("confident", "completed"):
                    probs = self.final_probs(stage, region, crop)
                    for label in range(self.num_classes):
                        if probs[label] > self.score_thresh:
                            box = boxes[label] if len(boxes) > 1 else boxes[0]
                            found = NaiveDetection(box, probs[label], label, stage)
                            scored[region.image].append(found)
                if reason is None:
                    top = max(range(self.num_classes), key=lambda label: logits[label])
                    region.box = boxes[top] if len(boxes) > 1 else boxes[0]
                    staying.append(region)
            live = staying
        return NaiveResult([self.select(found) for found in scored], survivors, left)

    def pool(self, features, image, box):
        area = (box[2] - box[0]) * (box[3] - box[1])
        finest, coarsest = math.log2(self.strides[0]), math.log2(self.strides[-1])
        level = math.floor(4 + math.log2(math.sqrt(area) / 224 + 1e-8))
        index = int(min(max(level, finest), coarsest) - finest)
        return roi_align(
            features[index][image : image + 1],
            torch.tensor([[0.0, *box]], dtype=torch.float64),
            self.output_size,
            1 / self.strides[index],
            self.sampling_ratio,
            self.aligned,
        )

    def run_head(self, stage, crop):
        x, i = crop, 1
        while f"box_head.{stage}.conv{i}.weight" in self.state:
            x = F.conv2d(x, *self.weights(f"box_head.{stage}.conv{i}"), padding=1)
            x, i = x.clamp(min=0), i + 1
        x, i = x.reshape(-1), 1
        while f"box_head.{stage}.fc{i}.weight" in self.state:
            weight, bias = self.weights(f"box_head.{stage}.fc{i}")
            x, i = (weight @ x + bias).clamp(min=0), i + 1
        outputs = []
        for name in ("cls_score", "bbox_pred"):
            weight, bias = self.weights(f"box_predictor.{stage}.{name}")
            outputs.append((weight @ x + bias).tolist())
        return outputs

    def weights(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def move(self, box, deltas, stage, image_size):
        width, height = box[2] - box[0], box[3] - box[1]
        dx, dy, dw, dh = (d / w for d, w in zip(deltas, self.bbox_reg_weights[stage], strict=True))
        x, y = box[0] + width / 2 + dx * width, box[1] + height / 2 + dy * height
        most = math.log(1000 / 16)
        width, height = width * math.exp(min(dw, most)), height * math.exp(min(dh, most))
        limit_y, limit_x = image_size
        return (
            min(max(x - width / 2, 0.0), limit_x),
            min(max(y - height / 2, 0.0), limit_y),
            min(max(x + width / 2, 0.0), limit_x),
            min(max(y + height / 2, 0.0), limit_y),
        )

    def running_probs(self, region):
        if self.ensemble == "last":
            return softmax(region.logits[-1])
        if self.ensemble == "mean_logits":
            return softmax(mean(region.logits))
        return mean([softmax(logits) for logits in region.logits])

    def final_probs(self, stage, region, crop):
        if self.ensemble != "last_boxes":
            return self.running_probs(region)
        return mean([softmax(self.run_head(earlier, crop)[0]) for earlier in range(stage + 1)])

    def reason_to_leave(self, stage, region):
        if stage == self.num_stages - 1:
            return "completed"
        if self.thresholds is None:
            return None
        best = max(self.running_probs(region)[:-1])
        if best < self.prune_thresholds[stage]:
            return "background"
        if best >= self.thresholds[stage]:
            return "confident"
        return None

    def select(self, found):
        kept = []
        for candidate in sorted(found, key=lambda d: -d.score):
            rivals = [other for other in kept if other.label == candidate.label]
            if all(iou(candidate.box, other.box) <= self.nms_thresh for other in rivals):
                kept.append(candidate)
        return kept if self.detections_per_image < 0 else kept[: self.detections_per_image]


def softmax(logits):
    largest = max(logits)
    exponentials = [math.exp(value - largest) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / total
