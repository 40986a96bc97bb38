"""A tile gate beside exits alone and plainer ways to save the finest map: time, tiles and AP."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cascade_det.benchmark.models import BenchmarkModel, ModelOutput, Standalone
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.timing import alternate, ratio, spread
from cascade_det.calibration.bootstrap import Difference, paired_bootstrap
from cascade_det.calibration.run_comparison import matched_by
from cascade_det.core import Detections, RoIPooler
from cascade_det.data.samples import Sample
from cascade_det.detection_formats import coco_results
from cascade_det.engine.datasets import load_datasets_to_evaluate
from cascade_det.evaluation.agreement import find_again
from cascade_det.evaluation.average_precision import ap_metrics, run_cocoeval
from cascade_det.evaluation.ground_truth import load_ground_truth
from cascade_det.layers.tile_gate import tile_scores
from cascade_det.report.tables import Metrics, table
from cascade_det.standalone.detector import Detector

CONTENDERS = ("ours-fast-exits", "plugin-fast-exits")
# Shares of open tiles that are measured on drawn weights, whose objectness means nothing.
_SHARES = (0.1, 0.2, 0.3)
_FEWER = 3  # times as few proposals
_METRICS = ("AP", "AP75", "AP90")


@dataclass(frozen=True)
class Setting:
    """What a model computes of its finest map.

    Attributes:
        name: for the table.
        threshold: of the tile gate; 0 for the whole map.
        proposals: most of an image, after the RPN's NMS.
        has_finest: whether regions are pooled from it.
    """

    name: str
    threshold: float
    proposals: int
    has_finest: bool = True


def measure_tiles(setup: Setup, models: Mapping[str, BenchmarkModel]) -> list[dict[str, Any]]:
    """Compare settings of the finest map, in turn on each image, in every optimised model.

    With trained weights the images are those of the test set, the exits and the threshold those of
    the configuration, and AP is on these images, with intervals by paired bootstrap over them.

    Returns:
        For each model ``model``, ``images`` and ``settings``: a list with ``setting``
        (its name), ``milliseconds`` (per image, a ``spread``), ``times_as_fast`` (as the first
        setting), ``tiles_open`` and ``tiles_computed`` (shares) and, with trained weights,
        ``again`` (share of the detections of the first setting that are found again), ``AP`` and so
        on in percent and ``differences`` from the first setting, ``(value, low, high)`` by metric.
    """
    chosen = [name for name in CONTENDERS if name in models]
    return [_compare(setup, name, models[name]) for name in chosen]


def _compare(setup: Setup, name: str, model: BenchmarkModel) -> dict[str, Any]:
    batches = setup.batches(1)
    images = len(batches)
    if not setup.trained:
        batches = batches * setup.options.rounds
    settings = list(_settings(setup, model))
    found: dict[str, list[ModelOutput]] = {setting.name: [] for setting in settings}
    order = [batches[0], *batches]

    def run(setting: Setting, number: int) -> None:
        returned = model.run(model.adapter.whole, model.adapter.inputs(order[number]))
        if number:
            found[setting.name].append(model.adapter.output(returned))

    by_name = {setting.name: setting for setting in settings}
    exits, first = model.exits, settings[0].name
    calls = {
        setting: lambda number, setting=setting: run(by_name[setting], number)
        for setting in by_name
    }
    times = alternate(
        calls,
        rounds=len(batches),
        device=setup.device,
        before=lambda setting, _: _use(model, exits, by_name[setting]),
    )
    _use(model, exits, settings[0])
    model.exits = exits
    rows: list[dict[str, Any]] = [
        {
            "setting": setting.name,
            "milliseconds": spread(times[setting.name]),
            "times_as_fast": ratio(times[first], times[setting.name]),
            **_tiles(setting, found[setting.name]),
        }
        for setting in settings
    ]
    if setup.trained:
        samples = [sample for batch in batches for sample in batch]
        detections = {name: _detections(outputs) for name, outputs in found.items()}
        accuracies = _accuracies(setup, samples, detections)
        for row in rows:
            row |= accuracies[row["setting"]]
    return {"model": name, "images": images, "settings": rows}


def _settings(setup: Setup, model: BenchmarkModel) -> Iterator[Setting]:
    """The settings, exits alone first."""
    most = setup.cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    yield Setting("exits alone", 0.0, most)
    if setup.trained:
        threshold = setup.cfg.MODEL.CASCADE.EXIT.TILE_THRESHOLD
        if threshold:
            yield Setting(f"tile gate from {threshold:g}", threshold, most)
    else:
        for share, threshold in _thresholds(setup).items():
            yield Setting(f"tile gate, {share:.0%} open", threshold, most)
    yield Setting("finest map not in the RPN", 1.0, most)
    if isinstance(model.adapter, Standalone):
        yield Setting("no finest map", 1.0, most, has_finest=False)
    yield Setting(f"{most // _FEWER} proposals", 0.0, most // _FEWER)


@torch.no_grad()
def _thresholds(setup: Setup) -> dict[float, float]:
    """Thresholds at which these shares of tiles are open in the first image."""
    detector = setup.build_ours()
    images, _ = detector.preprocess([setup.batches(1)[0][0]["image"]])
    maps, rpn = detector.backbone(images), detector.proposal_generator
    x = maps[rpn.in_features[1]]
    (logits,), _ = rpn.rpn_head([x])
    scores = tile_scores(logits.view(len(images), *x.shape[-2:], -1).amax(dim=3)).flatten()
    return {share: float(scores.quantile(1 - share)) for share in _SHARES}


def _use(model: BenchmarkModel, exits: Any, setting: Setting) -> None:
    model.exits = copy.copy(exits)
    assert model.exits is not None
    model.exits.tile_threshold = setting.threshold
    model.adapter.limit_proposals(setting.proposals)
    if isinstance(model.adapter, Standalone):
        _pool(model.adapter.detector, with_finest=setting.has_finest)


def _pool(detector: Detector, *, with_finest: bool) -> None:
    """Pool regions from all levels of the pyramid that they were, or not from the finest."""
    names, heads = list(detector.backbone.strides), detector.roi_heads
    last = detector.roi_in_features[-1]
    chosen = names[0 if with_finest else 1 : names.index(last) + 1]
    if tuple(chosen) == detector.roi_in_features:
        return
    detector.roi_in_features = tuple(chosen)
    strides = tuple(detector.backbone.strides[name] for name in chosen)
    heads.pooler, heads.crop_pooler = (
        RoIPooler(
            output_size=old.output_size,
            strides=strides,
            sampling_ratio=old.sampling_ratio,
            aligned=old.aligned,
            kernel=old.kernel,
        )
        for old in (heads.pooler, heads.crop_pooler)
    )


def _tiles(setting: Setting, outputs: list[ModelOutput]) -> dict[str, float]:
    """Shares of the tiles of all images."""
    counts = torch.tensor([output.tiles for output in outputs], dtype=torch.float64).sum(dim=0)
    whole = float(setting.has_finest)
    tiles, is_open, computed = counts.tolist()
    return {
        "tiles_open": is_open / tiles if tiles else whole,
        "tiles_computed": computed / tiles if tiles else whole,
    }


def _detections(outputs: list[ModelOutput]) -> list[Detections]:
    return [found.to("cpu") for output in outputs for found in output.detections]


def _accuracies(
    setup: Setup, samples: list[Sample], found: Mapping[str, list[Detections]]
) -> dict[str, dict[str, Any]]:
    """What is measured on objects, by setting; differences and agreement from the first one."""
    dataset = load_datasets_to_evaluate(setup.cfg, resume=False)[0]
    truth, ids = load_ground_truth(dataset.ground_truth), dataset.category_ids
    images = sorted({sample["image_id"] for sample in samples})
    rows: dict[str, dict[str, Any]] = {}
    first, wanted = None, next(iter(found.values()))
    for name, detections in found.items():
        results = [
            result
            for sample, own in zip(samples, detections, strict=True)
            for result in coco_results(own, sample["image_id"], ids, None)
        ]
        evaluation = run_cocoeval(truth, results, images)
        metrics = ap_metrics(evaluation)
        matched = matched_by(evaluation), matched_by(evaluation, size="small")
        first = first or matched
        changes: dict[str, Difference] = paired_bootstrap(first[0], matched[0])
        changes["APs"] = paired_bootstrap(first[1], matched[1])["AP"]
        kept = (*_METRICS, "APs")
        rows[name] = {metric: metrics[metric] for metric in kept}
        rows[name]["again"] = find_again(detections, wanted).share
        rows[name]["differences"] = {
            metric: (changes[metric].value, changes[metric].low, changes[metric].high)
            for metric in kept
        }
    return rows


def tiles_section(results: list[Metrics]) -> str:
    """The results of ``measure_tiles`` as tables in Markdown."""
    return "\n\n".join(map(_section, results))


def _section(compared: Metrics) -> str:
    rows, is_trained = [], "AP" in compared["settings"][0]
    for row in compared["settings"]:
        times = row["times_as_fast"]
        cells = [
            row["setting"],
            f"{row['milliseconds']['median']:.1f}",
            f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})",
            f"{row['tiles_open']:.0%}",
            f"{row['tiles_computed']:.0%}",
        ]
        if is_trained:
            cells.append(f"{row['again']:.1%}")
            cells += [_with_interval(row, metric) for metric in (*_METRICS, "APs")]
        rows.append(cells)
    headers = ["setting", "ms per image", "times as fast", "tiles open", "computed"]
    if is_trained:
        headers += ["found again", *(f"{metric} (%)" for metric in (*_METRICS, "APs"))]
    title = f"Tiles of the finest map: {compared['model']}, {compared['images']} images"
    return table(title, headers, rows, "")


def _with_interval(row: Metrics, metric: str) -> str:
    value, low, high = row["differences"][metric]
    return f"{row[metric]:.2f} ({value:+.2f} [{low:+.2f}, {high:+.2f}])"
