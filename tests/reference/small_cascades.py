"""Cascades and inputs small enough for a naive reference, with clearly different outputs."""

from dataclasses import dataclass

import torch
from naive_cascade import NaiveCascade
from naive_exits import NaivePolicy
from torch import Tensor, nn

from cascade_det.core import BoxPredictor, CascadeHead, ConvFCBoxHead, Detections, RoIPooler
from cascade_det.core.matching import GroundTruth, label_regions
from cascade_det.core.regions import ReportedRegions
from cascade_det.core.structures.boxes import flatten_images

CHANNELS = 6
POOLED = 3
NUM_CLASSES = 3
STRIDES = (4, 8)
IOUS = (0.5, 0.6, 0.7, 0.75)
REG_WEIGHTS = (
    (10.0, 10.0, 5.0, 5.0),
    (20.0, 20.0, 10.0, 10.0),
    (30.0, 30.0, 15.0, 15.0),
    (40.0, 40.0, 20.0, 20.0),
)


@dataclass
class Scene:
    """Inputs of a cascade: by default of two images, padded to the larger."""

    features: list[Tensor]
    proposals: list[Tensor]
    gt_boxes: list[Tensor]
    gt_classes: list[Tensor]
    image_sizes: list[tuple[int, int]]

    @property
    def targets(self):
        return self.gt_boxes, self.gt_classes

    @property
    def ground_truth(self):
        return GroundTruth.from_images(*self.targets)


