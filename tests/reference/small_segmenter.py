"""A small segmenter, as options of a configuration, samples for it, and a run on drawn scenes."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from cascade_det.config import get_cfg
from cascade_det.standalone.build_segmenter import build_segmenter

LEVELS = ["res2", "res3", "res4", "res5"]
SEGMENTER = (
    *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.OUT_FEATURES", LEVELS),
    *("MODEL.SEM_SEG_HEAD.NAME", "CascadeSemSegHead", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3),
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", LEVELS),
)

CLASSES = ["background", "bright", "dark"]


def write_squares(folder, count=6):
    """Images of a bright and a dark square on grey, with their labels."""
    generator = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for index in range(count):
        image = np.full((48, 64, 3), 128, np.uint8)
        labels = np.zeros((48, 64), np.uint8)
        for label, value in ((1, 230), (2, 30)):
            top, left = generator.integers(0, 24), generator.integers(0, 40)
            image[top : top + 24, left : left + 24] = value
            labels[top : top + 24, left : left + 24] = label
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{index}.png")


def squares_run(folder):
    """Options of two iterations on these images, with output in a folder beside them."""
    images, labels = str(folder / "images"), str(folder / "labels")
    return [
        *SEGMENTER,
        *("MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone"),
        *("CASCADE.SEMANTIC_DATASETS", [["squares", "folders", images, labels]]),
        *("CASCADE.SEMANTIC_CLASSES", CLASSES, "CASCADE.BEST_METRIC", "sem_seg/mIoU"),
        *("DATASETS.TRAIN", ("squares",), "DATASETS.TEST", ("squares",)),
        *("INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MIN_SIZE_TEST", 48),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()),
        *("SOLVER.BASE_LR", 0.002, "SOLVER.WARMUP_ITERS", 1, "CASCADE.OPTIMIZER", "AdamW"),
        *("DATALOADER.NUM_WORKERS", 0, "SEED", 0, "OUTPUT_DIR", str(folder / "output")),
    ]


def labelled(rows, columns, **more):
    """A drawn sample of three classes; ``more`` are further entries."""
    return {
        "image": torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8),
        "sem_seg": torch.randint(0, 3, (rows, columns)),
        **more,
    }


# Options of segmenters with other trunks.
TRUNKS = {
    "resnet": ("MODEL.CASCADE_DECODER.FUSE", "concat"),
    "mobilenet_v2": ("MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone"),
    "efficientvit": ("MODEL.BACKBONE.NAME", "build_efficientvit_backbone"),
    "pyramid": (
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", LEVELS),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4"], "MODEL.FPN.OUT_CHANNELS", 32),
    ),
}


def make_segmenter(*options):
    """A segmenter in evaluation mode whose norms are not those of an untrained one."""
    cfg = get_cfg()
    cfg.merge_from_list([*SEGMENTER, *options])
    torch.manual_seed(0)
    segmenter = build_segmenter(cfg).eval()
    for module in segmenter.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return segmenter
