"""Metrics of label maps: Detectron2's numbers, a naive count, and shares of several processes."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.errors import DatasetError
from cascade_det.evaluation.semantic import ConfusionMatrix, SemanticEvaluator, semantic_metrics
from cascade_det.segmentation.output import SegmenterOutput, SegmenterStats

NAMES = ["sky", "road", "car", "tree"]


def truth_of(sample):
    return sample["truth"]


def evaluator(**options):
    return SemanticEvaluator(class_names=NAMES, truth_of=truth_of, **options)


def random_images(seed, count=3, *, used=4):
    """Samples and scores; the truth has ignored pixels and classes below ``used``."""
    rng = np.random.default_rng(seed)
    samples, outputs = [], []
    for index in range(count):
        size = tuple(rng.integers(2, 9, 2))
        truth = rng.integers(0, used, size)
        truth[rng.random(size) < 0.2] = 255
        samples.append({"file_name": f"{index}.png", "truth": truth})
        scores = rng.standard_normal((4, *size)).astype(np.float32)
        outputs.append(torch.from_numpy(scores))
    return samples, outputs


def segmented(*scores):
    return SegmenterOutput(list(scores), SegmenterStats())


def processed(samples, outputs):
    whole = evaluator()
    whole.process(samples, segmented(*outputs))
    return whole


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("used", [4, 2, 1])
def test_same_numbers_as_detectron2(used, monkeypatch):
    theirs = pytest.importorskip("detectron2.evaluation", exc_type=ImportError)
    data = pytest.importorskip("detectron2.data", exc_type=ImportError)
    samples, outputs = random_images(used, used=used)
    files = [{"file_name": s["file_name"], "sem_seg_file_name": s["file_name"]} for s in samples]
    data.DatasetCatalog.register("ours_to_compare", lambda: files)
    metadata = data.MetadataCatalog.get("ours_to_compare")
    metadata.set(stuff_classes=NAMES, ignore_label=255)
    by_name = {sample["file_name"]: sample["truth"] for sample in samples}
    try:
        reference = theirs.SemSegEvaluator(
            "ours_to_compare",
            distributed=False,
            sem_seg_loading_fn=lambda name, dtype: by_name[name].astype(dtype),
        )
    finally:
        data.DatasetCatalog.remove("ours_to_compare")
        data.MetadataCatalog.remove("ours_to_compare")
    reference.reset()
    reference.process(samples, [{"sem_seg": scores} for scores in outputs])
    expected = reference.evaluate()["sem_seg"]
    # Boundary metrics are Detectron2's alone; the order of the rest is the same.
    expected = {name: value for name, value in expected.items() if "oundary" not in name}
    expected = {name: value for name, value in expected.items() if not name.startswith("min(")}
    ours = processed(samples, outputs).evaluate()["sem_seg"]
    assert list(ours) == list(expected)
    np.testing.assert_allclose(list(ours.values()), list(expected.values()), rtol=1e-12)


def test_numbers_by_hand():
    # True class in rows. Class 2 has no truth, but one pixel of class 1 was taken for it.
    counts = np.array([[3, 1, 0], [0, 4, 2], [0, 0, 0]])
    metrics = semantic_metrics(counts, ["a", "b", "c"])
    assert metrics["IoU-a"] == pytest.approx(100 * 3 / 4)
    assert metrics["IoU-b"] == pytest.approx(100 * 4 / 7)  # union: 6 true, 5 predicted, 4 both
    assert math.isnan(metrics["IoU-c"])
    assert math.isnan(metrics["ACC-c"])
    assert metrics["mIoU"] == pytest.approx(100 * (3 / 4 + 4 / 7) / 2)
    assert metrics["fwIoU"] == pytest.approx(100 * (0.4 * 3 / 4 + 0.6 * 4 / 7))
    assert metrics["ACC-a"] == pytest.approx(75)
    assert metrics["mACC"] == pytest.approx(100 * (3 / 4 + 4 / 6) / 2)
    assert metrics["pACC"] == pytest.approx(70)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([np.uint8, np.int16, np.int64]))
def test_counts_are_those_of_a_loop(seed, dtype):
    rng = np.random.default_rng(seed)
    prediction, truth = rng.integers(0, 4, (2, 5, 7)).astype(dtype)
    truth[rng.random((5, 7)) < 0.3] = 100
    expected = np.zeros((4, 4), int)
    for true, predicted in zip(truth.flat, prediction.flat, strict=True):
        if true != 100:
            expected[true, predicted] += 1
    confusion = ConfusionMatrix(4, ignore_label=100)
    confusion.update(prediction, truth)
    np.testing.assert_array_equal(confusion.counts, expected)
    confusion.update(prediction, truth)
    np.testing.assert_array_equal(confusion.counts, 2 * expected)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), owners=st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_shares_give_the_metrics_of_the_whole(seed, owners):
    samples, outputs = random_images(seed, 5)
    parts = [evaluator() for _ in range(3)]
    for owner, sample, output in zip(owners, samples, outputs, strict=True):
        parts[owner].process([sample], segmented(output))
    states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
    parts[1].merge(states)
    assert parts[1].evaluate() == processed(samples, outputs).evaluate()


def test_a_perfect_prediction():
    samples, _ = random_images(3)
    one_hot = [np.eye(4)[np.minimum(s["truth"], 3)].transpose(2, 0, 1) for s in samples]
    outputs = [torch.from_numpy(scores) for scores in one_hot]
    metrics = processed(samples, outputs).evaluate()["sem_seg"]
    assert set(metrics.values()) == {100.0}


def test_nothing_to_score_is_nan():
    metrics = evaluator().evaluate()["sem_seg"]
    assert all(math.isnan(value) for value in metrics.values())


def test_a_truth_that_cannot_be_is_named():
    scores = segmented(torch.zeros(4, 2, 3))
    sample = {"file_name": "a.jpg", "sem_seg_file_name": "a.png", "truth": np.full((2, 3), 7)}
    with pytest.raises(DatasetError, match=r"a\.png: the truth has label 7; known are 0 to 3"):
        evaluator().process([sample], scores)
    with pytest.raises(DatasetError, match=r"b\.jpg: .* 2 x 3 pixels .*, the truth has 3 x 2"):
        evaluator().process([{"file_name": "b.jpg", "truth": np.zeros((3, 2), int)}], scores)
