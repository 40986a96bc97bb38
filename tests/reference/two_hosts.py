"""One model three times: Detectron2 with its own heads, Detectron2 with ours, and standalone.

All take the batches of the standalone host: dicts with ``image``, ``height``, ``width`` and, in
training, ``gt_boxes``, ``gt_classes`` and, for masks, ``gt_masks``.
"""

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from detectron2.utils.events import EventStorage
from shape_runs import ROOT
from small_backbones import ATTENTION, CASCADE_FPN
from torch.nn import functional as F

from cascade_det import config
from cascade_det.core import Detections
from cascade_det.d2 import add_cascade_config
from cascade_det.engine.solver import build_optimizer, build_scheduler
from cascade_det.standalone import build_detector

CONFIG = ROOT / "configs" / "Base-Cascade-RCNN-FPN.yaml"
OWN_HEADS = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
OUR_HEADS = ("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads")
EXITS = (
    *("MODEL.CASCADE.EXIT.ENABLED", True),
    *("MODEL.CASCADE.EXIT.THRESHOLDS", (0.6, 0.4)),
    *("MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS", (0.1, 0.15)),
)
SAME_KERNEL = ("MODEL.CASCADE.POOLER_KERNEL", "torchvision")
FAST_KERNEL = ("MODEL.CASCADE.POOLER_KERNEL", "bags")
# Small, so that a test takes a second: what is compared does not depend on it.
SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 7),
    *("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ROI_BOX_HEAD.FC_DIM", 64),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [96], [128]]),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 150, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 150),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 64, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
    *("DATALOADER.NUM_WORKERS", 0),
)
BACKBONES = {
    "R-18": ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    "R-34": ("MODEL.RESNETS.DEPTH", 34, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    "R-50": ("MODEL.RESNETS.DEPTH", 50),
    "R-101": ("MODEL.RESNETS.DEPTH", 101),
    "R-152": ("MODEL.RESNETS.DEPTH", 152),
    "mobilenet_v2": ("MODEL.BACKBONE.NAME", "build_mobilenet_v2_fpn_backbone"),
    "mobilenet_v3": ("MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone"),
    **ATTENTION,
    **CASCADE_FPN,
}
MASKS = (
    *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 2),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
)
EVERY = (*MASKS, "MODEL.CASCADE.MASK.STAGES", "every")


class InDetectron2:
    """A model of Detectron2 with the methods of the standalone detector.

    Attributes:
        scalars: what the last call of ``losses`` put into the event storage.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.model = build_model(cfg)
        self.scalars = {}

    @property
    def cascade(self):
        return self.model.roi_heads.cascade

    @torch.no_grad()
    def detect(self, batch):
        return [_as_detections(output["instances"]) for output in self.model.eval()(batch)]

    @torch.no_grad()
    def detect_resized(self, batch):
        """In pixels of the resized images, with masks that are not pasted."""
        return [
            _as_detections(found, found.pred_masks[:, 0])
            for found in self.model.eval().inference(batch, do_postprocess=False)
        ]

    def losses(self, batch):
        with EventStorage() as storage:
            losses = self.model.train()([with_instances(sample) for sample in batch])
            self.scalars = {name: value for name, (value, _) in storage.latest().items()}
        return losses

    def solver(self):
        optimizer = build_detectron2_optimizer(self.cfg, self.model)
        return optimizer, build_lr_scheduler(self.cfg, optimizer)


class Standalone:
    """The standalone detector, with the same methods."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.model = build_detector(self.cfg)
        # That of Detectron2: where statistics are of a few pixels, gradients magnify any rounding,
        # and the last bit of a score decides which proposals are trained on.
        self.model.training_format = torch.contiguous_format
        self.scalars = {}

    @property
    def cascade(self):
        return self.model.roi_heads

    def detect(self, batch):
        return self.model.eval().detect(batch).detections

    @torch.no_grad()
    def detect_resized(self, batch):
        """In pixels of the resized images."""
        return self.cascade.detect(**vars(self.model.eval().cascade_inputs(batch)))[0]

    def losses(self, batch):
        losses = self.model.train().losses(batch)
        self.scalars = {name: float(value) for name, value in self.model.metrics.items()}
        return losses

    def solver(self):
        arguments = config.optimizer_arguments(self.cfg)
        del arguments["clip"]
        optimizer = build_optimizer(self.model, **arguments)
        return optimizer, build_scheduler(optimizer, **config.scheduler_arguments(self.cfg))


def _as_detections(found, masks=None):
    exit_stages = found.exit_stages if found.has("exit_stages") else None
    return Detections(found.pred_boxes.tensor, found.scores, found.pred_classes, exit_stages, masks)


def detectron2_cfg(options, file=CONFIG):
    """Detectron2's configuration with our nodes, a file and options."""
    cfg = get_cfg()
    add_cascade_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(list(options))
    return cfg


def in_detectron2(*options):
    """A small model of Detectron2, with its initial weights."""
    return InDetectron2(detectron2_cfg([*SMALL, *options]))


def standalone(*options):
    """A small standalone detector, with its initial weights."""
    return Standalone(config.load_config(CONFIG, [*SMALL, *options]))


def build_three(*options, seed=0, stirred=True):
    """Detectron2 with its own heads, with ours, and standalone, with the same weights.

    They are Detectron2's initial ones, or ``stirred``.
    """
    torch.manual_seed(seed)
    own = in_detectron2(*options, *OWN_HEADS)
    if stirred:
        stir(own.model)
    return own, *with_weights_of(own.model, *options)


