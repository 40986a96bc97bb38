"""Soft-NMS and weighted box fusion against loops over boxes, and against ensemble-boxes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_cascade import iou
from small_cascades import make_cascade, make_scene, random_boxes, reported

from cascade_det.core import Detections
from cascade_det.core.postprocess import Selection, select_detections
from cascade_det.core.suppression import fuse, soften

SIZE = (60, 80)
seeds = st.integers(0, 10**6)


def candidates_of(seed, count, num_classes=2):
    """Random boxes, each with a near copy; in random order."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes((count + 1) // 2, SIZE, generator=generator)
    near = (boxes + 3 * torch.randn(boxes.shape, generator=generator)).clamp(0, 60)
    near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 2)
    boxes = torch.cat([boxes, near])[torch.randperm(2 * len(boxes), generator=generator)[:count]]
    return Detections(
        boxes,
        0.02 + 0.97 * torch.rand(count, generator=generator),
        torch.randint(num_classes, (count,), generator=generator),
        torch.randint(3, (count,), generator=generator),
    )


def rows_of(found):
    """(score, class, exit stage, box) of each detection."""
    fields = (found.scores, found.classes, found.exit_stages, found.boxes)
    return list(zip(*(field.tolist() for field in fields), strict=True))


def assert_same(found, wanted):
    rows = rows_of(found)
    assert [row[1:3] for row in rows] == [row[1:3] for row in wanted]
    assert [row[0] for row in rows] == pytest.approx([row[0] for row in wanted], abs=1e-5)
    for row, other in zip(rows, wanted, strict=True):
        assert row[3] == pytest.approx(other[3], abs=1e-3)


def naive_soft_nms(found, *, score_thresh, threshold, sigma):
    """Class by class, as the paper's figure 2 has it."""
    kept = []
    for label in set(found.classes.tolist()):
        left = [list(row) for row in rows_of(found) if row[1] == label]
        while left:
            best = max(left)
            left.remove(best)
            kept.append(tuple(best))
            for row in left:
                overlap = iou(best[3], row[3])
                if sigma is not None:
                    row[0] *= math.exp(-(overlap**2) / sigma)
                elif overlap >= threshold:
                    row[0] *= 1 - overlap
    return sorted((row for row in kept if row[0] > score_thresh), reverse=True)


@given(
    seed=seeds,
    count=st.integers(0, 30),
    score_thresh=st.sampled_from([0.0, 0.1]),
    threshold=st.sampled_from([0.2, 0.5]),
    sigma=st.sampled_from([None, 0.3, 0.5]),
    most=st.sampled_from([-1, 5]),
)
def test_soft_nms_equals_the_papers_loop(seed, count, score_thresh, threshold, sigma, most):
    found = candidates_of(seed, count)
    wanted = naive_soft_nms(found, score_thresh=score_thresh, threshold=threshold, sigma=sigma)
    got = soften(found, score_thresh=score_thresh, iou=threshold, sigma=sigma, most=most)
    assert_same(got, wanted if most < 0 else wanted[:most])


def test_soft_nms_by_hand():
    """IoU of 1/3 and 1 with the best box; the third loses all, the fourth is of another class."""
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [0, 0, 2, 2], [0, 0, 2, 2]])
    scores, classes = torch.tensor([0.9, 0.6, 0.5, 0.3]), torch.tensor([0, 0, 0, 1])
    found = Detections(boxes, scores, classes, torch.zeros_like(classes))
    linear = soften(found, score_thresh=0.0, iou=0.3, sigma=None, most=10)
    assert linear.scores.tolist() == pytest.approx([0.9, 0.4, 0.3])
    gaussian = soften(found, score_thresh=0.0, iou=0.3, sigma=0.5, most=10)
    once = 0.6 * math.exp(-2 / 9)
    twice = 0.5 * math.exp(-2) * math.exp(-2 / 9)
    assert gaussian.scores.tolist() == pytest.approx([0.9, once, 0.3, twice])


def test_lowered_scores_keep_their_gradient():
    found = candidates_of(3, 12)
    found.scores.requires_grad_()
    soften(found, score_thresh=0.0, iou=0.3, sigma=0.5, most=6).scores.sum().backward()
    assert found.scores.grad.count_nonzero() == 6
    assert (found.scores.grad <= 1).all()


def naive_fusion(found, *, score_thresh, threshold, sources):
    clusters = []
    for row in sorted(rows_of(found), reverse=True):
        fused = [mean_box(own) if own[0][1] == row[1] else None for own in clusters]
        overlaps = [-1.0 if box is None else iou(box, row[3]) for box in fused]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if best >= 0 and overlaps[best] > threshold:
            clusters[best].append(row)
        else:
            clusters.append([row])
    merged = []
    for own in clusters:
        score = sum(row[0] for row in own) / len(own) * min(len(own), sources) / sources
        merged.append((score, own[0][1], own[0][2], mean_box(own)))
    return sorted((row for row in merged if row[0] > score_thresh), reverse=True)


