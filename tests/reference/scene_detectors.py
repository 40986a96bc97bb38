"""A cascade without a backbone as a detector, on the images of a scene; with masks if asked for."""

import torch
from small_cascades import CHANNELS, NUM_CLASSES, STRIDES, make_cascade, make_scene
from torch import nn

from cascade_det.core import (
    CascadeInputs,
    ConvUpsampleMaskHead,
    DetectorOutput,
    MaskBranch,
    RoIPooler,
)
from cascade_det.core.postprocess import rescale_detections

SIZES = ((64, 96), (72, 80))
COSTS = ((3.0, 2.0, 4.0), (0.02, 0.03, 0.05))  # of the stages, milliseconds per call and region
MASK_COSTS = (1.5, 0.25)  # milliseconds per call and mask


class SceneDetector(nn.Module):
    """A cascade on given feature maps: image ``i`` of a scene has the id ``10 + i``.

    Its time is what ``COSTS`` and ``MASK_COSTS`` say, and 20 ms for the rest; each gate that runs
    takes its ``gate_milliseconds`` per call.
    """

    def __init__(self, *, images=4, **cascade):
        super().__init__()
        self.cascade = make_cascade(score_thresh=0.1, **cascade)
        self.dropout = nn.Dropout(0.5)
        self.scene = make_scene(
            num_proposals=[20 + i for i in range(images)],
            num_objects=[2] * images,
            image_sizes=[SIZES[i % 2] for i in range(images)],
        )
        generator = torch.Generator().manual_seed(0)
        self.objectness = [torch.randn(len(p), generator=generator) for p in self.scene.proposals]
        self.calls = []
        self.gate_milliseconds = ()
        self.fails = False

    def set_exits(self, exits):
        self.cascade.exits = exits

    def cascade_inputs(self, batch, *, timer=None):
        chosen = [sample["image_id"] - 10 for sample in batch]
        return CascadeInputs(
            [self.dropout(level[chosen]) for level in self.scene.features],
            [self.scene.proposals[i] for i in chosen],
            [torch.Size(self.scene.image_sizes[i]) for i in chosen],
            [self.objectness[i] for i in chosen],
        )

    def detect(self, batch, *, stages=False, timer=None):
        self.calls.append((self.cascade.exits, [s["image_id"] for s in batch], timer is not None))
        if self.fails:
            raise RuntimeError("out of memory")
        detections, stats = self.cascade.detect(**vars(self.cascade_inputs(batch)))
        if timer is not None:
            per_call, per_region = COSTS
            timer.milliseconds["backbone"] = 20.0
            for stage, entered in enumerate(stats.entered):
                took = per_call[stage] * (entered > 0) + per_region[stage] * entered
                timer.milliseconds[f"stage{stage}"] = took
            for gate, took in enumerate(self.gate_milliseconds):
                if self.cascade.exits is not None and self.cascade.exits.has_gate(gate - 1):
                    timer.milliseconds[f"gate{gate}"] = took
            per_call, per_mask = MASK_COSTS
            timer.milliseconds["masks"] = per_call * (stats.masks > 0) + per_mask * stats.masks
        frames = [frame_of(sample, self) for sample in batch]
        return DetectorOutput(rescale_detections(detections, frames), stats)


def frame_of(sample, detector):
    return detector.scene.image_sizes[sample["image_id"] - 10], (sample["height"], sample["width"])


def batches_of(detector, size):
    samples = [
        {"image_id": 10 + i, "height": 2 * height, "width": 3 * width}
        for i, (height, width) in enumerate(detector.scene.image_sizes)
    ]
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def make_masks(*, heads=1, seed=0):
    """Mask heads whose masks differ by box and class, and are neither empty nor full."""
    torch.manual_seed(seed)
    made = []
    for _ in range(heads):
        head = ConvUpsampleMaskHead(
            in_channels=CHANNELS, conv_dims=(8,), upsampled_dim=8, num_masks=NUM_CLASSES
        )
        nn.init.normal_(head.predictor.weight, std=2.0)
        made.append(head)
    head = made[0] if heads == 1 else nn.ModuleList(made)
    return MaskBranch(head, RoIPooler(output_size=4, strides=STRIDES))
