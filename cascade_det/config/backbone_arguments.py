"""Keys of backbones as plain keyword arguments, and the names of their feature maps."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

_TRUNKS = ("resnet", "mobilenet_v2", "mobilenet_v3_large", "efficientvit", "hatnet", "hiervit")
# Trunk and neck, by MODEL.BACKBONE.NAME.
BACKBONES = {
    f"build_{trunk}_{neck}_backbone": (trunk, neck)
    for neck in ("fpn", "cascade_fpn")
    for trunk in _TRUNKS
}
# Without a pyramid, for segmenters.
TRUNKS = {f"build_{trunk}_backbone": (trunk, "") for trunk in (*_TRUNKS, "pvtv2", "maxvit")}
_PARTS = BACKBONES | TRUNKS
# MERIT's encoders of timm, for its first and its second scale.
_MAXVITS = {
    "tiny": ("maxvit_rmlp_tiny_rw_256", "maxvit_tiny_rw_224"),
    "small": ("maxxvit_rmlp_small_rw_256", "maxvit_rmlp_small_rw_224"),
}
_EXTRA_CONVS = 2  # of HierViT, whose coarsest map is fine


def backbone_arguments(cfg: CfgNode, scale: int = 0) -> dict[str, Any]:
    """The backbone: its ``name``, and the arguments of its ``bottom_up`` and its ``fpn``.

    ``neck`` is ``fpn``, ``cascade_fpn``, or the kind of a published neck of EfficientViT.

    Args:
        cfg: a checked configuration.
        scale: 0 or 1, of a segmenter with two scales.
    """
    model = cfg.MODEL
    name, neck = _PARTS[model.BACKBONE.NAME]
    bottom_up: dict[str, Any] = {"freeze_at": model.BACKBONE.FREEZE_AT}
    fpn: dict[str, Any] = {
        "in_features": tuple(model.FPN.IN_FEATURES),
        "out_channels": model.FPN.OUT_CHANNELS,
    }
    if name == "efficientvit":
        keys = model.EFFICIENTVIT
        bottom_up |= {
            "name": keys.NAME,
            "kernels": tuple(keys.KERNELS),
            "norm_eval": keys.NORM_EVAL,
        }
        neck = keys.NECK if keys.NECK != "fpn" else neck
    elif name == "hatnet":
        bottom_up |= {"name": model.HATNET.NAME, "drop_path": float(model.HATNET.DROP_PATH)}
    elif name == "hiervit":
        keys = model.HIERVIT
        bottom_up |= {
            "patch_sizes": tuple(keys.PATCH_SIZES),
            "widths": tuple(keys.WIDTHS),
            "depths": tuple(keys.DEPTHS),
            "mixer": keys.MIXER,
            "groups": keys.GROUPS,
            "drop_path": float(keys.DROP_PATH),
        }
        fpn["extra_convs"] = _EXTRA_CONVS
    elif name == "pvtv2":
        bottom_up["name"] = model.PVTV2.NAME
    elif name == "maxvit":
        side = model.DUAL_SCALE.SIZES[scale]
        bottom_up |= {"name": _MAXVITS[model.MAXVIT.NAME][scale], "side": side}
    else:
        bottom_up["norm"] = model.RESNETS.NORM
    if name == "resnet":
        bottom_up |= {
            "depth": model.RESNETS.DEPTH,
            "stride_in_1x1": model.RESNETS.STRIDE_IN_1X1,
            "num_groups": model.RESNETS.NUM_GROUPS,
            "width_per_group": model.RESNETS.WIDTH_PER_GROUP,
        }
    if neck == "fpn":
        fpn |= {"norm": model.FPN.NORM, "fuse_type": model.FPN.FUSE_TYPE}
    return {"name": name, "bottom_up": bottom_up, "fpn": fpn, "neck": neck}


def trunk_maps(cfg: CfgNode) -> tuple[str, ...]:
    """Names of the maps that a trunk has, finest first."""
    name, _ = _PARTS[cfg.MODEL.BACKBONE.NAME]
    if name == "hiervit":
        sizes = cfg.MODEL.HIERVIT.PATCH_SIZES
        return tuple(f"res{size.bit_length() - 1}" for size in sizes)
    if name == "efficientvit":
        first = 2 if cfg.MODEL.EFFICIENTVIT.NECK == "fpn" else 4
        return tuple(f"res{level}" for level in range(first, 7))
    return ("res2", "res3", "res4", "res5")


def backbone_maps(cfg: CfgNode) -> tuple[str, ...]:
    """Names of the maps of a backbone with its pyramid, finest first.

    Args:
        cfg: its ``MODEL.FPN.IN_FEATURES`` are the last of ``trunk_maps``.
    """
    name, _ = BACKBONES[cfg.MODEL.BACKBONE.NAME]
    finest, coarsest = (int(cfg.MODEL.FPN.IN_FEATURES[i].removeprefix("res")) for i in (0, -1))
    coarsest += _EXTRA_CONVS if name == "hiervit" else 1
    neck = cfg.MODEL.EFFICIENTVIT.NECK if name == "efficientvit" else "fpn"
    if neck != "fpn":
        finest, coarsest = (3, 7) if neck == "retinanet" else (2, 6)
    return tuple(f"p{level}" for level in range(finest, coarsest + 1))
