"""What ends a run in Detectron2 that its user can mend: a message, and no more."""

import json
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from coco_sets import damage, draw_noise, edit_json, turn_names
from shape_runs import INSTANT

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import BACKBONE_REGISTRY, build_model, build_resnet_backbone
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead

import train_net
from cascade_det import config, standalone
from cascade_det.d2 import host
from cascade_det.errors import CheckpointError, ConfigError, DatasetError

pytestmark = [pytest.mark.needs_detectron2, pytest.mark.usefixtures("no_pictures")]

SHORT = ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", "4")
STANDARD = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.CASCADE.EXIT.ENABLED", "False")
BROKEN = "roi_heads.box_predictor.1.bbox_pred"


@pytest.fixture
def data(shapes, tmp_path):
    """A copy of the shapes, to be damaged, and the options that name it."""
    folder = tmp_path / "data"
    shutil.copytree(shapes, folder)
    names = [(f"own_{s}", str(folder / f"{s}.json"), str(folder / s)) for s in ("train", "val")]
    keys = ["CASCADE.DATASETS", str(names)]
    return folder, [*keys, "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)"]


class TestDivergence:
    @pytest.fixture
    def broken_weights(self, make_cfg, tmp_path):
        weights = build_model(make_cfg()).state_dict()
        weights[f"{BROKEN}.weight"].fill_(3e38)  # its sums are no numbers any more
        torch.save({"model": weights}, tmp_path / "broken.pth")
        return str(tmp_path / "broken.pth")

    def test_stage_images_and_file_are_named_and_replayed_in_both_hosts(
        self, options, broken_weights, tmp_path, capfd, shapes
    ):
        keys = [*options, *SHORT, "MODEL.WEIGHTS", broken_weights]
        keys += ["OUTPUT_DIR", str(tmp_path / "output")]
        command = ["--host", "detectron2", "--config-file", INSTANT]
        assert train_net.main([*command, *keys]) == 1
        told = "".join(capfd.readouterr())
        assert "Traceback" not in told
        assert "diverged at iteration 0, in stage 1 of the cascade" in told
        assert "model_start.pth" in told
        (file,) = (tmp_path / "output").glob("diverged_*.pth")
        assert str(file) in told
        ids = json.loads(re.search(r"image ids (\[.*?\])", told)[1])
        known = {image["id"] for image in json.loads((shapes / "train.json").read_text())["images"]}
        assert len(ids) == 2
        assert known.issuperset(ids)

        for name in ("detectron2", "standalone"):
            command[1] = name
            assert train_net.main([*command, "--replay-batch", str(file), *keys]) == 0
            report = capfd.readouterr().out
            assert f"iteration 0, image ids {ids}" in report
            assert f"outputs that are not finite: {BROKEN}\n" in report
            assert "loss_box_reg_stage1 inf" in report

    def test_a_batch_of_the_standalone_host_is_replayed(self, make_cfg, broken_weights):
        cfg = make_cfg(*SHORT, "MODEL.WEIGHTS", broken_weights)
        Path(cfg.OUTPUT_DIR, "given.yaml").write_text(cfg.dump())
        with pytest.raises(FloatingPointError, match="stage 1"):
            standalone.train(config.load_config(f"{cfg.OUTPUT_DIR}/given.yaml"))
        (file,) = Path(cfg.OUTPUT_DIR).glob("diverged_*.pth")
        report = "\n".join(host.replay_batch(cfg, file))
        assert f"outputs that are not finite: {BROKEN}\n" in report


