"""Small backbones with attention: as options of a configuration, and their trunks alone."""

from functools import partial

import pytest
import torch
from torch import nn

from cascade_det.backbones import EfficientViT, HATNet, HierarchicalViT
from cascade_det.backbones.efficientvit import EfficientViTShape
from cascade_det.backbones.hatnet import HATNetShape
from cascade_det.backbones.pvtv2 import PVTv2, PVTv2Shape
from cascade_det.backbones.windows import pad_to_multiple

M0 = (
    *("MODEL.BACKBONE.NAME", "build_efficientvit_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.EFFICIENTVIT.NAME", "m0", "MODEL.EFFICIENTVIT.NORM_EVAL", False),
)
HIERVIT = (
    *("MODEL.BACKBONE.NAME", "build_hiervit_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.HIERVIT.WIDTHS", (32, 32, 32), "MODEL.HIERVIT.DEPTHS", (1, 1, 1)),
    *("MODEL.HIERVIT.DROP_PATH", 0.0, "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"]),
)
P3_TO_P7 = (
    *("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5", "p6"]),
)
STAGES = ("MODEL.FPN.IN_FEATURES", ["res4", "res5", "res6"])
# Attention in the backbone; without drop path, and with norms that learn their statistics.
ATTENTION = {
    "efficientvit": (*M0, *P3_TO_P7, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5", "res6"]),
    "efficientvit_retinanet": (*(*M0, *P3_TO_P7, *STAGES, "MODEL.EFFICIENTVIT.NECK", "retinanet"),),
    "efficientvit_maskrcnn": (*M0, *STAGES, "MODEL.EFFICIENTVIT.NECK", "maskrcnn"),
    "hatnet": (
        *("MODEL.BACKBONE.NAME", "build_hatnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
        *("MODEL.HATNET.DROP_PATH", 0.0),
        *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    ),
    "hiervit": HIERVIT,
    "hiervit_groups": (*HIERVIT, "MODEL.HIERVIT.MIXER", "token_groups"),
}
# The CASCADE decoder over every trunk.
CASCADE_FPN = {
    f"{name}_cascade": (
        *options,
        *("MODEL.BACKBONE.NAME", f"build_{name}_cascade_fpn_backbone", "MODEL.FPN.NORM", ""),
    )
    for name, options in {
        "resnet": ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        "mobilenet_v2": (),
        "mobilenet_v3_large": (),
        **{name: ATTENTION[name] for name in ("efficientvit", "hatnet", "hiervit")},
    }.items()
}

_HIERVIT = partial(
    HierarchicalViT, widths=(8, 16, 24), depths=(1, 1, 1), head_width=8, window=3, drop_path=0.0
)


def _pvtv2(**options):
    pytest.importorskip("timm")
    shape = PVTv2Shape((8, 8, 12, 16), (1, 2, 1, 1), (2, 1, 2, 2), (2, 2, 2, 2), (4, 3, 2, 1))
    return PVTv2(shape=shape, drop_path=0.0, **options)


# All maps of every trunk, several heads, windows and blocks; without drop path.
TRUNKS = {
    "efficientvit": partial(
        EfficientViT,
        shape=EfficientViTShape((16, 16, 32), (1, 1, 1), (1, 2, 2), (5, 3), (3, 3, 3)),
        out_features=("res2", "res3", "res4", "res5", "res6"),
    ),
    "hatnet": partial(
        HATNet,
        shape=HATNetShape((8, 8, 12, 16), 4, (1, 2, 1, 1), (5, 3, 3, 3), (2, 2, 2, 2)),
        drop_path=0.0,
    ),
    "hiervit": _HIERVIT,
    "pvtv2": _pvtv2,
    "hiervit_groups": partial(_HIERVIT, mixer="token_groups", groups=3),
}


def make_trunk(name, **options):
    """One of ``TRUNKS`` in evaluation mode, with values that let every layer count."""
    trunk = TRUNKS[name](**options)
    generator = torch.Generator().manual_seed(0)
    for key, value in [*trunk.named_parameters(), *trunk.named_buffers()]:
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() > 1 and not key.endswith("attention_biases"):
            noise *= 0.8 * value[0].numel() ** -0.5
        elif key.endswith(("weight", "running_var")):  # of norms
            noise = 0.5 + torch.rand(value.shape, generator=generator)
        value.data.copy_(noise)
    return trunk.eval()


class Listed(nn.Module):
    """Maps in order, as exporters have them; images are padded to multiples of 32."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, images):
        return list(self.trunk(pad_to_multiple(images, 32)).values())
