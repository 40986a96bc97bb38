"""Results of evaluations for reports, without a detector."""

import json

import cv2
import numpy as np

from cascade_det.evaluation import score_results
from cascade_det.evaluation.ground_truth import load_ground_truth
from cascade_det.report.text import write_results

HOSTILE = (
    "<script>window.hit = 1; alert(1)</script>",
    '"onload="window.hit = 1',
    "</style><img src=x onerror=alert(1)>",
    "]]><svg onload=alert(1)>",
    "javascript:alert(1)",
    "a\u202egnp.exe",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; '`\\",
)
MACHINE = {"device": "cpu", "device_name": "test", "threads": 1, "dtype": "float32"}
STAGE = {"AP": 40.0, "AP50": 60.0, "AP75": 45.0, "AP90": 9.0, "iou_before": 0.6, "iou_after": 0.7}
TIMES = {"backbone": 10.0, "stage0": 4.0, "gate1": 0.5, "stage1": 2.0, "postprocess": 1.0}


def make_data(folder, names, *, images=6, seed=0):
    """``truth.json`` with a category per name, and grey images; returns its content."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 90, "width": 120}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, start=1)],
        "annotations": [],
    }
    for image in content["images"]:
        pixels = np.full((90, 120, 3), 128, np.uint8)
        cv2.imwrite(str(folder / image["file_name"]), pixels)
        for _ in range(3):
            box = [*rng.uniform(0, 60, 2).round(1).tolist(), *rng.uniform(15, 29, 2).tolist()]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.integers(1, len(names) + 1)),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    (folder / "truth.json").write_text(json.dumps(content))
    return content


def noisy_results(content, *, noise=3.0, seed=1):
    """Detections near the objects, some of another class."""
    rng = np.random.default_rng(seed)
    count = len(content["categories"])
    found = []
    for item in content["annotations"]:
        for _ in range(2):
            box = (np.array(item["bbox"]) + rng.normal(0, noise, 4)).clip(1)
            other = rng.random() < 0.2
            category_id = int(rng.integers(1, count + 1)) if other else item["category_id"]
            score = float(rng.random())
            found.append(
                {
                    "image_id": item["image_id"],
                    "category_id": category_id,
                    "bbox": box.tolist(),
                    "score": score,
                }
            )
    return found


def write_run(folder, root, content, found, **more):
    """The folder of an evaluation on the data in ``root``; returns its results."""
    coco_gt = load_ground_truth(content)
    stages = {"regions": 5, "stage0": STAGE, "stage1": {**STAGE, "AP": 44.0}}
    parts = {name: {"median_ms": ms, "p95_ms": 2 * ms} for name, ms in TIMES.items()}
    left = {"stage0": {"background": 0.5}, "stage1": {"completed": 1.0}}
    results = {
        **score_results(coco_gt, found, sorted(coco_gt.imgs)),
        "stages": stages,
        "exits": {
            "images": 6,
            "stages_per_region": 1.5,
            "tiles": {"per_image": 850.0, "open_share": 0.1, "computed_share": 0.254},
            **{
                name: {
                    "entered_per_image": 100.0 / (1 + index),
                    "entered_share": 1.0 / (1 + index),
                    "exit_rate": 0.5 * (1 - index),
                    "left": left[name],
                    "mean_score": {},
                }
                for index, name in enumerate(left)
            },
        },
        "latency": {
            "batch_size": 1,
            "images": 6,
            "warmup_batches": 0,
            "parts": parts,
            "total": {"median_ms": 17.5, "p95_ms": 35.0},
            "most_exits_could_save": float("nan"),
            "notes": [],
        },
        "data": {
            "name": "cells",
            "json_file": str(root / "truth.json"),
            "image_root": str(root),
            "images": len(content["images"]),
            "skipped": 0,
        },
        "config": {"SOLVER.BASE_LR": [0.001, 0.02]},
        **more,
    }
    write_results(results, folder, machine=MACHINE)
    (folder / "inference").mkdir(exist_ok=True)
    file = folder / "inference" / "coco_instances_results.json"
    file.write_text(json.dumps(found))
    return results