def build_two(*options, seed=0, stirred=True):
    """Detectron2 with our heads, and standalone, with the same weights."""
    torch.manual_seed(seed)
    ours, alone = in_detectron2(*options, *OUR_HEADS), standalone(*options, *OUR_HEADS)
    if stirred:
        stir(ours.model)
    alone.model.load_state_dict(ours.model.state_dict(), strict=True)
    return ours, alone


def with_weights_of(model, *options):
    """Detectron2 with our heads, and standalone, with the weights of a model of Detectron2."""
    hosts = in_detectron2(*options, *OUR_HEADS), standalone(*options, *OUR_HEADS)
    for host in hosts:
        host.model.load_state_dict(model.state_dict(), strict=True)
    return hosts


@torch.no_grad()
def stir_backbone(model):
    """Random weights of its norms and attention biases, so that no layer is silent."""
    hooks = []
    for module in model.backbone.modules():
        if hasattr(module, "running_var"):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
            hooks.append(module.register_forward_pre_hook(_take_statistics))
    # As after a training, norms know what they see.
    model.backbone.eval()(model.preprocess_image(make_batch(3)).tensor)
    for hook in hooks:
        hook.remove()
    for name, value in model.named_parameters():
        if "attention_biases" in name:
            value.normal_()


@torch.no_grad()
def stir(model):
    """Random weights with which classes differ in score, boxes move, and no layer is silent."""
    stir_backbone(model)
    for name, value in model.named_parameters():
        width = value[0].numel()
        if "cls_score.weight" in name or "bbox_pred.weight" in name:
            value.normal_(std=0.8 / width**0.5)
        elif "anchor_deltas.weight" in name:
            value.normal_(std=0.24 / width**0.5)
        elif "mask_head" in name and "predictor.weight" in name:
            value.normal_(std=6.0 / width**0.5)


def _take_statistics(module, inputs):
    module.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
    module.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))


def make_batch(
    count, *, seed=0, objects=3, sizes=((96, 128), (90, 120), (64, 126)), masks="polygon"
):
    """Images of coloured blocks, of these sizes in turn, with boxes and masks of objects in them.

    Masks are of one or two polygons, which may have dents, or the bitmaps of these.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = [_make_sample(sizes[i % len(sizes)], generator, objects) for i in range(count)]
    generator = torch.Generator().manual_seed(seed)
    for sample in batch:
        polygons = [_make_polygons(box, generator) for box in sample["gt_boxes"]]
        sample["gt_masks"] = polygons
        if masks == "bitmask":
            arrays = [[points.numpy() for points in own] for own in polygons]
            sample["gt_masks"] = [
                torch.from_numpy(polygons_to_bitmask(own, *sample["image"].shape[1:]))
                for own in arrays
            ]
    return batch


def _make_polygons(box, generator):
    center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    polygons = []
    for part in range(int(torch.randint(1, 3, (1,), generator=generator))):
        corners = int(torch.randint(3, 9, (1,), generator=generator))
        angles = torch.arange(corners) * 2 * np.pi / corners
        radii = 0.3 + 0.7 * torch.rand(corners, 1, generator=generator)
        points = center + half * radii * torch.stack([angles.cos(), angles.sin()], dim=1)
        polygons.append((points + 3 * part).flatten().double())
    return polygons


def _make_sample(size, generator, objects):
    height, width = size
    blocks = 255 * torch.rand(1, 3, 6, 8, generator=generator)
    image = F.interpolate(blocks, size).squeeze(0)
    corners = torch.rand(objects, 2, generator=generator) * torch.tensor([width, height]) / 2
    sides = 16 + torch.rand(objects, 2, generator=generator) * (min(size) / 2 - 16)
    return {
        "image": image.to(torch.uint8),
        "height": 2 * height,
        "width": 3 * width,
        "gt_boxes": torch.cat([corners, corners + sides], dim=1),
        "gt_classes": torch.randint(7, (objects,), generator=generator),
    }


def with_instances(sample):
    """The sample with its objects as Detectron2 has them."""
    instances = Instances(
        tuple(sample["image"].shape[1:]),
        gt_boxes=Boxes(sample["gt_boxes"].clone()),
        gt_classes=sample["gt_classes"].clone(),
    )
    masks = sample.get("gt_masks")
    if masks and isinstance(masks[0], torch.Tensor):
        instances.gt_masks = BitMasks(torch.stack(masks))
    elif masks is not None:
        polygons = [[points.numpy() for points in own] for own in masks]
        instances.gt_masks = PolygonMasks(polygons)
    return {**sample, "instances": instances}


def largest_differences(got, wanted):
    """Largest differences of detections: ``boxes`` in pixels, and ``scores``.

    The order may differ among those that are as close in place and score as the limits below: each
    is compared with the nearest one of its class.

    Raises:
        AssertionError: the number, the classes or the order differ.
    """
    boxes, scores = 0.0, 0.0
    for ours, theirs in zip(got, wanted, strict=True):
        assert len(ours) == len(theirs)
        scores = max(scores, _largest(ours.scores - theirs.scores))
        if torch.equal(ours.classes, theirs.classes):
            boxes = max(boxes, _largest(ours.boxes - theirs.boxes))
            continue
        apart = (ours.boxes[:, None] - theirs.boxes).abs().amax(dim=2)
        alike = (ours.scores[:, None] - theirs.scores).abs() <= 1e-4
        apart[~(alike & (ours.classes[:, None] == theirs.classes))] = torch.inf
        nearest = apart.argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(len(theirs)))
        boxes = max(boxes, _largest(apart.min(dim=1).values))
    return {"boxes": boxes, "scores": scores}


def _largest(values):
    return values.abs().max().item() if values.numel() else 0.0
