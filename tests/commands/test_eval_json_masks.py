"""Predictions with masks against pycocotools, and masks that are none."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from noisy_detections import CATEGORY_IDS
from noisy_masks import SIZE, mask_evaluation, masked_case, rows_of
from pycocotools import mask as coco_mask

from cascade_det.commands import eval_json


@pytest.fixture
def case(tmp_path):
    """A folder with both files, and their contents."""
    content, found_in = masked_case(4, num_images=6)
    rows = rows_of(found_in, CATEGORY_IDS)
    boxes = [box for found in found_in.values() for box in found.boxes.tolist()]
    for row, (x1, y1, x2, y2) in zip(rows, boxes, strict=True):
        row["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    (tmp_path / "val.json").write_text(json.dumps(content))
    case = SimpleNamespace(folder=tmp_path, content=content, rows=rows)
    write(case)
    return case


def write(case):
    (case.folder / "predictions.json").write_text(json.dumps(case.rows))


def run(case, *options):
    files = (
        "--json",
        f"{case.folder}/val.json",
        "--predictions",
        f"{case.folder}/predictions.json",
    )
    output = str(case.folder / "out")
    status = eval_json.main([*files, "--output", output, *options])
    if status:
        return status
    return json.loads((case.folder / "out" / "scores.json").read_text())


def without_boxes(rows):
    return [{key: value for key, value in row.items() if key != "bbox"} for row in rows]


def test_mask_ap_is_that_of_pycocotools(case, capsys):
    scores = run(case)
    expected = mask_evaluation(case.content, without_boxes(case.rows))
    expected.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    got = [scores["segm"][name] for name in names]
    assert got == pytest.approx([100 * value for value in expected.stats[:6]], abs=1e-9)
    assert got[0] != scores["bbox"]["AP"]
    report = capsys.readouterr().out
    assert "**Mask AP (%)**" in report
    assert f"{got[0]:.1f}" in report
    header = next(line for line in report.splitlines() if line.startswith("| class"))
    assert "mask AP (%)" in header
    # Precision and recall stay those of boxes.
    for row in case.rows:
        del row["segmentation"]
    write(case)
    of_boxes = run(case)
    assert "segm" not in of_boxes
    assert of_boxes["bbox"] == scores["bbox"]
    assert of_boxes["analysis"]["confusion_matrix"] == scores["analysis"]["confusion_matrix"]


def greedy(case, threshold):
    """Found objects and false positives by mask IoU 0.5, class by class, counted one by one."""
    found = wrong = 0
    for image in case.content["images"]:
        for category in CATEGORY_IDS:
            truth, crowds = [], []
            for item in case.content["annotations"]:
                if (item["image_id"], item["category_id"]) == (image["id"], category):
                    (crowds if item["iscrowd"] else truth).append(bitmap_of(item["segmentation"]))
            rows = [
                row
                for row in case.rows
                if (row["image_id"], row["category_id"]) == (image["id"], category)
                and row["score"] >= threshold
            ]
            for row in sorted(rows, key=lambda row: -row["score"]):
                mask = bitmap_of(row["segmentation"])
                ious = [(mask & other).sum() / (mask | other).sum() for other in truth]
                if ious and max(ious) >= 0.5:
                    found += 1
                    del truth[int(np.argmax(ious))]
                elif not any((mask & crowd).sum() >= 0.5 * mask.sum() for crowd in crowds):
                    wrong += 1
    return found, wrong


def bitmap_of(segmentation):
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, SIZE, SIZE))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, SIZE, SIZE)
    return coco_mask.decode(segmentation).astype(bool)


def test_precision_and_recall_by_masks(case, capsys):
    scores = run(case, "--by-masks", "--score-threshold", "0.4")
    analysis = scores["analysis"]
    point = analysis["overall"][0]
    found, wrong = greedy(case, 0.4)
    assert (point["true_positives"], point["false_positives"]) == (found, wrong)
    assert [row["AP"] for row in analysis["per_class"]] == [
        scores["segm"][f"AP-{row['class']}"] for row in analysis["per_class"]
    ]
    counts = np.array(analysis["confusion_matrix"]["counts"])
    objects = sum(not item["iscrowd"] for item in case.content["annotations"])
    assert counts[:-1].sum() == objects
    report = capsys.readouterr().out
    assert "Precision and recall at mask IoU 0.5" in report
    assert "Mask AP per class" in report
    by_boxes = run(case, "--score-threshold", "0.4")["analysis"]
    assert by_boxes["confusion_matrix"] != analysis["confusion_matrix"]


def test_masks_are_asked_for_that_are_not_there(case, capsys):
    for row in case.rows:
        del row["segmentation"]
    write(case)
    assert run(case, "--by-masks") == 1
    assert "predictions.json: has no masks for --by-masks" in capsys.readouterr().err


def test_a_prediction_may_have_no_mask(case):
    del case.rows[0]["segmentation"]
    write(case)
    scores = run(case)
    note = f"1 of {len(case.rows)} detections have no mask, and do not count for mask AP."
    assert note in scores["notes"]
    expected = mask_evaluation(case.content, without_boxes(case.rows[1:]))
    expected.summarize()
    assert scores["segm"]["AP"] == pytest.approx(100 * expected.stats[0])


def test_masks_that_are_none_are_named(case, capsys):
    for row, change in zip(
        case.rows,
        (
            {"size": [SIZE, SIZE + 1]},
            {"counts": "0P"},
            {"counts": "111"},
            {"counts": 5},
            None,
        ),
        strict=False,
    ):
        row["segmentation"] = change and row["segmentation"] | change
    write(case)
    assert run(case) == 1
    error = capsys.readouterr().err
    for kind in (
        "has another 'size' than its image",
        "has 'counts' that are not compressed run lengths",
        "has 'counts' that do not add up to the pixels of its image",
        "has 'counts' that are neither a text nor a list of integers",
        "is not an object with 'size' and 'counts'",
    ):
        assert f"1 x prediction whose 'segmentation' {kind}" in error


segmentations = st.one_of(
    st.none(),
    st.text(max_size=4),
    st.lists(st.lists(st.integers(0, 300), max_size=8), max_size=2),
    st.fixed_dictionaries(
        {"size": st.just([SIZE, SIZE]) | st.lists(st.integers(-1, SIZE), max_size=3)},
        optional={
            "counts": st.one_of(
                st.text(max_size=8),
                st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=8),
                st.lists(st.integers(-5, SIZE * SIZE), max_size=4),
                st.just([SIZE * SIZE - 9, 9]),
                st.floats(),
            )
        },
    ),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segmentations)
def test_any_segmentation_is_scored_or_refused(case, segmentation):
    case.rows[0]["segmentation"] = segmentation
    write(case)
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(None):
        status = run(case)
    refused = status == 1
    assert refused == ("prediction whose 'segmentation'" in errors.getvalue())
    if not refused:
        assert segmentation["size"] == [SIZE, SIZE]
        assert sum(segmentation["counts"]) == SIZE * SIZE
