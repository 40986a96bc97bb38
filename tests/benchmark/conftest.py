"""A benchmark small enough for a test: ResNet-18, 64 pixels, 40 proposals."""

from pathlib import Path

import pytest

from cascade_det.benchmark.options import Options, Survivors
from cascade_det.benchmark.setup import Setup

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "Base-Cascade-RCNN-FPN.yaml")
SMALL = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "5", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [48], [64]]"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "60", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.CASCADE.FAST.DTYPE", "float32"),
)
BFLOAT16 = (*SMALL, "MODEL.CASCADE.FAST.DTYPE", "bfloat16")


@pytest.fixture(scope="session")
def make_options():
    """Gives options of a small benchmark, with changes."""

    def make(**changes):
        small = {
            "config_file": (CONFIG,),
            "opts": SMALL,
            "size": (64, 96),
            "proposals": (40,),
            "rounds": 2,
            "warmup": 0,
            "survivors": Survivors((20.0, 9.5, 3.0), "a test"),
        }
        return Options(**{**small, **changes})

    return make


@pytest.fixture(scope="session")
def setup(make_options):
    """What small contenders share, with weights that are drawn; all of them compute in float32."""
    return Setup(make_options())


@pytest.fixture(scope="session")
def bfloat16_setup(make_options):
    """The same weights, for fast contenders that compute in bfloat16."""
    return Setup(make_options(opts=BFLOAT16))
