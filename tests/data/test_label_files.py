"""Files of YOLO, Pascal VOC and LabelMe as their tools write them: boxes to the pixel, and faults.

The expected boxes are worked out by hand from each format's definition.
"""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from cascade_det.data.catalog import DatasetSource, dataset_of_files
from cascade_det.data.coco import load_dataset
from cascade_det.data.coco_json import check_coco_json
from cascade_det.data.image_check import check_dataset
from cascade_det.data.image_names import LinkRule
from cascade_det.errors import DatasetError

NAMES = "names:\n  0: cat\n  1: dog\n"


def draw(path, width=64, height=48):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(annotations, images=None, **options):
    source = dataset_of_files(str(annotations), images and str(images))
    return load_dataset(source, keep_ground_truth=True, **options)


def boxes(dataset):
    """Class names and XYXY boxes by file name."""
    root = str(dataset.source.image_root) + "/"
    return {
        record.file_name.removeprefix(root): [
            (dataset.class_names[k], *box)
            for k, box in zip(record.classes, record.boxes.tolist(), strict=True)
        ]
        for record in dataset.records
    }


def problems(annotations, images=None, **options):
    source = dataset_of_files(str(annotations), images and str(images))
    checked = check_dataset(source, **options)
    return checked, dict(checked.bad.counts)


# -- YOLO -----------------------------------------------------------------------------------------


def test_yolo_of_ultralytics(tmp_path):
    """64 x 48: 0.5 of the width is 32; an image without a file is background."""
    for name in ("a.jpg", "night/b.png", "none.jpg", "empty.jpg"):
        draw(tmp_path / "images" / "train" / name)
    labels = tmp_path / "labels" / "train"
    write(labels / "a.txt", "1 0.5 0.5 0.25 0.5\n\n0 0.125 0.25 0.25 0.5\n")
    write(labels / "night" / "b.txt", "0 0.25 0.25 0.75 0.25 0.5 0.75\n")
    write(labels / "empty.txt", "")
    write(tmp_path / "data.yaml", f"path: /nowhere\ntrain: ../../etc\nnc: 2\n{NAMES}")
    dataset = load(tmp_path / "data.yaml", tmp_path / "images" / "train", masks="keep")
    assert boxes(dataset) == {
        "a.jpg": [("dog", 24, 12, 40, 36), ("cat", 0, 0, 16, 24)],
        "empty.jpg": [],
        "night/b.png": [("cat", 16, 12, 48, 36)],
        "none.jpg": [],
    }
    assert dataset.class_names == ("cat", "dog")
    (polygon,) = dataset.records[2].masks[0]
    assert polygon.tolist() == [16, 12, 48, 12, 32, 36]
    assert dataset.records[0].masks == (None, None)


def test_yolo_of_roboflow(tmp_path):
    """Folders train/images and train/labels, and names as a list."""
    draw(tmp_path / "train" / "images" / "a_jpg.rf.0ab.jpg")
    write(tmp_path / "train" / "labels" / "a_jpg.rf.0ab.txt", "1 0.5 0.5 1 1")
    write(tmp_path / "data.yaml", "train: ../train/images\nnc: 2\nnames: ['cat', 'dog']\n")
    dataset = load(tmp_path / "data.yaml", tmp_path / "train" / "images")
    assert boxes(dataset) == {"a_jpg.rf.0ab.jpg": [("dog", 0, 0, 64, 48)]}


def test_yolo_labels_beside_the_images_scores_and_key_points(tmp_path):
    """As darknet has them; a line of predictions ends in a score, one of poses in key points."""
    draw(tmp_path / "a.jpg")
    write(tmp_path / "a.txt", "0.0 0.5 0.5 0.5 0.5 0.93\n1 .5 .5 1 1 .1 .2 2 .3 .4 2 .5 .6 2\n")
    write(tmp_path / "data.yaml", NAMES + "kpt_shape: [3, 3]\n")
    assert boxes(load(tmp_path / "data.yaml")) == {
        "a.jpg": [("cat", 16, 12, 48, 36), ("dog", 0, 0, 64, 48)]
    }


