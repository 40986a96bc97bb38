"""A small segmenter, as options of a configuration, and samples for it."""

import torch

LEVELS = ["res2", "res3", "res4", "res5"]
SEGMENTER = (
    *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.OUT_FEATURES", LEVELS),
    *("MODEL.SEM_SEG_HEAD.NAME", "CascadeSemSegHead", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3),
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", LEVELS),
)


def labelled(rows, columns, **more):
    """A drawn sample of three classes; ``more`` are further entries."""
    return {
        "image": torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8),
        "sem_seg": torch.randint(0, 3, (rows, columns)),
        **more,
    }
