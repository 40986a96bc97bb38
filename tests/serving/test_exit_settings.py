"""Settings of the slider: each detects as a predictor that was built with it."""

import json

import pytest

from cascade_det.calibration.front import FrontPoint, write_front
from cascade_det.config import merge_config
from cascade_det.config.shipped import shipped_names
from cascade_det.errors import CascadeDetError
from cascade_det.serving.detection import ImageDetection
from cascade_det.serving.exit_settings import PRESETS, ExitSettings

OFF = ["MODEL.CASCADE.EXIT.ENABLED", "False"]
EARLY = {
    "PRUNE_THRESHOLDS": [0.1, 0.15],
    "REGION_BUDGET": [30, 20, 0],
    "THRESHOLDS": [0.6, 0.9],
    "SCORE_SCALES": [1.5, 1.2, 1.0],
}
MODEST = {"REDUNDANCY_IOU": 0.95}


def settings_of(cfg, predictor, front=None):
    return {s.name: s for s in ExitSettings(cfg, predictor.detector, front)}


def front_file(folder, *settings):
    """A front whose points have less work from one to the next."""
    points = [
        FrontPoint(setting, 50.0 - rank, float(rank), 1 / (rank + 1), (1.0, 0.5, 0.2))
        for rank, setting in enumerate(settings)
    ]
    write_front(points[::-1], folder / "front.csv")
    return folder


def assert_same(found, detections, names):
    """The answer of the page and detections of a predictor."""
    listed = found["detections"]
    assert [d["box"] for d in listed] == detections.boxes.tolist()
    assert [d["score"] for d in listed] == detections.scores.tolist()
    assert [d["class"] for d in listed] == detections.classes.tolist()
    assert [d["exit_stage"] for d in listed] == detections.exit_stages.tolist()
    assert [d["label"] for d in listed] == [names[d["class"]] for d in listed]


def test_every_preset_is_known():
    known = {name.removeprefix("exits/") for name in shipped_names() if name.startswith("exits/")}
    assert known == {"Base-Exits.yaml", "throughput.yaml", *(f"{name}.yaml" for name in PRESETS)}


@pytest.mark.parametrize("fast", ["False", "True"])
def test_presets_detect_as_predictors_with_their_files(cfg_with, predictor_of, image, fast):
    own = ["MODEL.CASCADE.FAST.ENABLED", fast, "MODEL.CASCADE.FAST.DTYPE", "float32"]
    cfg = cfg_with(*own, "MODEL.CASCADE.EXIT.THRESHOLDS", "(0.6, 0.7)")
    predictor = predictor_of(cfg)
    settings = settings_of(cfg, predictor)
    assert list(settings) == ["off", "configuration", "default", "mobile"]
    default = ["MODEL.CASCADE.EXIT.THRESHOLDS", "(1.01,)"]
    wanted = {
        "off": cfg_with(*own, *OFF),
        "configuration": cfg,
        "default": cfg_with(*own, *default),
        "mobile": cfg_with(*own, files=["cascade_det://exits/mobile.yaml"]),
    }
    detection = ImageDetection(cfg, predictor)
    content, pixels = image()
    alone = {name: predictor_of(other)(pixels) for name, other in wanted.items()}
    found = {}
    # Twice, so that no setting leaves anything behind.
    for name in [*settings, *reversed(settings)]:
        found[name] = detection(content, settings[name])
        assert_same(found[name], alone[name], predictor.class_names)
    assert len({json.dumps(f["stages"]) for f in found.values()}) == len(found)
    assert [len(found[name]["stages"]) for name in settings] == [3, 3, 3, 2]


def test_points_of_a_front_go_from_accurate_to_fast(cfg_with, predictor_of, image, tmp_path):
    cfg = cfg_with(*OFF)
    predictor = predictor_of(cfg)
    front = front_file(tmp_path, {}, MODEST, EARLY)
    settings = settings_of(cfg, predictor, front)
    assert list(settings) == ["off", "front2", "front1"]
    assert settings["front1"].title == "AP 48.00 (-2.00), 33% of the work"
    assert list(settings_of(cfg, predictor, front / "front.csv")) == list(settings)
    content, pixels = image()
    for name, setting in (("off", None), ("front2", MODEST), ("front1", EARLY)):
        other = cfg_with(*OFF)
        if setting is not None:
            merge_config(other, ["cascade_det://exits/Base-Exits.yaml"])
            keys = [(f"MODEL.CASCADE.EXIT.{key}", value) for key, value in setting.items()]
            merge_config(other, None, [word for pair in keys for word in pair])
        found = ImageDetection(cfg, predictor)(content, settings[name])
        assert_same(found, predictor_of(other)(pixels), predictor.class_names)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"PRUNE_TRESHOLDS": [0.1]}, "PRUNE_TRESHOLDS"),
        ({"REDUNDANCY_IOU": "high"}, "REDUNDANCY_IOU"),
        ({"PRUNE_THRESHOLDS": [0.1, 0.2, 0.3]}, "PRUNE_THRESHOLDS"),
        ({"CONFIDENCE": "learned", "THRESHOLDS": [0.5, 0.5]}, "LEARNED"),
    ],
)
def test_a_front_of_another_model_is_an_error(cfg_with, predictor_of, tmp_path, setting, words):
    cfg = cfg_with()
    front = front_file(tmp_path, {}, setting)
    with pytest.raises(CascadeDetError, match=f"(?s)front.csv, line 2: .*{words}"):
        settings_of(cfg, predictor_of(cfg), front)


def test_a_cascade_that_fits_no_preset_has_none(cfg_with, predictor_of):
    weights = "((10.0, 10.0, 5.0, 5.0), (25.0, 25.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))"
    cfg = cfg_with("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", weights, *OFF)
    assert list(settings_of(cfg, predictor_of(cfg))) == ["off", "default"]


def test_weights_are_shared(cfg_with, predictor_of):
    cfg = cfg_with()
    predictor = predictor_of(cfg)
    memory = {p.data_ptr() for p in predictor.detector.parameters()}
    for setting in ExitSettings(cfg, predictor.detector):
        setting.apply(predictor.detector)
        assert {p.data_ptr() for p in predictor.detector.parameters()} <= memory


def test_times_are_in_the_order_of_the_work(cfg_with, predictor_of, image):
    cfg = cfg_with()
    predictor = predictor_of(cfg)
    settings = settings_of(cfg, predictor)
    found = ImageDetection(cfg, predictor)(image()[0], settings["mobile"])
    assert list(found["milliseconds"]) == [
        *("decode", "resize", "preprocess", "backbone", "rpn", "gate0", "stage0"),
        *("gate1", "stage1", "postprocess", "masks", "paste masks"),
    ]
    assert all(value >= 0 for value in found["milliseconds"].values())
