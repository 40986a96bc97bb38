"""The command on small data sets with known contents and faults."""

import json
from pathlib import Path

import numpy as np
import pytest
from coco_sets import damage
from PIL import Image

from cascade_det.commands import check_data

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules" / "instant_test.yaml"
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "dog"}]


def box(number, image_id, bbox, category_id=1, **rest):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "iscrowd": 0,
    } | rest


@pytest.fixture
def folder(tmp_path):
    """Four images, the last of them empty, and boxes of every size."""
    generator = np.random.default_rng(2)
    images = []
    for number, (width, height) in enumerate([(200, 150), (200, 150), (64, 48), (50, 60)], 1):
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        entry = {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        images.append(entry)
    boxes = [
        box(1, 1, [0, 0, 10, 10]),
        box(2, 1, [5, 5, 50, 50]),
        box(3, 1, [5, 5, 150, 120], category_id=2),
        box(4, 2, [1, 1, 40, 40], iscrowd=1),
        box(5, 3, [1, 1, 20, 20], category_id=2),
    ]
    write(tmp_path, images, boxes)
    return tmp_path


def write(folder, images, boxes, categories=CATEGORIES):
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))


def read(folder):
    content = json.loads((folder / "set.json").read_text())
    return content["images"], content["annotations"]


def test_kinds_of_masks_are_counted(folder):
    images, boxes = read(folder)
    triangle, bow = [1, 1, 9, 1, 1, 9], [0, 0, 8, 8, 8, 0, 0, 8]
    masks = [
        [triangle, [1, 2]],
        {"size": [150, 200], "counts": [20, 5, 29975]},
        None,
        [[30, 500, 40, 500, 30, 510]],
        [bow],
    ]
    boxes = [entry | {"segmentation": mask} for entry, mask in zip(boxes, masks, strict=True)]
    boxes.append(box(6, 3, [1, 1, 20, 20], segmentation=[[1, 1, 2, 2, 3, 3]]))
    boxes.append(box(7, 3, [5, 1, 20, 20], segmentation={"size": [64, 48], "counts": [64 * 48]}))
    write(folder, images, boxes)
    assert "masks: RLE" not in check(folder)[1]["figures"]
    status, found = check(folder, "--masks")
    assert status == 1
    kinds = ("polygons", "RLE", "none")
    assert [found["figures"][f"masks: {kind}"] for kind in kinds] == [4, 1, 1]
    (problem,) = found["problems"]
    assert problem == "mask whose RLE has another 'size' than its image, [height, width]"
    counts = {kind: entry["count"] for kind, entry in found["notes"].items()}
    expected = {
        "polygon of fewer than 3 points, or of half a point (left out)": 1,
        "object without a mask": 1,
        "mask of no area": 1,
        "mask outside its image": 1,
        "polygon that crosses itself (and is filled by the even-odd rule)": 1,
    }
    assert counts.items() >= expected.items()


def check(folder, *options):
    out = folder / "findings.json"
    status = check_data.main(["--json", str(folder / "set.json"), "--json-out", str(out), *options])
    return status, json.loads(out.read_text())["set"]


def test_figures_of_a_good_data_set(folder, capsys):
    status, found = check(folder)
    assert status == 0
    assert found["problems"] == {}
    assert found["figures"] == {
        "usable images": 4,
        "with boxes": 2,
        "boxes": 5,
        "of them crowds": 1,
        "small boxes": 2,
        "medium boxes": 2,
        "large boxes": 1,
        "categories": 3,
        "image sizes": 3,
        "smallest image": "50x60",
        "largest image": "200x150",
        "most common size": "200x150 (2 images)",
    }
    assert [(row["boxes"], row["images"]) for row in found["categories"]] == [
        (3, 2),
        (2, 2),
        (0, 0),
    ]
    printed = capsys.readouterr().out
    assert "No problems." in printed
    for row in ("| medium boxes ", "|    1 | cat    |       3 |        2 |"):
        assert row in printed


