"""Formats of semantic segmentation, on files written by hand: good ones, bad ones, hostile ones."""

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from semantic_sets import (
    CLASSES,
    image_of,
    labels_of,
    load,
    save,
    source_of,
    write_pair,
)

from cascade_det.config.run_keys import SEMANTIC_FORMATS
from cascade_det.data.image_names import LinkRule
from cascade_det.data.semantic import FORMATS, find_semantic_dataset, read_labels
from cascade_det.data.semantic.check import check_semantic
from cascade_det.data.semantic.reading import read_pair
from cascade_det.errors import DatasetError

h5py = pytest.importorskip("h5py")


def test_the_formats_of_the_keys_are_those_that_are_read():
    assert tuple(FORMATS) == SEMANTIC_FORMATS


# -- folders --------------------------------------------------------------------------------------


def test_pairs_by_stem(tmp_path):
    first = write_pair(tmp_path, "b", seed=1)
    labels = labels_of(6, 8, seed=2)
    labels[0, :5] = 255
    save(tmp_path / "images" / "a.jpg", image_of(labels))
    save(tmp_path / "labels" / "a.png", labels)
    (tmp_path / "images" / "Thumbs.db").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_text("no image")
    dataset = load(tmp_path)
    assert dataset.class_names == CLASSES
    assert dataset.ignore_value == 255
    assert [Path(record.file_name).name for record in dataset.records] == ["a.jpg", "b.png"]
    assert [record.image_id for record in dataset.records] == [0, 1]
    assert [(record.height, record.width) for record in dataset.records] == [(6, 8)] * 2
    np.testing.assert_array_equal(read_labels(dataset.records[0]), labels)
    image, found = read_pair(dataset.records[1], "BGR")
    np.testing.assert_array_equal(found, first)
    np.testing.assert_array_equal(image, image_of(first))
    both = np.concatenate([first.ravel(), labels.ravel()])
    assert dataset.class_pixels == tuple((both == k).sum() for k in range(3))


def test_a_palette_image_holds_the_index_and_not_the_colour(tmp_path):
    labels = write_pair(tmp_path, "a")
    picture = Image.fromarray(labels, "P")
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    picture.save(tmp_path / "labels" / "a.png")
    np.testing.assert_array_equal(read_labels(load(tmp_path).records[0]), labels)


def spoil_partner(folder):
    os.remove(folder / "labels" / "bad.png")
    return "without a partner", "images/bad.png"


def spoil_image(folder):
    os.remove(folder / "images" / "bad.png")
    return "without a partner", "labels/bad.png"


def spoil_size(folder):
    save(folder / "labels" / "bad.png", labels_of(8, 6))
    return "label image has another size", "8x6, not 6x8"


def spoil_value(folder):
    save(folder / "labels" / "bad.png", labels_of(6, 8, classes=5))
    return "neither a class nor ignored", "3, 4 (classes are 0 to 2)"


def spoil_colour(folder):
    save(folder / "labels" / "bad.png", image_of(labels_of(6, 8)))
    return "cannot be used", "mode 'RGB'"


def spoil_depth(folder):
    save(folder / "labels" / "bad.png", labels_of(6, 8).astype(np.uint16))
    return "cannot be used", "mode 'I;16'"


def spoil_label_file(folder):
    (folder / "labels" / "bad.png").write_bytes(b"no png")
    return "cannot be used", "cannot be read as an image"


