"""AP of masks against pycocotools called directly, and what has no mask."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from noisy_detections import ROWS, mean_precision
from noisy_masks import bitmaps, ellipse, mask_evaluation, masked_case, rows_of
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import binary_erosion

from cascade_det.core.structures import CascadeStats, DetectorOutput, StageOutput
from cascade_det.evaluation import CocoEvaluator, StageEvaluator
from cascade_det.evaluation.average_precision import has_fast_cocoeval

BOX = (20, 30, 60, 40)


def category_ids(content):
    return [category["id"] for category in content["categories"]]


def fed(content, found_in, **options):
    """An evaluator that was given the detections of each image by its id."""
    evaluator = CocoEvaluator(ground_truth=content, category_ids=category_ids(content), **options)
    for image_id, found in found_in.items():
        evaluator.process([{"image_id": image_id}], DetectorOutput([found], CascadeStats([], [])))
    return evaluator


def metrics_of(evaluation, content):
    wanted = {name: mean_precision(evaluation, row) for name, row in ROWS.items()}
    for area, name in enumerate(("APs", "APm", "APl"), start=1):
        wanted[name] = mean_precision(evaluation, area=area)
    for category, item in enumerate(content["categories"]):
        wanted[f"AP-{item['name']}"] = mean_precision(evaluation, category=category)
    return wanted


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_those_of_pycocotools(seed):
    content, found_in = masked_case(seed, num_images=6)
    before = copy.deepcopy(content)
    results = fed(content, found_in).evaluate()
    evaluation = mask_evaluation(content, rows_of(found_in, category_ids(content)))
    wanted = metrics_of(evaluation, content)
    assert list(results["segm"]) == list(wanted)
    assert results["segm"] == pytest.approx(wanted, abs=1e-9, nan_ok=True)
    assert 1 < results["segm"]["AP"] < 99
    assert results["segm"]["AP"] != results["bbox"]["AP"]
    assert not any("no mask" in note for note in results["notes"])
    assert content == before


def test_boxes_have_the_ap_that_they_have_without_masks():
    content, found_in = masked_case(0, num_images=6)
    with_masks = fed(content, found_in).evaluate()
    without = fed(
        content, {key: replace(found, masks=None) for key, found in found_in.items()}
    ).evaluate()
    assert with_masks["bbox"] == pytest.approx(without["bbox"], nan_ok=True)
    assert "segm" not in without
    scores = [name for name in without["analysis"] if name != "worst_images"]
    for name in scores:
        assert str(with_masks["analysis"][name]) == str(without["analysis"][name]), name


def disc_masks(count):
    """Masks that fill the ellipse in their box, ``[count, 28, 28]``."""
    at = (torch.arange(28) + 0.5) / 14 - 1
    return (at[:, None] ** 2 + at**2 <= 1).float().expand(count, 28, 28).clone()


def ground_truth(coco_content, *objects):
    content = coco_content([(1, 3, box) for box in objects], image_ids=(1,))
    for annotation in content["annotations"]:
        annotation["segmentation"] = [ellipse(annotation["bbox"])]
        del annotation["area"]
    return content


OTHER = (150, 100, 110, 120)


def test_an_object_without_a_mask_is_neither_missed_nor_are_its_detections_false(
    coco_content, detections
):
    content = ground_truth(coco_content, BOX, OTHER)
    found = detections((BOX, 0.9, 0), (OTHER, 0.8, 0))
    found.masks = disc_masks(2)
    whole = fed(content, {1: found}).evaluate()
    assert whole["segm"]["AP50"] == pytest.approx(100)
    for nothing in ([], None):
        content["annotations"][0]["segmentation"] = nothing
        results = fed(content, {1: found}).evaluate()
        assert results["segm"] == pytest.approx({**whole["segm"], "APm": math.nan}, nan_ok=True)
        assert any("1 of 2 annotations have no mask" in note for note in results["notes"])
        # Boxes count as ever.
        assert results["bbox"]["APm"] == pytest.approx(100)
    # The other object, missed, is missed.
    assert fed(content, {1: found[:1]}).evaluate()["segm"]["AP"] == 0
    for annotation in content["annotations"]:
        annotation.pop("segmentation")
    results = fed(content, {1: found}).evaluate()
    assert math.isnan(results["segm"]["AP"])
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_a_detection_without_a_mask_does_not_count_for_masks(coco_content, detections):
    content = ground_truth(coco_content, BOX, OTHER)
    # A false positive with the best score, and both objects.
    found = detections(((300, 200, 50, 50), 0.99, 0), (BOX, 0.9, 0), (OTHER, 0.8, 0))
    found.masks = disc_masks(3)
    found.masks[0] = 0
    results = fed(content, {1: found}).evaluate()
    assert results["segm"]["AP50"] == pytest.approx(100)
    assert results["bbox"]["AP50"] < 80
    note = "1 of 3 detections have no mask, and do not count for mask AP."
    assert note in results["notes"]
    found.masks[2] = 0
    assert fed(content, {1: found}).evaluate()["segm"]["AP50"] == pytest.approx(100 * 51 / 101)


def test_sizes_are_those_of_masks_where_the_json_has_no_area(coco_content, detections):
    # 35 x 35 is medium-sized, and the ellipse inside it, of 962 pixels, small.
    box = (10, 10, 35, 35)
    content = ground_truth(coco_content, box)
    found = detections((box, 0.9, 0))
    found.masks = disc_masks(1)
    segm = fed(content, {1: found}).evaluate()["segm"]
    assert segm["APs"] == pytest.approx(segm["AP"])
    assert math.isnan(segm["APm"])


def test_a_detector_that_finds_nothing_has_a_mask_ap_of_0(coco_content, detections):
    nothing = detections()
    nothing.masks = torch.zeros(0, 28, 28)
    results = fed(ground_truth(coco_content, BOX), {1: nothing}).evaluate()
    assert results["segm"]["AP"] == results["bbox"]["AP"] == 0


def test_processes_share_the_images_of_a_detector_with_masks():
    content, found_in = masked_case(1, num_images=6)
    whole = fed(content, found_in).evaluate()
    images = list(found_in)
    parts = [
        fed(content, {key: found_in[key] for key in keys}).state()
        for keys in (images[:2], images[2:], [])
    ]
    merged = fed(content, {})
    merged.merge(parts)
    assert merged.evaluate()["segm"] == pytest.approx(whole["segm"], nan_ok=True)


def test_written_file_holds_the_masks(tmp_path):
    content, found_in = masked_case(2, num_images=3)
    for found in found_in.values():
        if len(found):
            found.masks[0] = 0
    fed(content, found_in, output_dir=tmp_path).evaluate()
    rows = json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())
    assert len(rows) == sum(map(len, found_in.values()))
    for image_id, found in found_in.items():
        of_image = [row for row in rows if row["image_id"] == image_id]
        for row, bitmap in zip(of_image, bitmaps(found), strict=True):
            assert ("segmentation" in row) == bool(bitmap.any())
            if "segmentation" in row:
                np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]), bitmap)


def test_worst_images_have_masks_to_draw():
    content, found_in = masked_case(3, num_images=6)
    worst = fed(content, found_in).evaluate()["analysis"]["worst_images"]
    json.dumps(worst)
    kinds = set()
    for image in worst:
        for box in image["boxes"]:
            kinds.add(box["kind"])
            x, y, width, height = coco_mask.toBbox(box["segmentation"])
            # A mask lies in its box.
            low = np.array(box["bbox"][:2])
            high = low + box["bbox"][2:]
            assert (np.array([x, y]) > low - 2).all()
            assert (np.array([x + width, y + height]) < high + 2).all()
    assert kinds == {"found", "false positive", "missed"}


def test_every_stage_has_the_mask_ap_of_its_own_detections():
    content, found_in = masked_case(0, num_images=5)
    evaluator = StageEvaluator(ground_truth=content, category_ids=category_ids(content))
    stages = {}
    for image_id, found in found_in.items():
        # Later stages have better masks.
        stages[image_id] = [replace(found, masks=found.masks**power) for power in (4, 1)]
        none = [found.boxes[:0]]
        evaluator.process(
            [{"image_id": image_id}],
            DetectorOutput(
                [found],
                CascadeStats([], []),
                [StageOutput([of_stage], none, none) for of_stage in stages[image_id]],
            ),
        )
    state = evaluator.state()["detections"]
    assert all(found.masks is None for of_stage in state for _, found, _ in of_stage)
    metrics = evaluator.evaluate()["stages"]
    for index in range(2):
        alone = {key: of_image[index] for key, of_image in stages.items()}
        wanted = fed(content, alone).evaluate()
        got = metrics[f"stage{index}"]
        for name in ROWS:
            assert got["segm"][name] == pytest.approx(wanted["segm"][name]), name
            assert got[name] == pytest.approx(wanted["bbox"][name]), name
    assert metrics["stage0"]["segm"]["AP"] < metrics["stage1"]["segm"]["AP"]


class BoundaryEvaluation(COCOeval):
    """Boundary IoU (arXiv 2103.16562) pixel by pixel: the lower one of mask and boundary IoU."""

    def computeIoU(self, image_id, category_id):
        ious = super().computeIoU(image_id, category_id)
        if not len(ious):
            return ious
        objects = self._gts[image_id, category_id]
        found = sorted(self._dts[image_id, category_id], key=lambda item: -item["score"])
        ious = ious.copy()
        for row, detection in enumerate(found):
            for column, item in enumerate(objects):
                if not item["iscrowd"]:
                    rims = [rim(x["segmentation"]) for x in (detection, item)]
                    both, either = rims[0] & rims[1], rims[0] | rims[1]
                    iou = both.sum() / either.sum() if either.any() else 0
                    ious[row, column] = min(ious[row, column], iou)
        return ious


def rim(rle):
    bitmap = coco_mask.decode(rle).astype(bool)
    width = max(round(0.02 * math.hypot(*bitmap.shape)), 1)
    inner = binary_erosion(bitmap, np.ones((3, 3)), iterations=width, border_value=0)
    return bitmap & ~inner


def test_boundary_ap():
    pytest.importorskip("faster_coco_eval")
    content, found_in = masked_case(0, num_images=4)
    rows = rows_of(found_in, category_ids(content))
    wanted = metrics_of(mask_evaluation(content, rows, BoundaryEvaluation), content)
    results = fed(content, found_in).evaluate()
    assert results["boundary"] == pytest.approx(wanted, abs=1e-6, nan_ok=True)
    assert results["boundary"]["AP"] < results["segm"]["AP"]


def test_no_boundary_ap_without_its_library(monkeypatch):
    monkeypatch.setattr("cascade_det.evaluation.average_precision.find_spec", lambda _: None)
    assert not has_fast_cocoeval()
    content, found_in = masked_case(0, num_images=2)
    results = fed(content, found_in).evaluate()
    assert "segm" in results
    assert "boundary" not in results