def test_notes(folder):
    images, boxes = read(folder)
    images.append(images[2] | {"id": 9})
    boxes += [
        box(10, 9, [3, 3, 0, 5]),
        box(11, 9, [3, 3, 1.5, 5]),
        box(12, 9, [60, 3, 9, 5]),
        box(13, 9, [60, 3, 4.9, 5]),
        box(14, 9, [60, 3, 4.9, 5]),
    ]
    write(folder, images, boxes)
    status, found = check(folder)
    assert status == 0
    notes = {kind: (note["count"], note["examples"]) for kind, note in found["notes"].items()}
    assert notes == {
        "box of zero width or height": (
            1,
            ["annotation 10 (image_id 9, category_id 1, bbox [3, 3, 0, 5])"],
        ),
        "image without a box that is not a crowd": (2, ["image 2 ('2.png')", "image 4 ('4.png')"]),
        "box with a side below 2 pixels": (1, ["annotation 11 (image 9, bbox [3, 3, 1.5, 5])"]),
        "box that is partly outside its image (and is clipped)": (
            1,
            ["annotation 12 (image 9, bbox [60, 3, 9, 5])"],
        ),
        "duplicate box of the same class": (
            1,
            ["annotation 14 (image 9, bbox [60, 3, 4.9, 5])"],
        ),
        "file used by several images": (1, ["'3.png'"]),
        "category without a box": (1, ["'dog'"]),
        "category that shares its name with another": (
            2,
            ["category 2 ('dog')", "category 5 ('dog')"],
        ),
        "gap in the ids of categories": (1, ["2 to 5"]),
    }


def test_problems_are_counted_and_the_status_tells(folder, capsys):
    images, boxes = read(folder)
    boxes += [box(20 + n, 1, [300 + n, 1, 5, 5]) for n in range(30)]
    boxes.append(box(3, 1, [1, 1, 5, 5]))
    write(folder, images, boxes)
    (folder / "3.png").unlink()
    status, found = check(folder)
    assert status == 1
    assert {kind: problem["count"] for kind, problem in found["problems"].items()} == {
        "box outside its image": 30,
        "annotation that shares its id with another": 1,
        "missing image file": 1,
    }
    assert len(found["problems"]["box outside its image"]["examples"]) == 20
    assert found["figures"]["usable images"] == 3
    printed = capsys.readouterr().out
    assert "bbox [302, 1, 5, 5]" in printed
    assert "bbox [303, 1, 5, 5]" not in printed


def test_decoding_finds_damage_inside_a_file(folder):
    damage(folder / "1.png")
    assert check(folder)[0] == 0
    status, found = check(folder, "--decode")
    assert status == 1
    assert list(found["problems"]) == ["image file that is truncated or not an image"]


def test_what_leaves_no_data_set(folder, capsys):
    (folder / "set.json").write_text("[]")
    assert check_data.main(["--json", str(folder / "set.json")]) == 1
    assert "no object at the top" in capsys.readouterr().out
    assert check_data.main(["--json", str(folder / "gone.json")]) == 1
    assert "there is no such file" in capsys.readouterr().out
    options = ["--json", str(folder / "set.json"), "--images", str(folder / "gone")]
    assert check_data.main(options) == 1
    assert "gone: there is no such folder of images" in capsys.readouterr().err


def test_links_elsewhere_are_named_with_the_option_or_the_key(folder, tmp_path_factory, capsys):
    far = tmp_path_factory.mktemp("far")
    (folder / "1.png").rename(far / "1.png")
    (folder / "1.png").symlink_to(far / "1.png")
    status, found = check(folder)
    assert status == 1
    [(kind, problem)] = found["problems"].items()
    assert kind.startswith("image behind a link out of its folder, which --follow-links 'near'")
    assert problem["examples"][0].endswith(
        f"{str(folder / '1.png')!r} leads to {str(far / '1.png')!r}"
    )
    assert check(folder, "--follow-links", "all")[0] == 0
    capsys.readouterr()
    names = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"]
    names += ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    assert check_config(folder, *names) == 1
    assert "CASCADE.FOLLOW_LINKS" in capsys.readouterr().out
    assert check_config(folder, *names, "CASCADE.FOLLOW_LINKS", "all") == 0


