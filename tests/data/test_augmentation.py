"""Whole augmentations: mixing of images, crops, and that a sample depends on its position alone."""

import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from cascade_det import config
from cascade_det.config.augment_keys import complete_entries
from cascade_det.data.augment_mixing import copy_paste, mosaic
from cascade_det.data.coco import load_dataset
from cascade_det.data.loader import build_train_loader, detection_sample
from cascade_det.data.random_crop import CROP_TYPES, RandomCrop
from cascade_det.data.scene import Scene
from cascade_det.errors import DatasetError

LOADER = {
    "min_sizes": (24, 32),
    "max_size": 60,
    "sampling": "choice",
    "flip": "horizontal",
    "image_format": "BGR",
    "images_per_batch": 4,
    "aspect_ratio_grouping": False,
    "filter_empty": True,
    "seed": 3,
    "masks": {"mask_format": "polygon", "maskless": "keep"},
}
ALL = complete_entries(
    [
        ["Mosaic", {"size": [48, 60], "p": 0.5}],
        ["RandomPhotometricDistort"],
        ["ColorJitter", {"hue": 0.1}],
        ["RandomGrayscale", {"p": 0.3}],
        ["GaussianBlur", {"p": 0.5}],
        ["GaussianNoise", {"sigma": 0.05, "p": 0.5}],
        ["JPEG", {"p": 0.5}],
        ["RandomAffine", {"degrees": 20, "scale": [0.7, 1.4], "p": 0.5}],
        ["RandomRotation", {"degrees": 20, "expand": True, "p": 0.5}],
        ["RandomIoUCrop", {"p": 0.5}],
        ["RandomVerticalFlip"],
        ["RandomHorizontalFlip"],
        ["ScaleJitter", {"target_size": [40, 50], "scale_range": [0.5, 2.0]}],
        ["RandomCrop", {"size": [40, 50], "pad_if_needed": True}],
        ["CopyPaste", {"p": 0.5}],
    ]
)


def augment(*entries, crop=None, boxes_of_masks=True):
    entries = complete_entries(entries)
    resize = all(name != "ScaleJitter" for name, _ in entries)
    return {"crop": crop, "entries": entries, "resize": resize, "boxes_of_masks": boxes_of_masks}


EVERYTHING = augment(*ALL, crop=("relative_range", (0.7, 0.7)))


def star(generator, center, radius):
    """A polygon that does not cross itself."""
    angles = np.sort(generator.uniform(0, 2 * np.pi, generator.integers(5, 12)))
    radii = radius * generator.uniform(0.4, 1, len(angles))
    return (np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + center).ravel()


@pytest.fixture
def source(coco):
    """Six images with polygons, RLE and objects without a mask."""
    generator, images, boxes = np.random.default_rng(2), [], []
    for image_id in range(1, 7):
        width, height = ((60, 40), (44, 70), (80, 60))[image_id % 3]
        images.append(coco.image(image_id, width, height))
        for number in range(5):
            center = generator.uniform(12, np.array([width, height]) - 12)
            points = star(generator, center, 11).round(1)
            corner = points.reshape(-1, 2).min(axis=0)
            sides = points.reshape(-1, 2).max(axis=0) - corner
            mask = [points.tolist()]
            if number == 3:
                rle = coco_mask.frPyObjects(mask, height, width)[0]
                mask = {"size": rle["size"], "counts": rle["counts"].decode()}
            entry = coco.box(len(boxes), image_id, [*corner.tolist(), *sides.tolist()])
            boxes.append(entry if number == 4 else {**entry, "segmentation": mask})
    return coco.write(images, boxes)


@pytest.fixture
def dataset(source):
    return load_dataset(source, masks="keep")


def take(dataset, number, changes=None, **arguments):
    arguments = {**LOADER, "num_workers": 0, "augment": EVERYTHING, **(changes or {}), **arguments}
    return list(itertools.islice(build_train_loader([dataset], **arguments), number))


