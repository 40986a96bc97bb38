"""The bags kernel against torchvision's ``roi_align``, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from cascade_det.benchmark.pretended_gpu import PretendedGPU
from cascade_det.core import RoIPooler
from cascade_det.core.roi_bags import make_table
from cascade_det.core.roi_levels import assign_levels
from cascade_det.layers import gpu_kernels

STRIDES = (4, 8, 16)
MAP_SIZES = ((20, 24), (10, 12), (5, 6))
HEIGHT, WIDTH = 80, 96

# On an image of 96 x 80; bad proposals can be empty or inverted.
BOXES = {
    "inside": [10.3, 12.1, 40.7, 50.9],
    "whole image": [0.0, 0.0, 96.0, 80.0],
    "far larger than the image": [-300.0, -200.0, 500.0, 400.0],
    "partly outside, top left": [-20.0, -9.0, 15.0, 22.0],
    "partly outside, bottom right": [70.0, 60.0, 130.0, 111.0],
    "all outside": [-60.0, -50.0, -20.0, -15.0],
    "just beyond the border": [96.0, 80.0, 99.0, 83.0],
    "beyond three borders": [-20.0, -30.0, 125.0, 70.0],
    "wide and flat": [0.5, 30.0, 95.5, 31.5],
    "high and narrow": [50.0, 0.0, 50.75, 80.0],
    "a pixel": [33.0, 21.0, 34.0, 22.0],
    "a fraction of a pixel": [33.25, 21.5, 33.26, 21.51],
    "no width": [30.0, 20.0, 30.0, 60.0],
    "no height": [30.0, 20.0, 60.0, 20.0],
    "a point": [30.0, 20.0, 30.0, 20.0],
    "the origin": [0.0, 0.0, 0.0, 0.0],
    "a sample just on the border": [-30.0, -32.0, 72.5, 80.0],
    "on the pixel grid": [8.0, 16.0, 72.0, 48.0],
}


def make_features(*, images=2, channels=3, dtype=torch.float32, **options):
    return [torch.randn(images, channels, *size, dtype=dtype, **options) for size in MAP_SIZES]


def pool(features, boxes, image_index, *, kernel="bags", **settings):
    pooler = RoIPooler(output_size=3, strides=STRIDES, kernel=kernel, **settings)
    return pooler(pooler.prepare(features), boxes, image_index)


def pool_one_by_one(features, boxes, image_index, *, sampling_ratio=0, aligned=True):
    """torchvision's op on one box at a time, on the level that the FPN paper sends it to."""
    crops = []
    for box, image in zip(boxes, image_index.tolist(), strict=True):
        level = level_in_floats(box.tolist())
        region = torch.cat([box.new_tensor([image]), box])[None].to(features[0].dtype)
        crops.append(
            roi_align(features[level], region, 3, 1 / STRIDES[level], sampling_ratio, aligned)
        )
    return torch.cat(crops)


def every_box(images=2):
    """All boxes in each of the images."""
    boxes = torch.tensor(list(BOXES.values()))
    return boxes.repeat(images, 1), torch.arange(images).repeat_interleave(len(boxes))


def gradients(value, features):
    return torch.autograd.grad(value, features, materialize_grads=True)


def level_in_floats(box):
    area = (box[2] - box[0]) * (box[3] - box[1])
    level = math.floor(4 + math.log2(math.sqrt(max(area, 0.0)) / 224 + 1e-8))
    return min(max(level, 2), 4) - 2


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
class TestAgainstTorchvision:
    @pytest.fixture(autouse=True)
    def _settings(self, aligned, sampling_ratio):
        self.settings = {"aligned": aligned, "sampling_ratio": sampling_ratio}

    def test_forward_and_backward_of_many_boxes(self):
        boxes, image_index = every_box()
        levels = assign_levels(boxes, min_level=2, max_level=4)
        assert levels.unique().tolist() == [0, 1, 2]
        features = make_features(requires_grad=True)
        weights = torch.randn(len(boxes), 3, 3, 3)
        results = []
        for function in (pool, pool_one_by_one):
            pooled = function(features, boxes, image_index, **self.settings)
            results.append((pooled, *gradients((pooled * weights).sum(), features)))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    def test_kernels_agree_in_bfloat16(self):
        features = [f.bfloat16() for f in make_features()]
        boxes, image_index = every_box()
        wanted = pool_one_by_one([f.float() for f in features], boxes, image_index, **self.settings)
        for kernel in ("bags", "torchvision"):
            got = pool(features, boxes, image_index, kernel=kernel, **self.settings)
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("kernel", ["bags", "torchvision"])
def test_memory_format_does_not_matter(kernel):
    features = make_features()
    boxes, image_index = every_box()
    wanted = pool(features, boxes, image_index, kernel=kernel)
    channels_last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    assert torch.equal(pool(channels_last, boxes, image_index, kernel=kernel), wanted)


