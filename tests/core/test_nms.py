"""NMS of a batch as one operation, against torchvision's of each list."""

import pytest
import torch
from small_cascades import random_boxes
from torchvision.ops import batched_nms, nms

from cascade_det.core.structures.nms import nms_by_image, nms_mask

IOU = 0.4


def make_lists(count, *, images=3, classes=5, size=(200, 300), seed=0):
    """Arguments of NMS; boxes of the image ``images`` take no part."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(images + 1, (count,), generator=generator)
    boxes = random_boxes(count, size, generator=generator)
    boxes[image == images] = torch.nan
    return {
        "boxes": boxes,
        "scores": torch.rand(count, generator=generator),
        "images": image,
        "classes": torch.randint(classes, (count,), generator=generator),
        "num_images": images,
        "num_classes": classes,
        "iou": IOU,
    }


@pytest.mark.parametrize("count", [0, 1, 300, 1200])
@pytest.mark.parametrize("images", [1, 3])
def test_each_image_is_torchvisions(count, images):
    lists = make_lists(count, images=images)
    got = nms_by_image(**lists)
    assert len(got) == images
    for image, rows in enumerate(got):
        own = torch.nonzero(lists["images"] == image).squeeze(1)
        kept = batched_nms(*(lists[name][own] for name in ("boxes", "scores", "classes")), IOU)
        assert torch.equal(rows, own[kept])
        assert count < 300 or 0 < len(kept) < len(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mask_is_that_of_each_list(dtype):
    lists = make_lists(500)
    lists |= {name: lists[name].to(dtype) for name in ("boxes", "scores")}
    mask = nms_mask(**lists)
    for image in range(4):
        for label in range(5):
            own = torch.nonzero((lists["images"] == image) & (lists["classes"] == label)).squeeze(1)
            wanted = torch.zeros(len(own), dtype=torch.bool)
            if image < 3:
                wanted[nms(lists["boxes"][own], lists["scores"][own], IOU)] = True
                assert 0 < wanted.sum() < len(own)
            assert torch.equal(mask[own], wanted)


def test_an_image_without_boxes():
    lists = make_lists(50, images=2)
    alone = nms_by_image(**lists | {"num_images": 5, "images": lists["images"] * 2})
    assert [len(rows) for rows in alone[1::2]] == [0, 0]
    for rows, wanted in zip(alone[::2], nms_by_image(**lists), strict=False):
        assert torch.equal(rows, wanted)


@pytest.mark.parametrize("count", [0, 40])
def test_the_operation_keeps_the_rules_of_pytorch(count):
    # Schema, shapes without values, and what a compiler may assume.
    arguments = tuple(make_lists(count).values())
    torch.library.opcheck(torch.ops.cascade_det.batched_nms.default, arguments)


def test_gradients_pass_by():
    lists = make_lists(30)
    lists["boxes"].requires_grad_()
    lists["scores"].requires_grad_()
    [first, *_] = nms_by_image(**lists)
    lists["scores"][first].sum().backward()
    assert lists["scores"].grad.sum() == len(first)