def assert_same(ours, theirs):
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert one["image_id"] == other["image_id"]
        for key in ("image", "gt_boxes", "gt_classes"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
        assert list(map(str, one["gt_masks"])) == list(map(str, other["gt_masks"]))


# -- a function of the seed and the position ------------------------------------------------------


def test_batches_do_not_depend_on_workers_processes_or_where_they_start(dataset):
    whole = take(dataset, 6)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert_same(take(dataset, 6, num_workers=2), whole)
    assert_same(take(dataset, 3, start_batch=3), whole[3:])
    parts = [take(dataset, 6, share=(rank, 2)) for rank in range(2)]
    assert_same([a + b for a, b in zip(*parts, strict=True)], whole)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    other = take(dataset, 1, seed=4)
    assert not torch.equal(other[0][0]["image"], whole[0][0]["image"])


def test_samples_have_their_documented_form(dataset):
    found = 0
    for sample in itertools.chain(*take(dataset, 12)):
        height, width = sample["image"].shape[1:]
        assert (height, width) == (40, 50)  # of RandomCrop, not of MIN_SIZE_TRAIN
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].is_contiguous()
        boxes = sample["gt_boxes"]
        assert boxes.dtype == torch.float32
        assert len(boxes) == len(sample["gt_classes"]) == len(sample["gt_masks"])
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 1e-5).all()
        for mask in sample["gt_masks"]:
            assert mask is None or isinstance(mask, list) or mask.shape == (height, width)
        found += len(boxes)
    assert found > 100


def test_makers_can_be_sent_to_workers_that_are_not_forked(dataset):
    arguments = {key: LOADER[key] for key in ("min_sizes", "max_size", "sampling", "flip", "masks")}
    make = detection_sample(
        dataset.records, **arguments, image_format="BGR", augment=EVERYTHING, tries=1
    )
    again = pickle.loads(pickle.dumps(make))
    samples = [m(dataset.records[0], np.random.default_rng(5)) for m in (make, again)]
    assert_same([samples[:1]], [samples[1:]])


def test_channels_are_augmented_as_what_they_are(dataset):
    colours = augment(
        ["RandomPhotometricDistort"], ["ColorJitter", {"saturation": 0.9, "hue": 0.4}]
    )
    bgr = take(dataset, 3, augment=colours)
    rgb = take(dataset, 3, augment=colours, image_format="RGB")
    for one, other in zip(itertools.chain(*bgr), itertools.chain(*rgb), strict=True):
        assert torch.equal(one["image"].flip(0), other["image"])


def test_broken_images_are_not_mixed_in(dataset):
    path = dataset.source.image_root / "3.png"
    path.write_bytes(path.read_bytes()[:300])
    mixing = augment(["Mosaic", {"p": 1.0, "size": [40, 40]}])
    with pytest.raises(DatasetError, match=r"3\.png: cannot be read as an image"):
        take(dataset, 3, augment=mixing)
    assert len(take(dataset, 6, augment=mixing, on_bad_data="skip")) == 6


# -- crops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "heights", "widths"),
    [
        ("relative", (0.5, 0.25), (20, 20), (15, 15)),
        # 10.5 and 7.5 pixels, rounded up: as a float32, 0.2625 is a little less.
        ("relative", (0.2625, 0.125), (11, 11), (8, 8)),
        ("relative_range", (0.5, 0.25), (20, 40), (15, 60)),
        ("absolute", (30, 100), (30, 30), (60, 60)),
        ("absolute_range", (30, 50), (30, 40), (30, 50)),
        ("absolute_range", (50, 70), (40, 40), (50, 60)),
    ],
)
def test_crops_have_detectron2s_sizes(kind, size, heights, widths):
    generator = np.random.default_rng(1)
    crop = RandomCrop(kind, size)
    drawn = np.array([crop(40, 60, generator) for _ in range(3000)])
    assert (drawn[:, 0] + drawn[:, 2] <= 40).all()
    assert (drawn[:, 1] + drawn[:, 3] <= 60).all()
    assert (drawn.min(axis=0) == [0, 0, heights[0], widths[0]]).all()
    assert (drawn[:, 2:].max(axis=0) == [heights[1], widths[1]]).all()
    assert (drawn[:, 0] + drawn[:, 2]).max() == 40
    assert (drawn[:, 1] + drawn[:, 3]).max() == 60


def test_a_crop_leaves_a_pixel():
    assert RandomCrop("relative", (0.01, 0.01))(3, 3, np.random.default_rng(0))[2:] == (1, 1)


