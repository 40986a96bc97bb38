"""The CASCADE decoder as a semantic head of Detectron2's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor

from cascade_det import config
from cascade_det.config.tree import add_model_nodes
from cascade_det.segmentation.head import SegmentationHead
from cascade_det.segmentation.logits import predict, resize
from cascade_det.segmentation.losses import SubsetLoss


@SEM_SEG_HEADS_REGISTRY.register()
class CascadeSemSegHead(SegmentationHead):
    """:class:`~cascade_det.segmentation.head.SegmentationHead` for Detectron2's models.

    For ``SemanticSegmentor`` and ``PanopticFPN``. Reads ``MODEL.SEM_SEG_HEAD`` and
    ``MODEL.CASCADE_DECODER``.

    Args:
        in_features: names of the maps that are decoded, finest first.
        stride: of the finest of them, in pixels.
        loss: of the logits of all levels at the size of the labels.
        loss_weight: its factor.
        head: arguments of ``SegmentationHead``.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: tuple[str, ...],
        stride: int,
        loss: SubsetLoss,
        loss_weight: float,
        **head: Any,
    ) -> None:
        super().__init__(**head)
        self.in_features = in_features
        self.stride = stride
        self.loss = loss
        self.ignore_value = loss.ignore_value  # Detectron2 pads labels with it
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from a configuration and the maps of the backbone."""
        cfg = cfg.clone()
        cfg.defrost()
        add_model_nodes(cfg)
        config.check_segmenter(cfg)
        arguments = config.segmenter_arguments(cfg)
        names = arguments["in_features"]
        return {
            "in_features": names,
            "stride": input_shape[names[0]].stride,
            "loss": SubsetLoss(**arguments["loss"]),
            "loss_weight": arguments["loss_weight"],
            "channels": [input_shape[name].channels for name in reversed(names)],
            **arguments["head"],
        }

    def forward(  # type: ignore[override]
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Losses in training, else logits, as Detectron2's heads return them.

        Args:
            features: maps by name.
            targets: int64 ``[N, H, W]``, in training.

        Returns:
            Logits ``[N, K, H, W]``, with sides of the finest map times its stride, and an empty
            dict; in training ``None`` and ``loss_sem_seg``.
        """
        maps = self.decoded_maps(features)
        height, width = self.full_size(maps)
        if not self.training:
            if self.exits is not None:
                return resize(self.exits(maps).logits, (height, width)), {}
            return predict(self.decode(maps), (height, width)), {}
        assert targets is not None
        rows, columns = targets.shape[-2:]
        logits = self.decode(maps)
        full = [resize(x, (height, width))[..., :rows, :columns] for x in logits]
        return None, {"loss_sem_seg": self.loss_weight * self.loss(full, targets)}

    def decoded_maps(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The maps that are decoded, coarsest first."""
        return [features[name] for name in reversed(self.in_features)]

    def full_size(self, maps: Sequence[Tensor]) -> tuple[int, int]:
        """Sides of the finest map times its stride."""
        height, width = (side * self.stride for side in maps[-1].shape[-2:])
        return height, width