def test_torchvision_kernel_is_torchvision():
    features = make_features(requires_grad=True)
    boxes, image_index = every_box()
    got = pool(features, boxes, image_index, kernel="torchvision")
    wanted = pool_one_by_one(features, boxes, image_index)
    assert torch.equal(got, wanted)
    both = [gradients(pooled.square().sum(), features) for pooled in (got, wanted)]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


coordinate = st.floats(-60, 160, width=32)
side = st.one_of(st.floats(0, 3, width=32), st.floats(3, 200, width=32))
random_box = st.tuples(coordinate, coordinate, side, side).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@given(
    boxes=st.lists(st.tuples(random_box, st.integers(0, 1)), min_size=1, max_size=8),
    sampling_ratio=st.integers(0, 3),
    aligned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=80)
def test_any_boxes(boxes, sampling_ratio, aligned, dtype):
    torch.manual_seed(0)
    features = make_features(dtype=dtype, requires_grad=True)
    regions = torch.tensor([box for box, _ in boxes], dtype=dtype)
    image_index = torch.tensor([image for _, image in boxes])
    chosen = {"sampling_ratio": sampling_ratio, "aligned": aligned}
    results = []
    for function in (pool, pool_one_by_one):
        pooled = function(features, regions, image_index, **chosen)
        results.append((pooled, *gradients(pooled.square().sum(), features)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradient_is_that_of_the_function(sampling_ratio):
    features = [torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)]
    pooler = RoIPooler(output_size=2, strides=(4,), sampling_ratio=sampling_ratio, kernel="bags")
    boxes = torch.tensor([[1.0, 2.0, 15.0, 14.5], [-3.0, 5.0, 9.0, 30.0]], dtype=torch.float64)
    image_index = torch.zeros(2, dtype=torch.int64)
    assert torch.autograd.gradcheck(
        lambda level: pooler(pooler.prepare([level]), boxes, image_index), features
    )


@pytest.mark.parametrize("kernel", ["bags", "torchvision"])
class TestRegionsWithoutPixels:
    def test_no_regions(self, kernel):
        features = make_features(requires_grad=True)
        none = torch.zeros(0, dtype=torch.int64)
        pooled = pool(features, torch.zeros(0, 4), none, kernel=kernel)
        assert pooled.shape == (0, 3, 3, 3)
        for gradient in gradients(pooled.sum(), features):
            assert torch.equal(gradient, torch.zeros_like(gradient))

    @pytest.mark.parametrize(
        "bad", [[math.nan] * 4, [1.0, math.nan, 9.0, 9.0], [9.0, 1.0, 2.0, 7.0]]
    )
    def test_nan_and_inverted_boxes_pool_zeros(self, kernel, bad):
        features = make_features()
        image_index = torch.tensor([0, 1])
        boxes = torch.tensor([bad, BOXES["inside"]])
        pooled = pool(features, boxes, image_index, kernel=kernel)
        assert torch.equal(pooled[0], torch.zeros(3, 3, 3))
        alone = pool(features, boxes[1:], image_index[1:], kernel=kernel)
        torch.testing.assert_close(pooled[1:], alone)


def test_levels_by_hand():
    # A box of 224 belongs on level 4 (stride 16), half of that one level finer.
    sides = [1.0, 55.9, 56.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0]
    boxes = torch.tensor([[7.0, 3.0, 7.0 + s, 3.0 + s] for s in sides])
    assert assign_levels(boxes, min_level=2, max_level=5).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_levels(boxes, min_level=3, max_level=4).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    empty = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 3.0, 9.0, 3.0]])
    assert assign_levels(empty, min_level=2, max_level=5).tolist() == [0, 0]


