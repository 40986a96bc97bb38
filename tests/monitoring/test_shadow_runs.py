"""Shadow runs of the standalone host: the detector, the evaluation and the predictor."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cascade_det.evaluation import agreement_loss
from cascade_det.monitoring.shadow import ShadowRules
from cascade_det.standalone import Predictor, evaluate
from cascade_det.standalone.build import build_detector

EXITS = (
    *("MODEL.CASCADE.EXIT.ENABLED", True, "MODEL.CASCADE.EXIT.THRESHOLDS", (0.45, 0.6)),
    *("MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS", (0.2, 0.3)),
)
PROPOSALS = ("MODEL.RPN.POST_NMS_TOPK_TEST", 60, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01)
AS_THEY_ARE = ("INPUT.MIN_SIZE_TEST", 0)  # images
SHADOW = ("CASCADE.SHADOW_SHARE", 1.0, "CASCADE.SHADOW_SCORE", 0.2)


@pytest.fixture
def weights(instant_cfg, tmp_path):
    """Random ones whose scores and boxes differ from region to region and stage to stage."""
    torch.manual_seed(0)
    detector = build_detector(instant_cfg)
    for predictor in detector.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=30.0)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=1.0)
    path = tmp_path / "weights.pth"
    torch.save({"model": detector.state_dict()}, path)
    return str(path)


@pytest.fixture
def cfg(instant_cfg, weights):
    instant_cfg.merge_from_list(
        ["MODEL.WEIGHTS", weights, *EXITS, *SHADOW, *PROPOSALS, *AS_THEY_ARE]
    )
    return instant_cfg


def load(cfg, *options):
    cfg = cfg.clone()
    cfg.merge_from_list(list(options))
    detector = build_detector(cfg).eval()
    detector.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])
    return detector


@pytest.fixture
def batch(shapes):
    files = sorted((shapes / "val").iterdir())
    pixels = [cv2.imread(str(file)) for file in files]
    return [{"image": torch.from_numpy(p.transpose(2, 0, 1).copy())} for p in pixels]


def assert_same(ours, theirs):
    torch.testing.assert_close(vars(ours), vars(theirs), rtol=1e-4, atol=1e-4)


def test_the_last_stage_is_the_full_cascade_with_the_scores_that_are_reported(cfg, batch):
    scaled = ("MODEL.CASCADE.EXIT.SCORE_SCALES", (0.5, 0.8, 1.5))
    never = ("MODEL.CASCADE.EXIT.THRESHOLDS", (1.01,), "MODEL.CASCADE.EXIT.REDUNDANCY_IOU", 2.0)
    nothing_pruned = ("MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS", (0.0,))
    output = load(cfg, *scaled, *never, *nothing_pruned).detect(batch, stages=True)
    for early, full in zip(output.detections, output.stages[-1].detections, strict=True):
        assert len(early) > 5
        assert_same(early, full)


def expected_losses(cfg, batch):
    """Those of two detectors with the same weights, one without exits, image by image."""
    early, full = load(cfg), load(cfg, "MODEL.CASCADE.EXIT.ENABLED", False)
    pairs = [
        (e.detect([sample]), f.detect([sample])) for sample in batch for e, f in [(early, full)]
    ]
    return [agreement_loss(e.detections[0], f.detections[0], min_score=0.2) for e, f in pairs]


@pytest.mark.usefixtures("no_pictures")
def test_an_evaluation_reports_the_loss_of_the_exits(cfg, batch, caplog):
    caplog.set_level("INFO")
    losses = expected_losses(cfg, batch)
    assert 0 < sum(losses) / 3 < 1
    results = evaluate(cfg)
    assert results["shadow"]["loss"] == pytest.approx(sum(losses) / 3, abs=0.02)
    assert results["shadow"]["images"] == 3
    saved = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    assert saved["shadow"] == results["shadow"]
    assert saved["exits"]["head_flops_share"] < 1
    assert set(saved["exits"]["stage0"]["mean_score"]) == set(saved["exits"]["stage0"]["left"])
    assert "Shadow runs: 3 images also ran the full cascade" in caplog.text


@pytest.mark.usefixtures("no_pictures")
def test_an_evaluation_shadows_its_share_alone(cfg):
    cfg.CASCADE.SHADOW_SHARE = 0.5
    chosen = [number for number in (1, 2, 3) if ShadowRules(share=0.5).chooses(number)]
    assert evaluate(cfg)["shadow"]["images"] == len(chosen)


def test_a_predictor_watches_its_exits(cfg, shapes, tmp_path, batch):
    files = sorted((shapes / "val").iterdir())
    reports = []
    cfg.MODEL.CASCADE.EXIT.EXPECTED_LOSS = 0.0
    predictor = Predictor(cfg, on_drift=reports.append, metrics_dir=tmp_path / "metrics")
    found = predictor([*files, *files])
    plain = load(cfg)
    assert predictor.monitor.report()["exits"]["images"] == 6
    shadow = predictor.monitor.report()["shadow"]
    assert shadow["images"] == 6
    assert shadow["loss"] > 0
    for _ in range(4):
        predictor(files)
    predictor.monitor.close()
    (report,) = reports
    assert report["shadow"]["drift"] == 1
    lines = (tmp_path / "metrics" / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["shadow/drift"] == 1
    for detections, sample in zip(found, batch, strict=False):
        assert_same(detections, plain.detect([sample]).detections[0])


def test_a_predictor_knows_images_by_the_names_that_it_is_told(cfg):
    cfg.CASCADE.SHADOW_SHARE = 0.5
    images = [np.full((96, 128, 3), shade, np.uint8) for shade in (10, 50, 90, 130)]
    names = [name for name in map(str, range(40)) if ShadowRules(share=0.5).chooses(name)][:4]
    predictor = Predictor(cfg)
    predictor(images, names=names)
    assert predictor.monitor.report()["shadow"]["images"] == 4
    with pytest.raises(ValueError, match="4 images, but 2 names"):
        predictor(images, names=names[:2])
