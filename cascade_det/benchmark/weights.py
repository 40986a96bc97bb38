"""Random weights that a benchmark can use.

The time of a layer does not depend on its weights, but the number of proposals and detections
does. So norms get the statistics of their inputs, which keeps all values finite in half precision
too; the RPN proposes its anchors unchanged, and NMS leaves as many as requested; and class logits
vary enough for some regions to be detected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from cascade_det.standalone import build_detector

# Standard deviations of logits and of normalised box deltas. As after training, a few hundred of
# 1,000 regions x 80 classes reach a score of 0.05, and boxes move by some per cent of their size.
_LOGIT_SPREAD = 0.7
_DELTA_SPREAD = 0.25


def seeded_weights(cfg: CfgNode, image: Tensor, seed: int) -> dict[str, Tensor]:
    """The state dict of a detector with random weights, under Detectron2's names.

    Args:
        cfg: of a standalone detector on the CPU.
        image: uint8 ``[3, H, W]``; the norms get its statistics.
        seed: of the weights.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        detector = build_detector(cfg).eval()
        batch, _ = detector.preprocess([image])
        settle_norms(detector.backbone, lambda: detector.backbone(batch))
        keep_anchors(detector.proposal_generator.rpn_head.anchor_deltas)
        predictor: Any
        for predictor in detector.roi_heads.box_predictor:
            draw_predictor(predictor.cls_score, predictor.bbox_pred)
        masks = detector.roi_heads.masks
        for head in [] if masks is None else masks.heads:
            weight = head.get_parameter("predictor.weight")
            weight.normal_(std=_LOGIT_SPREAD / weight.shape[1] ** 0.5)
    return detector.state_dict()


@torch.no_grad()
def settle_norms(module: nn.Module, forward: Callable[[], object]) -> None:
    """Set the running statistics of norms to those of their inputs while ``forward`` runs."""
    norms = [norm for norm in module.modules() if hasattr(norm, "running_var")]
    hooks = [norm.register_forward_pre_hook(_set_statistics) for norm in norms]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def keep_anchors(deltas: nn.Module) -> None:
    """Let the RPN propose its anchors unchanged: set the weights of its box deltas to zero."""
    for parameter in deltas.parameters():
        parameter.zero_()


@torch.no_grad()
def draw_predictor(logits: nn.Linear, deltas: nn.Linear) -> None:
    """Draw the weights of two linear layers so that their predictions vary; biases become zero."""
    for layer, deviation in ((logits, _LOGIT_SPREAD), (deltas, _DELTA_SPREAD)):
        layer.weight.normal_(std=deviation / layer.in_features**0.5)
        layer.bias.zero_()


def _set_statistics(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
    norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))
