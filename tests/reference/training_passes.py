"""Stages of training passes, by hand and random."""

import torch
from small_cascades import NUM_CLASSES

from cascade_det.core.matching import LabelledRegions
from cascade_det.core.training_stage import TrainingStage


def make_pass(rows, logits, labels):
    count = len(rows)
    regions = LabelledRegions(
        torch.zeros(count, 4),
        torch.zeros(count, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.zeros(count, 4),
        torch.zeros(count),
        torch.zeros(count, dtype=torch.int64),
    )
    return TrainingStage(
        regions, torch.tensor(rows), torch.as_tensor(logits), torch.zeros(count, 4)
    )


def random_passes(seed=0):
    """Three stages of 40 regions, some of which are gone after a stage; many are confident."""
    generator = torch.Generator().manual_seed(seed)
    rows, passes = list(range(40)), []
    for _ in range(3):
        logits = 4 * torch.randn(len(rows), NUM_CLASSES + 1, generator=generator)
        guess = logits.argmax(dim=1)
        noise = torch.randint(NUM_CLASSES + 1, (len(rows),), generator=generator)
        right = torch.rand(len(rows), generator=generator) < 0.7
        passes.append(make_pass(rows, logits, torch.where(right, guess, noise).tolist()))
        rows = [row for row in rows if torch.rand(1, generator=generator) < 0.85]
    return passes


def losses_of(cascade, scene):
    """From one seed."""
    torch.manual_seed(1)
    return cascade.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes)