def mean_box(rows):
    weights = np.array([row[0] for row in rows])
    return (weights @ np.array([row[3] for row in rows]) / weights.sum()).tolist()


@given(
    seed=seeds,
    count=st.integers(0, 30),
    score_thresh=st.sampled_from([0.0, 0.2]),
    threshold=st.sampled_from([0.3, 0.55]),
    sources=st.integers(1, 4),
    most=st.sampled_from([-1, 5]),
)
def test_fusion_equals_a_loop_over_clusters(seed, count, score_thresh, threshold, sources, most):
    found = candidates_of(seed, count)
    wanted = naive_fusion(found, score_thresh=score_thresh, threshold=threshold, sources=sources)
    arguments = {"score_thresh": score_thresh, "iou": threshold, "sources": sources}
    assert_same(fuse(found, **arguments, most=most), wanted if most < 0 else wanted[:most])


@pytest.mark.parametrize("seed", range(5))
def test_fusion_equals_ensemble_boxes(seed):
    """The authors' own code, of three sources."""
    ensemble = pytest.importorskip("ensemble_boxes")
    found, generator = candidates_of(seed, 60), np.random.default_rng(seed)
    source = generator.integers(0, 3, len(found))
    parts = [[*np.flatnonzero(source == index)] for index in range(3)]
    boxes, scores, labels = ensemble.weighted_boxes_fusion(
        [(found.boxes[rows] / 80).tolist() for rows in parts],
        [found.scores[rows].tolist() for rows in parts],
        [found.classes[rows].tolist() for rows in parts],
        iou_thr=0.55,
        skip_box_thr=0.0,
    )
    ours = fuse(found, score_thresh=0.0, iou=0.55, sources=3, most=-1)
    np.testing.assert_allclose(ours.scores, scores, atol=1e-5)
    np.testing.assert_array_equal(ours.classes, labels)
    np.testing.assert_allclose(ours.boxes, boxes * 80, atol=1e-3)


@pytest.mark.parametrize("suppression", ["soft_linear", "soft_gaussian", "wbf"])
def test_each_image_of_a_batch_is_on_its_own(suppression):
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(40, SIZE, generator=generator)
    probs = torch.softmax(2 * torch.randn(40, 4, generator=generator), dim=1)
    images, stages = torch.arange(40) % 2, torch.arange(40) % 3
    selection = Selection(0.05, 0.2, 12, suppression)
    together = select_detections([reported(boxes, probs, images, stages)], 2, selection)
    plain = select_detections([reported(boxes, probs, images, stages)], 2, Selection(0.05, 0.2, 12))
    for image, (found, by_nms) in enumerate(zip(together, plain, strict=True)):
        own = images == image
        parts = (boxes[own], probs[own], torch.zeros(20, dtype=torch.int64), stages[own])
        (alone,) = select_detections([reported(*parts)], 1, selection)
        assert rows_of(found) == rows_of(alone)
        assert len(found) == 12
        assert (found.scores.diff() <= 0).all()
        assert rows_of(found) != rows_of(by_nms)


def test_a_cascade_takes_its_suppression():
    scene = make_scene()
    inputs = scene.features, scene.proposals, scene.image_sizes
    soft = make_cascade(suppression="soft_gaussian", suppression_sigma=0.3)
    assert (soft.selection.suppression, soft.selection.sigma) == ("soft_gaussian", 0.3)
    found, by_nms = (cascade.detect(*inputs)[0] for cascade in (soft, make_cascade()))
    # Nothing lowers the score of the best.
    for ours, theirs in zip(found, by_nms, strict=True):
        assert ours.scores[0] == theirs.scores[0]
        assert len(ours) > len(theirs)
    with pytest.raises(ValueError, match="unknown suppression 'hard'"):
        make_cascade(suppression="hard")


@pytest.mark.parametrize("suppression", ["soft_linear", "wbf"])
def test_tracing_is_refused(suppression):
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(6, SIZE, generator=generator)
    probs = torch.softmax(torch.randn(6, 4, generator=generator), dim=1)
    zeros = torch.zeros(6, dtype=torch.int64)

    def select(boxes):
        selection = Selection(0.05, 0.2, 12, suppression)
        return select_detections([reported(boxes, probs, zeros, zeros)], 1, selection)[0].boxes

    with pytest.raises(ValueError, match=r"MODEL\.CASCADE\.SUPPRESSION to nms"):
        torch.jit.trace(select, boxes)
