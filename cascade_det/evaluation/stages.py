"""The gain of each stage of the cascade: AP and the IoU of boxes after it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from cascade_det.core.structures import Detections, DetectorOutput, StageOutput
from cascade_det.data.coco_results import EncodedMasks, coco_results, encode_masks
from cascade_det.data.samples import Sample
from cascade_det.evaluation.average_precision import MAX_DETECTIONS, coco_ap, detections_limit
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.ground_truth import (
    admit_images,
    load_ground_truth,
    load_mask_truth,
    merge_seen,
)

MATCH_IOU = 0.5
_STAGE_METRICS = ("AP", "AP50", "AP75", "AP90")
# Image id, detections without their masks, and these masks.
_OfImage = tuple[int, Detections, EncodedMasks]


class StageEvaluator(Evaluator):
    """AP if the cascade stopped after each stage, and mean IoU before and after each stage.

    The IoU is averaged over the proposals whose IoU with an object is ``MATCH_IOU`` or more; crowds
    are not objects. The object with the highest IoU is the target at every stage, so that the
    stages can be compared.

    Args:
        ground_truth: the content of a COCO-format json, see ``load_ground_truth``.
        category_ids: category id in the json of each class of the detector.
        detections_per_image: see ``CocoEvaluator``.
        fast_ap: score by ``faster-coco-eval``.

    Raises:
        DatasetError: the ground truth cannot be used.
    """

    def __init__(
        self,
        *,
        ground_truth: Mapping[str, Any],
        category_ids: Sequence[int],
        detections_per_image: int = MAX_DETECTIONS,
        fast_ap: bool = False,
    ) -> None:
        self._fast_ap = fast_ap
        self._ground_truth = ground_truth
        self._coco_gt = load_ground_truth(ground_truth)
        self._category_ids = tuple(category_ids)
        self._max_detections = detections_limit(detections_per_image)
        self.reset()

    def reset(self) -> None:
        """Discard everything that was processed."""
        self._seen: set[int] = set()
        # Per stage and image.
        self._detections: list[list[_OfImage]] = []
        # By image: the number of matched regions, and their sums of IoU [stage][before, after].
        self._ious: dict[int, tuple[int, list[list[float]]]] = {}

    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Add the stages of a batch, in pixels of the original images.

        Raises:
            DatasetError: an image is not in the json or was processed before.
            ValueError: the output has no stages.
        """
        if not output.stages:
            raise ValueError("no output per stage: run the detector with stages=True")
        admit_images(batch, output.detections, self._coco_gt, self._seen)
        if not self._detections:
            self._detections = [[] for _ in output.stages]
        image_ids = [sample["image_id"] for sample in batch]
        for kept, stage in zip(self._detections, output.stages, strict=True):
            kept += [
                self._of_image(image_id, detections.to("cpu"))
                for image_id, detections in zip(image_ids, stage.detections, strict=True)
            ]
        for index, image_id in enumerate(image_ids):
            self._ious[image_id] = _iou_sums(
                output.stages, index, _boxes_of(self._coco_gt, image_id)
            )

    def state(self) -> dict[str, Any]:
        """``seen`` image ids, ``ious`` by image, and ``detections``, stage by stage."""
        return {"seen": sorted(self._seen), "ious": self._ious, "detections": self._detections}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of all processes.

        Raises:
            DatasetError: two processes saw the same image.
            ValueError: the number of stages differs between two that saw images.
        """
        self._seen = merge_seen(state["seen"] for state in states)
        self._ious = {key: value for state in states for key, value in state["ious"].items()}
        shares = [state["detections"] for state in states if state["seen"]]
        self._detections = [
            list(itertools.chain(*of_stage)) for of_stage in zip(*shares, strict=True)
        ]

    def evaluate(self) -> dict[str, Any]:
        """``{"stages": {"regions": n, "stage0": {...}, ...}}``.

        Each stage has ``AP``, ``AP50``, ``AP75`` and ``AP90`` in percent, for masks the same in
        ``segm``, ``iou_before`` and ``iou_after`` (nan if no region matches an object), averaged
        over ``regions``.
        """
        regions = sum(count for count, _ in self._ious.values())
        metrics: dict[str, Any] = {"regions": regions}
        has_masks = any(masks is not None for found in self._detections for *_, masks in found)
        truths = {"bbox": self._coco_gt}
        if has_masks:
            truths["segm"] = load_mask_truth(self._ground_truth)
        for index, detections in enumerate(self._detections):
            before, after = (
                # Exact: the same for any number of processes and any order of images.
                math.fsum(sums[index][column] for _, sums in self._ious.values())
                for column in (0, 1)
            )
            of_task = self._stage_ap(detections, truths)
            metrics[f"stage{index}"] = {
                **of_task.pop("bbox"),
                **of_task,
                "iou_before": before / (regions or math.nan),
                "iou_after": after / (regions or math.nan),
            }
        return {"stages": metrics}

    def _of_image(self, image_id: int, detections: Detections) -> _OfImage:
        if detections.masks is None:
            return image_id, detections, None
        image = self._coco_gt.imgs[image_id]
        masks = encode_masks(detections, image["height"], image["width"])
        return image_id, replace(detections, masks=None), masks

    def _stage_ap(
        self, of_images: list[_OfImage], truths: Mapping[str, COCO]
    ) -> dict[str, dict[str, float]]:
        """The metrics of each task."""
        if "annotations" not in self._coco_gt.dataset:
            return {task: dict.fromkeys(_STAGE_METRICS, float("nan")) for task in truths}
        results = [
            result
            for image_id, detections, masks in of_images
            for result in coco_results(detections, image_id, self._category_ids, masks)
        ]
        images, most = sorted(self._coco_gt.imgs), self._max_detections
        metrics = {
            task: coco_ap(
                truth, results, images, task=task, max_detections=most, fast=self._fast_ap
            )
            for task, truth in truths.items()
        }
        return {
            task: {name: of_task[name] for name in _STAGE_METRICS}
            for task, of_task in metrics.items()
        }


def _iou_sums(
    stages: Sequence[StageOutput], index: int, targets: Tensor
) -> tuple[int, list[list[float]]]:
    """Number of matched regions of an image, and per stage their summed IoU before and after."""
    regions, matches = _match(_cpu(stages[0].boxes_before[index]), targets)
    rows = torch.arange(len(regions))
    sums = [
        [
            box_iou(_cpu(boxes[index])[regions], targets)[rows, matches].sum().item()
            for boxes in (stage.boxes_before, stage.boxes_after)
        ]
        for stage in stages
    ]
    return len(regions), sums


def _boxes_of(coco_gt: COCO, image_id: int) -> Tensor:
    """The objects ``[G, 4]`` of an image without crowds, XYXY in original pixels."""
    boxes = [item["bbox"] for item in coco_gt.imgToAnns[image_id] if not item["iscrowd"]]
    return box_convert(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), "xywh", "xyxy")


def _match(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[M]`` of the boxes that match a target, and of these targets."""
    if not len(targets):
        nothing = torch.zeros(0, dtype=torch.int64)
        return nothing, nothing
    overlap, target = box_iou(boxes, targets).max(dim=1)
    regions = torch.nonzero(overlap >= MATCH_IOU).flatten()
    return regions, target[regions]


def _cpu(boxes: Tensor) -> Tensor:
    return boxes.detach().cpu().double()
