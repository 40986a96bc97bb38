"""The output folder of a run in Detectron2, compared with the standalone host on the same YAML."""

import json
import math

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shape_runs import INSTANT, metrics_of

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

import train_net
from cascade_det import config
from cascade_det.d2 import host
from cascade_det.data.catalog import DatasetSource
from cascade_det.data.coco import load_dataset
from cascade_det.data.loader import build_test_loader
from cascade_det.engine.validation import validation_losses
from cascade_det.standalone import build_detector, evaluate

pytestmark = pytest.mark.needs_detectron2

RUN = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "CASCADE.VALIDATION_LOSS", "True"]
RUN += ["SOLVER.AMP.ENABLED", "False"]  # float32 on every machine
RUN += ["CASCADE.SHADOW_SHARE", "1.0", "MODEL.CASCADE.EXIT.EXPECTED_LOSS", "0.1"]


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory):
    """The folders of the same run in both hosts, by name."""
    folders = {}
    for name in ("detectron2", "standalone"):
        folders[name] = tmp_path_factory.mktemp(name)
        command = ["--host", name, "--config-file", INSTANT, *options, *RUN]
        assert train_net.main([*command, "OUTPUT_DIR", str(folders[name])]) == 0
    return folders


@pytest.fixture(scope="module")
def output(runs):
    return runs["detectron2"]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def shape_of(value):
    """The keys at every depth, with the types of what they hold; nan is ``null`` in such a file."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    return "number" if value is None or isinstance(value, (int, float)) else type(value).__name__


def test_both_hosts_leave_the_same_files(runs):
    files = {
        name: {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if "tfevents" not in path.name and "worst_images/" not in str(path)
        }
        for name, folder in runs.items()
    }
    assert files["detectron2"] == files["standalone"]
    assert files["detectron2"] >= {
        *(
            "config.yaml",
            "log.txt",
            "metrics.json",
            "results.json",
            "report.png",
            "report.html",
            "last_checkpoint",
        ),
        *("model_0000002.pth", "model_final.pth", "model_best.pth"),
        *("inference/coco_instances_results.json", "analysis/confusion_matrix.csv"),
    }
    assert list(runs["detectron2"].glob("events.out.tfevents.*"))


def test_both_hosts_report_the_same_metrics(runs):
    ours, theirs = results_of(runs["standalone"]), results_of(runs["detectron2"])
    # Detectron2 names the AP of classes itself, and the confusions depend on the weights.
    per_class = {name for name in theirs["bbox"] if name.startswith("AP-")}
    assert per_class == {f"AP-{name}" for name in class_names(runs["detectron2"])}
    for results in (ours, theirs):
        results["bbox"] = {k: v for k, v in results["bbox"].items() if not k.startswith("AP-")}
        results["analysis"].pop("confused", None)
    assert shape_of(ours) == shape_of(theirs)
    names = {"bbox", "stages", "exits", "shadow", "latency", "analysis", "notes", "machine", "data"}
    assert names <= theirs.keys()
    assert ours["exits"]["full_head_gflops_per_image"] > 0.001
    assert theirs["shadow"]["images"] == 3
    assert theirs["exits"]["images"] == 3


def class_names(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["run"]["class_names"]


def test_the_box_ap_is_pycocotools(output, shapes):
    truth = COCO(str(shapes / "val.json"))
    found = truth.loadRes(str(output / "inference" / "coco_instances_results.json"))
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    bbox = results_of(output)["bbox"]
    assert found.anns
    for name, value in zip(("AP", "AP50", "AP75"), evaluation.stats[:3], strict=True):
        assert bbox[name] == pytest.approx(100 * value, abs=1e-9)
    at_90 = evaluation.eval["precision"][8, :, :, 0, 2]
    assert bbox["AP90"] == pytest.approx(100 * at_90[at_90 > -1].mean(), abs=1e-9)


def test_the_first_line_of_the_log_names_the_host(runs):
    for name, folder in runs.items():
        first = (folder / "log.txt").read_text().splitlines()[0]
        assert first.endswith(f"Host: {name}, as --host says")


def test_the_log_has_the_tables(output):
    log = (output / "log.txt").read_text()
    for words in ("Box AP", "If the cascade stopped after a stage", "Latency per image"):
        assert words in log
    assert "Traceback" not in log


def test_metrics_have_losses_rates_stages_and_results(output):
    lines = metrics_of(output)
    names = set().union(*lines)
    assert names >= {
        *("total_loss", "loss_rpn_cls", "loss_cls_stage2", "lr", "time", "data_time"),
        *("eta_seconds", "gradient_norm", "stage0/iou_before", "stage2/iou_after"),
        *("bbox/AP", "bbox/AP90", "stages/stage0/AP", "validation/total_loss"),
        *("shadow/loss", "shadow/drift", "exits/head_gflops_per_image"),
    }
    trained = [line for line in lines if "total_loss" in line]
    assert [line["iteration"] for line in trained] == [0, 1, 2, 3, 4, 5]
    # The first value of a smoothed figure is that of its iteration.
    losses = [value for name, value in trained[0].items() if name.startswith("loss_")]
    assert trained[0]["total_loss"] == pytest.approx(sum(losses), rel=1e-5)


def test_the_standalone_host_gives_its_weights_the_same_ap(output, tmp_path):
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path)]
    alone = evaluate(config.load_config(output / "config.yaml", weights))
    assert alone["bbox"]["AP"] == pytest.approx(results_of(output)["bbox"]["AP"], abs=0.1)


def test_a_checkpoint_is_plain_and_names_what_it_detects(output, shapes):
    content = torch.load(output / "model_final.pth", weights_only=True)
    categories = json.loads((shapes / "val.json").read_text())["categories"]
    assert content["run"]["class_names"] == [entry["name"] for entry in categories]
    assert content["run"]["host"] == "detectron2"
    assert content["iteration"] == 5
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    best = torch.load(output / "model_best.pth", weights_only=True)
    assert best.keys() == {"model", "run", "iteration", "metric"}
    reader = DetectionCheckpointer(build_model(host.load_config(output / "config.yaml")))
    assert reader.resume_or_load(str(output / "model_final.pth"), resume=False)["iteration"] == 5


def test_the_validation_loss_is_that_of_the_standalone_host(output, shapes):
    """Same weights, same images, same objects."""
    cfg = config.load_config(output / "config.yaml")
    detector = build_detector(cfg)
    content = torch.load(output / "model_final.pth", weights_only=True)
    detector.load_state_dict(content["model"])
    dataset = load_dataset(DatasetSource("val", shapes / "val.json", shapes / "val"))
    arguments = config.input_arguments(cfg, train=False) | config.test_loader_arguments(cfg)
    losses = validation_losses(detector, build_test_loader(dataset, **arguments, annotated=True))
    (line,) = (line for line in metrics_of(output) if "validation/total_loss" in line)
    assert losses.keys() == {n.removeprefix("validation/") for n in line if "validation/" in n}
    # Some 20 layers, each of which sums up to 2,304 products, in an order that is the kernel's own.
    rounding = 20 * math.sqrt(2304) * torch.finfo(torch.float32).eps
    for name, value in losses.items():
        # Which regions of background are drawn is each host's own; only class losses see it.
        close = 1e-3 if "cls" in name or name == "total_loss" else rounding
        assert line[f"validation/{name}"] == pytest.approx(value, rel=close), name
