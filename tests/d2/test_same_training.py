"""The same training of one model and data in Detectron2, our heads in it, and standalone.

``pytest --junitxml`` records the largest differences.
"""

import pytest
import torch
from small_backbones import ATTENTION

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from two_hosts import (
    BACKBONES,
    EVERY,
    FAST_KERNEL,
    MASKS,
    SAME_KERNEL,
    build_three,
    build_two,
    make_batch,
    stir_backbone,
    with_weights_of,
)

pytestmark = pytest.mark.needs_detectron2

R18 = BACKBONES["R-18"]
# Everything is trained, the first layers and the statistics of norms as well.
FROM_SCRATCH = (
    *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.5, "MODEL.RPN.SMOOTH_L1_BETA", 0.1),
)
NORMS = ("MODEL.ROI_MASK_HEAD.NORM", "BN", *FROM_SCRATCH)
ONE_MASK = ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True)
OUR_METRICS = ("iou_before", "iou_after", "nonfinite_boxes")
COUNTS = ("roi_head/num_fg_samples", "roi_head/num_bg_samples")


def step(host, batch):
    """Losses and gradients, by name, from one seed."""
    torch.manual_seed(5)
    losses = host.losses(batch)
    host.model.zero_grad()
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in host.model.named_parameters()}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def largest_relative(got, wanted):
    """Of losses, by name."""
    assert got.keys() == wanted.keys()
    assert all(wanted.values())
    return max(abs(got[name] / wanted[name] - 1) for name in wanted)


def largest_of_gradients(got, wanted):
    """Of each tensor relative to its largest element."""
    assert got.keys() == wanted.keys()
    assert [n for n in got if got[n] is None] == [n for n in wanted if wanted[n] is None]
    trained = [name for name, gradient in wanted.items() if gradient is not None]
    assert all(wanted[name].any() for name in trained)
    return max(
        ((got[name] - wanted[name]).abs().max() / wanted[name].abs().max()).item()
        for name in trained
    )


def check_step(host, batch, wanted):
    """The largest differences of losses and gradients from those of ``wanted``."""
    losses, gradients = step(host, batch)
    largest = {
        "losses": largest_relative(losses, wanted[0]),
        "gradients": largest_of_gradients(gradients, wanted[1]),
    }
    assert largest["losses"] <= 1e-5
    assert largest["gradients"] <= 1e-4
    return largest


@pytest.mark.parametrize("kernel", [SAME_KERNEL, FAST_KERNEL], ids=["same", "fast"])
@pytest.mark.parametrize("options", [(), FROM_SCRATCH], ids=["frozen", "from_scratch"])
def test_one_step(kernel, options, record_property):
    own, ours, alone = build_three(*R18, *kernel, *options, stirred=False)
    # One of the images has no objects.
    batch = [*make_batch(2), *make_batch(1, seed=1, objects=0)]
    wanted = step(own, batch)
    for name, host in (("plugin", ours), ("standalone", alone)):
        record_property(name, check_step(host, batch, wanted))


FIXED = ("MODEL.EFFICIENTVIT.NORM_EVAL", True)


