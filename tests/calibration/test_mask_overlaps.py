"""Masks of replayed exits, against the masks of a real run and pycocotools."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scene_detectors import SceneDetector, batches_of, make_masks

from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.mask_overlaps import LEAST_IOU, MaskedObjects, _reached
from cascade_det.calibration.recording import record_dataset
from cascade_det.calibration.search_space import truncated_cascades
from cascade_det.calibration.trials import ExitTrials
from cascade_det.core import MaskRules
from cascade_det.core.exits import ExitPolicy
from cascade_det.engine.head_flops import mask_flops

CATEGORY_IDS = (3, 7, 9)
SOME = settings(max_examples=40)
POLICIES = {
    "none": {},
    "accepting": {"thresholds": (0.6, 0.6), "prune_thresholds": (0.1, 0.1)},
    "dropping": {"prune_thresholds": (0.5, 0.6), "redundancy_iou": 0.6},
}


def encoded(bitmap):
    rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {**rle, "counts": rle["counts"].decode()}


def make_truth(detector):
    """Objects like every third detection after a stage; crowds, and one object without a mask."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for batch in batches_of(detector, 1):
        (sample,) = batch
        height, width = sample["height"], sample["width"]
        images.append({"id": sample["image_id"], "height": height, "width": width})
        for exits in (*truncated_cascades(3).values(), None):
            detector.set_exits(exits)
            (found,) = detector.detect(batch).detections
            bitmaps = found.paste(height, width).numpy()
            rows = zip(bitmaps, found.boxes.tolist(), found.classes.tolist(), strict=True)
            for bitmap, box, label in list(rows)[::3]:
                bitmap = np.roll(bitmap, rng.integers(-1, 2, 2), (0, 1))
                annotations.append(
                    {
                        "image_id": sample["image_id"],
                        "category_id": CATEGORY_IDS[label],
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": float(bitmap.sum()),
                        "iscrowd": int(rng.random() < 0.2),
                        "segmentation": encoded(bitmap),
                    }
                )
        del annotations[-1]["segmentation"]
        annotations[-1]["iscrowd"] = 0
    categories = [{"id": number, "name": str(number)} for number in CATEGORY_IDS]
    return {"images": images, "annotations": annotations, "categories": categories}


