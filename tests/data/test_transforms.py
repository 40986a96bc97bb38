"""Images and boxes against Pillow, Detectron2 if installed, and values by hand."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascade_det.data.transforms import (
    TrainTransform,
    decode_image,
    read_image,
    resize_image,
    resize_shortest_edge,
    resized_size,
)
from cascade_det.errors import DatasetError

NO_BOXES = np.zeros((0, 4), np.float32)
NO_CLASSES = np.zeros(0, np.int64)


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# -- reading --------------------------------------------------------------------------------------


def test_channel_orders(tmp_path):
    pixels = noise(5, 7)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    rgb, bgr = read_image(str(path), "RGB"), read_image(str(path), "BGR")
    np.testing.assert_array_equal(rgb, pixels)
    np.testing.assert_array_equal(bgr, pixels[:, :, ::-1])
    for image in (rgb, bgr):
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.flags.writeable


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.int32, "I")])
def test_sixteen_bits_keep_the_upper_eight(tmp_path, dtype, mode):
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], dtype)
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    assert Image.open(path).mode == mode
    image = read_image(str(path), "BGR")
    assert image.shape == (1, 5, 3)
    for channel in range(3):
        assert image[0, :, channel].tolist() == [0, 0, 1, 0x12, 0xFF]


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("L", (4, 3), grey) for grey in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_image(str(tmp_path / "a.gif"), "RGB") == 10).all()


def test_broken_exif_does_not_spoil_the_picture(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(8, 8)).save(path, exif=b"Exif\0\0garbage" * 3)
    assert read_image(str(path), "RGB").shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_content_is_decoded_as_the_file_is(tmp_path, kind):
    path = tmp_path / "image"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(6, 9)).save(path, kind, exif=exif)
    decoded = decode_image(path.read_bytes(), "BGR", name="x")
    assert decoded.shape == (9, 6, 3)
    np.testing.assert_array_equal(decoded, read_image(str(path), "BGR"))
    with pytest.raises(DatasetError, match="x: cannot be read as an image"):
        decode_image(path.read_bytes(), "BGR", name="x", decoders=("GIF",))


def test_missing_image(tmp_path):
    with pytest.raises(DatasetError, match=r"nothing\.png: there is no such image"):
        read_image(str(tmp_path / "nothing.png"), "RGB")


def test_what_is_no_image(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(DatasetError, match="cannot be read as an image"):
        read_image(str(tmp_path / "text.jpg"), "RGB")
    os.mkfifo(tmp_path / "pipe.jpg")  # has no writer: reading would block for ever
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path / "link.jpg", tmp_path, Path("/dev/zero")):
        with pytest.raises(DatasetError, match=f"^{path}: is not a file$"):
            read_image(str(path), "RGB")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(noise(30, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DatasetError, match=r"bomb\.png.*DecompressionBomb"):
        read_image(str(tmp_path / "bomb.png"), "RGB")


# -- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "short_edge", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 1066.67 rounds up
        ((640, 480), 800, 1333, (1067, 800)),
        ((500, 500), 320, 1333, (320, 320)),
        ((100, 1000), 800, 1333, (133, 1333)),  # stopped by the longer edge
        ((480, 640), 320, 400, (300, 400)),
        ((1, 100000), 10, 100, (1, 100)),  # never below one pixel
    ],
)
def test_resized_size_by_hand(size, short_edge, max_size, expected):
    assert resized_size(*size, short_edge, max_size) == expected


sides = st.integers(1, 5000)
short_edges = st.integers(1, 2000)
max_sizes = st.integers(1, 3000)


@given(sides, sides, short_edges, max_sizes)
def test_resized_size_keeps_its_promises(height, width, short_edge, max_size):
    new_height, new_width = resized_size(height, width, short_edge, max_size)
    assert 1 <= max(new_height, new_width) <= max(max_size, 1)
    assert min(new_height, new_width) <= short_edge
    scale = min(short_edge / min(height, width), max_size / max(height, width))
    assert new_height == pytest.approx(max(height * scale, 1), abs=0.501)
    assert new_width == pytest.approx(max(width * scale, 1), abs=0.501)
    assert resized_size(width, height, short_edge, max_size) == (new_width, new_height)


@pytest.mark.needs_detectron2
@given(height=sides, width=sides, short_edge=short_edges, max_size=max_sizes)
def test_resized_size_is_detectron2s(height, width, short_edge, max_size):
    d2 = pytest.importorskip("detectron2.data.transforms")
    theirs = d2.ResizeShortestEdge.get_output_shape(height, width, short_edge, max_size)
    # Detectron2 lets an edge become 0, and then fails.
    assert resized_size(height, width, short_edge, max_size) == tuple(max(x, 1) for x in theirs)


def test_resizing_is_pillows_bilinear():
    image = noise(60, 90)
    expected = np.asarray(Image.fromarray(image).resize((45, 30), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_image(image, (30, 45)), expected)
    np.testing.assert_array_equal(resize_shortest_edge(image, 30, 1000), expected)


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("size", [(30, 45), (200, 300), (61, 90), (60, 90), (1, 1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_resizing_is_detectron2s_to_the_bit(size, reverse):
    d2 = pytest.importorskip("detectron2.data.transforms")
    image = noise(60, 90)[:, :, :: -1 if reverse else 1]
    theirs = d2.ResizeTransform(60, 90, *size).apply_image(image)
    np.testing.assert_array_equal(resize_image(image, size), theirs)


# -- the transform of training --------------------------------------------------------------------


def make_transform(**changes):
    arguments = {"min_sizes": (20,), "max_size": 100, "sampling": "choice", "flip": "none"}
    return TrainTransform(**(arguments | changes))


def apply(transform, image, boxes=NO_BOXES, classes=None, seed=0):
    classes = np.arange(len(boxes)) if classes is None else classes
    return transform(image, np.asarray(boxes, np.float32), classes, np.random.default_rng(seed))


def test_boxes_are_scaled_clipped_and_empty_ones_removed():
    boxes = [
        [2, 4, 12, 14],
        [-5, -5, 3, 3],  # reaches outside
        [35, 25, 60, 50],
        [41, 5, 50, 10],  # wholly outside
        [5, 5, 5 + 4e-6, 9],  # 8e-6 wide when resized, which counts as empty
        [5, 5, 5.1, 5.1],
    ]
    image, moved, classes = apply(make_transform(min_sizes=(60,)), noise(30, 40), boxes)
    assert image.shape == (60, 80, 3)
    assert moved.dtype == np.float32
    expected = [[4, 8, 24, 28], [0, 0, 6, 6], [70, 50, 80, 60], [10, 10, 10.2, 10.2]]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    assert classes.tolist() == [0, 1, 2, 5]


def test_each_direction_has_its_own_scale():
    image, moved, _ = apply(make_transform(min_sizes=(2,)), noise(3, 10), [[0, 0, 10, 3]])
    assert image.shape == (2, 7, 3)  # 6.67 was rounded up, so the factors are 0.7 and 0.667
    np.testing.assert_allclose(moved, [[0, 0, 7, 2]], rtol=1e-6)


def test_no_boxes():
    _, boxes, classes = apply(make_transform(flip="horizontal"), noise(30, 40))
    assert (boxes.shape, boxes.dtype) == ((0, 4), np.float32)
    assert (classes.shape, classes.dtype) == ((0,), np.int64)


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_half_of_the_images_are_flipped_with_their_boxes(flip):
    image, box = noise(20, 40), [[1, 2, 11, 8]]
    transform = make_transform(min_sizes=(0,), flip=flip)
    flipped_pixels = image[:, ::-1] if flip == "horizontal" else image[::-1]
    flipped_box = {"horizontal": [[29, 2, 39, 8]], "vertical": [[1, 12, 11, 18]]}.get(flip)
    flips = 0
    for seed in range(400):
        pixels, boxes, _ = apply(transform, image, box, seed=seed)
        if np.array_equal(pixels, image):
            assert boxes.tolist() == box
        else:
            np.testing.assert_array_equal(pixels, flipped_pixels)
            assert boxes.tolist() == flipped_box
            flips += 1
    if flip == "none":
        assert flips == 0
    else:
        assert 160 < flips < 240  # 4 standard deviations


def drawn_heights(transform, draws=300):
    return {apply(transform, noise(8, 16), seed=seed)[0].shape[0] for seed in range(draws)}


def test_sizes_are_drawn_from_the_choice_or_the_range():
    assert drawn_heights(make_transform(min_sizes=(4, 9, 6))) == {4, 6, 9}
    assert drawn_heights(make_transform(min_sizes=(4, 9), sampling="range")) == {4, 5, 6, 7, 8, 9}


def test_all_chance_comes_from_the_generator():
    transform = make_transform(min_sizes=(10, 90), sampling="range", flip="horizontal")
    first = apply(transform, noise(30, 40), [[1, 2, 3, 4]], seed=5)
    np.random.seed(1)  # noqa: NPY002
    again = apply(transform, noise(30, 40), [[1, 2, 3, 4]], seed=5)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_inputs_are_not_changed():
    image, boxes = noise(30, 40), np.array([[1, 2, 90, 4]], np.float32)
    before = image.copy(), boxes.copy()
    apply(make_transform(flip="horizontal"), image, boxes)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(boxes, before[1])


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("flip", [None, "horizontal", "vertical"])
def test_equals_detectron2_to_the_bit(flip):
    """Same size and same flip: the same image and boxes as Detectron2's own functions give."""
    transforms = pytest.importorskip("detectron2.data.transforms")
    utils = pytest.importorskip("detectron2.data.detection_utils")
    structures = pytest.importorskip("detectron2.structures")
    generator = np.random.default_rng(3)
    image = noise(61, 97)
    xywh = generator.uniform(-5, 100, (200, 4)).astype(np.float32)
    xywh[:, 2:] = xywh[:, 2:].clip(0)
    xywh[:50, 2:] = generator.uniform(0, 3e-5, (50, 2))
    augmentations = [transforms.ResizeShortestEdge((43,), 60, "choice")]
    if flip:
        augmentations.append(
            transforms.RandomFlip(
                prob=1.0, horizontal=flip == "horizontal", vertical=flip == "vertical"
            )
        )
    theirs = transforms.AugInput(image)
    applied = transforms.AugmentationList(augmentations)(theirs)
    size = theirs.image.shape[:2]
    annotations = [
        {"bbox": box.tolist(), "bbox_mode": structures.BoxMode.XYWH_ABS, "category_id": index}
        for index, box in enumerate(xywh)
    ]
    annotations = [utils.transform_instance_annotations(a, applied, size) for a in annotations]
    instances = utils.filter_empty_instances(utils.annotations_to_instances(annotations, size))

    ours = make_transform(min_sizes=(43,), max_size=60, flip=flip or "none")
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    for seed in range(100):
        pixels, our_boxes, classes = apply(ours, image, boxes, seed=seed)
        if np.array_equal(pixels, theirs.image):
            break
    np.testing.assert_array_equal(pixels, theirs.image)
    np.testing.assert_array_equal(our_boxes, instances.gt_boxes.tensor.numpy())
    np.testing.assert_array_equal(classes, instances.gt_classes.numpy())
    assert 0 < len(classes) < len(xywh)
