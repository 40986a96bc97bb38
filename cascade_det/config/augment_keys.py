"""The entries of ``CASCADE.AUGMENT``: their names, arguments, defaults and checks.

Names and arguments are those of ``torchvision.transforms.v2`` where it has the transform. Sizes are
(height, width).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cascade_det.config.key import (
    COUNT,
    FRACTION,
    Condition,
    Values,
    at_least,
    each,
    rising,
    shown,
    whole,
    within,
)

KEY = "CASCADE.AUGMENT"

Entry = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Argument:
    """An argument of an entry.

    Attributes:
        default: used where the entry does not give it.
        values: the values that it takes.
    """

    default: Any
    values: Values


@dataclass(frozen=True)
class Augmentation:
    """One kind of entry.

    Attributes:
        help: its effect, in one sentence.
        arguments: by name.
        cuts: whether it may show only a part of an object, or turn it.
    """

    help: str
    arguments: dict[str, Argument]
    cuts: bool = False


def is_list_of_entries(value: object) -> bool:
    """Whether a value is a list of ``[name]`` and ``[name, {argument: value}]``."""
    return isinstance(value, (list, tuple)) and all(map(_is_entry, value))


def complete_entries(entries: Sequence[Sequence[Any]]) -> list[Entry]:
    """Checked entries with all of their arguments."""
    return [
        (name, {key: a.default for key, a in AUGMENTATIONS[name].arguments.items()} | _given(rest))
        for name, *rest in entries
    ]


def entry_problems(entries: Sequence[Sequence[Any]]) -> Iterator[str]:
    """What is wrong with names and arguments, each with the entry and a remedy."""
    for number, (name, *rest) in enumerate(entries):
        where = f"{KEY}[{number}]"
        if name not in AUGMENTATIONS:
            near = difflib.get_close_matches(name, AUGMENTATIONS, 1, cutoff=0.5)
            hint = (
                f"Did you mean {near[0]}?" if near else f"Give one of {', '.join(AUGMENTATIONS)}."
            )
            yield f"{where} is {shown(name)}, which is no augmentation. {hint}"
            continue
        arguments = AUGMENTATIONS[name].arguments
        for key, value in _given(rest).items():
            if key not in arguments:
                yield (
                    f"{where}: {name} has no argument {shown(key)}. Give some of "
                    f"{', '.join(arguments)}."
                )
            elif not arguments[key].values.accepts(value):
                yield f"{where}: {key} of {name} is {shown(value)}. {arguments[key].values.remedy}"
    names = [entry[0] for entry in entries]
    for name in MIXING:
        if names.count(name) > 1:
            yield (
                f"{KEY} has {name} {names.count(name)} times. Name it once: each of them reads "
                "further images for every image of the other."
            )


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (1, 2)
        and isinstance(value[0], str)
        and all(isinstance(rest, dict) for rest in value[1:])
    )


def _given(rest: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return dict(rest[0]) if rest else {}


def _pair(condition: Condition) -> Condition:
    """A list of two numbers that meet ``condition`` and do not fall."""
    return rising(each(condition, length=2), strictly=False)


def _number_or_pair(number: Condition, pair: Condition, low: float, high: float) -> Values:
    """A width of the distribution around a neutral value, or its two ends."""
    return Values(
        lambda value: number(value) or _pair(pair)(value),
        f"Give a number, or [smallest, largest], from {low:g} to {high:g}.",
    )


def _range(low: float, high: float) -> Values:
    return Values(
        _pair(within(low, high)), f"Give [smallest, largest], each from {low:g} to {high:g}."
    )


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_shear(value: object) -> bool:
    """One of the forms of torchvision: a limit, or ranges in x, or in x and y."""
    if within(0, 80)(value):
        return True
    ends = each(within(-80, 80))
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 4) or not ends(value):
        return False
    return all(low <= high for low, high in zip(value[::2], value[1::2], strict=True))


def _is_range_of_qualities(value: object) -> bool:
    quality = whole(within(1, 100))
    return quality(value) or _pair(quality)(value)


def _is_odd_size(value: object) -> bool:
    return isinstance(value, int) and value in range(1, 100, 2)


def _are_sampler_options(value: object) -> bool:
    return (
        isinstance(value, (list, tuple)) and each(at_least(0), least=1)(value) and max(value) >= 1
    )


_P = Argument(1.0, Values(within(0, 1), "Give the probability of this entry, from 0 to 1."))
_HALF = Argument(0.5, _P.values)
_SIZE = Values(each(whole(at_least(1)), length=2), "Give [height, width] in pixels, 1 or more.")
_FILL = Argument(114, Values(whole(within(0, 255)), "Give a grey level from 0 to 255."))
_FACTOR = _number_or_pair(within(0, 1), within(0, 100), 0, 100)
_HUE = _number_or_pair(within(0, 0.5), within(-0.5, 0.5), -0.5, 0.5)
_DEGREES = _number_or_pair(within(0, 180), within(-180, 180), -180, 180)
_SCALE = _range(0.01, 100)
_BOOL = Values(_is_bool, "Give True or False.")

AUGMENTATIONS = {
    "RandomPhotometricDistort": Augmentation(
        "Brightness, contrast, saturation, hue and the order of the channels, each with "
        "probability `p` (SSD, arXiv 1512.02325).",
        {
            "brightness": Argument((0.875, 1.125), _range(0, 100)),
            "contrast": Argument((0.5, 1.5), _range(0, 100)),
            "saturation": Argument((0.5, 1.5), _range(0, 100)),
            "hue": Argument((-0.05, 0.05), _range(-0.5, 0.5)),
            "p": _HALF,
        },
    ),
    "ColorJitter": Augmentation(
        "Brightness, contrast, saturation and hue, in random order; a number `x` is a factor from "
        "`1 - x` to `1 + x`, for hue a shift from `-x` to `x`.",
        {
            "brightness": Argument(0, _FACTOR),
            "contrast": Argument(0, _FACTOR),
            "saturation": Argument(0, _FACTOR),
            "hue": Argument(0, _HUE),
            "p": _P,
        },
    ),
    "RandomGrayscale": Augmentation("Grey in all channels.", {"p": Argument(0.1, _P.values)}),
    "GaussianBlur": Augmentation(
        "Blurs with a standard deviation `sigma`, in pixels, drawn from a range.",
        {
            "kernel_size": Argument(
                5, Values(_is_odd_size, "Give an odd number of pixels from 1 to 99.")
            ),
            "sigma": Argument((0.1, 2.0), _range(0.01, 100)),
            "p": _P,
        },
    ),
    "GaussianNoise": Augmentation(
        "Adds noise of standard deviation `sigma`, where 1 is white.",
        {
            "mean": Argument(0.0, Values(within(-1, 1), "Give a number from -1 to 1.")),
            "sigma": Argument(0.1, FRACTION),
            "p": _P,
        },
    ),
    "JPEG": Augmentation(
        "Compresses with a quality from 1 to 100, given or drawn from `[worst, best]`.",
        {
            "quality": Argument(
                (30, 95),
                Values(_is_range_of_qualities, "Give a whole number from 1 to 100, or two."),
            ),
            "p": _P,
        },
    ),
    "RandomAffine": Augmentation(
        "Rotates by `degrees`, shifts by shares of width and height up to `translate`, scales and "
        "shears (degrees), on an image of the same size.",
        {
            "degrees": Argument(0, _DEGREES),
            "translate": Argument(
                None,
                Values(
                    lambda x: x is None or each(within(0, 1), length=2)(x),
                    "Give [share of the width, share of the height], each from 0 to 1.",
                ),
            ),
            "scale": Argument(
                None, Values(lambda x: x is None or _SCALE.accepts(x), _SCALE.remedy)
            ),
            "shear": Argument(
                None,
                Values(
                    lambda x: x is None or _is_shear(x),
                    "Give degrees within 80: a limit, [low, high] in x, or [low, high, low, high] "
                    "in x and y.",
                ),
            ),
            "fill": _FILL,
            "p": _P,
        },
        cuts=True,
    ),
    "RandomRotation": Augmentation(
        "Rotates by `degrees`; `expand` enlarges the image so that nothing is cut off.",
        {
            "degrees": Argument(10, _DEGREES),
            "expand": Argument(False, _BOOL),
            "fill": _FILL,
            "p": _P,
        },
        cuts=True,
    ),
    "RandomIoUCrop": Augmentation(
        "Crops so that an object has a random IoU with the crop, and keeps the objects whose "
        "centre is inside (SSD, arXiv 1512.02325).",
        {
            "min_scale": Argument(0.3, Values(within(0.01, 1), "Give a number from 0.01 to 1.")),
            "max_scale": Argument(1.0, Values(within(0.01, 1), "Give a number from 0.01 to 1.")),
            "min_aspect_ratio": Argument(0.5, Values(within(0.01, 1), "Give 0.01 to 1.")),
            "max_aspect_ratio": Argument(2.0, Values(within(1, 100), "Give 1 to 100.")),
            "sampler_options": Argument(
                (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
                Values(
                    _are_sampler_options,
                    "Give smallest IoUs to draw from, 0 or more. One is 1, for the whole image: "
                    "others may be out of reach.",
                ),
            ),
            "trials": Argument(40, COUNT),
            "p": _P,
        },
        cuts=True,
    ),
    "ScaleJitter": Augmentation(
        "Resizes to fit into `target_size`, times a random scale (arXiv 2012.07177). Replaces the "
        "resizing to `INPUT.MIN_SIZE_TRAIN`.",
        {
            "target_size": Argument((1024, 1024), _SIZE),
            "scale_range": Argument((0.1, 2.0), _SCALE),
        },
    ),
    "RandomCrop": Augmentation(
        "Crops to `size`; pads a smaller image with `pad_if_needed`, and else leaves its side.",
        {
            "size": Argument((1024, 1024), _SIZE),
            "pad_if_needed": Argument(False, _BOOL),
            "fill": _FILL,
        },
        cuts=True,
    ),
    "RandomHorizontalFlip": Augmentation("Exchanges left and right.", {"p": _HALF}),
    "RandomVerticalFlip": Augmentation("Exchanges top and bottom.", {"p": _HALF}),
    "CopyPaste": Augmentation(
        "Pastes objects of another image, each with probability `share`, and cuts them out of the "
        "masks below (Simple Copy-Paste, arXiv 2012.07177). Needs masks.",
        {"share": Argument(0.5, FRACTION), "p": _HALF},
        cuts=True,
    ),
    "Mosaic": Augmentation(
        "Four images meet at a random point of a canvas, between shares `center` of its sides; "
        "each is scaled to cover its part (YOLOv4, arXiv 2004.10934).",
        {
            "size": Argument(
                (640, 640),
                Values(
                    each(whole(at_least(4)), length=2), "Give [height, width] in pixels, 4 or more."
                ),
            ),
            "center": Argument((0.25, 0.75), _range(0, 1)),
            "p": _HALF,
        },
        cuts=True,
    ),
}
# They read further images.
MIXING = ("CopyPaste", "Mosaic")