def test_names_of_classes_keep_the_table_narrow_and_stay_text(folder, capsys):
    names = ["x" * 255, "1e5", "007", "a|b"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    write(folder, *read(folder), categories)
    check(folder)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if line.startswith("|")) < 160
    assert all(f" {name} " in out for name in (*names[1:3], r"a\|b"))


def test_a_folder_of_a_name_that_is_no_text(folder, capsys):
    odd = folder / "gr\udcf6\udcdfe\x1b[2J"
    odd.mkdir()
    (folder / "set.json").rename(odd / "set.json")
    status = check_data.main(["--json", str(odd / "set.json"), "--images", str(folder)])
    assert status == 0
    assert r"gr\udcf6\udcdfe\x1b[2J/set.json" in capsys.readouterr().out
    assert check_data.main(["--json", str(odd / "gone.json")]) == 1
    assert "\x1b" not in capsys.readouterr().out


def check_config(folder, *options):
    datasets = [("mine", str(folder / "set.json"), str(folder))]
    return check_data.main(
        ["--config-file", str(CONFIG), "CASCADE.DATASETS", str(datasets), *options]
    )


def test_sets_of_a_configuration(folder, capsys):
    names = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)"]
    assert check_config(folder, *names, "MODEL.ROI_HEADS.NUM_CLASSES", "3") == 0
    assert capsys.readouterr().out.count(f"mine: {folder / 'set.json'}") == 1
    assert check_config(folder, *names, "MODEL.ROI_HEADS.NUM_CLASSES", "7") == 1
    assert "7, not 3" in capsys.readouterr().out
    assert check_config(folder, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()") == 1
    assert "there is nothing to check" in capsys.readouterr().err


@pytest.mark.parametrize("uses", [("TRAIN",), ("TEST",), ("TRAIN", "TEST")])
def test_sets_for_testing_are_decoded_as_before_a_run(folder, uses):
    damage(folder / "1.png")
    names = {f"DATASETS.{use}": "('mine',)" if use in uses else "()" for use in ("TRAIN", "TEST")}
    options = [part for pair in names.items() for part in pair]
    assert check_config(folder, *options, "MODEL.ROI_HEADS.NUM_CLASSES", "3") == ("TEST" in uses)


def test_without_boxes_a_set_is_good_for_testing_only(folder, capsys):
    images, _ = read(folder)
    (folder / "set.json").write_text(json.dumps({"images": images, "categories": CATEGORIES}))
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    testing = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "('mine',)"]
    assert check_config(folder, *testing, *classes) == 0
    assert "data set without annotations" in capsys.readouterr().out
    training = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"]
    assert check_config(folder, *training, *classes) == 1
    assert "nothing to train on" in capsys.readouterr().out


def test_the_annotations_are_not_replaced(folder, capsys):
    before = (folder / "set.json").read_bytes()
    (folder / "link.json").symlink_to("set.json")
    for output in ("set.json", "link.json"):
        arguments = ["--json", str(folder / "set.json"), "--json-out", str(folder / output)]
        assert check_data.main(arguments) == 1
        assert "would replace" in capsys.readouterr().err
    assert (folder / "set.json").read_bytes() == before


def test_findings_replace_findings_and_no_other_file(folder, capsys):
    """Such as an image of the data set, when a name was completed wrongly."""
    for name, content in (("1.png", None), ("other.json", '{"images": []}'), ("list.json", "[1]")):
        out = folder / name
        if content is not None:
            out.write_text(content)
        before = out.read_bytes()
        assert check_data.main(["--json", str(folder / "set.json"), "--json-out", str(out)]) == 1
        assert "holds no findings" in capsys.readouterr().err
        assert out.read_bytes() == before
    assert check(folder) == check(folder)