def test_yolo_with_a_list_of_names(tmp_path):
    """CVAT's YOLO 1.1, where train.txt lists images, and Label Studio's YOLO."""
    draw(tmp_path / "cvat" / "obj_train_data" / "a.jpg")
    write(tmp_path / "cvat" / "obj_train_data" / "a.txt", "1 0.5 0.5 1 1\n")
    write(tmp_path / "cvat" / "obj.names", "cat\nbig dog\n\n")
    write(tmp_path / "cvat" / "train.txt", "data/obj_train_data/a.jpg\n")
    cvat = load(tmp_path / "cvat" / "obj.names", tmp_path / "cvat" / "obj_train_data")
    assert boxes(cvat) == {"a.jpg": [("big dog", 0, 0, 64, 48)]}
    draw(tmp_path / "studio" / "images" / "3b5f-a.jpg")
    write(tmp_path / "studio" / "labels" / "3b5f-a.txt", "0 0.5 0.5 0.5 0.5")
    write(tmp_path / "studio" / "classes.txt", "cat\ndog")
    write(tmp_path / "studio" / "notes.json", "{}")
    studio = load(tmp_path / "studio" / "classes.txt")
    assert boxes(studio) == {"3b5f-a.jpg": [("cat", 16, 12, 48, 36)]}
    for text, said in (("cat\n\ndog", "line 2 is empty"), ("a\na", "the same name")):
        write(tmp_path / "studio" / "classes.txt", text)
        with pytest.raises(DatasetError, match=said):
            load(tmp_path / "studio" / "classes.txt")


def test_fractions_are_of_the_upright_image(tmp_path):
    """A photo that its EXIF data turn by 90 degrees is 48 wide and 64 high."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    write(tmp_path / "a.txt", "0 0.5 0.5 1 1")
    write(tmp_path / "data.yaml", NAMES)
    assert boxes(load(tmp_path / "data.yaml")) == {"a.jpg": [("cat", 0, 0, 48, 64)]}


def test_every_bad_line_of_yolo_is_listed_with_its_place(tmp_path):
    draw(tmp_path / "a.jpg")
    draw(tmp_path / "b.jpg")
    write(tmp_path / "c.jpg", "no image")
    lines = ["0 0.5 0.5 0.5 0.5", "2 .5 .5 .1 .1", "-1 .5 .5 .1 .1", "0.5 .5 .5 .1 .1"]
    lines += ["0 320 240 100 100", "0 .5 .5 .1", "0 .5 .5 .1 .1 .1 .1 .1", "cat .5 .5 .1 .1"]
    lines += ["0 nan .5 .1 .1", "0 .5 .5 inf .1", "0 .5 .5 0 .1", "0 .5 .5 -.005 .1"]
    write(tmp_path / "a.txt", "\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe0 .5")
    write(tmp_path / "data.yaml", NAMES)
    checked, found = problems(tmp_path / "data.yaml")
    assert {kind.partition(" (")[0]: count for kind, count in found.items()} == {
        "image file that is missing, truncated or not an image": 1,
        "YOLO class without a name in the yaml": 3,
        "YOLO coordinates outside 0 to 1": 1,
        "YOLO line of neither 4 numbers": 2,
        "YOLO line that is not a class and finite numbers": 3,
        "label file that cannot be read": 1,
        "box of negative width or height": 1,
    }
    assert dict(checked.of_no_area.counts) == {"box of zero width or height": 1}
    text = str(checked.bad)
    assert "'a.txt:2' ('2 .5 .5 .1 .1')" in text
    assert "label 'a.txt:12'" in text
    with pytest.raises(DatasetError, match=r"CASCADE\.ON_BAD_DATA to 'skip'"):
        load(tmp_path / "data.yaml")
    assert [len(b) for b in boxes(load(tmp_path / "data.yaml", on_bad_data="skip")).values()] == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("names: [", "not valid yaml"),
        ("", "has no 'names'"),
        ("- cat", "has no 'names'"),
        ("nc: 2", "has no 'names'"),
        ("names: {0: cat, 2: dog}", "not 0 to 1"),
        ("names: [[cat]]", "has no 'names'"),
        ("names: [cat, cat]", "same name"),
        ("nc: 3\nnames: [cat, dog]", "'nc' is 3, but there are 2"),
        ("names: [cat]\nkpt_shape: many", "kpt_shape"),
        ("names: []", "empty list of classes"),
        ('names: ["\\e[2J"]', "without a usable 'name'"),
        ("!!python/object/apply:os.system ['true']", "not valid yaml"),
        ("[" * 5000, "not valid yaml"),
    ],
)
def test_a_bad_yaml_says_what_is_wrong(tmp_path, text, said):
    draw(tmp_path / "a.jpg")
    write(tmp_path / "a.txt", "")
    with pytest.raises(DatasetError, match=said):
        load(write(tmp_path / "data.yaml", text))


def test_images_without_any_label_file_are_told(tmp_path):
    """Probably the labels are elsewhere; all would be background."""
    draw(tmp_path / "images" / "a.jpg")
    write(tmp_path / "data.yaml", NAMES)
    with pytest.raises(DatasetError, match="without a label file of any image"):
        load(tmp_path / "data.yaml")


# -- Pascal VOC -----------------------------------------------------------------------------------

# As VOC2007 has it, with what readers need not know.
VOC = """<annotation>
  <folder>VOC2007</folder><filename>{filename}</filename>
  <source><database>The VOC2007 Database</database></source>
  <size><width>{width}</width><height>48</height><depth>3</depth></size>
  <segmented>0</segmented>{objects}
