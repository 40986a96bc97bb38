"""A slow and plain cascade to test the real one against.

One region at a time, in double precision. It shares no code with ``cascade_det``, only the names
of the weights in the state dict.
"""

import math
from dataclasses import dataclass, field

import torch
from naive_exits import NaivePolicy, Seen, iou, sigmoid
from torch.nn import functional as F
from torchvision.ops import roi_align


@dataclass
class NaiveRegion:
    """``seen`` is the input of exit rules after the last stage."""

    image: int
    row: int
    box: tuple[float, float, float, float]
    seen: Seen
    logits: list[list[float]] = field(default_factory=list)
    tops: list[int] = field(default_factory=list)


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
    left_before: dict[str, int]
    confidence: list[dict[str, float]]


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
    policy: NaivePolicy | None = None

    def __post_init__(self):
        self.state = {name: value.detach().double() for name, value in self.state.items()}
        self.num_stages = len(self.bbox_reg_weights)

    def detect(self, features, proposals, image_sizes, objectness=None):
        features = [f.detach().double() for f in features]
        live = []
        for image, boxes in enumerate(proposals):
            for row, box in enumerate(boxes.tolist()):
                logit = 0.0 if objectness is None else objectness[image][row].item()
                seen = Seen(image, tuple(box), logit)
                live.append(NaiveRegion(image, row, tuple(box), seen))
        live, left_before = self.admit(live, features)
        stages = range(self.num_stages)
        survivors, left, confidence = [], [{} for _ in stages], [{} for _ in stages]
        scored = [[] for _ in image_sizes]
        accepted = []
        for stage in stages:
            survivors.append([(region.image, region.row) for region in live])
            runs = [self.run_stage(stage, r, features, image_sizes[r.image]) for r in live]
            reasons = self.reasons_to_leave(stage, live, accepted)
            staying = []
            for region, run, reason in zip(live, runs, reasons, strict=True):
                if reason is None:
                    staying.append(region)
                    continue
                left[stage][reason] = left[stage].get(reason, 0) + 1
                total = confidence[stage].get(reason, 0.0) + region.seen.score
                confidence[stage][reason] = total
                if reason == "confident":
                    accepted.append(region.seen)
                if reason in ("confident", "budget", "completed"):
                    scored[region.image] += self.report(stage, region, *run)
            live = staying
        detections = [self.select(found) for found in scored]
        return NaiveResult(detections, survivors, left, left_before, confidence)

    def report(self, stage, region, boxes, crop):
        """The detections of a region that exits after a stage."""
        found = []
        for label, score in enumerate(self.final_probs(stage, region, crop)[:-1]):
            if score > self.score_thresh:
                box = boxes[label] if len(boxes) > 1 else boxes[0]
                found.append(NaiveDetection(box, score, label, stage))
        return found

    def admit(self, live, features):
        """The regions that enter stage 0, and counts of the others by reason."""
        if self.policy is None:
            return live, {}
        for region in live:
            region.seen.crop = self.pool(features, region.image, region.box, 1, 2, True).flatten()
        reasons = self.policy.decide(-1, [region.seen for region in live])
        counts = {r: reasons.count(r) for r in reasons if r is not None}
        staying = [x for x, reason in zip(live, reasons, strict=True) if reason is None]
        return staying, counts

    def run_stage(self, stage, region, features, image_size):
        """Refine a region; all boxes of the stage, and its crop."""
        crop = self.pool(features, region.image, region.box)
        logits, deltas, predicted_iou = self.run_head(stage, crop)
        region.logits.append(logits)
        boxes = [
            self.move(region.box, deltas[i : i + 4], stage, image_size)
            for i in range(0, len(deltas), 4)
        ]
        before = region.box
        top = max(range(self.num_classes), key=lambda label: logits[label])
        region.box = boxes[top] if len(boxes) > 1 else boxes[0]
        probs = self.running_probs(region)
        region.tops.append(probs.index(max(probs)))
        agreements = 0
        while agreements < stage and region.tops[-2 - agreements] == region.tops[-1]:
            agreements += 1
        region.seen = Seen(
            region.image,
            region.box,
            region.seen.objectness,
            before,
            probs,
            agreements,
            predicted_iou,
        )
        return boxes, crop

    def pool(self, features, image, box, size=None, samples=None, aligned=None):
        area = (box[2] - box[0]) * (box[3] - box[1])
        finest, coarsest = math.log2(self.strides[0]), math.log2(self.strides[-1])
        level = math.floor(4 + math.log2(math.sqrt(area) / 224 + 1e-8))
        index = int(min(max(level, finest), coarsest) - finest)
        return roi_align(
            features[index][image : image + 1],
            torch.tensor([[0.0, *box]], dtype=torch.float64),
            size or self.output_size,
            1 / self.strides[index],
            self.sampling_ratio if samples is None else samples,
            self.aligned if aligned is None else aligned,
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
        if f"exits.learned.iou_head.{stage}.weight" in self.state:
            weight, bias = self.weights(f"exits.learned.iou_head.{stage}")
            return *outputs, sigmoid((weight @ x + bias).item())
        return *outputs, None

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
        probs = self.running_probs(region)
        if self.ensemble == "last_boxes":
            probs = mean([softmax(self.run_head(s, crop)[0]) for s in range(stage + 1)])
        return probs if self.policy is None else self.policy.reported(probs, stage)

    def reasons_to_leave(self, stage, live, accepted):
        if stage == self.num_stages - 1:
            return ["completed"] * len(live)
        if self.policy is None:
            return [None] * len(live)
        return self.policy.decide(stage, [region.seen for region in live], accepted)

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
