"""``cascade_det.d2.trainer.Trainer`` offers what users of a ``DefaultTrainer`` reach for."""

import inspect

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset

from cascade_det.benchmark.pretended_gpu import PretendedGPU
from cascade_det.d2.datasets import register_dataset
from cascade_det.d2.evaluate import coco_evaluator
from cascade_det.d2.trainer import Trainer
from cascade_det.data.coco import load_dataset
from cascade_det.engine.run_info import RunInfo

pytestmark = pytest.mark.needs_detectron2


@pytest.fixture
def trainer(make_cfg):
    cfg = make_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "SOLVER.MAX_ITER", "2")
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        source = register_dataset(name, cfg.CASCADE.DATASETS)
    return Trainer(cfg, RunInfo.of(cfg, load_dataset(source), "detectron2"))


def test_every_public_method_of_a_default_trainer_is_there():
    names = {
        name
        for name in vars(DefaultTrainer)
        if not name.startswith("_") and name not in dir(TrainerBase)
    }
    # The configuration is scaled before the trainer is built (SOLVER.REFERENCE_WORLD_SIZE).
    assert {n for n in names if not hasattr(Trainer, n)} - {"auto_scale_workers"} == {"data_loader"}
    for name in names:
        if name.startswith("build_") or name in ("test", "resume_or_load"):
            ours, theirs = (
                list(inspect.signature(getattr(c, name)).parameters)
                for c in (Trainer, DefaultTrainer)
            )
            assert ours == theirs, name


def test_attributes_are_those_of_the_step(trainer):
    assert isinstance(trainer.model, torch.nn.Module)
    assert trainer.optimizer.param_groups
    assert trainer.scheduler.optimizer is trainer.optimizer
    trainer.resume_or_load(resume=False)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert len(next(iter(trainer.data_loader))) == trainer.cfg.SOLVER.IMS_PER_BATCH
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    state = trainer.state_dict()
    assert state["_trainer"].keys() >= {"iteration", "optimizer"}
    assert state["_trainer"]["iteration"] == 1


class Counting(DatasetEvaluator):
    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(outputs)

    def evaluate(self):
        return {"images": self.images}


def test_test_is_detectron2s(trainer):
    cfg, (name,) = trainer.cfg, trainer.cfg.DATASETS.TEST
    found = Trainer.test(cfg, trainer.model)
    loader = build_detection_test_loader(cfg, name)
    wanted = inference_on_dataset(trainer.model, loader, coco_evaluator(cfg, name))
    assert found["bbox"] == pytest.approx(wanted["bbox"], nan_ok=True)
    assert Trainer.test(cfg, trainer.model, [Counting()]) == {"images": 3}


@pytest.mark.parametrize("half", [True, False])
def test_maps_of_half_precision_on_a_gpu_are_channels_last(trainer, half):
    with PretendedGPU() as gpu, torch.autocast("cuda", torch.bfloat16, enabled=half):
        backbone = gpu.move(trainer.module.backbone)
        maps = backbone(gpu.move(torch.zeros(1, 3, 64, 96)))
    channels_last = {x.held.is_contiguous(memory_format=torch.channels_last) for x in maps.values()}
    assert channels_last == {half}
