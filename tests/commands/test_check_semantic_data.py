"""``check-data`` on small data sets for semantic segmentation."""

import json

import numpy as np
import pytest
from semantic_sets import CLASSES, labels_of, save, write_pair
from shape_runs import INSTANT

from cascade_det.commands import check_data


@pytest.fixture
def check(tmp_path):
    """Check the pairs in a folder; returns the exit status and the findings."""

    def run(*options, entry=None, classes=3):
        entry = entry or ("mine", "folders", f"{tmp_path}/images", f"{tmp_path}/labels")
        keys = ["CASCADE.SEMANTIC_DATASETS", str([entry])]
        keys += ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"]
        keys += ["CASCADE.SEMANTIC_CLASSES", str(CLASSES), *options]
        keys += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes)]
        out = tmp_path / "findings.json"
        status = check_data.main(["--config-file", INSTANT, "--json-out", str(out), *keys])
        return status, json.loads(out.read_text())["mine"]

    return run


def test_counts_and_shares(tmp_path, check, capsys):
    labels = np.zeros((6, 8), np.uint8)
    labels[0, :4], labels[1, :] = 255, 1
    write_pair(tmp_path, "a")
    save(tmp_path / "labels" / "a.png", labels)
    status, found = check()
    assert status == 0
    assert found["figures"] == {
        "usable images": 1,
        "image sizes": 1,
        "smallest image": "8x6",
        "largest image": "8x6",
    }
    assert [tuple(row.values()) for row in found["classes"]] == [
        ("0", "ground", 36, "75.00%", 1),
        ("1", "tree", 8, "16.67%", 1),
        ("2", "house", 0, "0.00%", 0),
        ("255", "(ignored)", 4, "8.33%", 1),
    ]
    assert found["notes"]["class without a pixel"]["examples"] == ["'house'"]
    out = capsys.readouterr().out
    for text in ("mine: folders", "| tree", "16.67%", "No problems."):
        assert text in out


def test_problems_are_listed(tmp_path, check, capsys):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    save(tmp_path / "labels" / "a.png", np.full((6, 8), 7, np.uint8))
    status, found = check(classes=4)
    assert status == 1
    counts = {kind: issue["count"] for kind, issue in found["problems"].items()}
    assert counts == {
        "label that is neither a class nor ignored": 1,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES is not the number of classes": 1,
    }
    assert "4, not 3" in capsys.readouterr().out


def test_volumes_are_counted(tmp_path, check):
    volume = np.stack([labels_of(5, 4, 4, seed) for seed in range(3)])
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", img=np.zeros((3, 5, 4)), label=volume)
    status, found = check(entry=("mine", "acdc", str(tmp_path)), classes=4)
    assert status == 0
    assert found["figures"]["usable images"] == 6
    assert found["figures"]["volumes that they are slices of"] == 2
    assert sum(row["pixels"] for row in found["classes"]) == 2 * volume.size


def test_a_folder_without_images_is_a_problem(tmp_path, check):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    status, found = check()
    assert status == 1
    assert "no usable file" in found["problems"]


def test_damage_is_found_where_images_are_decoded(tmp_path, check):
    write_pair(tmp_path, "a", 64, 64)
    path = tmp_path / "images" / "a.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert check()[0] == 0
    assert check("DATASETS.TEST", "('mine',)")[0] == 1
