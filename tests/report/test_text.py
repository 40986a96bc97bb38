"""Tables, results.json and the picture of the results."""

from __future__ import annotations

import json
import os

import cv2
import numpy as np
import pytest
import torch

from cascade_det.core.structures import CascadeStats, StageOutput
from cascade_det.evaluation import default_evaluators
from cascade_det.files import write_json
from cascade_det.monitoring.shadow import ShadowEvaluator, ShadowRules
from cascade_det.report.plots import plot_report
from cascade_det.report.tables import table
from cascade_det.report.text import describe_machine, format_report, write_results

NAN = float("nan")
POINT = {
    "IoU": 0.5, "score": 0.5, "precision": 80.0, "recall": 57.14, "F1": 66.67,
    "true_positives": 4, "false_positives": 1, "misses": 3,
}  # fmt: skip
BEST = {**POINT, "score": 0.3333, "precision": NAN, "F1": 77.77}


@pytest.fixture
def results():
    return {
        "bbox": {
            "AP": 45.12, "AP50": 70.27, "AP75": 50.38, "AP90": 12.34,
            "APs": NAN, "APm": 30.41, "APl": 60.59,
            "AP-cat": 44.04, "AP-dog": 46.16,
        },
        "analysis": {
            "task": "bbox",
            "precision": 80.0, "recall": 57.14, "F1": 66.67,
            "overall": [POINT, BEST],
            "per_class": [
                {"class": "cat", "objects": 5, "AP": 44.04, "AP50": 69.0, **POINT, "best": BEST},
                {"class": "dog", "objects": 2, "AP": 46.16, "AP50": 71.5, **POINT, "best": POINT},
            ],
            "confusion_matrix": {
                "classes": ["cat", "dog", "background"],
                "counts": [[3, 2, 0], [1, 1, 9], [8, 7, 0]],
            },
            "worst_images": [
                {"image_id": 4, "file_name": "a.jpg", "false_positives": 3, "misses": 1},
                {"image_id": 5, "file_name": "", "false_positives": 0, "misses": 2},
            ],
        },
        "notes": ["APs is nan: because."],
        "stages": {
            "regions": 1234,
            "stage0": {"AP": 40.1, "AP50": 69.0, "AP75": 42.0, "AP90": 5.05,
                       "iou_before": 0.651, "iou_after": 0.722},
            "stage1": {"AP": 44.9, "AP50": 70.0, "AP75": 48.0, "AP90": 9.99,
                       "iou_before": 0.722, "iou_after": NAN},
        },
        "exits": {
            "images": 20,
            "stages_per_region": 0.625,
            "overrun_share": 0.1, "overrun_ms": 12.34,
            "head_gflops_per_image": 1.234, "full_head_gflops_per_image": 9.87,
            "head_flops_share": 0.125,
            "tiles": {"per_image": 850.0, "open_share": 0.1, "computed_share": 0.254},
            "proposals": {
                "entered": 40000, "entered_per_image": 2000.0, "entered_share": 1.0,
                "exit_rate": 0.5, "left": {"background": 0.5}, "mean_score": {},
            },
            "stage0": {
                "entered": 20000, "entered_per_image": 1000.0, "entered_share": 0.5,
                "exit_rate": 0.75, "left": {"background": 0.7, "confident": 0.05},
                "mean_score": {"background": 0.0123, "confident": 0.9},
            },
            "stage1": {
                "entered": 5000, "entered_per_image": 250.0, "entered_share": 0.125,
                "exit_rate": 0.0, "left": {"completed": 1.0}, "mean_score": {"completed": 0.4},
            },
        },
        "shadow": {
            "images": 1200, "loss": 0.0234, "loss_low": 0.0111, "loss_high": 0.04,
            "changed": 0.1, "changed_low": 0.0526, "changed_high": 0.17, "confidence": 0.95,
            "expected_loss": 0.01, "expected_deviation": 0.0005, "drift": 1,
        },
        "latency": {
            "batch_size": 2, "images": 20, "batches": 10, "warmup_batches": 5,
            "parts": {
                "backbone": {"median_ms": 41.23, "p95_ms": 43.21},
                "stage0": {"median_ms": 30.5, "p95_ms": 31.5},
            },
            "total": {"median_ms": 71.73, "p95_ms": 74.74},
            "full_parts": {
                "backbone": {"median_ms": 41.23, "p95_ms": 43.21},
                "stage0": {"median_ms": 30.6, "p95_ms": 31.6},
                "stage1": {"median_ms": 29.9, "p95_ms": 30.9},
            },
            "full_total": {"median_ms": 101.73, "p95_ms": 105.7},
            "most_exits_could_save": 0.294,
            "notes": ["Only a test."],
        },
        "machine": {"device": "cpu", "threads": 3},
    }  # fmt: skip


