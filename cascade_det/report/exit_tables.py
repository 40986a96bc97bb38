"""The tables of exits and of shadow runs."""

from __future__ import annotations

from collections.abc import Iterator

from cascade_det.core.structures import EXIT_REASONS
from cascade_det.report.tables import Metrics, stage_names, table

_TILES = {"open_share": "open for the RPN", "computed_share": "computed"}


def exit_sections(exits: Metrics | None) -> Iterator[str]:
    """Tables of the regions that enter and exit each stage and of their scores, and a summary.

    Args:
        exits: of an ``ExitEvaluator``.
    """
    if not exits or not stage_names(exits):
        return
    places = {name: exits[name] for name in exit_places(exits)}
    reasons = [name for name in EXIT_REASONS if any(name in p["left"] for p in places.values())]
    headers = ("stage", "regions/image", "of all (%)", "left early (%)")
    rows = [
        (
            name,
            place["entered_per_image"],
            100 * place["entered_share"],
            100 * place["exit_rate"],
            *(100 * place["left"].get(reason, 0.0) for reason in reasons),
        )
        for name, place in places.items()
    ]
    title = "Regions entering and leaving each stage"
    yield table(title, (*headers, *(f"{reason} (%)" for reason in reasons)), rows, ".1f")
    if any(place.get("mean_score") for place in places.values()):
        scores = [
            (name, *(place["mean_score"].get(reason) for reason in reasons))
            for name, place in places.items()
            if place.get("mean_score")
        ]
        yield table("Mean score of the regions that left", ("stage", *reasons), scores, ".3f")
    if tiles := exits.get("tiles"):
        shares = [(name, 100 * tiles[key]) for key, name in _TILES.items()]
        rows = [(name, tiles["per_image"] * share / 100, share) for name, share in shares]
        yield table(
            "Tile gate", ("tiles of the finest map", "tiles/image", "of all (%)"), rows, ".1f"
        )
    yield " ".join(_sentences(exits))


def exit_places(exits: Metrics) -> list[str]:
    """The gates of a table: ``proposals``, if any left before stage 0, then the stages."""
    early = exits.get("proposals", {}).get("left")
    return [*(["proposals"] if early else []), *stage_names(exits)]


def shadow_section(shadow: Metrics | None) -> str:
    """The results of shadow runs as a paragraph.

    Args:
        shadow: of a ``ShadowEvaluator``.
    """
    if not shadow:
        return ""
    if not shadow["images"]:
        return "Shadow runs: no image was chosen."
    text = (
        f"Shadow runs: {shadow['images']:,} images also ran the full cascade. Exits lose "
        f"{_with_interval(shadow, 'loss')} of its detections per image, and lose any on "
        f"{_with_interval(shadow, 'changed')} of the images ({100 * shadow['confidence']:g} % "
        "confidence intervals)."
    )
    if "drift" not in shadow:
        return text
    verdict = "this is drift" if shadow["drift"] else "no drift"
    return (
        f"{text} Calibration promised {100 * shadow['expected_loss']:.2f} % with a deviation of "
        f"{100 * shadow['expected_deviation']:.2f} %: {verdict}."
    )


def _sentences(exits: Metrics) -> Iterator[str]:
    yield (
        f"Mean over {exits['images']:,} images; a region sees {exits['stages_per_region']:.2f} of "
        f"{len(stage_names(exits))} stages."
    )
    if "head_flops_share" in exits:
        yield (
            f"The box heads compute {exits['head_gflops_per_image']:.2f} GFLOPs per image "
            f"(multiply-adds, by fvcore), {100 * exits['head_flops_share']:.1f} % of the "
            f"{exits['full_head_gflops_per_image']:.2f} without exits."
        )
    if masks := exits.get("masks"):
        yield (
            f"{masks['masks_per_image']:.1f} of {masks['detections_per_image']:.1f} detections per "
            f"image got a mask ({100 * masks['share']:.1f} %)."
        )
    if exits.get("overrun_share"):
        yield (
            f"{100 * exits['overrun_share']:.1f} % of the batches took longer than their time "
            f"budget, by {exits['overrun_ms']:.1f} ms at most."
        )


def _with_interval(shadow: Metrics, name: str) -> str:
    value, low, high = (100 * shadow[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.2f} % ({low:.2f} to {high:.2f})"
