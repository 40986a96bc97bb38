"""Interrupted and resumed runs in Detectron2: what they keep, log and refuse."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from shape_runs import INSTANT, assert_same, metrics_of, rates, saved

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import build_model

import train_net
from cascade_det import config, standalone
from cascade_det.d2 import host
from cascade_det.d2.trainer import Trainer
from cascade_det.engine.run_info import RunInfo
from cascade_det.errors import CheckpointError
from cascade_det.parallel.interrupts import Interrupted

pytestmark = pytest.mark.needs_detectron2

NO_TESTS = ("DATASETS.TEST", "()")
EACH = ("SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "1", "CASCADE.MAX_TO_KEEP", "0")
AVERAGED = (*EACH, *NO_TESTS, "CASCADE.EMA_DECAY", "0.25")
NAME = "roi_heads.box_head.0.fc1.weight"


class Killed(BaseException):
    """Ends a run at once; its files are as after ``kill -9``."""


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A folder with all checkpoints of a run of four iterations, with averaged weights."""
    folder = tmp_path_factory.mktemp("finished")
    cfg = host.load_config(INSTANT, [*options, *AVERAGED, "OUTPUT_DIR", str(folder)])
    host.train(cfg)
    return folder


@pytest.fixture
def copy(finished, make_cfg, tmp_path):
    """Gives a configuration whose folder is a copy of that, as it was after an iteration."""

    def make(last, *more):
        shutil.copytree(finished, tmp_path / "copy")
        (tmp_path / "copy" / "last_checkpoint").write_text(last)
        (tmp_path / "copy" / "metrics.json").unlink()
        return make_cfg(*AVERAGED, *more, output="copy")

    return make


def checkpoints(cfg):
    return sorted(path.stem for path in Path(cfg.OUTPUT_DIR).glob("*.pth"))


class TestState:
    def test_a_resumed_trainer_saves_what_it_was_resumed_from(self, copy):
        cfg = copy("model_final.pth")
        first = saved(cfg)
        names, ids = first["run"]["class_names"], first["run"]["category_ids"]
        trainer = Trainer(cfg, RunInfo(9, names, ids, "detectron2"))
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 4
        trainer.checkpointer.save("again", iteration=3)
        again = saved(cfg, "again.pth")
        assert_same(again, first)
        assert not torch.equal(first["model"][NAME], first["training_weights"][NAME])
        moments = first["trainer"]["_trainer"]["optimizer"]["state"][NAME]
        assert moments["exp_avg"].any()
        assert moments["step"] == 4

    def test_schedule_and_average_go_on_where_they_were(self, copy, finished):
        cfg = copy("model_0000001.pth")
        host.train(cfg, resume=True)
        before, again = rates(finished), rates(cfg.OUTPUT_DIR)
        assert len(set(before.values())) == 4
        assert again == {i: pytest.approx(before[i]) for i in (2, 3)}
        # Share that the average keeps at iteration t: min(decay, (1 + t) / (10 + t)).
        average = saved(cfg, "model_0000001.pth")["model"][NAME]
        for iteration, keep in ((2, 0.25), (3, 0.25)):
            checkpoint = saved(cfg, f"model_{iteration:07d}.pth")
            average = keep * average + (1 - keep) * checkpoint["training_weights"][NAME]
            torch.testing.assert_close(checkpoint["model"][NAME], average)

    def test_the_images_are_not_those_that_the_run_began_with(self, copy, make_cfg, on_step):
        seen = {}
        on_step(lambda i, batch: seen.setdefault(i, [sample["image_id"] for sample in batch]))
        host.train(make_cfg(*NO_TESTS, "SOLVER.MAX_ITER", "3"))
        first = list(seen.values())
        seen.clear()
        host.train(copy("model_0000000.pth"), resume=True)
        assert list(seen) == [1, 2, 3]
        assert list(seen.values()) != first