class TestData:
    def break_image(self, folder):
        """A picture that only decoding finds broken; its name."""
        draw_noise(folder / "train" / "broken.png")
        damage(folder / "train" / "broken.png")
        edit_json(folder / "train.json", lambda c: c["images"][1].update(file_name="broken.png"))

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_an_image_that_breaks_in_training_ends_it_with_a_checkpoint(
        self, data, options, tmp_path, capfd, workers
    ):
        folder, own = data
        self.break_image(folder)
        keys = [*options, *own, *SHORT, "OUTPUT_DIR", str(tmp_path / "output")]
        keys += ["DATALOADER.NUM_WORKERS", workers, "SOLVER.CHECKPOINT_PERIOD", "100"]
        assert train_net.main(["--host", "detectron2", "--config-file", INSTANT, *keys]) == 1
        told = "".join(capfd.readouterr())
        assert re.search(r"ERROR: \S*/train/broken\.png: cannot be read", told)
        assert "Traceback" not in told
        last = (tmp_path / "output" / "last_checkpoint").read_text()
        assert (tmp_path / "output" / last).is_file()

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_another_image_takes_its_place(self, data, make_cfg, on_step, capfd, caplog, workers):
        folder, own = data
        self.break_image(folder)
        cfg = make_cfg(*own, *SHORT, "CASCADE.ON_BAD_DATA", "skip")
        cfg.DATALOADER.NUM_WORKERS = int(workers)
        seen = []
        on_step(lambda _, batch: seen.extend(Path(s["file_name"]).name for s in batch))
        with caplog.at_level(logging.WARNING):
            host.train(cfg)
        assert len(seen) == 8
        assert "broken.png" not in seen
        if workers == "0":  # workers speak for themselves
            assert "broken.png: cannot be read" in caplog.text

    def test_what_is_wrong_in_a_json_cannot_be_left_out(self, data, make_cfg):
        folder, own = data
        cfg = make_cfg(*own, "MODEL.WEIGHTS", "weights.pth")
        edit_json(folder / "val.json", lambda c: c["annotations"][0].update(category_id=77))
        for run in (host.train, host.evaluate):
            with pytest.raises(DatasetError, match=r"val\.json: bad data\n.*77"):
                run(cfg)
        cfg.CASCADE.ON_BAD_DATA = "skip"
        for run in (host.train, host.evaluate):
            with pytest.raises(DatasetError, match=r"val\.json: 1 x .*--host standalone"):
                run(cfg)
        assert os.listdir(cfg.OUTPUT_DIR) == [".cascade_det.lock"]

    def test_data_sets_to_train_on_have_the_same_classes(self, data, make_cfg):
        folder, own = data
        edit_json(folder / "val.json", turn_names)
        with pytest.raises(DatasetError, match="have different"):
            host.train(make_cfg(*own, *SHORT, "DATASETS.TRAIN", "('own_train', 'own_val')"))

    def test_nothing_to_train_on(self, data, make_cfg):
        folder, own = data
        edit_json(folder / "train.json", lambda content: content["annotations"].clear())
        with pytest.raises(DatasetError, match=r"nothing to train on in 'own_train'"):
            host.train(make_cfg(*own, *SHORT))

    def test_annotations_may_lack_what_is_obvious(self, data, make_cfg):
        """Many exporters write neither; pycocotools needs both."""
        folder, own = data

        def strip(content):
            for annotation in content["annotations"]:
                del annotation["iscrowd"], annotation["area"]
                annotation |= {"area": None} if annotation["id"] % 2 else {}

        for split in ("train", "val"):
            edit_json(folder / f"{split}.json", strip)
        cfg = make_cfg(*own, "SOLVER.MAX_ITER", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
        assert host.train(cfg)["bbox"]["AP"] >= 0

    def test_workers_outlive_a_signal_to_all(self, make_cfg, on_step):
        """As Ctrl-C in a terminal sends it: to every process at once. But not their parent's."""
        seen = []

        def fire(iteration, _):
            seen.append(iteration)
            if iteration == 0:
                workers = [str(child.pid) for child in multiprocessing.active_children()]
                assert len(workers) == 2
                for name in ("INT", "TERM"):
                    subprocess.run(["kill", f"-{name}", *workers], check=True)
            elif iteration == 15:
                for child in multiprocessing.active_children():
                    child.terminate()
                    child.join(60)
                    assert child.exitcode == 0

        on_step(fire)
        cfg = make_cfg(*SHORT, "DATALOADER.NUM_WORKERS", "2", "SOLVER.MAX_ITER", "16")
        host.train(cfg)
        assert seen == list(range(16))


class Bomb:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("name", ["weights.pth", "last_checkpoint"])
def test_nothing_in_a_file_of_weights_is_executed(make_cfg, tmp_path, name, as_zip):
    cfg = make_cfg(*SHORT)
    resume = name == "last_checkpoint"
    file = Path(cfg.OUTPUT_DIR, "model_0000000.pth") if resume else tmp_path / name
    content = {"model": {}, "iteration": 0, "more": Bomb(tmp_path / "exploded")}
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    if resume:
        Path(cfg.OUTPUT_DIR, name).write_text(file.name)
    else:
        cfg.MODEL.WEIGHTS = str(file)
    with pytest.raises(CheckpointError, match=re.escape(file.name)):
        host.train(cfg, resume=resume)
    assert not (tmp_path / "exploded").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "exploded").exists()


