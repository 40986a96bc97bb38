"""Image files: those refused before a run, and unusual ones that must work."""

import importlib.util
import os
import struct
import time
import warnings
import zlib

import cv2
import numpy as np
import pytest
from coco_sets import damage, draw_noise
from PIL import ExifTags, Image

from cascade_det.data.coco import load_dataset
from cascade_det.data.image_check import _find_bad_images, check_image
from cascade_det.data.transforms import read_image
from cascade_det.errors import DatasetError

HEIGHT, WIDTH = 30, 40


@pytest.fixture
def picture():
    """Smooth, so that JPEG preserves it, with one marked corner."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([rows * 5, columns * 4, 200 - rows * 2 - columns], axis=2).astype(np.uint8)
    pixels[:8, :10] = (250, 30, 60)
    return pixels


def entry(path, height=HEIGHT, width=WIDTH):
    """The folder of an image, and its entry in a json."""
    return str(path.parent), {"id": 7, "file_name": path.name, "height": height, "width": width}


def bad_images(folder, entries, *, decode=False):
    return _find_bad_images(str(folder), entries, decode, lambda _: None)


def save(pixels, path, mode=None, **options):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# -- what has to work -----------------------------------------------------------------------------

GOOD = {
    "png": ("a.png", None, {}),
    "jpeg": ("a.jpg", None, {"quality": 95}),
    "progressive jpeg": ("a.jpg", None, {"quality": 95, "progressive": True}),
    "cmyk jpeg": ("a.jpg", "CMYK", {"quality": 95}),
    "grey jpeg": ("a.jpg", "L", {"quality": 95}),
    "grey png": ("a.png", "L", {}),
    "grey png with alpha": ("a.png", "LA", {}),
    "palette png": ("a.png", "P", {}),
    "black and white png": ("a.png", "1", {}),
    "png with alpha": ("a.png", "RGBA", {}),
    "16-bit png": ("a.png", "I;16", {}),
    "gif": ("a.gif", "P", {}),
    "bmp": ("a.bmp", None, {}),
    "webp": ("a.webp", None, {"lossless": True}),
    "tiff": ("a.tif", None, {}),
    "lzw tiff": ("a.tif", None, {"compression": "tiff_lzw"}),
    "16-bit tiff": ("a.tif", "I;16", {}),
    "jpeg 2000": ("a.jp2", None, {}),
    "ppm": ("a.ppm", None, {}),
}
# OpenCV makes another grey of these: it drops alpha in its own way, or has no conversion from CMYK
# with an inverted profile.
NOT_AS_OPENCV = {"grey png with alpha"}


@pytest.mark.parametrize("case", GOOD)
def test_good_images_pass_and_are_read_as_opencv_reads_them(tmp_path, picture, case):
    name, mode, options = GOOD[case]
    if mode == "I;16":
        grey = picture[..., 1].astype(np.uint16) * 256 + 77
        path = tmp_path / name
        Image.fromarray(grey).save(path)
    else:
        path = save(picture, tmp_path / name, mode, **options)
    assert check_image(*entry(path)) is None
    assert check_image(*entry(path), decode=True) is None
    ours = read_image(str(path), "BGR")
    assert ours.shape == (HEIGHT, WIDTH, 3)
    if mode != "I;16":
        with Image.open(path) as image:
            np.testing.assert_array_equal(ours[..., ::-1], np.asarray(image.convert("RGB")))
    theirs = cv2.imread(str(path), cv2.IMREAD_COLOR)
    # Not every OpenCV reads GIF.
    if theirs is not None and case not in NOT_AS_OPENCV:
        assert np.abs(ours.astype(int) - theirs).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_rotated_images_are_read_upright(tmp_path, picture, suffix, orientation):
    """Against the definition of EXIF's orientations, and Detectron2 if it is installed."""
    stored = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: picture.transpose(1, 0, 2)[::-1],
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: picture.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    save(np.ascontiguousarray(stored), path, exif=exif, **options)
    upright = read_image(str(path), "RGB")
    assert upright.shape == picture.shape
    assert np.abs(upright.astype(int) - picture).mean() < 3
    if suffix != "tif" and importlib.util.find_spec("detectron2"):
        theirs = importlib.import_module("detectron2.data.detection_utils")
        np.testing.assert_array_equal(upright, theirs.read_image(str(path), "RGB"))
    assert check_image(*entry(path)) is None
    issue = check_image(*entry(path, WIDTH, HEIGHT))
    if orientation <= 4:
        assert issue.kind == "image whose width and height are swapped in the json"
    elif suffix != "tif":  # Pillow does not say how a TIFF was stored
        assert issue.kind == "image whose size in the json is that before its EXIF rotation"
    assert f"{WIDTH}x{HEIGHT} in the file, {HEIGHT}x{WIDTH} in the json" in issue.detail


