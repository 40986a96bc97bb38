"""Whole detectors of the standalone host, small enough to be exported within a second or two."""

import torch
from small_cascades import CHANNELS, NUM_CLASSES, STRIDES, make_cascade
from torch import nn

from cascade_det.backbones import FPN
from cascade_det.core import ConvUpsampleMaskHead, MaskBranch, MaskRules, RoIPooler
from cascade_det.standalone import Detector
from cascade_det.standalone.rpn import RPN

LEVELS = ("p2", "p3", "p4")


class SmallTrunk(nn.Module):
    """Two convolutions, of strides 4 and 2."""

    out_features = ("res2", "res3")
    channels = {"res2": 8, "res3": 8}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 7, stride=4, padding=3)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def stem_and_stages(self):
        """What optimisation asks of a trunk."""
        return self.first, [self.second]

    def forward(self, images):
        finer = self.first(images).relu()
        return {"res2": finer, "res3": self.second(finer).relu()}


def make_detector(*, seed=0, proposals=40, min_box_size=0.0, **cascade):
    """A detector whose answers differ clearly between images; arguments as of ``make_cascade``."""
    torch.manual_seed(seed)
    backbone = FPN(SmallTrunk(), out_channels=CHANNELS)
    rpn = RPN(
        in_features=LEVELS,
        in_channels=CHANNELS,
        strides=[backbone.strides[name] for name in LEVELS],
        anchor_sizes=[[24], [48], [96]],
        aspect_ratios=[[0.5, 1.0, 2.0]] * 3,
        anchor_offset=0.0,
        conv_dims=[-1],
        iou_thresholds=(0.3, 0.7),
        batch_size_per_image=16,
        positive_fraction=0.5,
        pre_nms_topk=(60, 60),
        post_nms_topk=(proposals, proposals),
        nms_thresh=0.7,
        min_box_size=min_box_size,
        bbox_reg_weights=(1.0, 1.0, 1.0, 1.0),
        box_reg_loss_type="smooth_l1",
        smooth_l1_beta=0.0,
        loss_weights={"loss_rpn_cls": 1.0, "loss_rpn_loc": 1.0},
    )
    nn.init.normal_(rpn.rpn_head.objectness_logits.weight, std=1.0)
    nn.init.normal_(rpn.rpn_head.anchor_deltas.weight, std=0.1)
    detector = Detector(
        backbone=backbone,
        proposal_generator=rpn,
        roi_heads=make_cascade(seed=seed, **cascade),
        roi_in_features=("p2", "p3"),
        pixel_mean=(103.5, 116.3, 123.7),
        pixel_std=(57.4, 57.1, 58.4),
    )
    return detector.eval()


def make_masks(*, per_stage=False, seed=0, **rules):
    """Masks for ``make_cascade`` that differ clearly between regions, with rules of ``MaskRules``.

    There are three heads with ``per_stage``.
    """
    torch.manual_seed(seed)
    heads = []
    for _ in range(3 if per_stage else 1):
        head = ConvUpsampleMaskHead(
            in_channels=CHANNELS, conv_dims=(8,), upsampled_dim=8, num_masks=NUM_CLASSES
        )
        nn.init.normal_(head.predictor.weight, std=3.0)
        heads.append(head)
    pooler = RoIPooler(output_size=5, strides=STRIDES)
    return MaskBranch(nn.ModuleList(heads) if per_stage else heads[0], pooler, MaskRules(**rules))


def random_image(height, width, *, seed=0):
    """uint8 ``[3, H, W]`` of coarse patches, so that images have parts that differ."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(1, 3, height // 12 + 2, width // 12 + 2, generator=generator)
    image = nn.functional.interpolate(patches, size=(height, width), mode="bilinear")
    return (image[0] * 255).to(torch.uint8)
