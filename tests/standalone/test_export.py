"""A file of a detector gives what the detector gives."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_backbones import ATTENTION, CASCADE_FPN
from small_cascades import random_boxes
from small_detectors import make_detector, make_masks, random_image
from torchvision.ops import nms

from cascade_det.config import get_cfg
from cascade_det.data.transforms import resize_shortest_edge
from cascade_det.errors import CheckpointError, ConfigError, DatasetError
from cascade_det.onnx_predictor import METADATA_KEY, ExportedModel, OnnxPredictor
from cascade_det.standalone import build_detector
from cascade_det.standalone.export import (
    METADATA_FILE,
    compare,
    export_onnx,
    export_program,
    stages_to_export,
)
from cascade_det.standalone.fixed_depth import FixedDepthDetector, class_nms

SIZES = [(97, 130), (140, 70), (66, 251)]


def describe(num_stages=3):
    return ExportedModel(
        class_names=["a", "b", "c"],
        category_ids=[3, 5, 9],
        image_format="RGB",
        min_size=100,
        max_size=160,
        num_stages=num_stages,
    )


def eager(detector, image, num_stages):
    """The detections of the same depth."""
    if num_stages == detector.roi_heads.num_stages:
        return detector.detect([{"image": image}]).detections[0]
    stages = detector.detect([{"image": image}], stages=True).stages
    return stages[num_stages - 1].detections[0]


def assert_same(run, detector, image, num_stages=3):
    """Returns the number of detections."""
    wanted, found = eager(detector, image, num_stages), tuple(run(image))
    assert [x.dtype for x in found[:3]] == [torch.float32, torch.float32, torch.int64]
    columns = (wanted.boxes, wanted.scores, wanted.classes)
    torch.testing.assert_close(found[:3], columns, rtol=1e-4, atol=2e-3)
    assert (len(found) == 4) == (detector.roi_heads.masks is not None)
    if len(found) == 4:
        torch.testing.assert_close(found[3], wanted.masks, rtol=0, atol=1e-5)
    return len(wanted)


@pytest.fixture(scope="module")
def detector():
    return make_detector()


@pytest.fixture(scope="module")
def onnx_file(detector, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("export") / "detector.onnx"
    export_onnx(detector, path, describe())
    return path


def run_onnx(path):
    predictor = OnnxPredictor(path)
    return lambda image: tuple(torch.from_numpy(x) for x in predictor.run(image.numpy()))


def test_onnx_gives_the_detections_of_images_of_any_size(onnx_file, detector):
    run = run_onnx(onnx_file)
    counts = [assert_same(run, detector, random_image(*size)) for size in SIZES]
    # Neither as many as are allowed nor the same number everywhere.
    assert min(counts) > 3
    assert len(set(counts)) > 1
    # Of fewer anchors than are taken of a level, and of no more than a pixel.
    for size in [(20, 9), (1, 1), (64, 64)]:
        assert_same(run, detector, random_image(*size))


def test_onnx_of_two_stages_with_boxes_of_classes(tmp_path):
    pytest.importorskip("onnxruntime")
    changes = {"cls_agnostic": False, "ensemble": "last_boxes", "conv_dims": (5,)}
    detector = make_detector(**changes, detections_per_image=30)
    path = tmp_path / "detector.onnx"
    run = export_onnx(detector, path, describe(2))
    counts = [assert_same(run, detector, random_image(*size), 2) for size in SIZES]
    assert max(counts) == 30
    found = OnnxPredictor(path)(np.full((50, 50, 3), 200, np.uint8))
    assert set(found.exit_stages.tolist()) == {1}


def test_onnx_of_a_detector_that_proposes_nothing(tmp_path):
    pytest.importorskip("onnxruntime")
    changes = {"conv_dims": (5,), "detections_per_image": -1, "masks": make_masks(per_stage=True)}
    detector = make_detector(**changes, min_box_size=1000.0)
    run = export_onnx(detector, tmp_path / "detector.onnx", describe(1))
    assert [assert_same(run, detector, random_image(*size), 1) for size in SIZES] == [0, 0, 0]


@pytest.mark.parametrize(
    ("per_stage", "num_stages", "rules"),
    [
        (False, 3, {}),
        (True, 2, {}),
        (True, 3, {"score_threshold": 0.3, "redundancy_iou": 0.5}),
        (False, 3, {"score_threshold": 1.0}),
    ],
)
def test_onnx_gives_the_masks_of_the_detector_by_its_rules(tmp_path, per_stage, num_stages, rules):
    pytest.importorskip("onnxruntime")
    detector = make_detector(masks=make_masks(per_stage=per_stage, **rules))
    run = export_onnx(detector, tmp_path / "detector.onnx", describe(num_stages))
    for size in [*SIZES, (20, 9), (1, 1)]:
        assert_same(run, detector, random_image(*size), num_stages)
    masks = run(random_image(*SIZES[0]))[3]
    made = masks[masks.amax(dim=(1, 2)) > 0]
    if rules.get("score_threshold") == 1.0:
        assert len(made) == 0
    else:
        assert made.std() > 0.02
        assert (len(made) < len(masks)) == bool(rules)


@pytest.mark.parametrize("shape", [(97, 130), (300, 120)])
def test_predictor_pastes_the_masks_into_its_image(tmp_path, shape):
    pytest.importorskip("onnxruntime")
    detector = make_detector(masks=make_masks())
    path = tmp_path / "detector.onnx"
    export_onnx(detector, path, replace(describe(), image_format="BGR"))
    array = random_image(*shape).permute(1, 2, 0).numpy()
    found = OnnxPredictor(path)(array)
    image = torch.from_numpy(resize_shortest_edge(array, 100, 160)).permute(2, 0, 1)
    sample = {"image": image, "height": shape[0], "width": shape[1]}
    (wanted,) = detector.detect([sample]).detections
    np.testing.assert_allclose(found.masks, wanted.masks, rtol=0, atol=1e-5)
    values = sampled(wanted.masks, wanted.boxes, shape)
    certain = (values - 0.5).abs() > 1e-4
    pasted = torch.from_numpy(found.paste(*shape))
    assert pasted.shape == (len(wanted), *shape)
    assert torch.equal(pasted[certain], (values >= 0.5)[certain])
    assert 0.02 < pasted[certain].double().mean() < 0.5


def sampled(masks, boxes, shape):
    """The masks at the centres of the pixels of an image, by ``grid_sample``: ``[D, H, W]``."""
    low, high = boxes.double().split(2, dim=1)
    centres = torch.stack(
        torch.meshgrid(*(torch.arange(side).double() + 0.5 for side in shape), indexing="ij")[::-1],
        dim=-1,
    )
    grid = (centres - low[:, None, None]) / (high - low)[:, None, None] * 2 - 1
    pixels = torch.nn.functional.grid_sample(masks[:, None].double(), grid, align_corners=False)
    return pixels[:, 0]


@pytest.mark.slow
def test_program_gives_the_detections_of_images_of_any_size(tmp_path):
    masks = make_masks(per_stage=True, score_threshold=0.7)
    detector = make_detector(score_thresh=0.6, masks=masks)
    path = tmp_path / "detector.pt2"
    export_program(detector, path, describe(1))
    files = {METADATA_FILE: ""}
    run = torch.export.load(path, extra_files=files).module()
    assert ExportedModel.from_json(files[METADATA_FILE]) == describe(1)
    counts = [assert_same(run, detector, random_image(*size), 1) for size in SIZES]
    assert len(set(counts)) > 1
    assert_same(run, detector, random_image(33, 40), 1)


@pytest.fixture
def attentive(request, instant_cfg):
    """A detector with attention in the backbone, whose answers are not all alike."""
    options = ("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FPN.NORM", "")
    instant_cfg.merge_from_list([*(ATTENTION | CASCADE_FPN)[request.param], *options])
    instant_cfg.merge_from_list(["MODEL.CASCADE.EXIT.ENABLED", False])
    detector = build_detector(instant_cfg).eval()
    for predictor in detector.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
    return detector


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attentive", "export"),
    [
        ("efficientvit", export_onnx),
        ("efficientvit", export_program),
        ("hiervit", export_onnx),
        ("hiervit_cascade", export_onnx),
    ],
    indirect=["attentive"],
)
def test_attention_takes_images_of_any_size(attentive, tmp_path, export):
    run = export(attentive, tmp_path / "detector", describe(1))
    if export is export_onnx:
        run = run_onnx(tmp_path / "detector")
    sizes = [(128, 131), (300, 170)] if export is export_program else [(30, 47), (300, 170)]
    for size in sizes:
        assert assert_same(run, attentive, random_image(*size), 1) > 10


def test_comparison_tells_other_detections(onnx_file, detector):
    run, image = run_onnx(onnx_file), random_image(*SIZES[0])
    assert compare(detector, run, image, 3).same
    boxes, scores, classes = run(image)

    def compare_with(*outputs, detector=detector):
        return compare(detector, lambda image: outputs, image, 3)

    moved = compare_with(boxes + torch.tensor([0.0, 0.0, 0.0, 1.0]), scores, classes)
    assert moved.boxes == pytest.approx(1.0, abs=1e-3)
    assert not moved.same
    raised = compare_with(boxes, scores + 0.01, classes)
    assert raised.scores == pytest.approx(0.01, abs=1e-5)
    assert not raised.same
    fewer = compare_with(boxes[1:], scores[1:], classes[1:])
    assert fewer.boxes > 0.1
    assert not fewer.same
    assert not compare_with(boxes, scores, (classes + 1) % 3).same
    assert not compare_with(boxes[:0], scores[:0], classes[:0]).same
    with_masks = make_detector(masks=make_masks())
    masks = eager(with_masks, image, 3).masks
    assert masks is not None
    assert compare_with(boxes, scores, classes, masks, detector=with_masks).same
    masks[-1, 3, 2] += 0.01
    other = compare_with(boxes, scores, classes, masks, detector=with_masks)
    assert other.masks == pytest.approx(0.01, abs=1e-5)
    assert not other.same


@pytest.mark.parametrize("shape", [(97, 130), (300, 120), (40, 44)])
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_predictor_resizes_and_scales_as_the_detector_of_the_weights(
    onnx_file, detector, shape, image_format, monkeypatch
):
    predictor = OnnxPredictor(onnx_file)
    predictor.model = replace(predictor.model, image_format=image_format)
    array = random_image(*shape).permute(1, 2, 0).numpy()[:, :, ::-1]
    pixels = array if image_format == "BGR" else array[:, :, ::-1]
    resized = resize_shortest_edge(pixels, 100, 160)
    image = torch.from_numpy(resized).permute(2, 0, 1)
    sample = {"image": image, "height": shape[0], "width": shape[1]}
    (wanted,) = detector.detect([sample]).detections
    found, again = predictor([array, array.copy()])
    assert len(wanted) > 3
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-2)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    assert found.classes.tolist() == wanted.classes.tolist()
    assert found.exit_stages.tolist() == wanted.exit_stages.tolist()
    np.testing.assert_array_equal(found.boxes, again.boxes)
    assert len(predictor(array)) == len(found)


def test_predictor_takes_images_alone(onnx_file, tmp_path):
    predictor = OnnxPredictor(onnx_file)
    assert (predictor.class_names, predictor.category_ids) == (["a", "b", "c"], [3, 5, 9])
    assert predictor([]) == []
    for wrong in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            predictor(wrong)
    with pytest.raises(DatasetError, match="no such image"):
        predictor(tmp_path / "nowhere.png")


def test_foreign_and_broken_files_are_told(onnx_file, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "file.onnx"
    with pytest.raises(CheckpointError, match=r"file\.onnx: there is no such file"):
        OnnxPredictor(path)
    content = onnx_file.read_bytes()
    for broken in (b"", b"no ONNX at all", content[:1000], content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"file\.onnx: .*cascade-det export"):
            OnnxPredictor(path)
    value = onnx.helper.make_tensor_value_info
    image, boxes = value("image", 1, [3, 4, 5]), value("boxes", 1, [3, 4, 5])
    nodes = [onnx.helper.make_node("Identity", ["image"], ["boxes"])]
    graph = onnx.helper.make_graph(nodes, "other", [image], [boxes])
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=opsets)
    for metadata, words in (
        ({}, "without the metadata 'cascade_det'"),
        ({METADATA_KEY: "{"}, "metadata 'cascade_det' cannot be used"),
        ({METADATA_KEY: describe().to_json()}, r"takes .* not a uint8 image"),
    ):
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, path)
        with pytest.raises(CheckpointError, match=rf"file\.onnx: .*{words}.*cascade-det export"):
            OnnxPredictor(path)


def configured(*options):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.WEIGHTS", "some.pth", *options])
    return cfg


EXITS = [
    *("MODEL.CASCADE.EXIT.ENABLED", True),
    *("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads"),
]


def test_what_cannot_be_exported_is_told_before_work(monkeypatch):
    for file_format in ("onnx", "torch-export"):
        assert stages_to_export(configured(), file_format, None) == 3
        assert stages_to_export(configured(*EXITS), file_format, 2) == 2
        for options, stages, words in (
            (EXITS, None, r"MODEL\.CASCADE\.EXIT\.ENABLED is True.*--stages"),
            ([], 0, "--stages 0.*from 1 to 3"),
            ([], 4, "--stages 4.*IOUS has 3 stages"),
            (["MODEL.WEIGHTS", ""], None, "MODEL.WEIGHTS is empty"),
            (["MODEL.CASCADE.SUPPRESSION", "wbf"], None, "'wbf', but an exported file has NMS"),
        ):
            with pytest.raises(ConfigError, match=words):
                stages_to_export(configured(*options), file_format, stages)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs onnx, which is not installed"):
        stages_to_export(configured(), "onnx", None)
    assert stages_to_export(configured(), "torch-export", None) == 3


def test_what_is_no_detector_of_so_many_stages_is_refused():
    detector = make_detector()
    detector.optimizations = ["Norms are folded."]
    with pytest.raises(ValueError, match="optimised"):
        FixedDepthDetector(detector, 3)
    with pytest.raises(ValueError, match="4 stages of a cascade of 3"):
        FixedDepthDetector(make_detector(), 4)
    with pytest.raises(ValueError, match="NMS, not 'soft_linear'"):
        FixedDepthDetector(make_detector(suppression="soft_linear"), 3)


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 40), num_classes=st.integers(1, 90))
def test_classes_do_not_meet_in_nms(seed, count, num_classes):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(count, (800, 1333), generator=generator)
    scores = torch.rand(count, generator=generator)
    classes = torch.randint(num_classes, (count,), generator=generator)
    wanted = []
    for number in range(num_classes):
        rows = torch.nonzero(classes == number).squeeze(1)
        wanted += rows[nms(boxes[rows], scores[rows], 0.5)].tolist()
    found = class_nms(boxes, scores, classes, num_classes, 0.5)
    assert sorted(found.tolist()) == sorted(wanted)