def cells(report, first):
    """The cells of the table row that begins with ``first``."""
    row = next(line for line in report.splitlines() if line.strip("| ").startswith(f"{first} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_report_holds_the_figures(results):
    report = format_report(results)
    assert cells(report, "45.1") == ["45.1", "70.3", "50.4", "12.3", "nan", "30.4", "60.6"]
    assert cells(report, "0.500")[1:] == ["80.0", "57.1", "66.7", "4", "1", "3"]
    best = ["0.333 or more (best F1)", "nan", "57.1", "77.8", "4", "1", "3"]
    assert cells(report, "0.333") == best
    assert cells(report, "cat") == [
        *("cat", "5", "44.0", "69.0", "80.0", "57.1", "66.7", "77.8", "0.33")
    ]
    assert "Most confused: cat as dog (2), dog as cat (1)." in report
    assert "most mistakes: a.jpg (3 false, 1 missed), 5 (0 false, 2 missed)." in report
    tables = report.split("**")
    stages, exits, scores, latency = (tables[index] for index in (8, 10, 12, 16))
    assert cells(stages, "stage0") == ["stage0", "40.1", "69.0", "42.0", "5.0", "0.651", "0.722"]
    assert cells(exits, "proposals") == [
        *("proposals", "2000.0", "100.0", "50.0", "50.0", "0.0", "0.0")
    ]
    assert cells(exits, "stage0") == ["stage0", "1000.0", "50.0", "75.0", "70.0", "5.0", "0.0"]
    assert cells(scores, "stage0") == ["stage0", "0.012", "0.900", ""]
    assert cells(scores, "stage1") == ["stage1", "", "", "0.400"]
    assert cells(tables[14], "open") == ["open for the RPN", "85.0", "10.0"]
    assert cells(tables[14], "computed") == ["computed", "215.9", "25.4"]
    assert cells(latency, "stage0") == ["stage0", "30.50", "31.50", "30.60", "31.60"]
    assert cells(latency, "stage1") == ["stage1", "", "", "29.90", "30.90"]
    assert cells(latency, "total") == ["total", "71.73", "74.74", "101.73", "105.70"]
    assert "(t_full - t_stage1) / t_full: 29.4 %" in report
    assert "a region sees 0.62 of 2 stages" in report
    assert "1.23 GFLOPs per image (multiply-adds, by fvcore), 12.5 % of the 9.87" in report
    assert "10.0 % of the batches took longer than their time budget, by 12.3 ms" in report
    assert "1,200 images also ran the full cascade" in report
    assert "lose 2.34 % (1.11 to 4.00) of its detections per image" in report
    assert "any on 10.00 % (5.26 to 17.00) of the images (95 % confidence intervals)" in report
    assert "promised 1.00 % with a deviation of 0.05 %: this is drift." in report
    assert "Mean IoU over 1,234 regions" in report
    assert "Measured on: device cpu, threads 3." in report
    assert report.endswith("Warnings:\n- APs is nan: because.\n- Only a test.")


def test_every_part_of_a_report_may_be_missing(results):
    whole = format_report(results)
    for name in results:
        alone = format_report({name: results[name]}).partition("Warnings:")
        assert alone[0].strip() in whole
        assert alone[2].strip() in whole
        rest = {key: value for key, value in results.items() if key != name}
        assert len(format_report(rest)) < len(whole)
    assert format_report({}) == ""
    assert format_report({"latency": {"images": 0, "notes": ["None."]}}) == "Warnings:\n- None."


def test_results_file_is_valid_json_without_nan(results, tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    path = write_results(results, tmp_path / "new" / "folder", machine={"device": "cuda:0"})
    assert path == tmp_path / "new" / "folder" / "results.json"
    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read["bbox"]["APs"] is None
    assert read["stages"]["stage1"]["iou_after"] is None
    assert read["bbox"]["AP"] == 45.12
    assert read["machine"] == {"device": "cuda:0"}
    assert np.isnan(results["bbox"]["APs"])


def test_numpy_values_and_infinities_are_written(tmp_path):
    value = {"a": np.float32(0.5), "b": (np.int64(3), np.float64("nan")), 5: float("-inf")}
    write_json(value, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 0.5, "b": [3, None], "5": None}


def test_machine_is_described():
    machine = describe_machine("cpu", dtype="bfloat16")
    assert machine["device"] == "cpu"
    assert machine["dtype"] == "bfloat16"
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert machine["device_name"]
    assert not {"autocast", "tf32"} & machine.keys()


def test_types_that_pytorch_takes_instead_are_described(monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        machine = describe_machine("cpu")
        assert machine["autocast"] == "bfloat16"
        assert "autocast bfloat16" in format_report({"machine": machine})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for capability, dtype, precision, found in (
        ((8, 0), "float32", "highest", "convolutions"),
        ((9, 0), "float32: stem; bfloat16: fpn", "high", "convolutions and products"),
        ((9, 0), "bfloat16", "high", None),
        ((7, 5), "float32", "high", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda p=precision: p)
        assert describe_machine("cuda", dtype).get("tf32") == found


@pytest.mark.parametrize("keys", [("bbox",), ("exits",), ("stages", "exits", "latency")])
def test_picture_of_what_was_measured(results, tmp_path, keys):
    path = tmp_path / "new" / "report.png"
    plot_report({key: results[key] for key in keys}, path)
    picture = cv2.imread(str(path))
    panels = {("bbox",): 0, ("exits",): 1}.get(keys, 4)
    assert picture.shape[1] > picture.shape[0] > 400 * max(1, panels // 2)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert os.listdir(path.parent) == ["report.png"]


def test_all_evaluators_together(coco_content, detections, detector_output, tmp_path):
    box = (10, 20, 50, 50)
    evaluators = default_evaluators(
        ground_truth=coco_content([(1, 3, box)], image_ids=(1,)),
        category_ids=(3, 7),
        output_dir=tmp_path,
        warmup=0,
    )
    evaluators.append(ShadowEvaluator(ShadowRules(share=1.0)))
    # As the engine does it: the tensors are made in inference mode, the metrics outside it.
    with torch.inference_mode():
        found = detections((box, 0.9, 0))
        boxes = [found.boxes]
        output = detector_output(
            [found],
            stages=[StageOutput([found], boxes, boxes)] * 2,
            stats=CascadeStats([9, 1], [{"background": 8}, {"completed": 1}], {"stage0": 3.0}, 9),
        )
        for evaluator in evaluators:
            evaluator.process([{"image_id": 1}], output)
    merged = {}
    for evaluator in evaluators:
        metrics = evaluator.evaluate()
        assert not merged.keys() & metrics.keys()
        merged |= metrics
    names = {"bbox", "analysis", "notes", "stages", "shadow", "exits", "latency"}
    assert merged.keys() == names
    write_results(merged, tmp_path, machine=describe_machine())
    plot_report(merged, tmp_path / "report.png")
    report = format_report(merged)
    assert cells(report.split("**")[8], "stage1") == ["stage1", *["100.0"] * 4, "1.000", "1.000"]
    assert "Latency per image" in report


def test_stages_can_be_left_out(coco_content):
    dataset = {"ground_truth": coco_content([]), "category_ids": [3]}
    with_stages = [type(item).__name__ for item in default_evaluators(**dataset)]
    without = [type(item).__name__ for item in default_evaluators(**dataset, stages=False)]
    assert set(with_stages) - set(without) == {"StageEvaluator"}


def test_parts_stand_in_the_order_in_which_they_run(results):
    times = {"median_ms": 1.0, "p95_ms": 2.0}
    results["latency"]["parts"] = {"stage0": times, "postprocess": times}
    results["latency"]["full_parts"] = {"stage0": times, "stage1": times, "postprocess": times}
    lines = format_report({"latency": results["latency"]}).splitlines()[4:8]
    assert [line.split()[1] for line in lines] == ["stage0", "stage1", "postprocess", "total"]


def test_texts_in_tables_are_texts():
    rows = [("007", 1.25), ("1e5", 2.5), ("a|b\x1b[31m\u202e\udcf6", 3.0), ("x" * 10_000, 4.0)]
    shown = table("T", ("class", "AP"), rows, ".1f")
    cells = [line.split(" | ")[0].strip("| ") for line in shown.splitlines()[4:]]
    assert cells[:3] == ["007", "1e5", "a\\|b\\x1b[31m\\u202e\\udcf6"]
    assert 40 < len(cells[3]) < 60
    assert [line.split()[-2] for line in shown.splitlines()[4:]] == ["1.2", "2.5", "3.0", "4.0"]


@pytest.fixture
def with_masks(results):
    """The results of a detector with masks."""
    results["segm"] = {"AP": 38.52, "AP50": 60.1, "AP-cat": 37.3, "AP-dog": 39.7}
    results["boundary"] = {"AP": 21.43, "AP50": 44.4, "AP-cat": 20.0, "AP-dog": 22.86}
    for number, name in enumerate(("stage0", "stage1")):
        of_masks = {"AP": 34.6, "AP50": 55.5, "AP75": 33.3, "AP90": 2.21}
        results["stages"][name]["segm"] = {key: value + number for key, value in of_masks.items()}
    masks = {"detections_per_image": 52.5, "masks_per_image": 21.25, "share": 0.40476}
    results["exits"]["masks"] = masks
    return results


def test_masks_stand_beside_boxes(with_masks):
    report = format_report(with_masks)
    titles = report.split("**")[1::2]
    assert titles[:3] == ["Box AP (%)", "Mask AP (%)", "Boundary AP (%)"]
    assert cells(report, "38.5") == ["38.5", "60.1"]
    assert cells(report, "21.4") == ["21.4", "44.4"]
    # Precision and recall are those of boxes.
    assert titles[4].startswith("Box AP per class")
    assert cells(report, "cat")[:5] == ["cat", "5", "44.0", "69.0", "37.3"]
    assert cells(report, "dog")[4:6] == ["39.7", "80.0"]
    stages = report.split("**")[titles.index("If the cascade stopped after a stage") * 2 + 2]
    header = stages.strip().splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        *("after", "AP (%)", "AP50 (%)", "AP75 (%)", "AP90 (%)"),
        *("mask AP (%)", "mask AP50 (%)", "mask AP75 (%)", "mask AP90 (%)"),
        *("mean IoU before", "mean IoU after"),
    ]
    assert cells(stages, "stage1") == [
        *("stage1", "44.9", "70.0", "48.0", "10.0", "35.6", "56.5", "34.3", "3.2", "0.722", "nan")
    ]
    assert "21.2 of 52.5 detections per image got a mask (40.5 %)." in report


def test_an_analysis_by_masks_says_so(with_masks):
    with_masks["analysis"]["task"] = "segm"
    report = format_report(with_masks)
    assert "**Precision and recall at mask IoU 0.5**" in report
    assert "**Mask AP per class; precision, recall and F1 at score 0.5**" in report
    assert len(cells(report, "cat")) == 9


def test_a_single_class_of_detectron2_has_the_mask_ap_of_all(with_masks):
    with_masks["segm"] = {"AP": 38.52, "AP50": 60.1}
    with_masks["analysis"]["per_class"] = with_masks["analysis"]["per_class"][:1]
    assert cells(format_report(with_masks), "cat")[4] == "38.5"


def test_picture_of_masks(with_masks, tmp_path):
    plot_report({"stages": with_masks["stages"]}, tmp_path / "report.png")
    wide = cv2.imread(str(tmp_path / "report.png"))
    for name in ("stage0", "stage1"):
        del with_masks["stages"][name]["segm"]
    plot_report({"stages": with_masks["stages"]}, tmp_path / "boxes.png")
    # A panel more begins a second row.
    assert wide.shape[0] > 1.5 * cv2.imread(str(tmp_path / "boxes.png")).shape[0]
