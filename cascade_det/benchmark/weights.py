"""Weights that nobody trained, in a state in which a benchmark can use them.

What a layer computes takes as long whatever the weights are, but how many regions come out of the
RPN, and how many are left to sort at the end, depend on them. So here norms know what they see,
which keeps all values finite in half precision too; the RPN proposes its anchors as they are, of
which NMS leaves as many as are asked for; and classes differ enough for some to be detected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from cascade_det.core import BoxPredictor
from cascade_det.standalone import build_detector

# Standard deviation of logits and of normalised box deltas: a few hundred of 1,000 regions x 80
# classes reach a score of 0.05, and boxes move by some per cent of their size, as after a training.
_LOGIT_SPREAD = 0.7
_DELTA_SPREAD = 0.25


def seeded_weights(cfg: CfgNode, images: list[Tensor], seed: int) -> dict[str, Tensor]:
    """The state dict of a detector that nobody trained, under Detectron2's names.

    Args:
        cfg: of a standalone detector.
        images: uint8 ``[3, H, W]``, for the statistics of the norms.
        seed: of the weights.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        detector = build_detector(cfg).eval()
        batch, _ = detector.preprocess(images)
        settle_norms(detector.backbone, lambda: detector.backbone(batch))
        keep_anchors(detector.proposal_generator.rpn_head.anchor_deltas)
        for predictor in detector.roi_heads.box_predictor:
            assert isinstance(predictor, BoxPredictor)
            spread(predictor.cls_score, predictor.bbox_pred)
    return detector.state_dict()


@torch.no_grad()
def settle_norms(module: nn.Module, run: Callable[[], object]) -> None:
    """Give norms with stored statistics those of what they see when ``run`` is called."""
    norms = [norm for norm in module.modules() if hasattr(norm, "running_var")]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def keep_anchors(deltas: nn.Module) -> None:
    """Let the RPN propose its anchors, by setting to zero what it would move them by."""
    for parameter in deltas.parameters():
        parameter.zero_()


@torch.no_grad()
def spread(logits: nn.Module, deltas: nn.Module) -> None:
    """Let classes and boxes that two linear layers predict differ; their biases become zero."""
    for layer, deviation in ((logits, _LOGIT_SPREAD), (deltas, _DELTA_SPREAD)):
        assert isinstance(layer, nn.Linear)
        layer.weight.normal_(std=deviation / layer.in_features**0.5)
        layer.bias.zero_()


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
    variance.copy_(inputs[0].var(dim=(0, 2, 3)))
