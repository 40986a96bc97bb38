"""COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_1x_early_exit.yaml as a LazyConfig.

The file beside this one without ``mask`` in its name says how to use it.
``model.roi_heads.mask_rules.score_threshold=0.3`` leaves out the masks of detections that score
less. For a mask head of every stage, in a file of your own:

    from detectron2.config import LazyCall as L
    from cascade_det.core import ConvUpsampleMaskHead
    from cascade_det.d2.mask_heads import StageMaskHeads

    model.roi_heads.mask_head = L(StageMaskHeads)(
        heads=[
            L(ConvUpsampleMaskHead)(
                in_channels=256, conv_dims=[256] * 4, upsampled_dim=256, num_masks=80
            )
            for _ in range(3)
        ]
    )
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead

from cascade_det.core import MaskRules

# LazyConfig reads relative imports as paths.
from .cascade_rcnn_R_50_FPN_1x_early_exit import (  # noqa: TID252
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.roi_heads.update(
    mask_in_features="${.box_in_features}",
    mask_pooler=L(ROIPooler)(
        output_size=14,
        scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    ),
    mask_head=L(MaskRCNNConvUpsampleHead)(
        input_shape=ShapeSpec(channels=256, height=14, width=14),
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256, 256],  # the last is that of the deconvolution
    ),
    mask_rules=L(MaskRules)(score_threshold=0.0),
)
dataloader.train.mapper.use_instance_mask = True
