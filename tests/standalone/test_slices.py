"""Detection in slices: against brute force, and against SAHI on the same detector."""

import json
from itertools import pairwise
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_runs import INSTANT

from cascade_det.commands.predict import main as predict
from cascade_det.config import check_config, load_config
from cascade_det.core import Detections
from cascade_det.core.postprocess import Selection
from cascade_det.errors import ConfigError
from cascade_det.standalone import Predictor, build_detector
from cascade_det.standalone.slices import SlicedPredictor, slice_corners, suppress_parts
from shape_scenes import make_scene

SIZE, OVERLAP = 96, 0.25


class Spots:
    """Finds bright spots as connected components; the score grows with what is seen of a spot.

    It finds nothing in an image with a side above ``largest``, and notes the names it is given.
    """

    def __init__(self, *, masks=False, largest=SIZE):
        self.largest = largest
        selection = Selection(0.0, 0.5, 5)
        heads = SimpleNamespace(selection=selection, masks=object() if masks else None)
        self.detector = SimpleNamespace(roi_heads=heads)
        self.class_names, self.category_ids = ["dim", "bright"], [1, 2]
        self.monitor = object()
        self.batch_size = 4
        self.calls = []
        self._masks = masks

    def __call__(self, images, names=None):
        self.calls.append(names)
        return [self._find(i if max(i.shape) <= self.largest else i * 0) for i in images]

    def _find(self, image):
        rows = []
        for k, level in enumerate((100, 200)):
            pixels = (image[:, :, 0] == level).astype(np.uint8)
            _, _, stats, _ = cv2.connectedComponentsWithStats(pixels)
            rows += [(x, y, x + w, y + h, area, k) for x, y, w, h, area in stats[1:].tolist()]
        table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        scores, classes = table[:, 4] / 1e4, table[:, 5].long()
        masks = scores[:, None, None].expand(-1, 2, 2) if self._masks else None
        found = Detections(table[:, :4], scores, classes, classes, masks)
        return found[torch.argsort(scores, descending=True)]


def spots_image(rng, height, width, *, largest):
    """Rectangles that do not touch, of two levels."""
    image = np.zeros((height, width, 3), np.uint8)
    taken = np.zeros((height, width), bool)
    for _ in range(40):
        w, h = rng.integers(3, largest, 2)
        x, y = rng.integers(0, max(width - w, 1)), rng.integers(0, max(height - h, 1))
        area = np.s_[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2]
        if not taken[area].any():
            taken[area] = True
            image[y : y + h, x : x + w] = rng.choice([100, 200])
    return image


def table(found):
    rows = [found.boxes, found.classes[:, None], found.scores[:, None]]
    return sorted(torch.cat([r.double() for r in rows], dim=1).tolist())


@settings(max_examples=60)
@given(
    *(st.integers(1, 400) for _ in range(2)),
    st.integers(16, 200),
    st.floats(0, 0.95),
)
def test_every_pair_of_near_pixels_is_in_one_slice(height, width, size, overlap):
    """Two pixels of a row less apart than the overlap; and slices lie inside the image."""
    corners = slice_corners(height, width, size, overlap)
    for x, y in corners:
        assert 0 <= x <= max(width - size, 0)
        assert 0 <= y <= max(height - size, 0)
    assert len(set(corners)) == len(corners)
    shared = int(overlap * size)
    for axis, length in enumerate((width, height)):
        starts = sorted({corner[axis] for corner in corners})
        covered = [(s, min(s + size, length)) for s in starts]
        assert covered[0][0] == 0
        assert covered[-1][1] == length
        for (_, end), (start, _) in pairwise(covered):
            assert end - start >= min(shared, length)
    assert len(corners) == len({x for x, _ in corners}) * len({y for _, y in corners})


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_objects_smaller_than_the_overlap_are_found_once_and_whole(seed, height, width, masks):
    rng = np.random.default_rng(seed)
    image = spots_image(rng, height, width, largest=int(SIZE * OVERLAP))
    spots = Spots(masks=masks)
    found = SlicedPredictor(spots, size=SIZE, overlap=OVERLAP)(image)
    expected = Spots(largest=300)([image])[0]
    assert table(found) == table(expected)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    if masks:  # they stay with their boxes
        assert torch.equal(found.masks[:, 0, 0], found.scores)