</annotation>"""
PERSON = """<object><name>person</name><pose>Left</pose><truncated>1</truncated>
  <difficult>1</difficult>
  <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox>
  <part><name>head</name>
    <bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part></object>"""
CAR = """<object><name>car</name>
  <bndbox><xmax>10</xmax><xmin>10</xmin><ymin>5.5</ymin><ymax>7</ymax></bndbox></object>"""


def voc(root, stem, objects="", filename="", width=64):
    filename = filename or f"{stem}.jpg"
    text = VOC.format(filename=filename, objects=objects, width=width)
    return write(root / "Annotations" / f"{stem}.xml", text)


@pytest.fixture
def voc2007(tmp_path):
    for stem in ("000001", "000002", "000003"):
        draw(tmp_path / "JPEGImages" / f"{stem}.jpg")
    voc(tmp_path, "000001", PERSON + CAR, filename="of_another_name.png")
    voc(tmp_path, "000002", width=0)
    voc(tmp_path, "000003", CAR)
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "000002\n000001  1\n")
    return tmp_path


def test_voc_corners_count_from_1_and_belong_to_the_box(voc2007):
    """1, 1, 64, 48 is all of the image; 10 to 10 is one column of pixels, from 9 to 10."""
    expected = {
        "000001.jpg": [("person", 0, 0, 64, 48), ("car", 9, 4.5, 10, 7)],
        "000002.jpg": [],
        "000003.jpg": [("car", 9, 4.5, 10, 7)],
    }
    for annotations in (voc2007, voc2007 / "Annotations"):
        dataset = load(annotations)
        assert boxes(dataset) == expected
        assert dataset.class_names == ("car", "person")


def test_a_list_of_voc_names_the_images_and_all_files_the_classes(voc2007):
    dataset = load(voc2007 / "ImageSets" / "Main" / "train.txt")
    assert list(boxes(dataset)) == ["000002.jpg", "000001.jpg"]
    assert dataset.class_names == ("car", "person")


@pytest.mark.parametrize("line", ["my cat 1", '"my cat 1"', '"my cat 1"  -1'])
def test_a_list_of_voc_may_name_files_with_spaces(voc2007, line):
    voc(voc2007, "my cat 1")
    (voc2007 / "JPEGImages" / "my cat 1.jpg").write_bytes(
        next((voc2007 / "JPEGImages").iterdir()).read_bytes()
    )
    listed = write(voc2007 / "ImageSets" / "Main" / "spaces.txt", line + "\n")
    assert [*boxes(load(listed))] == ["my cat 1.jpg"]


def test_the_format_of_a_folder_does_not_depend_on_what_the_readers_leave_out(tmp_path):
    """A hidden folder of an editor; files behind a link; endings in capital letters."""
    for name in ("hidden", "real"):
        draw(tmp_path / name / "a.jpg")
        labelme(tmp_path / name / "a.json", [shape("cat", [[1, 2], [9, 8]], "rectangle")], "a.jpg")
    write(tmp_path / "hidden" / ".idea" / "workspace.xml", "<project/>")
    assert boxes(load(tmp_path / "hidden")) == {"a.jpg": [("cat", 1, 2, 9, 8)]}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "day").symlink_to(tmp_path / "real")
    linked = load(tmp_path / "linked", links=LinkRule("all"))
    assert boxes(linked) == {"day/a.jpg": [("cat", 1, 2, 9, 8)]}
    draw(tmp_path / "capitals" / "A.JPG")
    write(tmp_path / "capitals" / "A.XML", "<annotation/>")
    with pytest.raises(DatasetError, match="empty list of classes"):
        load(tmp_path / "capitals")


def test_faults_of_voc_are_listed(voc2007):
    voc(voc2007, "000002", "<object><name>cat</name></object>" + CAR.replace("car", " "))
    voc(voc2007, "000003", CAR.replace("5.5", "nan") + CAR.replace("<xmax>10", "<xmax>-4"))
    voc(voc2007, "000004", CAR)
    for stem, text in (("5", "<annotation>"), ("6", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')):
        write(voc2007 / "Annotations" / f"{stem}.xml", text)
    write(voc2007 / "Annotations" / "7.xml", VOC.format(filename="7", width=64, objects=CAR))
    draw(voc2007 / "JPEGImages" / "7.png", width=30)
    checked, found = problems(voc2007)
    assert found == {
        "label file that cannot be read": 2,
        "VOC file without an image of the same name": 1,
        "VOC object without a name or four finite corners": 3,
        "box of negative width or height": 1,
        "image whose size is not that in the json": 1,
    }
    assert "'6.xml': has a DOCTYPE" in str(checked.bad)


def test_a_corner_of_0_is_probably_counted_from_0(voc2007):
    voc(voc2007, "000003", CAR.replace("5.5", "0"))
    checked, found = problems(voc2007)
    assert found == {}
    assert list(checked.odd_labels.counts.values()) == [1]


def test_a_list_of_voc_may_name_what_is_not_there_but_leaves_no_folder(voc2007):
    write(voc2007.parent / "secret.xml", VOC.format(filename="000001.jpg", width=64, objects=CAR))
    names = write(voc2007 / "ImageSets" / "Main" / "val.txt", "000001\n000009\n../../secret\n")
    checked, found = problems(names)
    assert found == {"listed image without an xml file": 1}
    assert [image["file_name"] for image in checked.images.values()] == ["000001.jpg"]
    with pytest.raises(DatasetError, match="below ImageSets/"):
        load(write(voc2007 / "names.txt", "000001"))


# -- LabelMe --------------------------------------------------------------------------------------


def shape(label, points, kind="polygon", group=None):
    return {
        **{"label": label, "points": points, "group_id": group, "shape_type": kind},
        **{"flags": {}, "description": ""},
    }


def labelme(path, shapes, image, **changes):
    """As LabelMe 5 writes it, with the image inside."""
    content = {
        **{"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": image},
        "imageData": base64.b64encode(b"pixels").decode(),
        **{"imageHeight": 48, "imageWidth": 64},
    }
    return write(path, json.dumps(content | changes))


def test_labelme(tmp_path):
    draw(tmp_path / "a.jpg")
    draw(tmp_path / "day" / "b.jpg")
    shapes = [
        shape("dog", [[40, 30.5], [10, 20]], "rectangle"),
        shape("cat", [[1, 2], [5, 2], [3, 9]]),
        shape("cat", [[20, 2], [24, 2], [24, 6]], group=1),
        shape("cat", [[30, 2], [34, 2], [34, 7]], group=1),
        shape("ant", [[30, 20], [33, 24]], "circle"),
    ]
    labelme(tmp_path / "a.json", shapes, "..\\photos\\a.jpg")
    labelme(tmp_path / "day" / "b.json", [], "b.jpg", imageHeight=None)
    dataset = load(tmp_path, masks="keep")
    assert boxes(dataset) == {
        "a.jpg": [
            ("dog", 10, 20, 40, 30.5),
            ("cat", 1, 2, 5, 9),
            ("cat", 20, 2, 34, 7),
            ("ant", 25, 15, 35, 25),
        ],
        "day/b.jpg": [],
    }
    assert dataset.class_names == ("ant", "cat", "dog")
    masks = dataset.records[0].masks
    assert [mask is not None and len(mask) for mask in masks] == [False, 1, 2, False]
    np.testing.assert_array_equal(masks[1][0], [1, 2, 5, 2, 3, 9])


def test_faults_of_labelme_are_listed(tmp_path):
    draw(tmp_path / "a.jpg")
    shapes = [
        *(shape("cat", [[1, 2], [3, 4]], kind) for kind in ("line", "point", "mask", 7)),
        *(shape(None, [[1, 2], [3, 4]], "rectangle"), shape("cat", [[1, 2], [3, 4]]), "shape"),
        shape("cat", [[1, 2], [3, float("nan")], [4, 5]]),
    ]
    labelme(tmp_path / "a.json", shapes, "a.jpg")
    labelme(tmp_path / "b.json", [], "/etc/b.jpg")
    labelme(tmp_path / "c.json", [], "")
    write(tmp_path / "d.json", "{")
    write(tmp_path / "e.json", '{"images": []}')
    _, found = problems(tmp_path)
    assert found == {
        "label file that cannot be read": 1,
        "json that is not LabelMe's: no list 'shapes'": 1,
        "LabelMe shape that has no area, or is a bitmap": 4,
        "LabelMe shape without a label, or without enough points of two finite numbers": 4,
        "LabelMe file without 'imagePath'": 1,
        "missing image file": 1,
    }


# -- all ------------------------------------------------------------------------------------------


def test_a_folder_without_label_files_says_so(tmp_path):
    draw(tmp_path / "a.jpg")
    with pytest.raises(DatasetError, match="without xml files"):
        load(tmp_path)


def test_links_are_followed_as_far_as_they_may(tmp_path):
    """Links of images and of label files, and of folders, one of them in a circle."""
    far, root = tmp_path / "far", tmp_path / "set"
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        draw(far / name)
    write(far / "b.txt", "0 .5 .5 1 1")
    draw(root / "b.jpg")
    write(root / "data.yaml", NAMES)
    (root / "a.jpg").symlink_to(far / "a.jpg")
    (root / "b.txt").symlink_to(far / "b.txt")
    (root / "sub").symlink_to(far / "sub")
    (root / "again").symlink_to(root)
    source = DatasetSource("set", root / "data.yaml", root)
    near = check_coco_json(source, LinkRule("near"))
    assert sum(near.bad.counts.values()) == 3
    assert [image["file_name"] for image in near.images.values()] == ["b.jpg"]
    assert near.annotations == {}
    everywhere = check_coco_json(source, LinkRule("all"))
    names = [image["file_name"] for image in everywhere.images.values()]
    assert {"a.jpg", "b.jpg", "sub/c.jpg"} <= set(names)
    assert len(everywhere.annotations[names.index("b.jpg") + 1]) == 1


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_our_boxes_are_those_of_supervision(kind, tmp_path, voc2007):
    """The library's readers, on the files above that they can read."""
    supervision = pytest.importorskip("supervision")
    if kind == "voc":
        theirs = supervision.DetectionDataset.from_pascal_voc(
            str(voc2007 / "JPEGImages"), str(voc2007 / "Annotations")
        )
        ours = load(voc2007)
    else:
        generator = np.random.default_rng(0)
        draw(tmp_path / "images" / "a.jpg")
        sides = generator.uniform(0, 1, (40, 4))
        lines = [
            f"{k % 2} " + " ".join(f"{side:.6f}" for side in row) for k, row in enumerate(sides)
        ]
        write(tmp_path / "labels" / "a.txt", "\n".join(lines))
        write(tmp_path / "data.yaml", NAMES)
        theirs = supervision.DetectionDataset.from_yolo(
            *(str(tmp_path / name) for name in ("images", "labels", "data.yaml"))
        )
        ours = load(tmp_path / "data.yaml", tmp_path / "images")
    assert len(theirs) == len(ours.records)
    for record in ours.records:
        found = theirs.annotations[record.file_name]
        np.testing.assert_allclose(record.boxes, found.xyxy, atol=1e-5 * 64)
        assert [ours.class_names[k] for k in record.classes] == [
            theirs.classes[k] for k in found.class_id
        ]
