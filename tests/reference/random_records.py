"""Random records of cascades that never ran, with boxes near objects, and random learned parts."""

from dataclasses import dataclass

import torch
from small_cascades import random_boxes
from torch import Tensor

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits.learned import REGION_PARTS, LearnedParts
from cascade_det.core.matching import GroundTruth
from cascade_det.core.postprocess import Selection
from cascade_det.core.record import CascadeRecord, RecordedStage

IMAGE_SIZE = (200, 300)
HIDDEN = 7
CROP_CHANNELS = 6


@dataclass
class RecordedScene:
    """A record and the ground truth of its images."""

    record: CascadeRecord
    gt_boxes: list[Tensor]
    gt_classes: list[Tensor]

    @property
    def targets(self):
        return self.gt_boxes, self.gt_classes

    @property
    def ground_truth(self):
        return GroundTruth.from_images(*self.targets)


def make_recorded_scene(
    *,
    seed=0,
    num_proposals=(30, 20),
    num_objects=(4, 3),
    num_classes=3,
    num_stages=3,
    cls_agnostic=True,
):
    """Half of the regions of an image with objects lie ever nearer to one, most of its class."""
    generator = torch.Generator().manual_seed(seed)
    gt_boxes = [random_boxes(n, IMAGE_SIZE, generator=generator, smallest=30) for n in num_objects]
    gt_classes = [torch.randint(num_classes, (n,), generator=generator) for n in num_objects]
    proposals = [random_boxes(n, IMAGE_SIZE, generator=generator) for n in num_proposals]
    image_index = torch.arange(len(num_proposals)).repeat_interleave(torch.tensor(num_proposals))
    near = torch.zeros(len(image_index), dtype=torch.bool)
    goals = torch.cat(proposals)
    top = torch.randint(num_classes, (len(goals),), generator=generator)
    for row, image in enumerate(image_index.tolist()):
        if num_objects[image] and torch.rand(1, generator=generator) < 0.5:
            goal = torch.randint(num_objects[image], (1,), generator=generator).item()
            near[row], goals[row] = True, gt_boxes[image][goal]
            if torch.rand(1, generator=generator) < 0.8:
                top[row] = gt_classes[image][goal]

    stages = []
    total = torch.zeros(len(goals), num_classes + 1)
    for stage in range(num_stages):
        logits = torch.randn(len(goals), num_classes + 1, generator=generator)
        logits[torch.arange(len(goals)), top] += 3.0 * near
        total = total + torch.softmax(logits, dim=1)
        columns = 1 if cls_agnostic else num_classes
        noise = torch.randn(len(goals), columns, 4, generator=generator) * 12 / (stage + 1)
        corners = (goals[:, None] + noise).unflatten(2, (2, 2)).sort(dim=2).values.flatten(2)
        chosen = logits[:, :-1].argmax(dim=1) if columns > 1 else torch.zeros_like(top)
        stages.append(
            RecordedStage(
                boxes=corners[torch.arange(len(goals)), chosen],
                decoded=corners.flatten(1),
                score_state=total,
                agreements=torch.randint(stage + 1, (len(goals),), generator=generator),
                predicted_ious=torch.rand(len(goals), generator=generator),
                hidden=torch.randn(len(goals), HIDDEN, generator=generator),
            )
        )
    record = CascadeRecord(
        image_sizes=[IMAGE_SIZE] * len(num_proposals),
        image_index=image_index,
        proposals=torch.cat(proposals),
        objectness=torch.randn(len(goals), generator=generator) + 3.0 * near,
        crops=5 * torch.randn(len(goals), CROP_CHANNELS, generator=generator),
        stages=stages,
        ensemble=ScoreEnsemble("mean_probs"),
        selection=Selection(0.05, 0.5, 12),
    )
    return RecordedScene(record, gt_boxes, gt_classes)


def make_parts(
    *, names=REGION_PARTS, num_stages=3, crop_channels=CROP_CHANNELS, hidden=HIDDEN, seed=1
):
    """Parts with random weights, which give different answers to each region."""
    torch.manual_seed(seed)
    parts = LearnedParts(
        names=names,
        num_stages=num_stages,
        hidden_features=[hidden] * num_stages,
        crop_channels=crop_channels,
    )
    for parameter in parts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return parts
