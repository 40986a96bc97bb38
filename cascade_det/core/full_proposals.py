"""What the full cascade gets: the proposals of the whole maps, also where a tile gate is on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from torch import Tensor

from cascade_det.core.structures import PartTimer, part
from cascade_det.layers.tiles import FeatureMap, TiledMap

Found = TypeVar("Found", bound=Any)  # the proposals of an image, with a row for each


def full_proposals(
    maps: Mapping[str, FeatureMap],
    proposals: Sequence[Found],
    chosen: Sequence[bool],
    propose: Callable[[dict[str, Any], slice], Sequence[Found]],
    *,
    timer: PartTimer | None,
) -> tuple[dict[str, Any], list[Found]]:
    """Maps and proposals of the chosen images, for their full cascade; the others get none.

    Without a tile gate they are those at hand. With one, the RPN also reads the tiles that were
    closed: of a backbone that ran before, and for the chosen images alone.

    Args:
        maps: by name, of N images; one may be a ``TiledMap``, which is then computed as a whole.
        proposals: of the N images, behind the gate.
        chosen: N.
        propose: the proposals of a slice of the images, on their maps.
        timer: takes the milliseconds of ``full/tile gate``, the map, and ``full/rpn`` if given.
    """
    none = [own[:0] for own in proposals]
    if not any(isinstance(x, TiledMap) for x in maps.values()):
        pairs = zip(proposals, none, chosen, strict=True)
        return dict(maps), [own if keep else empty for own, empty, keep in pairs]
    with part(timer, "full/tile gate"):
        whole = {
            name: x.recompute(chosen) if isinstance(x, TiledMap) else x for name, x in maps.items()
        }
    found = none
    with part(timer, "full/rpn"):
        for images in _runs(chosen):
            found[images] = propose(_of(whole, images), images)
    return whole, found


def _of(maps: Mapping[str, Tensor], images: slice) -> dict[str, Any]:
    return {name: x[images] for name, x in maps.items()}


def _runs(chosen: Sequence[bool]) -> Iterator[slice]:
    """The chosen images, those beside each other together."""
    for is_chosen, group in groupby(range(len(chosen)), key=lambda image: bool(chosen[image])):
        if is_chosen:
            images = list(group)
            yield slice(images[0], images[-1] + 1)