@given(st.lists(st.tuples(st.floats(0.5, 2000), st.floats(0.5, 2000)), min_size=1, max_size=20))
@settings(max_examples=100)
def test_levels_equal_the_equation(sizes):
    exact = [4 + math.log2(math.sqrt(w * h) / 224 + 1e-8) for w, h in sizes]
    clear = [abs(level - round(level)) > 1e-5 for level in exact]
    boxes = torch.tensor([[0.0, 0.0, w, h] for w, h in sizes])
    wanted = [min(max(math.floor(level), 2), 5) - 2 for level in exact]
    got = assign_levels(boxes, min_level=2, max_level=5).tolist()
    for ours, theirs, sure in zip(got, wanted, clear, strict=True):
        assert ours == theirs or not sure


@pytest.mark.parametrize(
    ("kernel", "has_table"), [("auto", True), ("bags", True), ("torchvision", False)]
)
def test_kernel_on_the_cpu(kernel, has_table):
    pooler = RoIPooler(output_size=3, strides=STRIDES, kernel=kernel)
    assert (pooler.prepare(make_features()).table is not None) == has_table


class TestMapsInOneBlock:
    """Maps that lie one after another in channels-last order are pooled where they are."""

    def in_one_block(self, features, *, gap=0, **options):
        sizes = [level.numel() + gap for level in features]
        block = torch.empty(sum(sizes), **options)
        views = []
        for level, place in zip(features, block.split(sizes), strict=True):
            images, channels, height, width = level.shape
            view = place[: level.numel()].view(images, height, width, channels)
            views.append(view.permute(0, 3, 1, 2).copy_(level))
        return views

    def pool_both(self, features, others, **settings):
        boxes, image_index = every_box(len(features[0]))
        return (pool(some, boxes, image_index, **settings) for some in (features, others))

    @pytest.mark.parametrize("images", [1, 2, 3])
    def test_they_are_not_copied(self, images):
        features = make_features(images=images)
        block = self.in_one_block(features)
        pooler = RoIPooler(output_size=3, strides=STRIDES)
        assert pooler.prepare(block).table.data_ptr() == block[0].data_ptr()
        assert pooler.prepare(features).table.data_ptr() != features[0].data_ptr()
        expected, got = self.pool_both(features, block)
        assert got.equal(expected)

    def test_gaps(self):
        features = make_features()
        expected, got = self.pool_both(features, self.in_one_block(features, gap=3))
        assert got.equal(expected)

    def test_contiguous_maps(self):
        features = make_features()
        block = torch.cat([level.flatten() for level in features])
        parts = block.split([level.numel() for level in features])
        views = [part.view_as(level) for part, level in zip(parts, features, strict=True)]
        expected, got = self.pool_both(features, views)
        assert got.equal(expected)

    def test_neighbours_that_are_not_one_tensor(self):
        features = make_features()
        pixels = torch.cat([level.permute(0, 2, 3, 1).flatten() for level in features])
        memory, place, views = bytearray(pixels.numpy()), 0, []
        for level in features:
            images, channels, height, width = level.shape
            part = torch.frombuffer(memory, dtype=torch.float32, count=level.numel(), offset=place)
            views.append(part.view(images, height, width, channels).permute(0, 3, 1, 2))
            place += level.nbytes
        expected, got = self.pool_both(features, views)
        assert got.equal(expected)

    def test_swapped_levels(self):
        # Equal sizes, so that only the places tell.
        features = [torch.randn(2, 3, 6, 6) for _ in STRIDES]
        first, second, third = self.in_one_block(features)
        expected, got = self.pool_both(
            [features[1], features[0], features[2]], [second, first, third]
        )
        assert got.equal(expected)

    def test_another_type(self):
        features = make_features()
        boxes, image_index = torch.tensor([BOXES["inside"]]), torch.tensor([1])
        pooler = RoIPooler(output_size=3, strides=STRIDES)
        expected, got = (
            pooler(pooler.prepare(some, dtype=torch.bfloat16), boxes, image_index)
            for some in (features, self.in_one_block(features))
        )
        assert got.dtype == torch.bfloat16
        assert got.equal(expected)

    def test_gradients_reach_every_map(self):
        features = make_features()
        block = [level.detach().requires_grad_() for level in self.in_one_block(features)]
        for level in features:
            level.requires_grad_()
        expected, got = self.pool_both(features, block)
        weights = torch.randn_like(got)
        torch.testing.assert_close(
            gradients((got * weights).sum(), block), gradients((expected * weights).sum(), features)
        )