class TestRefusals:
    def test_resuming_nothing(self, options, tmp_path, capfd):
        command = ["--host", "detectron2", "--config-file", INSTANT, "--resume", *options]
        assert train_net.main([*command, "OUTPUT_DIR", str(tmp_path)]) == 1
        told = "".join(capfd.readouterr())
        assert f"there is nothing to resume in OUTPUT_DIR {tmp_path}" in told
        assert "Traceback" not in told

    def test_the_other_host_does_not_resume(self, copy, make_cfg, tmp_path):
        cfg = copy("model_final.pth")
        with pytest.raises(CheckpointError, match="trained by --host detectron2"):
            standalone.train(config.load_config(f"{cfg.OUTPUT_DIR}/config.yaml"), resume=True)
        cfg = make_cfg(*NO_TESTS, "SOLVER.MAX_ITER", "1", output="other")
        (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
        standalone.train(config.load_config(f"{cfg.OUTPUT_DIR}/config.yaml"))
        cfg.SOLVER.MAX_ITER = 2
        with pytest.raises(CheckpointError, match="trained by --host standalone"):
            host.train(cfg, resume=True)
        assert saved(cfg)["iteration"] == 0

    def test_a_run_of_detectron2s_own_trainer_is_not_resumed(self, make_cfg):
        """Its optimiser is stored by position, which says nothing of the parameters."""
        cfg = make_cfg(*NO_TESTS)
        model = build_model(cfg)
        optimizer = torch.optim.SGD(model.parameters(), 0.1).state_dict()
        trainer = {"iteration": 0, "_trainer": {"iteration": 0, "optimizer": optimizer}}
        content = {"model": model.state_dict(), "trainer": trainer, "iteration": 0}
        torch.save(content, Path(cfg.OUTPUT_DIR, "model_final.pth"))
        Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_final.pth")
        with pytest.raises(CheckpointError, match=r"model_final\.pth: its 'trainer' does not fit"):
            host.train(cfg, resume=True)


class TestInterrupts:
    def test_a_signal_ends_a_run_with_a_checkpoint_and_the_command(
        self, options, tmp_path, on_step, capfd
    ):
        on_step(lambda i, _: os.kill(os.getpid(), signal.SIGTERM) if i == 0 else None)
        command = ["--host", "detectron2", "--config-file", INSTANT, *options, *NO_TESTS]
        command += ["SOLVER.MAX_ITER", "3", "OUTPUT_DIR", str(tmp_path)]
        assert train_net.main(command) == 130
        told = "".join(capfd.readouterr())
        assert "Interrupted after iteration 1 of 3. To continue: python" in told
        assert "Traceback" not in told
        assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
        on_step(lambda *_: None)
        assert train_net.main([*command[:2], "--resume", *command[2:]]) == 0
        assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 2

    def test_a_signal_in_an_evaluation_ends_it_and_it_comes_again(self, make_cfg, on_evaluation):
        cfg = make_cfg("SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "2")

        def evaluate():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        on_evaluation(evaluate)
        with pytest.raises(Interrupted, match="after iteration 1"):
            host.train(cfg)
        assert Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_0000001.pth"
        values = iter([7.0, 6.0])
        on_evaluation(lambda: next(values))
        host.train(cfg, resume=True)
        assert saved(cfg, "model_best.pth")["metric"] == {"bbox/AP": 7.0}
        assert saved(cfg, "model_best.pth")["iteration"] == 1


class TestEvaluations:
    def test_patience_ends_a_run_and_a_resume_does_not_begin_it_again(
        self, make_cfg, on_evaluation, on_step
    ):
        values = [3.0, 1.0, 2.0, 9.0, 0.0]
        left, steps = iter(values), []
        on_evaluation(lambda: next(left))
        on_step(lambda i, _: steps.append(i))
        cfg = make_cfg(*EACH, "SOLVER.MAX_ITER", "5", "TEST.EVAL_PERIOD", "1")
        cfg.CASCADE.PATIENCE = 2
        results = host.train(cfg)
        assert results["bbox"]["AP"] == 2.0
        assert steps == [0, 1, 2]
        assert saved(cfg)["iteration"] == 2
        best = saved(cfg, "model_best.pth")
        assert (best["iteration"], best["metric"]) == (0, {"bbox/AP": 3.0})
        assert_same(best["model"], saved(cfg, "model_0000000.pth")["model"])
        final = Path(cfg.OUTPUT_DIR, "model_final.pth").read_bytes()

        assert host.train(cfg, resume=True) == {}
        assert steps == [0, 1, 2]
        assert Path(cfg.OUTPUT_DIR, "model_final.pth").read_bytes() == final

        cfg.CASCADE.PATIENCE = 3
        host.train(cfg, resume=True)
        assert steps == [0, 1, 2, 3, 4]
        assert saved(cfg, "model_best.pth")["metric"] == {"bbox/AP": 9.0}
        aps = {r["iteration"]: r["bbox/AP"] for r in metrics_of(cfg.OUTPUT_DIR) if "bbox/AP" in r}
        # Detectron2 logs values after the last iteration under the next one.
        assert aps == dict(zip([0, 1, 2, 3, 5], values, strict=True))

    def test_an_evaluation_that_was_cut_off_is_made_up_for(self, make_cfg, on_evaluation, on_step):
        def cut_off():
            raise Killed

        steps = []
        on_step(lambda i, _: steps.append(i))
        cfg = make_cfg(*EACH, "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "2")
        on_evaluation(cut_off)
        with pytest.raises(Killed):
            host.train(cfg)
        evaluated_after = []
        on_evaluation(lambda: evaluated_after.append(len(steps)) or 1.0)
        host.train(cfg, resume=True)
        assert steps == [0, 1, 2]
        assert evaluated_after == [2, 3]

    def test_a_last_step_that_fails_is_not_evaluated(self, make_cfg, on_evaluation, on_step):
        def fail(iteration, _):
            if iteration == 1:
                raise FloatingPointError("diverged")

        on_step(fail)
        on_evaluation(lambda: pytest.fail("evaluated"))
        cfg = make_cfg("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0")
        with pytest.raises(FloatingPointError, match="diverged"):
            host.train(cfg)
        assert checkpoints(cfg) == ["model_start"]

    def test_only_the_latest_checkpoints_are_kept_over_a_resume(self, make_cfg, on_step):
        def kill(iteration, _):
            if iteration == 3:
                raise Killed

        cfg = make_cfg(*EACH, *NO_TESTS, "SOLVER.MAX_ITER", "5", "CASCADE.MAX_TO_KEEP", "2")
        on_step(kill)
        with pytest.raises(Killed):
            host.train(cfg)
        assert checkpoints(cfg) == ["model_0000001", "model_0000002"]
        on_step(lambda *_: None)
        host.train(cfg, resume=True)
        assert checkpoints(cfg) == ["model_0000003", "model_0000004", "model_final"]
