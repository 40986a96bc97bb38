"""Pictures of training samples: images after augmentation, with their objects or labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.coco import CocoDataset
from cascade_det.data.loader import build_train_loader
from cascade_det.data.samples import Batch, Sample
from cascade_det.data.semantic import SemanticDataset, build_semantic_train_loader
from cascade_det.data.semantic.reading import visible_pixels
from cascade_det.data.transforms import Pixels
from cascade_det.masks.polygons import draw_polygons
from cascade_det.masks.truth import ObjectMask
from cascade_det.report.colors import class_color
from cascade_det.report.drawing import draw_boxes
from cascade_det.report.label_drawing import draw_labels
from cascade_det.report.mask_drawing import draw_masks


def draw_training_samples(
    cfg: CfgNode, datasets: Sequence[CocoDataset] | Sequence[SemanticDataset]
) -> Iterator[tuple[str, Pixels]]:
    """Draw the samples of a training run in their order, without end.

    Args:
        cfg: a checked configuration. A ``SEED`` below 0, random in a run, counts as 0.
        datasets: of ``DATASETS.TRAIN``.

    Yields:
        A name, made of the sample's number and image id, and the picture, uint8 ``[H, W, 3]`` BGR.
    """
    semantic = [dataset for dataset in datasets if isinstance(dataset, SemanticDataset)]
    if semantic:
        loader, draw = _semantic_loader(cfg, semantic), partial(_draw_labels, dataset=semantic[0])
    else:
        coco = [dataset for dataset in datasets if isinstance(dataset, CocoDataset)]
        loader, draw = _loader(cfg, coco), partial(_draw, class_names=coco[0].class_names)
    for number, sample in enumerate(itertools.chain.from_iterable(loader)):
        pixels = _pixels(sample["image"], cfg.INPUT.FORMAT)
        yield f"{number:04d}_image{sample['image_id']}", draw(sample, pixels)


def _loader(cfg: CfgNode, datasets: Sequence[CocoDataset]) -> Iterable[Batch]:
    return build_train_loader(
        datasets,
        **config.input_arguments(cfg, train=True),
        **_in_this_process(config.train_loader_arguments(cfg)),
        on_bad_data=cfg.CASCADE.ON_BAD_DATA,
    )


def _semantic_loader(cfg: CfgNode, datasets: Sequence[SemanticDataset]) -> Iterable[Batch]:
    return build_semantic_train_loader(
        datasets,
        **config.semantic_input_arguments(cfg, train=True),
        **_in_this_process(config.semantic_train_loader_arguments(cfg)),
        on_bad_data=cfg.CASCADE.ON_BAD_DATA,
    )


def _in_this_process(arguments: dict[str, Any]) -> dict[str, Any]:
    # The batch size of SOLVER.IMS_PER_BATCH 0 is known in training only.
    images = max(arguments["images_per_batch"], 1)
    seed = max(arguments["seed"], 0)
    return {**arguments, "images_per_batch": images, "seed": seed, "num_workers": 0}


def tile(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Arrange pictures row by row in a roughly square grid, on grey."""
    columns = math.ceil(math.sqrt(len(pictures)))
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    rows = math.ceil(len(pictures) / columns)
    canvas = np.full((rows * height, columns * width, 3), 128, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _pixels(image: torch.Tensor, image_format: str) -> Pixels:
    """BGR pixels of an image ``[3, H, W]``, whose grey levels may be fractions."""
    pixels = visible_pixels(image.permute(1, 2, 0).numpy())
    return pixels if image_format == "BGR" else pixels[..., ::-1]


def _draw_labels(sample: Sample, picture: Pixels, dataset: SemanticDataset) -> Pixels:
    labels = sample["sem_seg"].numpy()
    return draw_labels(picture, labels, dataset.class_names, ignored=dataset.ignore_value)


def _draw(sample: Sample, picture: Pixels, class_names: Sequence[str]) -> Pixels:
    classes = sample["gt_classes"].tolist()
    colors = [class_color(index) for index in classes]
    if "gt_masks" in sample:
        bitmaps = [_bitmap(mask, *picture.shape[:2]) for mask in sample["gt_masks"]]
        picture = draw_masks(picture, bitmaps, colors)
    return draw_boxes(picture, sample["gt_boxes"], [class_names[i] for i in classes], colors)


def _bitmap(mask: ObjectMask, height: int, width: int) -> np.ndarray:
    """The pixels of a mask; none of an object whose mask is unknown."""
    if isinstance(mask, torch.Tensor):
        return mask.numpy()
    return draw_polygons([polygon.numpy() for polygon in mask or ()], height, width)