class SameDraws:
    """A generator that draws as numpy's global one, takes the first size, and always flips."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)

    def integers(self, low, high=None, endpoint=False):
        if low == 2**63:
            return 0  # the seed for torch, which Detectron2 does not draw
        low, high = (0, low) if high is None else (low, high + endpoint)
        return self.state.randint(low, high)

    def random(self, size=None):
        return 0.0 if size is None else self.state.rand(size)

    def choice(self, sizes):
        return sizes[0]


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("kind", CROP_TYPES)
def test_with_the_same_draws_a_crop_is_detectron2s(kind):
    transforms = pytest.importorskip("detectron2.data.transforms", exc_type=ImportError)
    size = (0.3, 0.6) if kind.startswith("relative") else (20, 33)
    theirs, ours = transforms.RandomCrop(kind, size), RandomCrop(kind, size)
    for seed, (height, width) in enumerate([(40, 60), (25, 90), (200, 18), (7, 7)] * 5):
        np.random.seed(seed)  # noqa: NPY002
        crop = theirs.get_transform(np.zeros((height, width, 3)))
        assert ours(height, width, SameDraws(seed)) == (crop.y0, crop.x0, crop.h, crop.w)


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask", None])
def test_samples_with_a_crop_are_detectron2s(source, mask_format):
    """Pixels, boxes, masks, and which objects are left: Detectron2 drops those that are empty."""
    d2_coco = pytest.importorskip("detectron2.data.datasets.coco", exc_type=ImportError)
    if mask_format:
        pytest.importorskip("shapely")  # with which Detectron2 cuts polygons
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T

    mapper = DatasetMapper(
        is_train=True,
        augmentations=[
            T.RandomCrop("relative_range", (0.2, 0.2)),
            T.ResizeShortestEdge((43,), 200, "choice"),
            T.RandomFlip(prob=1.0),
        ],
        image_format="BGR",
        use_instance_mask=mask_format is not None,
        instance_mask_format=mask_format or "polygon",
        recompute_boxes=mask_format is not None,
    )
    # What its mapper refuses is left out of the json.
    kinds = {"polygon": (list,), "bitmask": (list, dict), None: (list, dict, type(None))}
    content = json.loads(source.json_file.read_text())
    content["annotations"] = [
        entry
        for entry in content["annotations"]
        if isinstance(entry.get("segmentation"), kinds[mask_format])
    ]
    source.json_file.write_text(json.dumps(content))
    masks = {"mask_format": mask_format, "maskless": "drop"} if mask_format else None
    dataset = load_dataset(source, masks="drop" if masks else None)
    make = detection_sample(
        dataset.records,
        **{"min_sizes": (43,), "max_size": 200, "sampling": "choice", "flip": "horizontal"},
        **{"image_format": "BGR", "masks": masks},
        augment=augment(crop=("relative_range", (0.2, 0.2)), boxes_of_masks=bool(masks)),
    )
    theirs = d2_coco.load_coco_json(str(source.json_file), str(source.image_root))
    dropped = 0
    for seed, (record, entry) in itertools.product(
        range(8), zip(dataset.records, theirs, strict=True)
    ):
        sample = make(record, SameDraws(seed))
        np.random.seed(seed)  # noqa: NPY002
        mapped = mapper(entry)
        assert torch.equal(sample["image"], mapped["image"])
        found = mapped["instances"]
        dropped += len(entry["annotations"]) - len(found)
        torch.testing.assert_close(
            sample["gt_boxes"], found.gt_boxes.tensor, rtol=0, atol=1e-4 if masks else 1e-9
        )
        if mask_format == "bitmask":
            for mask, expected in zip(sample["gt_masks"], found.gt_masks.tensor, strict=True):
                assert (mask != expected).sum() <= 2
    assert dropped > 20


# -- mixing ---------------------------------------------------------------------------------------


def plain_scene(level, boxes, masks, size=(20, 30)):
    image = torch.full((3, *size), level, dtype=torch.uint8)
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Scene(image, boxes, np.full(len(boxes), level), masks)


def block(left, top, right, bottom, size=(20, 30)):
    bitmap = np.zeros(size, bool)
    bitmap[top:bottom, left:right] = True
    return bitmap


def test_pasting_by_hand():
    below = plain_scene(
        10,
        [(2, 2, 8, 8), (10, 2, 14, 6), (20, 10, 28, 18), (5, 5, 6, 6), (0, 0, 30, 20)],
        [
            block(2, 2, 8, 8),
            [np.array([10.0, 2, 14, 2, 14, 6, 10, 6])],
            block(20, 10, 28, 18),
            None,
            None,
        ],
    )
    source = plain_scene(200, [(4, 4, 16, 12), (0, 0, 3, 3)], [block(4, 4, 16, 12), None])
    pasted = copy_paste(below, source, share=1.0)
    assert pasted.classes.tolist() == [10, 10, 10, 10, 200]
    np.testing.assert_array_equal(pasted.masks[0], block(2, 2, 8, 8) & ~block(4, 4, 16, 12))
    np.testing.assert_array_equal(pasted.masks[1], block(10, 2, 14, 4))
    assert pasted.masks[2] is below.masks[2]
    assert pasted.masks[3] is None  # and the object whose box was covered is gone
    np.testing.assert_array_equal(pasted.masks[4], block(4, 4, 16, 12))
    level = torch.where(torch.from_numpy(block(4, 4, 16, 12)), 200, 10)
    assert torch.equal(pasted.image, level.to(torch.uint8).expand(3, -1, -1))
    whole = copy_paste(below, plain_scene(9, [(0, 0, 30, 20)], [block(0, 0, 30, 20)]), 1.0)
    assert whole.classes.tolist() == [9]
    assert copy_paste(below, source, share=0.0) is below
    maskless = plain_scene(9, [(0, 0, 30, 20)], [None])
    assert copy_paste(below, maskless, share=1.0) is below


@pytest.mark.parametrize("size", [(8, 12), (50, 12), (50, 70)])
def test_images_of_other_sizes_are_pasted_somewhere_inside(size):
    below = plain_scene(10, [], [])
    objects = plain_scene(
        200, [(0, 0, size[1], size[0])], [block(0, 0, size[1], size[0], size)], size
    )
    for _ in range(10):
        pasted = copy_paste(below, objects, share=1.0)
        (mask,) = pasted.masks
        assert pasted.size == (20, 30)
        assert mask.sum() == min(size[0], 20) * min(size[1], 30)
        assert ((pasted.image == 200).all(dim=0).numpy() == mask).all()


def test_a_mosaic_by_hand():
    sizes = [(20, 30), (40, 10), (7, 7), (100, 120)]
    scenes = [
        plain_scene(
            50 * (number + 1),
            [(0, 0, width, height), (0, 0, width / 2, height)],
            [block(0, 0, width, height, (height, width)), None],
            (height, width),
        )
        for number, (height, width) in enumerate(sizes)
    ]
    together = mosaic(scenes, (60, 80), (0.5, 0.5))
    assert together.size == (60, 80)
    quarters = [(0, 0, 40, 30), (40, 0, 80, 30), (0, 30, 40, 60), (40, 30, 80, 60)]
    whole = [number for number, mask in enumerate(together.masks) if mask is not None]
    for index, (level, box) in zip(
        whole, zip((50, 100, 150, 200), quarters, strict=True), strict=True
    ):
        left, top, right, bottom = box
        assert (together.image[:, top:bottom, left:right] == level).all()
        np.testing.assert_allclose(together.boxes[index], box)
        np.testing.assert_array_equal(together.masks[index], block(*box, (60, 80)))
        assert together.classes[index] == level
    for _ in range(30):  # at any point
        scene = mosaic(scenes, (60, 80), (0.0, 1.0))
        rows = (scene.image[0, :, 0] == 50).sum()
        columns = (scene.image[0, 0] == 50).sum()
        assert 2 <= rows <= 58
        assert 2 <= columns <= 78
        assert scene.image[0].unique().tolist() == [50, 100, 150, 200]


def test_what_is_pasted_has_been_through_the_entries_before(dataset):
    """Objects of up to 22 pixels, in images of 40 and more, scaled to fit into 20 pixels."""
    shrink = ["ScaleJitter", {"target_size": [20, 20], "scale_range": [1.0, 1.0]}]
    paste = ["CopyPaste", {"p": 1.0, "share": 1.0}]
    samples = list(itertools.chain(*take(dataset, 6, augment=augment(shrink, paste))))
    assert sum(len(sample["gt_boxes"]) for sample in samples) > 6 * len(samples)
    for sample in samples:
        sides = sample["gt_boxes"][:, 2:] - sample["gt_boxes"][:, :2]
        assert (sides <= 20 * 22 / 40).all()


@pytest.mark.parametrize("preset", ["light", "strong"])
def test_presets_augment(dataset, preset):
    cfg = config.load_config(f"cascade_det://augment/{preset}.yaml")
    arguments = config.input_arguments(cfg, train=True)["augment"]
    plain = take(dataset, 3, augment=None, masks=None)
    changed = take(dataset, 3, augment=arguments, masks=None)
    same = [
        one["image"].shape == other["image"].shape and torch.equal(one["image"], other["image"])
        for one, other in zip(itertools.chain(*plain), itertools.chain(*changed), strict=True)
    ]
    assert sum(same) < 6