def test_a_png_with_its_exif_data_behind_the_pixels(tmp_path, picture):
    path = save(picture, tmp_path / "a.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = path.read_bytes()
    end = data.index(b"IEND") - 4
    late = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    path.write_bytes(data[:end] + late + data[end:])
    assert check_image(*entry(path, WIDTH, HEIGHT)) is None
    assert read_image(str(path), "RGB").shape == (WIDTH, HEIGHT, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
def test_bytes_behind_the_end_do_no_harm(tmp_path, picture, suffix):
    path = save(picture, tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes() + b"\0made by a camera\xff\xd8\0")
    assert check_image(*entry(path)) is None
    assert read_image(str(path), "RGB").shape == picture.shape


def test_a_camera_s_jpeg_with_further_pictures_is_no_animation(tmp_path, picture):
    path = tmp_path / "a.jpg"
    others = [Image.fromarray(picture[::2, ::2])]
    Image.fromarray(picture).save(path, "MPO", save_all=True, append_images=others)
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert check_image(*entry(path)) is None


def test_a_tiff_with_previews_has_one_picture(tmp_path, picture):
    path = tmp_path / "a.tif"
    preview = Image.fromarray(np.ascontiguousarray(picture[::2, ::2]))
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(picture).save(path, save_all=True, append_images=[preview])
    with Image.open(path) as image:
        image.seek(1)
        if image.tag_v2.get(254) != 1:
            pytest.skip("this Pillow cannot mark a page as a preview")
    assert check_image(*entry(path)) is None


def test_real_photographs_pass(bccd):
    files = sorted((bccd / "images").iterdir())[:40]
    entries = []
    for number, path in enumerate(files):
        height, width = cv2.imread(str(path)).shape[:2]
        entries.append(entry(path, height, width)[1] | {"id": number})
    assert bad_images(bccd / "images", entries) == {}
    assert bad_images(bccd / "images", entries, decode=True) == {}


# -- what is refused ------------------------------------------------------------------------------


def test_missing_and_empty_files_and_what_is_none(tmp_path):
    assert check_image(*entry(tmp_path / "no.png")).kind == "missing image file"
    (tmp_path / "file").write_text("")
    assert check_image(*entry(tmp_path / "file")).kind == "empty image file"
    assert check_image(*entry(tmp_path / "file/a.png")).kind == "image file that cannot be read"
    assert check_image(*entry(tmp_path)).kind == "image that is not a file"
    os.mkfifo(tmp_path / "pipe")
    assert check_image(*entry(tmp_path / "pipe")).kind == "image that is not a file"
    (tmp_path / "a.jpg").write_text("<html>404 not found</html>")
    issue = check_image(*entry(tmp_path / "a.jpg"))
    assert issue.kind == "image file that is truncated or not an image"
    assert issue.detail.startswith("image 7 ('a.jpg'): cannot be read as an image")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("case", [case for case in GOOD if "16-bit" not in case])
def test_truncated_files_are_found_without_decoding_all(tmp_path, picture, case, kept):
    name, mode, options = GOOD[case]
    path = save(picture, tmp_path / name, mode, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    try:
        read_image(str(path), "RGB")
    except DatasetError:
        assert check_image(*entry(path)).kind == "image file that is truncated or not an image"
    else:  # only an end without pixels is gone
        assert kept == 0.95
        assert check_image(*entry(path)) is None


def test_damage_in_the_middle_is_found_by_decoding(tmp_path):
    path = tmp_path / "a.png"
    draw_noise(path, HEIGHT, WIDTH)
    damage(path)
    assert check_image(*entry(path)) is None
    issue = check_image(*entry(path), decode=True)
    assert issue.kind == "image file that is truncated or not an image"


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animations_are_refused(tmp_path, picture, suffix):
    path = tmp_path / f"a.{suffix}"
    others = [Image.fromarray(picture[::-1])]
    Image.fromarray(picture).save(path, save_all=True, append_images=others)
    assert check_image(*entry(path)).kind.startswith("image of several frames or pages")


def test_floating_point_pixels_are_refused(tmp_path, picture):
    path = save(picture[..., 0].astype(np.float32) / 255, tmp_path / "a.tif")
    assert check_image(*entry(path)).kind.startswith("image of floating-point pixels")


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    """A well-formed head of 60,000 x 60,000 pixels, which would take 10 GB."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    chunks = [(b"IHDR", head), (b"IDAT", pixels), (b"IEND", b"")]
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    issue = check_image(*entry(path, 60_000, 60_000))
    assert issue.kind == "enormous image (a decompression bomb?)"
    assert "3600000000 pixels" in issue.detail


def test_any_bytes_give_an_issue_or_a_size(tmp_path, picture):
    """Files damaged at random never raise, and what passes the decoding check can be read."""
    generator = np.random.default_rng(5)
    for suffix in ("jpg", "png", "gif", "bmp", "webp", "tif"):
        whole = save(picture, tmp_path / f"whole.{suffix}").read_bytes()
        for _ in range(25):
            data = np.frombuffer(whole, np.uint8).copy()
            places = generator.integers(0, len(data), generator.integers(1, 12))
            data[places] = generator.integers(0, 256, len(places))
            path = tmp_path / f"damaged.{suffix}"
            path.write_bytes(data.tobytes()[: generator.integers(1, len(data) + 1)])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_image(*entry(path))
                if check_image(*entry(path), decode=True) is None:
                    assert read_image(str(path), "RGB").shape == picture.shape


# -- whole data sets ------------------------------------------------------------------------------


def test_all_issues_of_files_are_listed_together_and_can_be_skipped(coco):
    images = [coco.image(number) for number in range(1, 10)]
    source = coco.write(images, [coco.box(n, n) for n in range(1, 10)])
    root = source.image_root
    for number in (2, 3, 4, 5):
        (root / f"{number}.png").unlink()
    (root / "6.png").write_bytes(b"")
    (root / "7.png").write_bytes((root / "7.png").read_bytes()[:300])
    Image.new("RGB", (31, 40)).save(root / "8.png")
    with pytest.raises(DatasetError) as caught:
        load_dataset(source)
    message = str(caught.value)
    missing = ", ".join(f"image {n} ('{n}.png')" for n in (2, 3, 4))
    assert f"4 x missing image file: {missing}, ...\n" in message
    assert "1 x empty image file: image 6 ('6.png')\n" in message
    assert "1 x image file that is truncated or not an image: image 7 ('7.png'): " in message
    assert "1 x image whose size is not that in the json: image 8 ('8.png'): 31x40 in" in message
    dataset = load_dataset(source, "skip", keep_ground_truth=True)
    assert [record.image_id for record in dataset.records] == [1, 9]
    assert [image["id"] for image in dataset.ground_truth["images"]] == [1, 9]
    assert [box["image_id"] for box in dataset.ground_truth["annotations"]] == [1, 9]


def test_decoding_leaves_damaged_images_out_of_images_and_boxes(coco):
    source = coco.write([coco.image(n) for n in (1, 2)], [coco.box(n, n) for n in (1, 2)])
    draw_noise(source.image_root / "2.png", 30, 40)
    damage(source.image_root / "2.png")
    assert len(load_dataset(source).records) == 2
    with pytest.raises(
        DatasetError, match=r"truncated or not an image: image 2.*\n.*set --x to 'skip'"
    ):
        load_dataset(source, decode=True, option="--x")
    dataset = load_dataset(source, "skip", decode=True, keep_ground_truth=True)
    assert [record.image_id for record in dataset.records] == [1]
    assert [image["id"] for image in dataset.ground_truth["images"]] == [1]
    assert [box["image_id"] for box in dataset.ground_truth["annotations"]] == [1]
    assert dataset.left_out_images == {2}
    assert dataset.left_out == {"image file that is truncated or not an image": 1}


def test_many_images_are_each_looked_at(tmp_path, picture):
    path = save(picture, tmp_path / "a.png")
    wrong = {0, 63, 64, 127, 200, 299}
    entries = [entry(path, HEIGHT + (n in wrong))[1] | {"id": n} for n in range(300)]
    assert set(bad_images(tmp_path, entries)) == wrong


def test_an_interrupt_does_not_wait_for_the_rest(tmp_path, picture, monkeypatch):
    path = save(picture, tmp_path / "a.png")
    seen = []

    def interrupted(_, entry, *, decode):
        seen.append(entry)
        time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr("cascade_det.data.image_check.check_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bad_images(tmp_path, [entry(path)[1]] * 100_000)
    assert len(seen) < 1000
