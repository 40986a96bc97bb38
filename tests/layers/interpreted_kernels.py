"""The kernels in Triton against torchvision's, on CPUs: run by ``test_triton_kernels``.

Triton's interpreter is chosen when Triton is first imported, so these tests have their own process.
"""

import pytest
import torch
from small_cascades import random_boxes
from torchvision.ops import nms

from cascade_det.benchmark.pretended_gpu import PretendedGPU
from cascade_det.core import RoIPooler
from cascade_det.core.roi_bags import make_table
from cascade_det.core.structures.nms import nms_at_once
from cascade_det.layers import triton_nms
from cascade_det.layers.triton_nms import TILE, nms_of_lists
from cascade_det.layers.triton_roi_align import roi_align_levels

STRIDES = (4, 8, 16)
MAP_SIZES = ((40, 36), (20, 18), (10, 9))


def remaining(boxes, iou):
    """Bool ``[R]`` of a list that is sorted, by torchvision."""
    falling = torch.arange(len(boxes), 0, -1, dtype=boxes.dtype)
    return torch.zeros(len(boxes), dtype=torch.bool).index_fill_(0, nms(boxes, falling, iou), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iou", [0.1, 0.6, 0.7])
def test_nms_of_lists_is_torchvisions(iou, dtype):
    lengths = [0, 1, TILE, TILE + 1, 0, 2 * TILE + 30, 20]
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(sum(lengths) + 5, (50, 60), generator=generator).to(dtype)
    boxes[3], boxes[70] = boxes[2], boxes[69, [0, 1, 0, 1]]  # a copy, and a point
    starts = torch.tensor([0, *lengths]).cumsum(0)
    got = nms_of_lists(boxes, starts, iou)
    lists = boxes[:-5].split(lengths)
    assert torch.equal(got[:-5], torch.cat([remaining(own, iou) for own in lists]))
    assert 0 < got.sum() < sum(lengths)
    assert not got[-5:].any()  # in no list


def test_nms_of_a_chain():
    # Each overlaps the next by 2/3, and no other by more than 3/7: every second one remains. The
    # longest chain of decisions that there can be.
    left = torch.arange(TILE + 7) * 2.0
    boxes = torch.stack([left, 0 * left, left + 10, 0 * left + 1], 1)
    got = nms_of_lists(boxes, torch.tensor([0, len(boxes)]), 0.5)
    assert got.tolist() == [i % 2 == 0 for i in range(len(boxes))]


@pytest.mark.parametrize(("iou", "remains"), [(0.5, True), (0.49999997, False)])
def test_an_overlap_has_to_exceed_the_threshold(iou, remains):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5]])
    assert nms_of_lists(boxes, torch.tensor([0, 2]), iou).tolist() == [True, remains]


def test_a_threshold_between_two_numbers():
    # An IoU of float32(0.6), which is more than 0.6.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 6]])
    assert nms_of_lists(boxes, torch.tensor([0, 2]), 0.6).tolist() == remaining(boxes, 0.6).tolist()


@pytest.mark.parametrize("images", [1, 3])
def test_nms_at_once_is_that_of_each_list(images):
    generator = torch.Generator().manual_seed(images)
    count, classes = 90, 4
    boxes = random_boxes(count, (60, 80), generator=generator)
    scores = torch.rand(count, generator=generator).mul(20).round()  # with ties
    image = torch.randint(images + 1, (count,), generator=generator)
    label = torch.randint(classes, (count,), generator=generator)
    boxes[image == images] = torch.nan
    rows, counts = nms_at_once(boxes, scores, image, label, images, classes, 0.3)
    wanted = []
    for i in range(images):
        kept = []
        for k in range(classes):
            own = torch.nonzero((image == i) & (label == k)).squeeze(1)
            kept.append(own[nms(boxes[own], scores[own], 0.3)])
        own = torch.cat(kept).sort().values
        wanted.append(own[scores[own].argsort(descending=True, stable=True)])
    assert counts.tolist() == [len(own) for own in wanted]
    assert rows.tolist() == [
        *torch.cat(wanted).tolist(),
        *[count] * (count - sum(map(len, wanted))),
    ]
    assert 0 < sum(map(len, wanted)) < (image < images).sum()