def make_scene(
    *, seed=0, num_proposals=(24, 17), num_objects=(4, 3), image_sizes=((240, 320), (200, 280))
):
    """A random scene with boxes on both levels; no two are alike, so nothing ties."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(sizes) for sizes in zip(*image_sizes, strict=True))
    features = [
        torch.randn(len(image_sizes), CHANNELS, height // s, width // s, generator=generator)
        for s in STRIDES
    ]
    pairs = list(zip(num_objects, image_sizes, strict=True))
    gt_boxes = [random_boxes(count, size, generator=generator) for count, size in pairs]
    gt_classes = [torch.randint(NUM_CLASSES, (n,), generator=generator) for n in num_objects]
    pairs = list(zip(num_proposals, image_sizes, strict=True))
    proposals = [random_boxes(count, size, generator=generator) for count, size in pairs]
    for boxes, objects in zip(proposals, gt_boxes, strict=True):
        # A third of the proposals lie near an object.
        for i in range(len(boxes) // 3 if len(objects) else 0):
            boxes[i] = objects[i % len(objects)] + 3 * torch.randn(4, generator=generator)
    return Scene(features, proposals, gt_boxes, gt_classes, list(image_sizes))


def random_boxes(count, image_size, *, generator, smallest=8.0):
    """``[count, 4]`` boxes inside an image, most of them overlapping others."""
    height, width = image_size
    bounds = torch.tensor([width, height], dtype=torch.float32)
    sizes = smallest + torch.rand(count, 2, generator=generator) * (bounds * 0.6 - smallest)
    corners = torch.rand(count, 2, generator=generator) * (bounds - sizes)
    return torch.cat([corners, corners + sizes], dim=1)


def make_cascade(
    *, num_stages=3, seed=0, cls_agnostic=True, conv_dims=(), fc_dims=(12,), pooler=None, **changes
):
    """A cascade whose weights are large enough for confident classes and boxes that move."""
    torch.manual_seed(seed)
    heads, predictors = [], []
    for _ in range(num_stages):
        head = ConvFCBoxHead(
            in_channels=CHANNELS, pooled_size=POOLED, conv_dims=conv_dims, fc_dims=fc_dims
        )
        predictor = BoxPredictor(
            in_features=head.out_features,
            num_classes=NUM_CLASSES,
            cls_agnostic_bbox_reg=cls_agnostic,
        )
        nn.init.normal_(predictor.cls_score.weight, std=3.0)
        nn.init.normal_(predictor.bbox_pred.weight, std=1.5)
        nn.init.normal_(predictor.bbox_pred.bias, std=0.5)
        heads.append(head)
        predictors.append(predictor)
    arguments = {
        "ious": IOUS[:num_stages],
        "bbox_reg_weights": REG_WEIGHTS[:num_stages],
        "num_classes": NUM_CLASSES,
        "pooler": pooler or RoIPooler(output_size=POOLED, strides=STRIDES),
        "batch_size_per_image": 16,
    }
    return CascadeHead(box_heads=heads, box_predictors=predictors, **(arguments | changes))


def label_scene(scene, iou_threshold):
    """Every proposal of a scene, labelled, none sampled away."""
    return label_regions(
        *flatten_images(scene.proposals),
        scene.ground_truth,
        iou_threshold=iou_threshold,
        num_classes=NUM_CLASSES,
    )


def objectness_of(scene, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(p), generator=generator) for p in scene.proposals]


def detect(cascade, scene, objectness=None):
    """Detections and statistics; the objectness is random unless given."""
    if objectness is None:
        objectness = objectness_of(scene)
    return cascade.detect(scene.features, scene.proposals, scene.image_sizes, objectness=objectness)


def detect_stages(cascade, scene):
    return cascade.detect_stages(scene.features, scene.proposals, scene.image_sizes)


def naive_twin(cascade, policy=None):
    """The naive cascade with the weights and settings of a real one.

    Its exits are thresholds of probabilities and redundancy, unless a policy is given.
    """
    pooler, exits = cascade.pooler, cascade.exits
    if exits is not None and policy is None:
        ious = [rule.iou for rule in exits.rules if rule.reason == "redundant"]
        policy = NaivePolicy(
            thresholds=exits.thresholds,
            prune_thresholds=exits.prune_thresholds,
            redundancy_iou=ious[0] if ious else None,
        )
    return NaiveCascade(
        state=cascade.state_dict(),
        num_classes=cascade.num_classes,
        bbox_reg_weights=cascade.targets.bbox_reg_weights,
        strides=pooler.strides,
        output_size=pooler.output_size,
        sampling_ratio=pooler.sampling_ratio,
        aligned=pooler.aligned,
        ensemble=cascade.ensemble.name,
        **nms_settings(cascade),
        policy=policy,
    )


def nms_settings(cascade):
    """Thresholds and limit of the detections of a cascade with NMS."""
    names = ("score_thresh", "nms_thresh", "detections_per_image")
    return {name: getattr(cascade.selection, name) for name in names}


def truncate(cascade, num_stages):
    """The first stages of a cascade, sharing its weights and settings, without exits."""
    targets = cascade.targets
    return CascadeHead(
        pooler=cascade.pooler,
        box_heads=list(cascade.box_head)[:num_stages],
        box_predictors=list(cascade.box_predictor)[:num_stages],
        num_classes=cascade.num_classes,
        ious=targets.ious[:num_stages],
        bbox_reg_weights=cascade.targets.bbox_reg_weights[:num_stages],
        ensemble=cascade.ensemble.name,
        **nms_settings(cascade),
    )


def reported(boxes, probs, image_index, exit_stages):
    return ReportedRegions(boxes, probs, image_index, exit_stages, torch.arange(len(boxes)))


def as_detections(naive_images):
    """What the naive cascade found, in the form of the real one."""
    images = []
    for found in naive_images:
        images.append(
            Detections(
                torch.tensor([d.box for d in found]).view(-1, 4),
                torch.tensor([d.score for d in found]),
                torch.tensor([d.label for d in found], dtype=torch.int64),
                torch.tensor([d.exit_stage for d in found], dtype=torch.int64),
            )
        )
    return images


def record_calls(cascade):
    """Boxes and image indices of each call of the pooler, and rows of each call of each head."""
    pooled, rows = [], [[] for _ in cascade.box_head]

    def on_pool(_, arguments, output):
        pooled.append((arguments[1].clone(), arguments[2].clone()))
        assert len(output) == len(arguments[1])

    cascade.pooler.register_forward_hook(on_pool)
    for counts, head, predictor in zip(rows, cascade.box_head, cascade.box_predictor, strict=True):
        for module in (head, predictor):
            module.register_forward_hook(lambda _, x, y, counts=counts: counts.append(len(x[0])))
    return pooled, rows


def assert_same_detections(got, wanted, *, exact=False):
    """Compare lists of ``Detections``; every field, in order."""
    assert len(got) == len(wanted)
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.classes.tolist() == theirs.classes.tolist()
        assert ours.exit_stages.tolist() == theirs.exit_stages.tolist()
        torch.testing.assert_close(ours.scores, theirs.scores, **tolerance)
        torch.testing.assert_close(ours.boxes, theirs.boxes, **tolerance)
