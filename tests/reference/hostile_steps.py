"""Files of a training step as no training writes them: changes of one that does."""

import copy
import math
import random

import numpy as np
import torch

from cascade_det.errors import CheckpointError


def entry(name, value):
    """The step with another entry of that name."""

    def change(step):
        step[name] = value

    return change


def field(name, value):
    """The step whose first image has another value of that name."""

    def change(step):
        step["batch"][0][name] = value

    return change


def without(name, of=None):
    def change(step):
        del (step if of is None else step[of][0])[name]

    return change


def weight(value):
    """The step with another first weight."""

    def change(step):
        step["model"][next(iter(step["model"]))] = value

    return change


def float_image(step):
    step["batch"][0]["image"] = step["batch"][0]["image"].float()


def nan_image(step):
    step["batch"][0]["image"] = torch.full((3, 64, 64), math.nan)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ZERO = torch.zeros(1)
IMAGE = torch.zeros(3, 64, 64, dtype=torch.uint8)
BOX = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
ENTRIES = ("model", "batch", "random", "iteration", "amp_dtype", "parts", "progress")
ODD_VALUES = (
    None,
    "text",
    -1,
    1.5,
    math.nan,
    10**30,
    True,
    [],
    {},
    [1],
    {"a": 1},
    ZERO,
    nested(50),
)
IMAGES = (
    torch.zeros(3, 0, 5, dtype=torch.uint8),
    torch.zeros(1, 8, 8, dtype=torch.uint8),
    torch.zeros(8, 8, 3, dtype=torch.uint8),
    torch.zeros(4, 8, 8, dtype=torch.uint8),
    torch.zeros(3, 8, dtype=torch.uint8),
    torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    torch.tensor(7),
    torch.zeros(1).expand(3, 2**15, 2**15),
    IMAGE.to("meta"),
    IMAGE.to_sparse(),
    IMAGE.to(torch.complex64),
    torch.quantize_per_tensor(IMAGE.float(), 1.0, 0, torch.quint8),
    np.zeros((3, 8, 8), np.uint8),
    [[[0]]],
    "image.jpg",
    None,
)
BOXES = (
    torch.zeros(1, 5),
    torch.zeros(4),
    torch.zeros(1, 1, 4),
    torch.zeros(2, 4),
    torch.zeros(0, 4),
    torch.zeros(1, 4, dtype=torch.int64),
    torch.zeros(1, 4, dtype=torch.bool),
    torch.zeros(1).expand(10**7, 4),
    BOX.to("meta"),
    BOX.to_sparse(),
    BOX.to(torch.complex64),
    BOX.numpy(),
    [[4.0, 4.0, 40.0, 40.0]],
    None,
)
CLASSES = (
    torch.tensor([1_000_000]),
    torch.tensor([-1]),
    torch.tensor([2**62]),
    torch.tensor([1.0]),
    torch.tensor([math.nan]),
    torch.tensor([True]),
    torch.tensor([1, 1]),
    torch.tensor([[1]]),
    torch.tensor(1),
    torch.tensor([], dtype=torch.int64),
    [1],
    "cat",
    None,
)
# These are strange, and can be computed.
HARMLESS = {
    "boxes that are NaN": field("gt_boxes", torch.full((1, 4), math.nan)),
    "boxes that are infinite": field("gt_boxes", torch.full((1, 4), math.inf)),
    "boxes far away": field("gt_boxes", BOX * 1e30),
    "boxes inside out": field("gt_boxes", BOX.flip(1)),
    "boxes of no size": field("gt_boxes", BOX * 0),
    "boxes in float64": field("gt_boxes", BOX.double()),
    "classes in int32": field("gt_classes", torch.tensor([1], dtype=torch.int32)),
    "an image of floats": float_image,
    "an image of NaN": nan_image,
    "an image of one pixel": field("image", IMAGE[:, :1, :1]),
    "heights of NaN": field("height", math.nan),
    "an id that is a list": field("image_id", [1, [2]]),
    "an id that is long": field("image_id", "x" * 100_000),
    "more than is needed": entry("more", [1, {"a": ZERO}]),
}
HOSTILE = {
    "an image without key": without("image", "batch"),
    "boxes without key": without("gt_boxes", "batch"),
    "classes without key": without("gt_classes", "batch"),
    "keys that are numbers": entry("batch", [{1: IMAGE}]),
    "samples that are lists": entry("batch", [[IMAGE, BOX]]),
    "random numbers of another length": entry("random", {"cpu": torch.zeros(7), "cuda": None}),
    "random numbers that are none": entry("random", {"cpu": "x", "cuda": None}),
    "random numbers without GPU": entry("random", {"cpu": torch.get_rng_state()}),
    "a type that is none": entry("amp_dtype", "float8"),
    "parts that divide nothing": entry("parts", 7),
    "weights of another shape": weight(torch.zeros(2, 3, 5)),
    "weights without data": weight(ZERO.to("meta")),
    "weights that are sparse": weight(ZERO.to_sparse()),
    "weights that are complex": weight(ZERO.to(torch.complex64)),
    "weights that are text": weight("x"),
    "too many objects": lambda step: step["batch"][0].update(
        gt_boxes=BOX.repeat(10_001, 1), gt_classes=torch.zeros(10_001, dtype=torch.int64)
    ),
    **{f"without {name}": without(name) for name in ENTRIES[:-1]},
    **{f"image {i}": field("image", image) for i, image in enumerate(IMAGES)},
    **{f"boxes {i}": field("gt_boxes", boxes) for i, boxes in enumerate(BOXES)},
    **{f"classes {i}": field("gt_classes", classes) for i, classes in enumerate(CLASSES)},
}
# Some of these are what a training may write: a part of 1, no mixed precision.
ODD = {f"{name} {i}": entry(name, value) for name in ENTRIES for i, value in enumerate(ODD_VALUES)}


def changed(step, change):
    """A copy of a step, with a change of the above."""
    step = copy.copy(step)
    step["model"] = dict(step["model"])
    step["batch"] = [dict(sample) for sample in step["batch"]]
    change(step)
    return step


def outcome(replayed, step):
    """The first line of a replay, or the error that it ended in."""
    try:
        return replayed(step)[0]
    except CheckpointError as error:
        return str(error)


def truncated(content, share):
    return content[: int(len(content) * share)]


def scrambled(content, seed):
    """A few bytes of a file are others."""
    drawn = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(20):
        damaged[drawn.randrange(len(damaged))] = drawn.randrange(256)
    return bytes(damaged)