@pytest.mark.parametrize(
    ("name", "fixed"),
    [*((name, ()) for name in (*ATTENTION, "hiervit_cascade")), ("efficientvit", FIXED)],
)
def test_one_step_of_backbones_of_ours(name, fixed):
    hosts = build_two(*BACKBONES[name], *fixed, *SAME_KERNEL, stirred=False)
    stir_backbone(hosts[0].model)
    hosts[1].model.load_state_dict(hosts[0].model.state_dict())
    before = statistics_of(hosts[0].model)
    (wanted, gradients), (losses, found) = (step(host, make_batch(2)) for host in hosts)
    assert largest_relative(losses, wanted) <= 1e-5
    assert found.keys() == gradients.keys()
    # Norms make the shift of a residual cancel out: nothing is left of its gradient but rounding.
    noise = 1e-8 * max(gradient.abs().max() for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        apart = (found[parameter] - gradient).abs().max()
        assert apart <= 1e-4 * gradient.abs().max() + noise, parameter
    for host in hosts:
        after = statistics_of(host.model)
        moved = [name for name in before if not torch.equal(after[name], before[name])]
        assert moved == ([] if fixed else list(before))


def statistics_of(model):
    return {n: x.clone() for n, x in model.state_dict().items() if "running" in n}


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False),
        ("MODEL.CASCADE.STAGE_LOSS_WEIGHTS", (1.0, 0.5, 0.25)),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 2.5, "MODEL.RPN.LOSS_WEIGHT", 0.5),
        (
            *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3]),
            *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.3, 0.31, 0.32)),
        ),
    ],
    ids=lambda options: options[0].removeprefix("MODEL."),
)
def test_one_step_with_options(options):
    ours, alone = (
        step(host, make_batch(2))
        for host in build_two(*R18, *FROM_SCRATCH, *options, stirred=False)
    )
    assert largest_relative(alone[0], ours[0]) <= 1e-5
    assert largest_of_gradients(alone[1], ours[1]) <= 1e-4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("polygon", ()),
        ("bitmask", ()),
        ("polygon", ONE_MASK),
        ("bitmask", NORMS),
        ("polygon", FAST_KERNEL),
    ],
    ids=["polygon", "bitmask", "agnostic", "norms", "fast"],
)
def test_one_step_with_masks(kind, options, record_property):
    own, ours, alone = build_three(*R18, *MASKS, *SAME_KERNEL, *options, stirred=False)
    batch = [*make_batch(2, masks=kind), *make_batch(1, seed=1, objects=0, masks=kind)]
    wanted = step(own, batch)
    assert wanted[0]["loss_mask"] > 0
    for name, host in (("plugin", ours), ("standalone", alone)):
        record_property(name, check_step(host, batch, wanted))
        for scalar in ("accuracy", "false_positive", "false_negative"):
            name = f"mask_rcnn/{scalar}"
            assert host.scalars[name] == pytest.approx(own.scalars[name], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("polygon", ()), ("bitmask", ONE_MASK), ("polygon", NORMS)],
    ids=["plain", "agnostic", "norms"],
)
def test_one_step_with_masks_of_every_stage(kind, options):
    hosts = build_two(*R18, *EVERY, *options, stirred=False)
    batch = [*make_batch(2, masks=kind), *make_batch(1, seed=1, objects=0, masks=kind)]
    (ours, our_gradients), (alone, gradients) = (step(host, batch) for host in hosts)
    assert {name for name in ours if "mask" in name} == {f"loss_mask_stage{s}" for s in range(3)}
    assert largest_relative(alone, ours) <= 1e-5
    assert largest_of_gradients(gradients, our_gradients) <= 1e-4
    scalars = {name for name in hosts[0].scalars if "mask_rcnn" in name}
    assert len(scalars) == 9
    for name in scalars:
        assert hosts[1].scalars[name] == pytest.approx(hosts[0].scalars[name], abs=1e-6)


def test_without_objects_the_mask_loss_is_0_with_a_graph():
    batch = make_batch(2, objects=0)
    for host in (*build_three(*R18, *MASKS, stirred=False), *build_two(*R18, *EVERY)):
        losses, gradients = step(host, batch)
        masks = {name: loss for name, loss in losses.items() if "mask" in name}
        assert masks
        assert not any(masks.values())
        own = {name: grad for name, grad in gradients.items() if "mask_head" in name}
        assert all(grad is not None and not grad.any() for grad in own.values())


