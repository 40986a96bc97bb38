"""Inputs of exit rules, random or by hand."""

import dataclasses

import torch
from hypothesis import strategies as st
from naive_exits import NaivePolicy, Seen
from small_cascades import random_boxes

from cascade_det.core import ExitPolicy
from cascade_det.core.exits import RegionView

NUM_STAGES = 3
IMAGE_SIZE = (120, 160)


def make_view(
    *, stage=0, counts=(12, 0, 9), num_classes=4, seed=0, num_accepted=0, image_size=IMAGE_SIZE
):
    """Clusters of overlapping boxes, some with confident classes."""
    generator = torch.Generator().manual_seed(seed)
    boxes, before = [], []
    for count in counts:
        bunches = random_boxes(max(1, count // 4), image_size, generator=generator)
        own = bunches[torch.randint(len(bunches), (count,), generator=generator)]
        before.append(own + 2 * torch.randn(count, 4, generator=generator))
        boxes.append(before[-1] + 2 * torch.randn(count, 4, generator=generator))
    image_index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    logits = 3 * torch.randn(len(image_index), num_classes + 1, generator=generator)
    view = RegionView(
        stage=stage,
        num_images=len(counts),
        image_index=image_index,
        boxes=torch.cat(boxes),
        objectness=2 * torch.randn(len(image_index), generator=generator),
    )
    if stage >= 0:
        view.boxes_before = torch.cat(before)
        view.probs = torch.softmax(logits, dim=1)
        view.agreements = torch.randint(stage + 2, (len(image_index),), generator=generator)
        view.predicted_ious = torch.rand(len(image_index), generator=generator)
    if num_accepted:
        chosen = torch.randint(len(image_index), (num_accepted,), generator=generator)
        accepted = accepted_view(
            view.boxes[chosen] + torch.randn(num_accepted, 4, generator=generator),
            torch.rand(num_accepted, generator=generator),
            view.classes[chosen],
            image_index[chosen],
            num_images=len(counts),
            num_classes=num_classes,
        )
        view.accepted = [accepted[: num_accepted // 2], accepted[num_accepted // 2 :]]
    return view


def accepted_view(boxes, scores, classes, image_index, *, num_images, num_classes):
    """Accepted regions: all of their probability is that of their class."""
    probs = torch.zeros(len(boxes), num_classes + 1)
    probs[torch.arange(len(boxes)), classes] = scores
    return RegionView(0, num_images, image_index, boxes, torch.zeros(len(boxes)), probs=probs)


def view_of(probs, *, boxes=None, image_index=None, stage=0, **others):
    """A view of hand-made regions; by default of one image and far from each other."""
    probs = torch.tensor(probs)
    count = len(probs)
    if boxes is None:
        boxes = [[100.0 * i, 0.0, 100.0 * i + 50, 50.0] for i in range(count)]
    index = torch.tensor(image_index or [0] * count)
    return RegionView(
        stage=stage,
        num_images=int(index.max()) + 1,
        image_index=index,
        boxes=torch.tensor(boxes),
        objectness=torch.zeros(count),
        boxes_before=torch.tensor(boxes),
        probs=probs,
        agreements=others.pop("agreements", torch.zeros(count, dtype=torch.int64)),
        **others,
    )


def view_of_image(view, image):
    """The regions of one image, as if it were alone."""
    one = view[torch.nonzero(view.image_index == image).squeeze(1)]
    one.num_images, one.image_index = 1, torch.zeros_like(one.image_index)
    one.accepted = [view_of_image(accepted, image) for accepted in view.accepted]
    return one


def on_gpu(view, gpu):
    """The view on a ``PretendedGPU``."""
    fields = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
    moved = {n: gpu.move(x) if isinstance(x, torch.Tensor) else x for n, x in fields.items()}
    return RegionView(**moved | {"accepted": [on_gpu(one, gpu) for one in view.accepted]})


def as_seen(view):
    """The regions of a view, for the naive rules."""

    def rows(values):
        return [None] * len(view) if values is None else values.tolist()

    tensors = (
        view.image_index,
        view.boxes,
        view.objectness,
        view.boxes_before,
        view.probs,
        view.agreements,
        view.predicted_ious,
        view.crops,
    )
    return [
        Seen(image, tuple(box), objectness, before and tuple(before), *others)
        for image, box, objectness, before, *others in zip(*map(rows, tensors), strict=True)
    ]


def as_accepted(view):
    """The accepted regions of a view, for the naive rules."""
    return [
        Seen(image, tuple(box), probs=probs)
        for accepted in view.accepted
        for image, box, probs in zip(
            accepted.image_index.tolist(),
            accepted.boxes.tolist(),
            accepted.probs.tolist(),
            strict=True,
        )
    ]


def some_policies(num_stages=NUM_STAGES):
    """Strategy of arguments for both policies; every rule is in or out."""

    def each(values, count):
        return st.tuples(*[values] * count)

    stages, gates = num_stages - 1, num_stages
    return st.fixed_dictionaries(
        {},
        optional={
            "proposal_threshold": st.floats(0.05, 0.5),
            "prune_thresholds": each(st.floats(0, 0.4), stages),
            "prune_margins": each(st.floats(0.05, 1), gates),
            "prune_best": st.integers(1, 12),
            "redundancy_iou": st.floats(0.2, 0.9),
            "thresholds": each(st.floats(0.3, 1.1), stages),
            "confidence": st.sampled_from(["max_prob", "entropy", "margin", "agreement"]),
            "region_budget": each(st.integers(0, 9), gates),
            "score_scales": each(st.floats(0.5, 2), gates),
            "score_shifts": each(st.floats(-1, 1), gates),
        },
    ).map(_whole)


def _whole(arguments):
    """Scales come with shifts."""
    if ("score_scales" in arguments) != ("score_shifts" in arguments):
        arguments = {k: v for k, v in arguments.items() if not k.startswith("score_")}
    return arguments


def policy(*, num_stages=NUM_STAGES, **arguments):
    """The real policy."""
    return ExitPolicy(num_stages=num_stages, **arguments)


def both_policies(*, num_stages=NUM_STAGES, **arguments):
    """The real policy and the naive one; what is the same for all gates may be one number."""
    lengths = {
        "thresholds": num_stages - 1,
        "localisation_thresholds": num_stages - 1,
        "prune_thresholds": num_stages - 1,
        "prune_margins": num_stages,
        "region_budget": num_stages,
    }
    for name, length in lengths.items():
        if isinstance(arguments.get(name), (int, float)):
            arguments[name] = (arguments[name],) * length
    real = ExitPolicy(num_stages=num_stages, **arguments)
    arguments.pop("learned", None)
    return real, NaivePolicy(**arguments)


def reasons_of(decision, count):
    """The exit reason of each region, ``None`` if it stays; each has one outcome."""
    reasons = [None] * count
    for reason, rows in decision.exited.items():
        assert rows.dtype == torch.int64
        assert len(rows)
        for row in rows.tolist():
            assert reasons[row] is None
            reasons[row] = reason
    staying = [row for row in range(count) if reasons[row] is None]
    if decision.kept is None:
        assert not decision.exited
    else:
        assert decision.kept.dtype == torch.int64
        assert decision.kept.tolist() == staying
    return reasons
