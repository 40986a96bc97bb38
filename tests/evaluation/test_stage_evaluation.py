"""AP and mean IoU per stage against constructed outputs and a loop over regions."""

from __future__ import annotations

import math

import pytest
import torch
from naive_exits import iou

from cascade_det.core.structures import StageOutput
from cascade_det.errors import DatasetError
from cascade_det.evaluation import StageEvaluator

CATEGORY_IDS = (3, 7)
BOX = (0, 0, 100, 100)


def no_boxes(images=1):
    return [torch.zeros(0, 4) for _ in range(images)]


def test_ap_of_every_stage_is_that_of_its_own_detections(coco_content, detections, detector_output):
    # IoU 0.52, 0.72 and 1: one, five and ten of the thresholds 0.50, 0.55, ..., 0.95.
    content = coco_content([(1, 3, BOX)], image_ids=(1,))
    stages = [
        StageOutput([detections(((0, 0, width, 100), 0.9, 0))], no_boxes(), no_boxes())
        for width in (52, 72, 100)
    ]
    evaluator = StageEvaluator(ground_truth=content, category_ids=CATEGORY_IDS)
    evaluator.process([{"image_id": 1}], detector_output([detections()], stages=stages))
    metrics = evaluator.evaluate()["stages"]
    assert [metrics[f"stage{k}"]["AP"] for k in range(3)] == pytest.approx([10, 50, 100])
    assert [metrics[f"stage{k}"]["AP50"] for k in range(3)] == pytest.approx([100, 100, 100])
    for name in ("AP75", "AP90"):
        assert [metrics[f"stage{k}"][name] for k in range(3)] == pytest.approx([0, 0, 100])


def random_boxes(generator, count):
    corner = torch.rand(count, 2, generator=generator) * 200
    size = 20 + torch.rand(count, 2, generator=generator) * 80
    return torch.cat([corner, corner + size], dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_mean_iou_equals_a_loop_over_the_regions(coco_content, detections, detector_output, seed):
    generator = torch.Generator().manual_seed(seed)
    image_ids = (1, 2, 3)
    truth = {1: random_boxes(generator, 3), 2: random_boxes(generator, 4), 3: torch.zeros(0, 4)}
    # In image 2 the last box is a crowd: it must not be a target.
    objects = [
        (i, 3, [*box[:2], box[2] - box[0], box[3] - box[1]], int(i == 2 and row == 3))
        for i in image_ids
        for row, box in enumerate(truth[i].tolist())
    ]
    content = coco_content(objects, image_ids=image_ids)
    chain = [[], [], []]  # Boxes before stage 0, between the stages, and after stage 1.
    for image_id in image_ids:
        boxes = torch.cat([truth[image_id]] * 4 + [random_boxes(generator, 5)])
        for boxes_of_images in chain:
            boxes = boxes + torch.randn(boxes.shape, generator=generator) * 5
            boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            boxes_of_images.append(boxes)

    found = [detections() for _ in image_ids]
    stages = [StageOutput(found, chain[k], chain[k + 1]) for k in range(2)]
    evaluator = StageEvaluator(ground_truth=content, category_ids=CATEGORY_IDS)
    # One batch of one image and one of two.
    for part in (slice(0, 1), slice(1, 3)):
        evaluator.process(
            [{"image_id": image_id} for image_id in image_ids[part]],
            detector_output(
                found[part],
                stages=[
                    StageOutput(s.detections[part], s.boxes_before[part], s.boxes_after[part])
                    for s in stages
                ],
            ),
        )
    metrics = evaluator.evaluate()["stages"]

    sums, count = [0.0] * 3, 0
    for index, image_id in enumerate(image_ids):
        targets = truth[image_id].tolist()[: 3 if image_id == 2 else None]
        for row, entering in enumerate(chain[0][index].tolist()):
            best = max(targets, key=lambda target: iou(entering, target), default=None)
            if best is None or iou(entering, best) < 0.5:
                continue
            count += 1
            for step in range(3):
                sums[step] += iou(chain[step][index][row].tolist(), best)
    assert 5 < count < len(torch.cat(chain[0]))
    assert metrics["regions"] == count
    expected = [total / count for total in sums]
    ours = [metrics["stage0"]["iou_before"], metrics["stage0"]["iou_after"]]
    ours += [metrics["stage1"]["iou_before"], metrics["stage1"]["iou_after"]]
    assert ours == pytest.approx([expected[0], expected[1], expected[1], expected[2]], abs=1e-6)


def test_a_region_keeps_its_first_target(coco_content, detections, detector_output):
    # The region starts on the left object and is moved onto the right one: that is a loss.
    content = coco_content([(1, 3, (0, 0, 100, 100)), (1, 3, (200, 0, 100, 100))], image_ids=(1,))
    left, right = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[200.0, 0, 300, 100]])
    stages = [
        StageOutput([detections()], [left], [right]),
        StageOutput([detections()], [right], [left]),
    ]
    evaluator = StageEvaluator(ground_truth=content, category_ids=CATEGORY_IDS)
    evaluator.process([{"image_id": 1}], detector_output([detections()], stages=stages))
    metrics = evaluator.evaluate()["stages"]
    assert (metrics["stage0"]["iou_before"], metrics["stage0"]["iou_after"]) == (1, 0)
    assert (metrics["stage1"]["iou_before"], metrics["stage1"]["iou_after"]) == (0, 1)


def test_no_matching_region_gives_nan(coco_content, detections, detector_output):
    content = coco_content([(1, 3, BOX)], image_ids=(1,))
    far = [torch.tensor([[300.0, 200, 320, 220]])]
    stages = [StageOutput([detections()], far, far)]
    evaluator = StageEvaluator(ground_truth=content, category_ids=CATEGORY_IDS)
    evaluator.process([{"image_id": 1}], detector_output([detections()], stages=stages))
    metrics = evaluator.evaluate()["stages"]
    assert metrics["regions"] == 0
    assert math.isnan(metrics["stage0"]["iou_before"])
    assert math.isnan(metrics["stage0"]["iou_after"])
    assert metrics["stage0"]["AP"] == 0


def test_file_without_annotations_gives_nan(coco_content, detections, detector_output):
    content = coco_content([], image_ids=(1,))
    del content["annotations"]
    evaluator = StageEvaluator(ground_truth=content, category_ids=CATEGORY_IDS)
    stages = [StageOutput([detections((BOX, 0.9, 0))], no_boxes(), no_boxes())]
    evaluator.process([{"image_id": 1}], detector_output([detections()], stages=stages))
    assert math.isnan(evaluator.evaluate()["stages"]["stage0"]["AP"])


def test_images_are_checked_and_reset_forgets_them(coco_content, detections, detector_output):
    evaluator = StageEvaluator(ground_truth=coco_content([(1, 3, BOX)]), category_ids=CATEGORY_IDS)
    stages = [StageOutput([detections()], no_boxes(), no_boxes())]
    output = detector_output([detections()], stages=stages)
    evaluator.process([{"image_id": 1}], output)
    with pytest.raises(DatasetError, match="twice"):
        evaluator.process([{"image_id": 1}], output)
    with pytest.raises(DatasetError, match="not in the annotation file"):
        evaluator.process([{"image_id": 5}], output)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], output)


def test_output_without_stages_is_refused(coco_content, detections, detector_output):
    evaluator = StageEvaluator(ground_truth=coco_content([]), category_ids=CATEGORY_IDS)
    with pytest.raises(ValueError, match="stages=True"):
        evaluator.process([{"image_id": 1}], detector_output([detections()]))