class TestConfiguration:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["SOLVER.MAX_ITR", "5"], ["no key SOLVER.MAX_ITR", "SOLVER.MAX_ITER"]),
            (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER is 'many'", "int is expected"]),
            (["CASCADE.EMA_DECAY", "1.5"], ["CASCADE.EMA_DECAY is 1.5"]),
            (["MODEL.CASCADE.EXIT.THRESHOLDS", "(0.9, 0.9, 0.9)"], ["EXIT.THRESHOLDS", "3 stages"]),
            (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"], ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"]),
            (["OUTPUT_DIR"], ["pairs"]),
        ],
    )
    def test_mistakes_end_with_a_message(self, options, words, tmp_path, capfd):
        command = ["--host", "detectron2", "--config-file", INSTANT, "OUTPUT_DIR", str(tmp_path)]
        assert train_net.main([*command, *options]) == 1
        told = "".join(capfd.readouterr())
        assert all(word in told for word in words)
        assert "Traceback" not in told

    def test_a_mistake_in_a_file_is_told_with_its_line(self, tmp_path):
        (tmp_path / "own.yaml").write_text(f"_BASE_: {INSTANT}\nSOLVER:\n  MAX_ITER: [1]\n")
        with pytest.raises(ConfigError, match=r"own\.yaml:3: SOLVER\.MAX_ITER is \[1\]"):
            host.load_config(tmp_path / "own.yaml")

    @pytest.mark.parametrize(
        "options",
        [
            ["MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True"],
            ["MODEL.RPN.HEAD_NAME", "MyHead", "MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"],
            ["MODEL.BACKBONE.NAME", "build_my_backbone", "MODEL.RESNETS.DEFORM_MODULATED", "True"],
            [*STANDARD, "MODEL.META_ARCHITECTURE", "RetinaNet"],
            ["MODEL.ROI_BOX_HEAD.NAME", "MyHead", "MODEL.ROI_BOX_HEAD.NORM", "naiveSyncBN"],
            ["TEST.AUG.ENABLED", "True", "TEST.PRECISE_BN.ENABLED", "True", "VIS_PERIOD", "5"],
            ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 38.5, 0.2]]"],
            [
                "INPUT.CROP.ENABLED",
                "True",
                "DATALOADER.SAMPLER_TRAIN",
                "RandomSubsetTrainingSampler",
            ],
            [*STANDARD, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
        ],
    )
    def test_what_detectron2_alone_can_do_is_not_refused(self, options, monkeypatch):
        # Names of parts that the program around registers.
        monkeypatch.setitem(RPN_HEAD_REGISTRY._obj_map, "MyHead", StandardRPNHead)
        monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_my_backbone", build_resnet_backbone)
        host.check_config(host.load_config(INSTANT, options))
        with pytest.raises(ConfigError):
            config.check_config(config.load_config(INSTANT, options))


class TestExpectedResults:
    @pytest.fixture
    def expect(self, monkeypatch, make_cfg):
        """Train for an iteration that ends with an AP of 40, and expect something of it."""
        monkeypatch.setattr("cascade_det.d2.train.evaluate_all", lambda *_: {"bbox": {"AP": 40.0}})

        def run(*expected):
            host.train(make_cfg("SOLVER.MAX_ITER", "1", "TEST.EXPECTED_RESULTS", str([expected])))

        return run

    def test_they_decide_over_the_exit_status(self, expect, tmp_path):
        expect("bbox", "AP", 39.9, 0.2)
        shutil.rmtree(tmp_path / "output")
        with pytest.raises(SystemExit) as end:
            expect("bbox", "AP", 39.0, 0.2)
        assert end.value.code == 1

    def test_they_are_of_what_is_evaluated(self, expect):
        with pytest.raises(ConfigError, match=r"EXPECTED_RESULTS names segm.* of bbox"):
            expect("segm", "AP", 39.0, 0.2)