def ap_by_pycocotools(content, detector, policy):
    """AP of masks in percent, and their number, of a run with exits."""
    truth, items = COCO(), []
    for number, item in enumerate(content["annotations"], start=1):
        x, y, w, h = item["bbox"]
        # An object without a mask has no known pixels.
        box = {"segmentation": [[x, y, x, y + h, x + w, y + h, x + w, y]], "iscrowd": 1}
        items.append({**item, "id": number, **({} if "segmentation" in item else box)})
    truth.dataset = {**content, "annotations": items}
    truth.createIndex()
    detector.set_exits(policy)
    rows = []
    for batch in batches_of(detector, 2):
        output = detector.detect(batch)
        for sample, found in zip(batch, output.detections, strict=True):
            for bitmap, mask, score, label in zip(
                found.paste(sample["height"], sample["width"]).numpy(),
                found.masks,
                found.scores.tolist(),
                found.classes.tolist(),
                strict=True,
            ):
                if mask.any():
                    rows.append(
                        {
                            "image_id": sample["image_id"],
                            "category_id": CATEGORY_IDS[label],
                            "segmentation": encoded(bitmap),
                            "score": score,
                        }
                    )
    evaluation = COCOeval(truth, truth.loadRes(rows), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    present = precision[:, :, precision[0, 0] > -1]
    aps = {"AP": present, "AP50": present[0], "AP75": present[5], "AP90": present[8]}
    return {name: 100 * values.mean() for name, values in aps.items()}, len(rows)


class Case:
    """A detector with masks, its objects and its trials."""

    def __init__(self, *, rules=None, heads=1, loss="boxes", **cascade):
        masks = make_masks(heads=heads)
        self.detector = SceneDetector(masks=masks, **cascade).eval()
        self.content = make_truth(self.detector)
        self.detector.cascade.masks = dataclasses.replace(masks, rules=rules or masks.rules)
        self.matcher = ImageMatcher(self.content, CATEGORY_IDS)
        batches = batches_of(self.detector, 3)
        self.recording = record_dataset(self.detector, batches, 4, self.matcher)
        self.trials = ExitTrials(self.recording, self.matcher, score=0.3, loss=loss)

    def check(self, rules):
        policy = ExitPolicy(num_stages=3, **rules)
        trial = self.trials.replay(policy)
        wanted, count = ap_by_pycocotools(self.content, self.detector, policy)
        for name, value in wanted.items():
            assert trial.metrics[f"segm/{name}"] == pytest.approx(value, abs=1e-9), name
        assert trial.masks.sum() == count
        return trial, wanted


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.mark.parametrize("name", POLICIES)
def test_ap_of_masks_is_that_of_a_run(case, name):
    trial, wanted = case.check(POLICIES[name])
    assert 0 < wanted["AP90"] < wanted["AP75"] < wanted["AP50"] < 97
    assert wanted["AP"] > 1
    if name != "none":
        assert wanted["AP"] != pytest.approx(case.trials.full.metrics["segm/AP"])
        assert trial.metrics["AP"] != pytest.approx(trial.metrics["segm/AP"])


@pytest.mark.parametrize(
    "changes",
    [
        {"cls_agnostic": False},
        {"heads": 3},
        {"ensemble": "last_boxes"},
        {"rules": MaskRules(score_threshold=0.5)},
        {"rules": MaskRules(redundancy_iou=0.4)},
    ],
    ids=["boxes of each class", "a head for every stage", "last_boxes", "score", "redundancy"],
)
def test_of_other_cascades(changes):
    case = Case(**changes)
    trial, wanted = case.check(POLICIES["accepting"])
    assert 1 < wanted["AP"] < 97
    detections = sum(map(len, case.trials.detections(None)))
    assert (case.trials.full.masks.sum() < detections) == ("rules" in changes)
    assert set(trial.matched_masks.exit_stages) == {0, 1, 2}


def test_rules_are_tried_without_a_new_recording(case):
    rules = MaskRules(score_threshold=0.5, redundancy_iou=0.6)
    accepting = ExitPolicy(num_stages=3, **POLICIES["accepting"])
    trial = case.trials.replay(accepting, rules)
    with_rules, _ = Case(rules=rules).check(POLICIES["accepting"])
    assert trial.metrics == with_rules.metrics
    assert trial.masks.tolist() == with_rules.masks.tolist()
    assert 0 < trial.masks.sum() < case.trials.replay(accepting).masks.sum()


def test_masks_are_work(case):
    trial = case.trials.replay(ExitPolicy(num_stages=3, **POLICIES["dropping"]))
    flops = case.recording.stage_flops
    of_mask = mask_flops(case.detector.cascade.masks, 6)
    assert case.trials.full.work == 1

    def total(one):
        stages = (one.entered.sum(axis=1) * flops).sum()
        return stages + one.masks.sum() * of_mask

    assert trial.work == pytest.approx(total(trial) / total(case.trials.full))
    assert case.trials.gigaflops(trial) == pytest.approx(total(trial) / 4e9)


def test_some_of_the_images(case):
    some = case.recording.of_images([3, 1])
    trial = ExitTrials(some, case.matcher, score=0.3).replay(None)
    full = case.trials.full
    assert trial.masks.tolist() == full.masks[[1, 3]].tolist()
    kept = np.isin(full.matched_masks.images, [1, 3])
    assert trial.matched_masks.hits.tolist() == full.matched_masks.hits[:, kept].tolist()
    assert 0 < trial.matched_masks.hits.sum() < full.matched_masks.hits.sum()


def test_lost_masks():
    """Objects that the masks of a run no longer find, by hand."""
    case = Case(loss="masks")

    def found(policy):
        case.detector.set_exits(policy)
        sets = []
        for batch in batches_of(case.detector, 1):
            (sample,), (image,) = batch, case.detector.detect(batch).detections
            truth = case.matcher.masks_of(sample["image_id"])
            taken = set()
            for bitmap, score, label in zip(
                image.paste(sample["height"], sample["width"]).numpy(),
                image.scores.tolist(),
                image.classes.tolist(),
                strict=True,
            ):
                ious = coco_mask.iou([encoded(bitmap)], truth.masks, [0] * len(truth.masks))[0]
                free = [
                    g
                    for g in np.flatnonzero((truth.classes == label) & ~truth.crowds).tolist()
                    if g not in taken and ious[g] >= 0.5
                ]
                if score >= 0.3 and free:
                    taken.add(max(free, key=lambda g: ious[g]))
            sets.append(taken)
        return sets

    policy = ExitPolicy(num_stages=3, **POLICIES["dropping"])
    early, full = found(policy), found(None)
    wanted = [len(a - b) / max(len(a), 1) for a, b in zip(full, early, strict=True)]
    lost = case.trials.replay(policy).lost
    assert lost.tolist() == pytest.approx(wanted)
    assert 0 < sum(wanted) < 4
    by_boxes = ExitTrials(case.recording, case.matcher, score=0.3).replay(policy).lost
    assert by_boxes.tolist() != lost.tolist()


SIDE = 24
CORNER = st.floats(0, SIDE, width=32)


@SOME
@given(
    box=st.tuples(CORNER, CORNER, CORNER, CORNER),
    truth=st.tuples(*[st.integers(0, SIDE)] * 4),
    holes=st.integers(0, 2**32 - 1),
    crowd=st.booleans(),
)
def test_no_mask_that_could_match_is_left_out(box, truth, holes, crowd):
    """Whatever its cells: of pixels whose centres are inside the box."""
    rng = np.random.default_rng(holes)
    centres = np.arange(SIDE) + 0.5
    (x1, x2), (y1, y2) = sorted(box[::2]), sorted(box[1::2])
    inside = ((centres >= y1) & (centres <= y2))[:, None] & ((centres >= x1) & (centres <= x2))
    target = np.zeros((SIDE, SIDE), bool)
    (left, right), (top, bottom) = sorted(truth[::2]), sorted(truth[1::2])
    target[top:bottom, left:right] = True
    target &= rng.random((SIDE, SIDE)) > 0.3
    if not target.any():
        return
    objects = MaskedObjects([encoded(target)], np.array([1]), np.array([crowd]))
    best = inside & target  # no mask inside the box has a higher IoU
    ious = coco_mask.iou([encoded(best)], objects.masks, [crowd])
    boxes = np.array([[x1, y1, x2, y2]])
    if best.any() and ious[0, 0] >= LEAST_IOU:
        assert _reached(boxes, np.array([1]), objects).all()
    assert not _reached(boxes, np.array([0]), objects).any()


@pytest.mark.parametrize(
    ("box", "label", "crowd", "reached"),
    [
        ((0, 0, 40, 40), 0, False, True),
        ((0, 0, 7, 40), 0, False, True),  # half of the object and more
        ((0, 0, 3, 40), 0, False, False),
        ((0, 0, 3, 40), 0, True, True),  # a mask inside it may lie in the crowd
        ((20, 20, 40, 40), 0, True, False),
        ((0, 0, 40, 40), 1, False, False),
    ],
)
def test_masks_that_cannot_match_are_not_made(box, label, crowd, reached):
    target = np.zeros((40, 40), bool)
    target[:10, :10] = True
    objects = MaskedObjects([encoded(target)], np.array([0]), np.array([crowd]))
    assert _reached(np.array([box], float), np.array([label]), objects).tolist() == [reached]