def test_objects_larger_than_a_slice_are_found_in_the_whole_image():
    image = np.zeros((300, 300, 3), np.uint8)
    image[20:280, 30:290] = 100
    expected = Spots(largest=300)([image])[0]
    assert len(SlicedPredictor(Spots(), size=SIZE)(image)) > 1
    assert table(SlicedPredictor(Spots(largest=300), size=SIZE)(image)) == table(expected)


def test_fusion_replaces_the_suppression():
    """A box that two slices have is one, with their mean score."""
    image = np.zeros((96, 200, 3), np.uint8)
    image[10:30, 80:94] = 200
    found = SlicedPredictor(Spots(largest=100), size=100, overlap=0.3, merge="wbf")(image)
    np.testing.assert_allclose(table(found), [[80, 10, 94, 30, 1, 0.028]], rtol=1e-5)
    with pytest.raises(ConfigError, match="no masks for fused boxes: merge them by nms"):
        SlicedPredictor(Spots(masks=True), size=100, merge="wbf")
    with pytest.raises(ValueError, match="merge is 'nmm', not one of nms, wbf"):
        SlicedPredictor(Spots(), size=100, merge="nmm")


def test_slices_go_to_the_predictor_together_with_names(tmp_path):
    image = np.zeros((150, 100, 3), np.uint8)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), image)
    spots = Spots()
    sliced = SlicedPredictor(spots, size=80, overlap=0.25)
    assert [len(d) for d in sliced([image, path])] == [0, 0]
    assert len(sliced(path)) == 0
    assert len(sliced([image], names=["b"])[0]) == 0
    corners = ["0,0", "20,0", "0,60", "20,60", "0,70", "20,70"]
    of_file, of_name = ([f"{name}#{corner}" for corner in corners] for name in (path, "b"))
    of_whole = [[str(path)], of_file]
    assert spots.calls == [None, None, *of_whole, *of_whole, ["b"], of_name]
    assert (sliced.class_names, sliced.category_ids) == (spots.class_names, spots.category_ids)
    assert sliced.monitor is spots.monitor
    assert sliced([]) == []


@pytest.mark.parametrize(("size", "overlap"), [(15, 0.2), (64.5, 0.2), (640, 1.0), (640, -0.1)])
def test_wrong_slices_are_refused(size, overlap):
    with pytest.raises(ValueError, match="from 16 on, and the overlap a number from 0"):
        SlicedPredictor(Spots(), size=size, overlap=overlap)


def test_the_share_of_the_smaller_box_decides_within_a_class():
    boxes = [
        [0, 0, 10, 10],
        [0, 0, 5, 8],
        [5, 5, 15, 15],
        [0, 0, 5, 10],
        [6, 0, 26, 10],
        [3, 3, 3, 9],
    ]
    found = Detections(
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.99]),
        torch.tensor([0, 0, 0, 1, 0, 0]),
        torch.zeros(6, dtype=torch.int64),
    )
    # 1 lies in 0; a quarter of 2 and less of 4 does; 3 has another class; 5 is empty.
    assert suppress_parts(found, share=0.5).scores.tolist() == pytest.approx(
        [0.99, 0.9, 0.7, 0.6, 0.5]
    )
    # A quarter of 2, and 0.4 of 0 in 4.
    assert suppress_parts(found, share=0.25).scores.tolist() == pytest.approx([0.99, 0.9, 0.6])
    assert len(suppress_parts(found[:0], share=0.5)) == 0


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """For random weights whose classes differ clearly between regions."""
    torch.manual_seed(0)
    state = build_detector(load_config(INSTANT)).state_dict()
    for name, value in state.items():
        if "box_predictor" in name and name.endswith("weight"):
            value.copy_(torch.randn(value.shape) * 0.2)
    path = tmp_path_factory.mktemp("weights") / "lively.pth"
    torch.save({"model": state}, path)
    return ["MODEL.WEIGHTS", str(path), "CASCADE.TEST_IMS_PER_BATCH", "3"]


