"""Detectors and predictors go to other processes as they are."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from small_detectors import make_detector, random_image

from cascade_det.config import load_config
from cascade_det.standalone import Predictor, build_detector

CONFIG = "configs/quick_schedules/instant_test.yaml"


def detections(detector):
    return detector.detect([{"image": random_image(90, 120)}]).detections[0]


def trained(detector):
    sample = {"image": random_image(90, 120), "gt_boxes": torch.tensor([[5.0, 5, 60, 60]])}
    losses = detector.train().losses([{**sample, "gt_classes": torch.tensor([1])}])
    sum(losses.values()).backward()
    return detector.eval()


@pytest.mark.parametrize("change", [lambda detector: detector, trained])
@pytest.mark.parametrize(
    "duplicate", [lambda detector: pickle.loads(pickle.dumps(detector)), copy.deepcopy]
)
def test_a_detector_detects_the_same_as_its_copy(change, duplicate):
    detector = change(make_detector())
    before = detections(detector)
    copied = detections(duplicate(detector))
    assert len(before) > 3
    for name in ("boxes", "scores", "classes", "exit_stages"):
        assert torch.equal(getattr(copied, name), getattr(before, name))


@pytest.mark.parametrize("fast", [False, True])
def test_a_predictor_is_watched_as_before(request, tmp_path, fast):
    config = str(request.config.rootpath / CONFIG)
    options = ["MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "CASCADE.SHADOW_SHARE", 1.0]
    torch.manual_seed(0)
    detector = build_detector(load_config(config, options))
    torch.save({"model": detector.state_dict()}, tmp_path / "weights.pth")
    options += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.CASCADE.FAST.ENABLED", fast]
    options += ["MODEL.CASCADE.FAST.DTYPE", "float32"]
    predictor = Predictor(load_config(config, options), metrics_dir=tmp_path)
    image = np.ascontiguousarray(random_image(64, 64).permute(1, 2, 0).numpy())
    (wanted,) = predictor([image])
    predictor.monitor.close()
    predictor([image])
    predictor.monitor._write(predictor.monitor.report())  # with its file open
    copied = pickle.loads(pickle.dumps(predictor))
    (found,) = copied([image])
    assert torch.equal(found.boxes, wanted.boxes)
    assert copied.class_names == predictor.class_names
    assert (copied.monitor.images, predictor.monitor.images) == (3, 2)
    for one in (predictor, copied):
        one.monitor.close()
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]