def test_nms_at_once_of_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    rows, counts = nms_at_once(torch.zeros(0, 4), torch.zeros(0), none, none, 2, 3, 0.5)
    assert (rows.tolist(), counts.tolist()) == ([], [0, 0])


def test_nms_at_once_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(
        triton_nms, "nms_of_lists", lambda boxes, starts, _: starts[:1].expand(len(boxes)) == 0
    )
    boxes, image = torch.rand(9, 4), torch.arange(9) // 3
    with PretendedGPU() as gpu:
        moved = [gpu.move(x) for x in (boxes, boxes[:, 0], image, image)]
        nms_at_once(*moved, 3, 3, 0.5)
        assert gpu.launches > 5
        assert not gpu.waits


# Of 144 x 160 pixels. Few large ones: the interpreter is slow.
BOXES = {
    "inside": [10.3, 12.1, 30.7, 35.9],
    "partly outside, top left": [-20.0, -9.0, 15.0, 22.0],
    "partly outside, bottom right": [130.0, 150.0, 148.0, 170.0],
    "all outside": [-60.0, -50.0, -40.0, -35.0],
    "just beyond the border": [144.0, 160.0, 147.0, 163.0],
    "wide and flat": [70.5, 30.0, 143.5, 34.5],
    "a fraction of a pixel": [33.25, 21.5, 33.26, 21.51],
    "no width": [30.0, 20.0, 30.0, 60.0],
    "a point": [30.0, 20.0, 30.0, 20.0],
    "NaN": [torch.nan, 0.0, 10.0, 10.0],
}
# Of the coarsest level, far larger than the image; and for few samples only.
HUGE = [-3000.0, -2000.0, 5000.0, 4000.0]


def pool_both(boxes, image, *, dtype=torch.float32, channels=5, size=2, **settings):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in MAP_SIZES]
    reference = RoIPooler(output_size=size, strides=STRIDES, kernel="torchvision", **settings)
    wanted = reference(reference.prepare(maps), boxes, image)  # [R, C, P, P]
    table, first_rows = make_table(maps)
    got = roi_align_levels(
        table,
        boxes,
        image,
        torch.tensor(first_rows),
        torch.tensor(MAP_SIZES),
        min_level=2,
        canonical_level=4,
        canonical_size=224,
        bins=size,
        sampling_ratio=reference.sampling_ratio,
        aligned=reference.aligned,
    )
    assert got.dtype == dtype
    return got, wanted.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_is_torchvisions(aligned, sampling_ratio):
    boxes = torch.tensor([*BOXES.values(), *([HUGE] if sampling_ratio else [])])
    image = torch.arange(len(boxes)) % 2
    got, wanted = pool_both(boxes, image, aligned=aligned, sampling_ratio=sampling_ratio)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert wanted.abs().sum(dim=(1, 2)).gt(0).sum() >= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_in_half_precision(dtype):
    boxes, image = torch.tensor([BOXES["inside"], BOXES["wide and flat"]]), torch.tensor([1, 0])
    got, wanted = pool_both(boxes, image, dtype=dtype, channels=8, sampling_ratio=2)
    # Both sum in float32 and round once.
    torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_roi_align_on_every_level():
    # Squares just below and at the sizes where levels begin.
    sides = torch.tensor([111.99, 112.0, 223.99, 224.0, 447.0, 448.0, 5000.0])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    image = torch.zeros(len(sides), dtype=torch.int64)
    got, wanted = pool_both(boxes, image, sampling_ratio=1)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_roi_align_of_no_region_and_of_one_without_end():
    got, wanted = pool_both(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert got.shape == wanted.shape == (0, 4, 5)
    maps = torch.ones(1, 3, 8, 8)
    table, first_rows = make_table([maps])
    endless = torch.tensor([[0.0, 0.0, torch.inf, 5.0]])
    pooled = roi_align_levels(
        table,
        endless,
        torch.zeros(1, dtype=torch.int64),
        torch.tensor(first_rows),
        torch.tensor([[8, 8]]),
        min_level=2,
        canonical_level=4,
        canonical_size=224,
        bins=1,
        sampling_ratio=0,
        aligned=True,
    )
    assert pooled.tolist() == [[[0.0, 0.0, 0.0]]]
