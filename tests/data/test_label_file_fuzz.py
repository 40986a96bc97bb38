"""Any label file gives a usable data set or a ``DatasetError``."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade_det.data.catalog import dataset_of_files
from cascade_det.data.coco import load_dataset
from cascade_det.data.dataset_summary import summarize
from cascade_det.data.image_check import check_dataset
from cascade_det.errors import DatasetError

YAML = b"nc: 2\nnames:\n  0: cat\n  1: dog\nkpt_shape: [2, 3]\n"
LINES = b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.5 0.75\n"
XML = (
    b"<annotation><filename>a.png</filename><size><width>8</width><height>5</height></size>"
    b"<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>8</xmax><ymax>5</ymax>"
    b"</bndbox></object></annotation>"
)
NAMES = b"a\nb 1\n"
LABELME = (
    b'{"shapes": [{"label": "cat", "points": [[1, 2], [3, 4], [5, 1]], "shape_type": "polygon",'
    b' "group_id": 1}, {"label": "dog", "points": [[0, 0], [4, 4]], "shape_type": "rectangle"}],'
    b' "imagePath": "a.png", "imageHeight": 5, "imageWidth": 8}'
)
# The files of a data set, its annotations, and which file is spoilt.
SETS = {
    "yaml": ({"data.yaml": YAML, "a.txt": LINES}, "data.yaml", "data.yaml"),
    "lines": ({"data.yaml": YAML, "a.txt": LINES}, "data.yaml", "a.txt"),
    "xml": ({"a.xml": XML}, "", "a.xml"),
    "list": (
        {"Annotations/a.xml": XML, "ImageSets/Main/t.txt": NAMES},
        "ImageSets/Main/t.txt",
        "ImageSets/Main/t.txt",
    ),
    "labelme": ({"a.json": LABELME}, "", "a.json"),
}
PIECES = [
    *(b"nan", b"1e999", b"-", b"1_0", b"0x1", b"", b"\0", b"\xff", b"&a;", b"<!DOCTYPE a>", b"<a>"),
    *(b"*a", b"&a [1]", b"!!python/name:os.system ''", b"'", b"{", b"[", b": ", b"\n", b"null"),
    *(b"9" * 400, b"true", b"2020-99-99", b"\\ud800", b"../", b"</object>", b"{}", b"<<: 1"),
]


@st.composite
def spoilt(draw, data):
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        data = data[:start] + draw(st.sampled_from(PIECES) | st.binary(max_size=3)) + data[end:]
    return data


@pytest.mark.parametrize("kind", SETS)
@settings(max_examples=40)
@given(data=st.data())
def test_any_label_file(kind, data):
    files, annotations, name = SETS[kind]
    content = data.draw(spoilt(files[name]) | st.binary(max_size=20))
    on_bad_data = data.draw(st.sampled_from(["error", "skip"]))
    with tempfile.TemporaryDirectory() as folder:
        for other, good in files.items():
            path = Path(folder, other)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if other == name else good)
        Image.new("RGB", (8, 5)).save(Path(folder, "a.png"))
        source = dataset_of_files(str(Path(folder, annotations)), folder)
        try:
            checked = check_dataset(source, masks=True)
            str(checked.bad).encode()
            str(summarize(checked).warnings).encode()
            dataset = load_dataset(source, on_bad_data, masks="keep", keep_ground_truth=True)
        except DatasetError as error:
            str(error).encode()
            return
        for record in dataset.records:
            assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
            assert ((record.classes >= 0) & (record.classes < len(dataset.class_names))).all()


@pytest.mark.parametrize("kind", SETS)
def test_the_good_files_are_good(kind, tmp_path):
    files, annotations, _ = SETS[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (8, 5)).save(tmp_path / "a.png")
    source = dataset_of_files(str(tmp_path / annotations), str(tmp_path))
    dataset = load_dataset(source, "skip" if kind == "list" else "error")
    assert len(dataset.records[0].boxes) > 0