def spoil_end_of_image(folder):
    content = (folder / "images" / "bad.png").read_bytes()
    (folder / "images" / "bad.png").write_bytes(content[: len(content) // 2])
    return "cannot be used", "images/bad.png: cannot be read as an image"


def spoil_stem(folder):
    save(folder / "images" / "bad.bmp", image_of(labels_of(6, 8)))
    return "same name but for the ending", "bad.bmp and bad.png"


FAULTS = [
    spoil_partner,
    spoil_image,
    spoil_size,
    spoil_value,
    spoil_colour,
    spoil_depth,
    spoil_label_file,
    spoil_end_of_image,
    spoil_stem,
]


@pytest.mark.parametrize("spoil", FAULTS)
def test_a_fault_is_named_with_its_file(tmp_path, spoil):
    write_pair(tmp_path, "good")
    write_pair(tmp_path, "bad")
    kind, detail = spoil(tmp_path)
    with pytest.raises(DatasetError, match="bad data") as raised:
        load(tmp_path)
    message = str(raised.value)
    assert f"1 x {'image whose ' * (spoil is spoil_size)}" in message
    assert kind in message
    assert detail in message
    assert "ON_BAD_DATA" in message
    names = [Path(record.file_name).stem for record in load(tmp_path, on_bad_data="skip").records]
    assert names == (["bad", "good"] if spoil is spoil_stem else ["good"])


def test_faults_are_listed_together_and_counted_when_skipped(tmp_path):
    for stem in ("a", "b", "c", "good"):
        write_pair(tmp_path, stem)
    os.remove(tmp_path / "labels" / "a.png")
    for stem in ("b", "c"):
        save(tmp_path / "labels" / f"{stem}.png", np.full((6, 8), 77, np.uint8))
    with pytest.raises(DatasetError) as raised:
        load(tmp_path)
    for text in ("1 x file without", "images/a.png", "2 x label that", "b.png: 77", "c.png: 77"):
        assert text in str(raised.value)
    dataset = load(tmp_path, on_bad_data="skip")
    assert sorted(dataset.left_out.values()) == [1, 2]
    assert [record.image_id for record in dataset.records] == [0]


def test_damage_inside_an_image_is_found_by_decoding(tmp_path):
    write_pair(tmp_path, "a", 64, 64)
    path = tmp_path / "images" / "a.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert len(load(tmp_path).records) == 1
    with pytest.raises(DatasetError, match=r"a\.png: cannot be read"):
        load(tmp_path, decode=True)


def test_processes_share_the_work_and_find_the_same(pairs):
    save(pairs / "labels" / "3.png", np.full((24, 40), 9, np.uint8))
    alone = check_semantic(source_of(pairs))
    parts = []

    def stop(part):
        parts.append(part)
        raise InterruptedError

    for rank in range(2):
        with pytest.raises(InterruptedError):
            check_semantic(source_of(pairs), share=(rank, 2), gather=stop)
    for rank in range(2):
        found = check_semantic(source_of(pairs), share=(rank, 2), gather=lambda _: parts)
        assert found.records == alone.records
        assert found.bad.counts == alone.bad.counts
        np.testing.assert_array_equal(found.pixels, alone.pixels)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_an_empty_data_set_is_an_error(tmp_path, kind):
    for name in ("images", "labels", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(DatasetError, match=f"data set 'set': there is no .* in {tmp_path}"):
        load(tmp_path, kind)


def test_a_link_out_of_the_folder_is_followed_only_as_the_rule_says(tmp_path):
    inside, outside = tmp_path / "data" / "set", tmp_path / "elsewhere"
    write_pair(inside, "good")
    write_pair(inside, "bad")
    write_pair(outside, "bad")
    os.remove(inside / "labels" / "bad.png")
    (inside / "labels" / "bad.png").symlink_to(outside / "labels" / "bad.png")
    for follow in ("near", "none"):
        with pytest.raises(DatasetError, match=f"link out of its folder.*'{follow}'"):
            load(inside, links=LinkRule(follow))
    assert len(load(inside, links=LinkRule("all")).records) == 2


# -- sources --------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_declaration(tmp_path):
    own = [("a", "polyp", str(tmp_path))]
    with pytest.raises(DatasetError, match=r"no data set 'b' .* known names: a"):
        find_semantic_dataset("b", own)
    with pytest.raises(DatasetError, match=f"no folder {tmp_path}/images. Correct the entry 'a'"):
        find_semantic_dataset("a", own)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    with pytest.raises(DatasetError, match="SEMANTIC_CLASSES has 0 names"):
        source_of(tmp_path, classes=())
    with pytest.raises(DatasetError, match="IGNORE_VALUE is -1; label images hold 0 to 255"):
        source_of(tmp_path, ignore_value=-1)


# -- polyps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [False, True])
def test_a_mask_is_foreground_from_grey_level_128(tmp_path, colour):
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    save(tmp_path / "images" / "1.png", image_of(grey // 8))
    save(tmp_path / "masks" / "1.png", np.repeat(grey[..., None], 3, 2) if colour else grey)
    dataset = load(tmp_path, "polyp")
    assert dataset.class_names == ("background", "polyp")
    assert read_labels(dataset.records[0]).tolist() == [[0, 0, 1, 1]]
    assert dataset.class_pixels == (2, 2)


def test_polyps_without_partner_are_told(tmp_path):
    for image, mask in (("1", "1"), ("10", "10_mask"), ("2", "")):
        save(tmp_path / "images" / f"{image}.png", image_of(labels_of(4, 4)))
        if mask:
            save(tmp_path / "masks" / f"{mask}.jpg", labels_of(4, 4))
    with pytest.raises(DatasetError, match="3 x file without a partner") as raised:
        load(tmp_path, "polyp")
    for name in ("images/10.png", "masks/10_mask.jpg", "images/2.png"):
        assert name in str(raised.value)


# -- arrays ---------------------------------------------------------------------------------------


def write_npz(path, image, labels, keys=("image", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **dict(zip(keys, (image, labels), strict=True)))


def write_h5(path, image, labels):
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, labels


def test_synapse_slices_and_volumes(tmp_path):
    random = np.random.default_rng(0)
    slice_image, volume_image = random.random((6, 8), np.float32), random.random((3, 6, 8))
    volume_labels = np.stack([labels_of(6, 8, 9, seed) for seed in range(3)])
    write_npz(tmp_path / "case0005_slice000.npz", slice_image, labels_of(6, 8, 9, 7))
    write_h5(tmp_path / "case0008.npy.h5", volume_image, volume_labels.astype(np.float32))
    dataset = load(tmp_path, "synapse")
    assert dataset.class_names[4] == "gallbladder"
    found = [(record.volume, record.slice_index) for record in dataset.records]
    assert found == [("", None), ("case0008", 0), ("case0008", 1), ("case0008", 2)]
    assert [record.image_id for record in dataset.records] == [0, 1, 2, 3]
    image, labels = read_pair(dataset.records[0], "BGR")
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, 255 * slice_image)
    np.testing.assert_array_equal(labels, labels_of(6, 8, 9, 7))
    for record, levels, truth in zip(dataset.records[1:], volume_image, volume_labels, strict=True):
        image, labels = read_pair(record, "BGR")
        np.testing.assert_allclose(image, 255 * levels, rtol=1e-6)
        np.testing.assert_array_equal(labels, truth)
        np.testing.assert_array_equal(read_labels(record), truth)


def test_the_fourteen_labels_of_synapse_become_nine(tmp_path):
    labels = np.arange(14, dtype=np.float32).reshape(2, 7)
    write_npz(tmp_path / "a.npz", np.zeros((2, 7), np.float32), labels)
    dataset = load(tmp_path, "synapse-14")
    expected = [[0, 1, 2, 3, 4, 0, 6], [7, 8, 0, 0, 5, 0, 0]]
    assert read_labels(dataset.records[0]).tolist() == expected
    assert dataset.class_pixels == (6, 1, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(DatasetError, match=r"9, 10, 11, 12, 13 \(classes are 0 to 8"):
        load(tmp_path, "synapse")


def test_acdc_slices_and_volumes(tmp_path):
    keys = ("img", "label")
    volume = np.stack([labels_of(5, 4, 4, seed) for seed in range(2)])
    write_npz(tmp_path / "a.npz", np.full((5, 4), 0.5), labels_of(5, 4, 4), keys)
    write_npz(tmp_path / "b.npz", np.zeros((2, 5, 4), np.uint8), volume, keys)
    dataset = load(tmp_path, "acdc")
    assert dataset.class_names == (
        "background",
        "right ventricle",
        "myocardium",
        "left ventricle",
    )
    assert [record.volume for record in dataset.records] == ["", "b", "b"]
    np.testing.assert_array_equal(read_labels(dataset.records[2]), volume[1])
    assert read_pair(dataset.records[0], "RGB")[0][0, 0] == 127.5
    assert read_pair(dataset.records[1], "RGB")[0].dtype == np.uint8


GREY = np.zeros((4, 5), np.float32)
LABELS = np.zeros((4, 5), np.uint8)


@pytest.mark.parametrize(
    ("image", "labels", "message"),
    [
        (GREY, np.zeros((5, 4), np.uint8), r"shape \[4, 5\], but the labels have \[5, 4\]"),
        (GREY[0], LABELS[0], r"shape \[5\], not that of a slice"),
        (GREY + np.nan, LABELS, "not finite"),
        (GREY.astype(np.int16), LABELS, "image holds int16; give uint8, or floating-point"),
        (GREY, LABELS + 0.5, "whole numbers from 0 to 255, not 0.5"),
        (GREY, LABELS.astype(np.int16) - 1, "whole numbers from 0 to 255, not -1"),
        (GREY, LABELS + np.nan, "whole numbers from 0 to 255, not nan"),
        (GREY, np.full((4, 5), "a"), "label array holds <U1, not numbers"),
    ],
)
def test_a_bad_array_is_named(tmp_path, image, labels, message):
    write_npz(tmp_path / "bad.npz", image, labels)
    with pytest.raises(DatasetError, match=message) as raised:
        load(tmp_path, "synapse")
    assert "bad.npz" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no archive", b"\x93NUMPY\1\0v\0{", b"\x89HDF\r"])
@pytest.mark.parametrize("name", ["bad.npz", "bad.npy.h5"])
def test_a_file_that_is_no_array_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=f"{name}: cannot be read as arrays"):
        load(tmp_path, "synapse")


def test_a_missing_key_is_told_with_those_there_are(tmp_path):
    write_npz(tmp_path / "a.npz", GREY, LABELS, ("img", "label"))
    with pytest.raises(DatasetError, match="no array 'image'; it has img, label"):
        load(tmp_path, "synapse")


def test_unusual_grey_levels_are_noted(tmp_path):
    write_npz(tmp_path / "a.npz", GREY - 2, LABELS)
    notes = check_semantic(source_of(tmp_path, "synapse")).notes
    assert ["-2 to 0" in text for kind, (text, *_) in notes.examples.items() if "[0, 1]" in kind]


class Attack:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("whole_file", [False, True])
def test_a_pickle_is_never_run(tmp_path, whole_file):
    victim = tmp_path / "ran"
    if whole_file:
        (tmp_path / "bad.npz").write_bytes(pickle.dumps(Attack(victim)))
    else:
        write_npz(tmp_path / "bad.npz", np.array([Attack(victim)], object), LABELS)
    with pytest.raises(DatasetError, match="allow_pickle"):
        load(tmp_path, "synapse")
    assert not victim.exists()
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Attack(victim)], object))
        archive.writestr("image.npy", buffer.getvalue())
        archive.writestr("label.npy", buffer.getvalue())
    with pytest.raises(DatasetError, match="Object arrays"):
        load(tmp_path, "synapse")
    assert not victim.exists()


def test_an_h5_file_leads_to_no_other_file(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_h5(elsewhere / "secret.h5", GREY, LABELS)
    (elsewhere / "raw").write_bytes(GREY.tobytes())
    folder = tmp_path / "set"
    folder.mkdir()
    with h5py.File(folder / "a.npy.h5", "w") as file:
        file["image"] = h5py.ExternalLink(str(elsewhere / "secret.h5"), "image")
        file["label"] = LABELS
    with h5py.File(folder / "b.npy.h5", "w") as file:
        layout = h5py.VirtualLayout((4, 5), np.float32)
        layout[:] = h5py.VirtualSource(str(elsewhere / "secret.h5"), "image", (4, 5))
        file.create_virtual_dataset("image", layout)
        file["label"] = LABELS
    with h5py.File(folder / "c.npy.h5", "w") as file:
        raw = [(str(elsewhere / "raw"), 0, GREY.nbytes)]
        file.create_dataset("image", (4, 5), np.float32, external=raw)
        file["label"] = LABELS
    with h5py.File(folder / "d.npy.h5", "w") as file:
        file.create_group("image")
        file["label"] = LABELS
    with pytest.raises(DatasetError, match="4 x file that cannot be used"):
        load(folder, "synapse")
    write_h5(folder / "good.npy.h5", GREY, LABELS)
    assert len(load(folder, "synapse", on_bad_data="skip").records) == 1
    kinds = check_semantic(source_of(folder, "synapse")).bad.examples["file that cannot be used"]
    for text, part in zip(
        kinds, ("is a link", "another file", "another file", "group"), strict=True
    ):
        assert part in text


def test_h5py_is_asked_for(tmp_path, monkeypatch):
    write_h5(tmp_path / "a.npy.h5", GREY, LABELS)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DatasetError, match=r"pip install 'cascade_det\[medical\]'"):
        load(tmp_path, "synapse")
