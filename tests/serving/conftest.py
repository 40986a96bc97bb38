"""A small detector with random weights on the page: its class names try to be markup."""

import io

import numpy as np
import pytest
import torch
from lively_heads import lively
from PIL import Image
from torch import nn

from cascade_det.config import load_config
from cascade_det.standalone import Predictor
from cascade_det.standalone.build import build_detector

NAMES = ["cell", "<img src=x onerror=alert(1)>", "cell & co", "'\"", "größe", "</td>"]


@pytest.fixture(scope="session")
def cfg_with(tmp_path_factory):
    """``cfg_with(*options, files=())``: a configuration of that detector, with its weights."""
    options = ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"]
    options += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "INPUT.MIN_SIZE_TEST", "64"]
    options += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.2", "MODEL.RPN.POST_NMS_TOPK_TEST", "50"]
    options += ["MODEL.RPN.NMS_THRESH", "0.9"]  # so that some regions cover others
    instant = "cascade_det://quick_schedules/instant_test.yaml"
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    generator = torch.random.get_rng_state()
    torch.manual_seed(5)
    detector = lively(build_detector(load_config(instant, options)))
    nn.init.normal_(detector.proposal_generator.rpn_head.objectness_logits.weight, std=0.5)
    tell_regions_apart(detector, picture())
    torch.random.set_rng_state(generator)
    run = {"seed": 1, "class_names": NAMES, "category_ids": [1, 2, 3, 4, 5, 6]}
    torch.save({"model": detector.state_dict(), "run": run}, path)

    def make(*more, files=()):
        return load_config([instant, *files], [*options, "MODEL.WEIGHTS", str(path), *more])

    return make


@pytest.fixture(scope="session")
def predictor_of():
    """``predictor_of(cfg)``."""
    return Predictor


def tell_regions_apart(detector, pixels):
    """Spread the class scores of an image's regions: some background, others certain."""
    detector.set_exits(None)
    inputs = {}
    for predictor in detector.roi_heads.box_predictor:
        nn.init.normal_(predictor.bbox_pred.weight, std=0.02)
        predictor.cls_score.register_forward_pre_hook(
            lambda layer, given: inputs.__setitem__(layer, given[0])
        )
    image = torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1)
    detector.detect([{"image": image}])
    for layer, hidden in inputs.items():
        apart = hidden - hidden.mean(dim=0)
        nn.init.normal_(layer.weight)
        layer.weight.data *= 3.0 / (apart @ layer.weight.T).std(dim=0)[:, None]
        layer.bias.data = -layer.weight.data @ hidden.mean(dim=0)
        layer.bias.data[-1] += 4.0


def picture(width=96, height=80, *, seed=3):
    """Blobs of colour, uint8 ``[height, width, 3]``."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels, kind="PNG", **options):
    """An image file of RGB pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def image():
    """``image(kind="PNG", **options)``: a file, and its pixels in BGR order."""

    def make(kind="PNG", *, width=96, height=80, **options):
        pixels = picture(width, height)
        return encoded(pixels, kind, **options), np.ascontiguousarray(pixels[:, :, ::-1])

    return make
