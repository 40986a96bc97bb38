"""Training schedules in Detectron2: losses as in the core, and a frozen detector stays frozen."""

import copy

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.utils.events import EventStorage
from small_cascades import CHANNELS, POOLED, STRIDES, make_cascade, make_scene
from small_plugin import (
    MASKS,
    OURS,
    SAME_KERNEL,
    build_heads,
    features_of,
    heads_cfg,
    proposals_of,
    targets_of,
)
from two_hosts import BACKBONES, Standalone, build_two, make_batch, with_instances

from cascade_det import config
from cascade_det.core import CascadeInputs, RoIPooler, build_exits, build_training_schedule
from cascade_det.d2.detector import Detector
from cascade_det.engine.training_modes import (
    freeze_detector,
    set_progress,
    training_mode,
)

pytestmark = pytest.mark.needs_detectron2

NODE = "MODEL.CASCADE.TRAINING."
DYNAMIC = [
    *(f"{NODE}DYNAMIC.ENABLED", True, f"{NODE}DYNAMIC.PERIOD", 1, f"{NODE}DYNAMIC.K_I", 4),
    *(f"{NODE}DYNAMIC.K_BETA", 2, f"{NODE}DYNAMIC.BETA_START", 9.0),
]
SCHEDULED = [
    *(f"{NODE}STAGE_WEIGHTING", "scheduled", f"{NODE}STAGE_LOSS_WEIGHTS_END", (0.2, 0.5, 0.9)),
    *("MODEL.CASCADE.STAGE_LOSS_WEIGHTS", (1.0, 0.7, 0.4)),
]
LEARNED = [
    *("MODEL.CASCADE.EXIT.ENABLED", True),
    *("MODEL.CASCADE.EXIT.LEARNED", ("iou_head", "gate", "pruner")),
]
FROZEN = [*LEARNED, f"{NODE}FREEZE_DETECTOR", True]
SCHEDULES = {
    "hard": [f"{NODE}GATING", "hard", f"{NODE}GATE_THRESHOLD", 0.5, *SCHEDULED],
    "soft": [f"{NODE}GATING", "soft", f"{NODE}GATE_THRESHOLD", 0.5],
    "focal": [f"{NODE}CLASS_LOSS", "focal", f"{NODE}CLASS_WEIGHTS", (1.0, 2.0, 0.5, 0.3)],
    "seesaw": [f"{NODE}CLASS_LOSS", "seesaw"],
    "learned weights": [f"{NODE}STAGE_WEIGHTING", "learned"],
    "prefixes": [f"{NODE}PREFIX_LOSS_WEIGHT", 0.5],
    "dynamic": DYNAMIC,
    "learned exits": LEARNED,
    "exits alone": FROZEN,
}


def twins(options):
    """Heads in Detectron2 and a cascade of the core, of one configuration and weights."""
    heads = build_heads(OURS, [*options, *SAME_KERNEL]).train()
    cfg = heads_cfg(OURS, options)
    cascade = make_cascade(
        pooler=RoIPooler(output_size=POOLED, strides=STRIDES, kernel="torchvision"),
        stage_loss_weights=config.cascade_arguments(cfg)["stage_loss_weights"],
        exits=build_exits(config.exit_arguments(cfg), [12] * 3, CHANNELS),
        regime=build_training_schedule(**config.training_arguments(cfg)),
    )
    cascade.load_state_dict(heads.state_dict())
    return heads, cascade


def losses_of_heads(heads, scene):
    with EventStorage():
        _, losses = heads(None, features_of(scene), proposals_of(scene), targets_of(scene))
    return losses


def losses_of_core(cascade, scene):
    losses = {}
    if not cascade.regime.exits_alone:
        losses = cascade.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes)
    objectness = [torch.zeros(len(boxes)) for boxes in scene.proposals]
    inputs = CascadeInputs(scene.features, scene.proposals, scene.image_sizes, objectness)
    return {**losses, **cascade.exit_losses(inputs, *scene.targets)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_and_state_are_those_of_the_core(name):
    models, results = twins(SCHEDULES[name]), []
    for model, losses_of in zip(models, (losses_of_heads, losses_of_core), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        history = []
        for iteration in range(3):
            torch.manual_seed(iteration)
            set_progress(model, iteration / 3)
            losses = losses_of(model, make_scene(seed=iteration, num_proposals=(60, 50)))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: loss.item() for name, loss in losses.items()})
        results.append((history, model.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_proposals_are_drawn_by_the_threshold_of_now():
    options = [*DYNAMIC, f"{NODE}DYNAMIC.IOU_FLOOR", 0.1, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0]
    heads, scene = twins([*options, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 200])[0], make_scene()
    state = heads.regime.dynamic.state_dict()
    found = []
    for threshold in (0.2, 0.45):
        state["iou_statistics"] = torch.full((3,), threshold)
        heads.regime.dynamic.load_state_dict(state)
        with EventStorage():
            drawn = heads.label_and_sample_proposals(proposals_of(scene), targets_of(scene))
        labels = torch.cat([x.gt_classes for x in drawn])
        found.append(int((labels < heads.num_classes).sum()))
    assert found[0] > found[1] > 0


def test_masks_have_no_loss_where_exits_alone_are_trained():
    heads = build_heads(OURS, [*FROZEN, *MASKS, *SAME_KERNEL]).train()
    assert all(name.startswith("loss_exit_") for name in losses_of_heads(heads, make_scene()))


@pytest.fixture(scope="module")
def frozen_models():
    options = [*BACKBONES["R-18"], *FROZEN, "MODEL.RESNETS.NORM", "BN"]
    models = build_two(*options, "MODEL.BACKBONE.FREEZE_AT", 0, stirred=True)
    for one in models:
        freeze_detector(one.model)
    return models


def losses_of_frozen(one, batch):
    training_mode(one.model)
    if isinstance(one, Standalone):
        return one.model.losses(batch)
    with EventStorage():
        return one.model([with_instances(sample) for sample in batch])


def test_a_frozen_detector_stays_as_it_is_in_both_hosts(frozen_models):
    results = []
    for one in frozen_models:
        before = copy.deepcopy(one.model.state_dict())
        trained = [p for p in one.model.parameters() if p.requires_grad]
        optimizer, history = torch.optim.SGD(trained, lr=0.1), []
        for iteration in range(2):
            torch.manual_seed(iteration)
            losses = losses_of_frozen(one, make_batch(2, seed=iteration))
            assert all(name.startswith("loss_exit_") for name in losses)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append({name: loss.item() for name, loss in losses.items()})
        state = one.model.state_dict()
        changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
        assert changed
        assert all(name.startswith("roi_heads.exits.learned.") for name in changed)
        results.append(history)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_validation_of_a_frozen_detector_has_the_losses_of_exits(frozen_models):
    model = frozen_models[0].model.eval()
    losses = Detector(model).losses([with_instances(sample) for sample in make_batch(1)])
    assert losses
    assert all(name.startswith("loss_exit_") for name in losses)