def test_scalars_are_those_of_detectron2_and_ours_beside_them():
    own, ours, alone = build_three(*R18, *SAME_KERNEL, stirred=False)
    for host in (own, ours, alone):
        step(host, make_batch(2))
    assert set(own.scalars) <= set(ours.scalars)
    for name, value in own.scalars.items():
        assert ours.scalars[name] == pytest.approx(value, rel=1e-6), name
    for name in own.scalars.keys() & alone.scalars.keys():
        assert alone.scalars[name] == pytest.approx(own.scalars[name], rel=1e-6), name
    added = {f"stage{s}/{name}" for s in range(3) for name in (*OUR_METRICS, *COUNTS)}
    assert set(ours.scalars) == set(own.scalars) | added
    # Stage 0 has the counts that Detectron2 logs without a stage.
    for name in COUNTS:
        assert ours.scalars[f"stage0/{name}"] == own.scalars[name]
        assert own.scalars[name] > 0
    for s in range(3):
        assert 0 < ours.scalars[f"stage{s}/iou_before"] <= 1
        assert 0 <= ours.scalars[f"stage{s}/iou_after"] <= 1


# A difference in the last bit grows from step to step, the faster the higher the rate, until a
# proposal comes or goes; the more regions are drawn, the less one of them matters.
RUN = (
    *(*BACKBONES["mobilenet_v3"], *FROM_SCRATCH),
    *("SOLVER.BASE_LR", 0.0005, "SOLVER.MAX_ITER", 50, "SOLVER.WARMUP_ITERS", 5),
    *("SOLVER.STEPS", (30, 40), "SOLVER.WEIGHT_DECAY_NORM", 0.01, "SOLVER.BIAS_LR_FACTOR", 2.0),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 256, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 80, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.PIXEL_STD", [57.0, 57.0, 57.0]),
)


def train(host, steps, masks="polygon"):
    """Losses of each iteration, from one seed, on batches that come again and again."""
    batches = [make_batch(1, seed=seed, sizes=[(64, 96)], masks=masks) for seed in range(4)]
    optimizer, scheduler = host.solver()
    torch.manual_seed(5)
    history = []
    for iteration in range(steps):
        losses = host.losses(batches[iteration % len(batches)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        scheduler.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return history


def total(history):
    return torch.tensor([sum(losses.values()) for losses in history])


@pytest.mark.slow
def test_a_run(record_property):
    hosts = build_three(*RUN, *SAME_KERNEL, stirred=False)
    own, ours, alone = hosts
    _, fast = with_weights_of(own.model, *RUN, *FAST_KERNEL)
    wanted = train(own, 50)
    assert total(wanted)[-10:].mean() < 0.75 * total(wanted)[:10].mean()

    each = [largest_relative(g, w) for g, w in zip(train(ours, 10), wanted[:10], strict=True)]
    record_property("plugin, 10 steps", max(each))
    assert max(each) <= 1e-6

    for name, host, steps in (("standalone", alone, 10), ("standalone, fast", fast, 50)):
        losses = total(train(host, steps))
        apart = (losses[:10] / total(wanted)[:10] - 1).abs().max().item()
        record_property(f"{name}, 10 steps", apart)
        assert apart <= 1e-3
    means = abs(losses.mean() / total(wanted).mean() - 1).item()
    record_property("standalone, fast, mean of 50", means)
    assert means <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stages"), [("polygon", MASKS), ("bitmask", EVERY)], ids=["last", "every"]
)
def test_a_run_with_masks(kind, stages, record_property):
    if stages is MASKS:
        own, *others = build_three(*RUN, *stages, *SAME_KERNEL, stirred=False)
    else:
        own, *others = build_two(*RUN, *stages, *SAME_KERNEL, stirred=False)
    wanted = train(own, 10, masks=kind)
    alone = train(others[-1], 10, masks=kind)
    if stages is MASKS:
        ours = train(others[0], 10, masks=kind)
        each = [largest_relative(g, w) for g, w in zip(ours, wanted, strict=True)]
        record_property("plugin", max(each))
        assert max(each) <= 1e-6
    apart = (total(alone) / total(wanted) - 1).abs().max().item()
    names = [name for name in wanted[0] if "mask" in name]
    masks = max(abs(a[n] / w[n] - 1) for a, w in zip(alone, wanted, strict=True) for n in names)
    record_property("standalone", {"total": apart, "masks": masks})
    assert max(apart, masks) <= 1e-3
