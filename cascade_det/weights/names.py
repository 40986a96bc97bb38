"""Renames weights of other projects to Detectron2's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# Applied in order, each to the result of those before. "_" in blob names is "." already.
_CAFFE2_RULES: _Rules = (
    # kinds of parameters
    (r"^pred\.([bw])$", r"linear.\1"),
    (r"\.b$", ".bias"),
    (r"\.w$", ".weight"),
    (r"(?:bn\.(?:s|gamma)|gn\.s)$", "norm.weight"),
    (r"(?:[bg]n\.bias|bn\.beta)$", "norm.bias"),
    (r"bn\.(?:rm|running\.mean)$", "norm.running_mean"),
    (r"bn\.(?:riv|running\.var)$", "norm.running_var"),
    # ResNet
    (r"^res\.conv1\.norm\.", "conv1.norm."),
    (r"^conv1\.", "stem.conv1."),
    (r"\.branch1\.", ".shortcut."),
    (r"\.branch2a\.", ".conv1."),
    (r"\.branch2b\.", ".conv2."),
    (r"\.branch2c\.", ".conv3."),
    # RPN; with an FPN its blobs are named after the finest level and shared by the others
    (r"conv\.rpn(?:\.fpn2)?", "proposal_generator.rpn_head.conv"),
    (r"rpn\.bbox\.pred(?:\.fpn2)?", "proposal_generator.rpn_head.anchor_deltas"),
    (r"rpn\.cls\.logits(?:\.fpn2)?", "proposal_generator.rpn_head.objectness_logits"),
    # box head
    (r"^bbox\.pred", "bbox_pred"),
    (r"^cls\.score", "cls_score"),
    (r"^fc6\.", "box_head.fc1."),
    (r"^fc7\.", "box_head.fc2."),
    (r"^head\.conv", "box_head.conv"),
    # FPN: fpn.inner.res4.5.sum.lateral.weight, fpn.res4.5.sum.weight
    (r"^fpn\.inner\.res(\d)\..*?(norm\.)?([^.]+)$", r"fpn_lateral\1.\2\3"),
    (r"^fpn\.res(\d)\..*?(norm\.)?([^.]+)$", r"fpn_output\1.\2\3"),
    # mask and keypoint heads
    (r"\.\[mask\]\.fcn|^\.mask\.fcn", "mask_head.mask_fcn"),
    (r"mask\.fcn\.logits", "mask_head.predictor"),
    (r"conv5\.mask", "mask_head.deconv"),
    (r"conv\.fcn", "roi_heads.keypoint_head.conv_fcn"),
    (r"kps\.score\.lowres", "roi_heads.keypoint_head.score_lowres"),
    (r"kps\.score\.", "roi_heads.keypoint_head.score."),
)

_TORCHVISION_RESNET_RULES: _Rules = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer([1-4])\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)

_TIMM_PVT_V2_RULES: _Rules = (
    (r"^patch_embed\.", "patch_embed1."),
    (r"^stages\.(\d)\.downsample\.", lambda match: f"patch_embed{int(match[1]) + 1}."),
    (r"^stages\.(\d)\.blocks\.", lambda match: f"block{int(match[1]) + 1}."),
    (r"^stages\.(\d)\.norm\.", lambda match: f"norm{int(match[1]) + 1}."),
    (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
)

_CLASSIFIERS = {
    "EfficientViT": re.compile(r"head(?:_dist)?\.(?:bn|l)\."),
    "HAT-Net": re.compile(r"classifier\."),
    "PVTv2": re.compile(r"head\."),
    "MaxViT": re.compile(r"head\."),
}
_NEVER_USED = re.compile(r"(?:^|\.)attn\.proj_norm\.(?:weight|bias)$")


def has_caffe2_names(names: Iterable[str]) -> bool:
    """Whether these are Caffe2 blob names (``res2_0_branch2a_w``): no dots, weights end in _w."""
    names = list(names)
    return not any("." in name for name in names) and any(name.endswith("_w") for name in names)


def caffe2_to_detectron2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the blobs of an ImageNet backbone or of a whole Detectron model.

    Caffe2 puts the background class first; Detectron2 puts it last, without a box or mask of its
    own. Rows of the prediction layers are moved or dropped accordingly.

    Args:
        weights: blob name to tensor; momentum blobs are dropped.

    Returns:
        Detectron2's name to tensor, without the prefix above the part (``res2.0.conv1.weight``).
    """
    renamed = {}
    for blob, tensor in weights.items():
        if blob.endswith("_momentum"):
            continue
        name = _apply(_CAFFE2_RULES, blob.replace("_", "."))
        if name.startswith("bbox_pred."):
            tensor = tensor[4:]
        elif name.startswith("mask_head.predictor."):
            tensor = tensor[1:]
        elif name.startswith("cls_score."):
            tensor = torch.cat([tensor[1:], tensor[:1]])
        renamed[name] = tensor
    return renamed


def has_torchvision_resnet_names(names: Iterable[str]) -> bool:
    """Whether these are the names of torchvision's ResNet classifiers."""
    return "layer1.0.conv1.weight" in names


def torchvision_resnet_to_detectron2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's ResNet: ``layer1.0.bn1.weight`` -> ``res2.0.conv1.norm.weight``."""
    return {_apply(_TORCHVISION_RESNET_RULES, name): tensor for name, tensor in weights.items()}


def has_efficientvit_names(names: Iterable[str]) -> bool:
    """Whether these are the names of EfficientViT's classifiers (microsoft/Cream)."""
    return "patch_embed.0.c.weight" in names


def has_hat_net_names(names: Iterable[str]) -> bool:
    """Whether these are the names of HAT-Net's classifiers."""
    return {"patch_embed.0.weight", "blocks.0.0.attn.qkv.weight"} <= {*names}


def has_pvt_v2_names(names: Iterable[str]) -> bool:
    """Whether these are the names of PVTv2's classifiers (whai362/PVT)."""
    return {"patch_embed1.proj.weight", "block1.0.mlp.dwconv.dwconv.weight"} <= {*names}


def has_timm_pvt_v2_names(names: Iterable[str]) -> bool:
    """Whether these are the names of timm's PVTv2."""
    return {"patch_embed.proj.weight", "stages.0.blocks.0.mlp.dwconv.weight"} <= {*names}


def timm_pvt_v2_to_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's PVTv2: ``stages.0.blocks.0.attn.q.weight`` -> ``block1.0.attn.q.weight``."""
    return {_apply(_TIMM_PVT_V2_RULES, name): tensor for name, tensor in weights.items()}


def has_maxvit_names(names: Iterable[str]) -> bool:
    """Whether these are the names of timm's MaxViT and MaxxViT."""
    return {"stem.conv1.weight", "stages.0.blocks.0.attn_grid.attn.qkv.weight"} <= {*names}


def unused_part(name: str, origin: str) -> str:
    """What a weight belongs to that no detector uses; empty for all others.

    Args:
        name: as in a file.
        origin: whose names the file uses, see ``WeightsFile``.
    """
    classifier = _CLASSIFIERS.get(origin)
    if classifier is not None and classifier.match(name):
        return "the classifier"
    return "proj_norm, which HAT-Net never uses" if _NEVER_USED.search(name) else ""


def _apply(rules: _Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
