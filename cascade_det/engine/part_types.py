"""The types that the parts of an optimised detector compute in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from cascade_det.backbones import EfficientViT, MobileNetV2, MobileNetV3Large
from cascade_det.config.cascade_keys import FAST_PARTS as PARTS
from cascade_det.engine.devices import describe_dtypes

# The stem reads images, and what is not named here gives boxes and scores: they need more.
INT8_PARTS = ("backbone", "fpn", "rpn", "roi_heads")

# Parts in float32 and parts in 8 bits, from what is usually fastest to what is safest.
_TRUNK = ("stem", "backbone")
CANDIDATES: tuple[tuple[Collection[str], Collection[str]], ...] = (
    ((), INT8_PARTS),
    ((), INT8_PARTS[1:]),
    ((), ()),
    (_TRUNK, INT8_PARTS[1:]),
    (_TRUNK, ()),
    ((*_TRUNK, "fpn"), ()),
    (PARTS, ()),
)
# Their depthwise convolutions and narrow maps without a ReLU keep rounding errors.
_CHANGE_IN_BFLOAT16 = (EfficientViT, MobileNetV2, MobileNetV3Large)


@dataclass(frozen=True)
class PartTypes:
    """The types of the parts of an optimised detector, of ``FAST_PARTS``.

    Attributes:
        floating: the floating-point type of each part.
        int8: the parts whose products are in 8 bits where they can be, of ``INT8_PARTS``.
    """

    floating: Mapping[str, torch.dtype]
    int8: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, dtype: torch.dtype, float32_parts: Collection[str], int8: Collection[str] = ()
    ) -> PartTypes:
        """One type, but for parts in float32 and, of the others, parts in 8 bits.

        Raises:
            ValueError: an unknown part.
        """
        if unknown := set(float32_parts) - set(PARTS):
            raise ValueError(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
        return cls(
            {part: torch.float32 if part in float32_parts else dtype for part in PARTS},
            frozenset(int8).difference(float32_parts),
        )

    def without(self, unknown: Iterable[str]) -> PartTypes:
        """The same with unknown parts in float32."""
        floating = {**self.floating, **dict.fromkeys(unknown, torch.float32)}
        return PartTypes(floating, self.int8)

    @property
    def computed(self) -> dict[str, torch.dtype]:
        """The type of the products of each part."""
        return {
            part: torch.int8 if part in self.int8 else dtype
            for part, dtype in self.floating.items()
        }

    def describe(self) -> str:
        """As ``describe_dtypes``."""
        return describe_dtypes(self.computed.items())


def candidates(
    dtype: torch.dtype, float32_parts: Collection[str], int8_parts: Collection[str] = ()
) -> list[PartTypes]:
    """The types to choose from, each once; the last is float32.

    Args:
        dtype: the fastest floating-point type of the device.
        float32_parts: that stay float32 in any case.
        int8_parts: that can be in 8 bits.
    """
    found: dict[str, PartTypes] = {}
    for float32, in_8_bits in CANDIDATES:
        in_8_bits = set(in_8_bits).intersection(int8_parts)
        types = PartTypes.of(dtype, {*float32, *float32_parts}, in_8_bits)
        found.setdefault(types.describe(), types)
    return list(found.values())


def spare_trunk(
    trunk: object, name: str, dtype: torch.dtype, float32_parts: Collection[str]
) -> tuple[Collection[str], list[str]]:
    """Parts that stay float32: under ``auto``, also trunks whose detections change there.

    Args:
        trunk: of the detector.
        name: of the type that was asked for.
        dtype: what it is on the device.
        float32_parts: that stay float32 in any case.

    Returns:
        The parts, and sentences that say why.
    """
    if (name, dtype) != ("auto", torch.bfloat16) or not isinstance(trunk, _CHANGE_IN_BFLOAT16):
        return float32_parts, []
    return {"stem", "backbone", *float32_parts}, [
        "The backbone stays float32: detections change noticeably in bfloat16 with such backbones."
    ]