def test_wrong_number_of_maps():
    pooler = RoIPooler(output_size=3, strides=STRIDES)
    with pytest.raises(ValueError, match="2 feature maps for 3 strides"):
        pooler.prepare(make_features()[:2])


@pytest.mark.parametrize("strides", [(4, 16), (8, 4), (3, 6), (4, 8, 8), (4, 12)])
def test_strides_that_are_no_pyramid(strides):
    with pytest.raises(ValueError, match="powers of two"):
        RoIPooler(output_size=3, strides=strides)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="'fast'"):
        RoIPooler(output_size=3, strides=STRIDES, kernel="fast")


def test_the_torchvision_kernel_gets_its_maps_once():
    boxes, image_index = every_box()
    pooler = RoIPooler(output_size=3, strides=STRIDES, kernel="torchvision")
    pyramid = pooler.prepare(
        [f.bfloat16().to(memory_format=torch.channels_last) for f in make_features()]
    )
    assert all(f.dtype == torch.float32 and f.is_contiguous() for f in pyramid.features)
    assert pooler(pyramid, boxes, image_index).dtype == torch.bfloat16
    features = make_features()
    assert all(a is b for a, b in zip(pooler.prepare(features).features, features, strict=True))


class TestOnGPUs:
    """With Triton, on a pretended GPU; ``tests/layers/interpreted_kernels.py`` runs the kernel."""

    def pool(self, **options):
        features = [f.to(memory_format=torch.channels_last) for f in make_features()]
        boxes, image_index = every_box()
        pooler = RoIPooler(output_size=3, strides=STRIDES)
        wanted = pooler(pooler.prepare(features), boxes, image_index)
        with PretendedGPU() as gpu:
            moved = [gpu.move(f) for f in features]
            for _ in range(2):  # sizes are sent with the first
                gpu.reset()
                pyramid = pooler.prepare(moved, **options)
                got = pooler(pyramid, gpu.move(boxes), gpu.move(image_index))
        torch.testing.assert_close(got.held, wanted, rtol=1e-4, atol=1e-5)
        return pyramid, gpu

    def test_fast_heads_get_crops_without_a_wait(self):
        pyramid, gpu = self.pool(dtype=torch.float32)
        assert pyramid.table is not None
        assert not gpu.waits

    def test_other_heads_get_torchvisions(self):
        pyramid, gpu = self.pool()
        assert pyramid.table is None
        assert gpu.waits.total() == 1

    def test_so_do_gradients(self):
        with PretendedGPU() as gpu:
            features = [gpu.move(f) for f in make_features()]
            pooler = RoIPooler(output_size=3, strides=STRIDES)
            trained = [f.detach().requires_grad_() for f in features]
            assert pooler.prepare(trained, dtype=torch.float32).table is None
            with torch.no_grad():
                assert pooler.prepare(trained, dtype=torch.float32).table is not None

    def test_without_triton(self, monkeypatch):
        pooler = RoIPooler(output_size=3, strides=STRIDES)
        with PretendedGPU() as gpu, monkeypatch.context() as without:
            without.setattr(gpu_kernels, "has_triton", lambda _: False)
            features = [gpu.move(f) for f in make_features()]
            assert pooler.prepare(features, dtype=torch.float32).table is None


@pytest.mark.parametrize("regions", [0, 5])
def test_the_operation_keeps_the_rules_of_pytorch(regions):
    table, first_rows = make_table(make_features())
    boxes, image_index = every_box()
    arguments = (
        table,
        boxes[:regions],
        image_index[:regions],
        torch.tensor(first_rows),
        torch.tensor(MAP_SIZES),
        *(2, 3, 0, True),
    )
    torch.library.opcheck(torch.ops.cascade_det.roi_align_levels.default, arguments)
