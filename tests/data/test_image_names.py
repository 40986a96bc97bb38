"""Data sets made of links, such as DVC's: which are followed, and the error messages."""

import json
import os

import pytest
from PIL import Image

from cascade_det.data.coco import load_dataset
from cascade_det.data.image_names import LinkRule
from cascade_det.data.loader import build_test_loader
from cascade_det.errors import DatasetError


@pytest.fixture
def far(tmp_path_factory):
    """A folder that has nothing to do with the data set."""
    return tmp_path_factory.mktemp("far")


@pytest.fixture
def linked(coco):
    """Makes ``1.png`` of a data set a link to a file in another folder."""

    def make(folder, *, name="1.png"):
        source = coco.write([coco.image(1, file_name=name)], [coco.box(1, 1)])
        folder.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (40, 30)).save(folder / "abc.png")
        (source.image_root / name).unlink(missing_ok=True)
        (source.image_root / name).parent.mkdir(exist_ok=True)
        (source.image_root / name).symlink_to(folder / "abc.png")
        return source

    return make


def refused(source, links):
    with pytest.raises(DatasetError) as caught:
        load_dataset(source, links=links)
    assert load_dataset(source, "skip", links=links).records == []
    return str(caught.value)


def test_by_default_links_are_followed_to_the_folder_of_the_json(coco, linked):
    source = linked(coco.folder / "cache" / "ab")
    assert [r.file_name for r in load_dataset(source).records] == [str(source.image_root / "1.png")]
    assert len(load_dataset(source, links=LinkRule("all")).records) == 1


def test_and_to_the_working_directory(far, linked, monkeypatch):
    source = linked(far / ".dvc" / "cache")
    assert "FOLLOW_LINKS" in refused(source, LinkRule())
    monkeypatch.chdir(far)
    assert len(load_dataset(source).records) == 1


def test_the_root_of_the_file_system_is_not_near_everything(far, linked, monkeypatch):
    source = linked(far)
    monkeypatch.chdir("/")
    assert "FOLLOW_LINKS" in refused(source, LinkRule())


def test_a_link_elsewhere_is_named_with_its_target_and_the_key(far, linked):
    source = linked(far)
    link, target = repr(str(source.image_root / "1.png")), repr(str(far / "abc.png"))
    said = refused(source, LinkRule())
    assert (
        "1 x image behind a link out of its folder, which CASCADE.FOLLOW_LINKS 'near' does not "
        "follow ('all' anywhere): image 1 (file_name '1.png', "
    ) in said
    assert f"): {link} leads to {target}" in said
    assert len(load_dataset(source, links=LinkRule("all")).records) == 1


def test_a_linked_folder_is_named_and_not_the_file_in_it(coco, far):
    source = coco.write([coco.image(1, file_name="batch/1.png")], [coco.box(1, 1)])
    Image.new("RGB", (40, 30)).save(far / "1.png")
    (source.image_root / "batch").symlink_to(far)
    said = refused(source, LinkRule())
    assert f"{str(source.image_root / 'batch')!r} leads to {str(far / '1.png')!r}" in said
    assert len(load_dataset(source, links=LinkRule("all")).records) == 1


def test_none_follows_no_link_out_of_the_folder(coco, linked):
    source = linked(coco.folder / "cache")
    said = refused(source, LinkRule("none", "--links"))
    assert "which --links 'none' does not follow ('near' follows it to the folder of" in said
    (source.image_root / "1.png").unlink()
    Image.new("RGB", (40, 30)).save(source.image_root / "here.png")
    (source.image_root / "1.png").symlink_to("here.png")
    assert len(load_dataset(source, links=LinkRule("none")).records) == 1


@pytest.mark.parametrize("follow", ["near", "all", "none"])
def test_dots_and_absolute_paths_are_refused_whatever_links_are_followed(coco, far, follow):
    """Even if a link on the path makes the dots appear to stay inside."""
    names = ["../cache/1.png", str(coco.folder / "cache" / "1.png"), "deep/../1.png", "deep/../.."]
    images = [coco.image(n, file_name=name) for n, name in enumerate(names)]
    source = coco.write(images, [])
    (coco.folder / "cache" / "inner").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(coco.folder / "cache" / "1.png")
    (source.image_root / "deep").symlink_to(coco.folder / "cache" / "inner")
    said = refused(source, LinkRule(follow))
    assert "4 x image whose 'file_name' leaves the image folder" in said
    assert said.count(" x ") == 1


def test_a_linked_json_is_near_where_the_link_is(coco, far, linked):
    """DVC links the json into its cache as well."""
    source = linked(coco.folder / "cache")
    source.json_file.rename(far / "0123")
    source.json_file.symlink_to(far / "0123")
    assert len(load_dataset(source).records) == 1


def test_a_link_to_a_link_counts_by_where_it_ends(coco, far, linked):
    source = linked(far)
    (coco.folder / "middle.png").symlink_to(far / "abc.png")
    (source.image_root / "1.png").unlink()
    (source.image_root / "1.png").symlink_to("../middle.png")
    assert repr(str(far / "abc.png")) in refused(source, LinkRule())


def test_a_link_to_nowhere_is_a_missing_image(coco, linked):
    source = linked(coco.folder / "cache")
    os.remove(coco.folder / "cache" / "abc.png")
    assert "missing image file: image 1 ('1.png')" in refused(source, LinkRule())


def test_without_a_look_at_images_links_do_not_matter(far, linked):
    assert len(load_dataset(linked(far), check_images=False).records) == 1


# -- names that no terminal should see, and no encoder takes ---------------------------------------

NAMES = {
    "latin-1": "gr\udcf6\udcdfe.png",
    "escape": "a\x1b[2Jb.png",
    "new line": "a\nb.png",
    "right to left": "a\u202egnp.png",
    "backslash": "a\\b.png",
    "a drive that is a folder": "C:/1.png",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_odd_names_are_read_and_shown_escaped(coco, name):
    source = coco.write([], [], name="set")
    content = json.dumps(
        {"images": [coco.image(1, file_name=name)], "categories": [*coco.categories]}
    )
    source.json_file.write_text(content)
    (source.image_root / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(source.image_root / name)
    dataset = load_dataset(source, decode=True)
    assert [os.path.relpath(r.file_name, source.image_root) for r in dataset.records] == [name]
    (source.image_root / name).unlink()
    with pytest.raises(DatasetError) as caught:
        load_dataset(source)
    said = str(caught.value)
    assert "missing image file" in said
    assert said.isascii()
    assert all(character.isprintable() or character == "\n" for character in said)
    assert len(said.splitlines()) == 3


def test_a_name_that_is_no_text_comes_through_a_worker(coco):
    name = NAMES["latin-1"]
    source = coco.write([coco.image(1, file_name=name)], [coco.box(1, 1)])
    Image.new("RGB", (40, 30)).save(source.image_root / name)
    arguments = {"min_sizes": (20,), "max_size": 40, "image_format": "RGB", "num_workers": 1}
    loader = build_test_loader(load_dataset(source), images_per_batch=1, **arguments)
    assert [sample["file_name"] for [sample] in loader] == [str(source.image_root / name)]