@pytest.fixture(scope="module")
def predictor(keys):
    """A real predictor with these weights."""
    cfg = load_config(INSTANT, keys)
    check_config(cfg)
    return Predictor(cfg)


@pytest.mark.parametrize(("size", "overlap"), [(128, 0.2), (100, 0.4)])
def test_it_gives_what_sahi_gives(predictor, size, overlap):
    """By its NMS of the share of the smaller box, in its slices, on the same detector."""
    pytest.importorskip("sahi", exc_type=ImportError)
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction
    from sahi.slicing import get_slice_bboxes

    class Wrapped(DetectionModel):
        def load_model(self):
            self.model = predictor

        def perform_inference(self, image):
            # SAHI has RGB.
            self._original_predictions = [predictor(np.ascontiguousarray(image[:, :, ::-1]))]

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list=None, full_shape_list=None
        ):
            (found,) = self._original_predictions
            # Lists for a batch of slices, a single one for the whole image.
            shift, full = np.array([shift_amount_list, full_shape_list]).reshape(2, 2).tolist()
            columns = (found.boxes.tolist(), found.scores.tolist(), found.classes.tolist())
            self._object_prediction_list_per_image = [
                [
                    ObjectPrediction(
                        bbox=box,
                        category_id=k,
                        category_name=predictor.class_names[k],
                        score=score,
                        shift_amount=shift,
                        full_shape=full,
                    )
                    for box, score, k in zip(*columns, strict=True)
                ]
            ]

    image = make_scene(5, "val", 0, width=300, height=260).image
    found = SlicedPredictor(predictor, size=size, overlap=overlap)(image)
    result = get_sliced_prediction(
        image[:, :, ::-1].copy(),
        Wrapped(confidence_threshold=0.0, device="cpu"),
        slice_height=size,
        slice_width=size,
        overlap_height_ratio=overlap,
        overlap_width_ratio=overlap,
        postprocess_type="NMS",
        postprocess_match_metric="IOS",
        postprocess_match_threshold=0.5,
        verbose=0,
    )
    boxes = get_slice_bboxes(*image.shape[:2], size, size, False, overlap, overlap)
    assert [(x, y) for x, y, *_ in boxes] == slice_corners(*image.shape[:2], size, overlap)
    rows = sorted(
        [*p.bbox.to_xyxy(), p.category.id, p.score.value] for p in result.object_prediction_list
    )
    assert len(rows) > 20
    np.testing.assert_allclose(table(found), rows, atol=2e-3)


@pytest.mark.parametrize("merge", ["nms", "wbf"])
def test_the_command_detects_in_slices(predictor, keys, tmp_path, merge):
    image = make_scene(5, "val", 0, width=300, height=260).image
    cv2.imwrite(str(tmp_path / "a.png"), image)
    begin = ["--config-file", INSTANT, "--input", str(tmp_path / "a.png")]
    begin += ["--output", str(tmp_path / "out"), "--slice", "128", "--overlap", "0.3"]
    assert predict([*begin, "--slice-merge", merge, "--opts", *keys]) == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    expected = SlicedPredictor(predictor, size=128, overlap=0.3, merge=merge)(image).to_coco(1)
    assert len(found) == len(expected) > len(predictor(image))
    for one, other in zip(found, expected, strict=True):
        assert {key: one[key] for key in other} == other


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-file", "a.yaml", "--overlap", "0.3"], "give --slice too"),
        (["--config-file", "a.yaml", "--slice-merge", "wbf"], "give --slice too"),
        (["--onnx", "a.onnx", "--slice", "640"], "--slice needs a configuration"),
        (["--config-file", "a.yaml", "--slice", "15"], "give a whole number of 16 or more"),
    ],
)
def test_wrong_arguments_are_told(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        predict(["--input", "a.png", "--output", "o", *arguments])
    assert words in capsys.readouterr().err
