"""A replay of a record decides as the exits do; an oracle, competitors and choices by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively_heads import lively
from small_segmenter import SEGMENTER, labelled

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.calibration.maps import record as record_module
from cascade_det.calibration.maps.choice import choose
from cascade_det.calibration.maps.record import (
    computed_shares,
    patches_of_pixels,
    record_images,
    replay,
)
from cascade_det.calibration.maps.runs import FULL, ORACLE, Run, run_decoders
from cascade_det.calibration.maps.scores import Scorer
from cascade_det.calibration.maps.search import NEVER, MapTrial, worth_running
from cascade_det.calibration.maps.search import settings as settings_of
from cascade_det.calibration.target import Target
from cascade_det.config import get_cfg
from cascade_det.errors import ConfigError
from cascade_det.segmentation.logits import predict
from cascade_det.segmentation.map_exits import MapExits
from cascade_det.segmentation.output import EncodedImages
from cascade_det.segmentation.sparse_decoder import ATTENDED, SparseLevel
from cascade_det.standalone.build_segmenter import build_segmenter


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return [labelled(64, 96), labelled(60, 80, height=90, width=120)]


@pytest.fixture(scope="module")
def segmenter(batch):
    """Its predictions differ over the image and between levels."""
    cfg = get_cfg()
    cfg.merge_from_list([*SEGMENTER, "MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone"])
    torch.manual_seed(0)
    segmenter = lively(build_segmenter(cfg)).eval()
    head = segmenter.sem_seg_head
    with torch.no_grad():
        for classify, logits in zip(head.heads, head(segmenter.encode(batch).maps), strict=True):
            spread = logits.std((0, 2, 3)).mean()
            classify.weight /= spread
            classify.bias.copy_((classify.bias - logits.mean((0, 2, 3))) / spread)
    return segmenter


def truth_of(sample):
    labels = sample["sem_seg"].numpy()
    if "height" in sample:
        labels = np.resize(labels, (sample["height"], sample["width"]))
    return labels.astype(np.uint8)


@torch.no_grad()
def recorded(segmenter, batch, patch):
    encoded = segmenter.encode(batch)
    logits = segmenter.sem_seg_head(encoded.maps)
    labels = [
        [
            x.argmax(0)
            for x in segmenter.at_original_size(
                predict(logits[: n + 1], encoded.size), encoded, batch
            )
        ]
        for n in range(len(logits))
    ]
    truths = [truth_of(sample) for sample in batch]
    return encoded, truths, record_images(logits, labels, truths, encoded, patch)


@pytest.mark.parametrize("kind", ["image", "patch"])
@pytest.mark.parametrize("measure", ["max", "quantile", "entropy"])
def test_a_replay_decides_as_the_exits_do(segmenter, batch, kind, measure, monkeypatch):
    """As long as whole levels are computed, and at the pixels of the record."""
    monkeypatch.setattr("cascade_det.segmentation.map_exits.DENSE_SHARE", 0.0)
    encoded, truths, records = recorded(segmenter, batch, patch=4)
    values = np.concatenate([one.confidence[kind, measure] for one in records], axis=1)
    thresholds = [float(np.quantile(level, 0.6)) + 1e-5 for level in values]
    setting = {"kind": kind, "confidence": measure, "thresholds": thresholds}
    head = segmenter.sem_seg_head
    exited = MapExits(head.decoder, head.heads, patch=4, **setting)(encoded.maps)
    assert len(exited.levels.unique()) > 1
    after_levels = segmenter.segment(batch, levels=True).levels
    for index, (one, truth) in enumerate(zip(records, truths, strict=True)):
        found = record_module.first_exits(one.confidence[kind, measure], thresholds)
        assert np.array_equal(found, exited.levels[index].flatten().numpy())
        each = np.stack([level[index].numpy() for level in after_levels])  # [L, height, width]
        own = encoded.image_sizes[index]
        patches = patches_of_pixels(truth.shape, own, encoded, 4) if kind == "patch" else 0
        answer = np.take_along_axis(each, np.broadcast_to(found[patches], each[:1].shape), 0)[0]
        expected = np.zeros((3, 3), int)
        np.add.at(expected, (truth[::2, ::2], answer[::2, ::2]), 1)
        replayed = replay(one, setting, 3, 255)
        assert np.array_equal(replayed.counts, expected)
        if kind == "image":
            assert replayed.computed == tuple(float(level <= found[0]) for level in range(4))


def test_without_exits_a_replay_is_the_whole_decoder(segmenter, batch):
    _, truths, records = recorded(segmenter, batch, patch=8)
    found = [x.argmax(0).numpy() for x in segmenter.segment(batch).sem_seg]
    for one, truth, labels in zip(records, truths, found, strict=True):
        expected = np.zeros((3, 3), int)
        for t, p in zip(truth[::2, ::2].ravel(), labels[::2, ::2].ravel(), strict=True):
            expected[t, p] += 1
        replayed = replay(one, None, 3, 255)
        assert np.array_equal(replayed.counts, expected)
        assert replayed.computed == (1.0,) * 4


def test_patches_of_the_pixels_of_a_file():
    encoded = EncodedImages([torch.zeros(1, 1, 16, 24)], (64, 96), [(60, 80)])
    found = patches_of_pixels((90, 120), (60, 80), encoded, 4)
    for y, x in ((0, 0), (89, 119), (45, 60), (23, 24), (24, 23)):
        row, column = int((y + 0.5) * 60 / 90 / 4), int((x + 0.5) * 80 / 120 / 4)
        assert found[y, x] == row // 4 * 6 + column // 4


@settings(max_examples=15)
@given(seed=st.integers(0, 99), share=st.floats(0.0, 0.7))
def test_shares_are_those_of_the_pixels_that_are_decoded(segmenter, seed, share):
    """Counted where the levels compute."""
    rng = np.random.default_rng(seed)
    levels = np.where(rng.random((4, 6)) < share, rng.integers(1, 4, (4, 6)), 0)
    torch.manual_seed(seed)
    maps = [
        torch.randn(1, c, *size)
        for c, size in zip(
            segmenter.sem_seg_head.decoder.channels,
            [(4, 6), (8, 12), (16, 24), (32, 48)],
            strict=True,
        )
    ]
    channels = list(segmenter.sem_seg_head.decoder.channels)
    computed = [1.0, 0.0, 0.0, 0.0]
    some, whole = SparseLevel.__call__, CascadeDecoder.refine

    def count_some(self, coarser, skip, wanted):
        near = record_module.dilate(wanted, ATTENDED)
        computed[channels.index(skip.shape[1])] = float(near.float().mean())
        return some(self, coarser, skip, wanted)

    def count_whole(self, level, coarser, skip):
        computed[channels.index(skip.shape[1])] = 1.0
        return whole(self, level, coarser, skip)

    head = segmenter.sem_seg_head
    exits = MapExits(head.decoder, head.heads, thresholds=[0.0] * 3, kind="patch", patch=8)
    exits._leaves = lambda level, so_far, size: torch.from_numpy(levels)[None] <= level
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SparseLevel, "__call__", count_some)
        patched.setattr(CascadeDecoder, "refine", count_whole)
        exits(maps)
    sizes = [tuple(x.shape[2:]) for x in maps]
    assert computed_shares(levels.ravel(), sizes, 8) == pytest.approx(computed)


def test_decoders_in_turn(segmenter, batch):
    never = {"kind": "patch", "confidence": "max", "thresholds": [NEVER] * 3}
    at_once = {"kind": "image", "confidence": "max", "thresholds": [1e-9] * 3}
    runs = run_decoders(
        segmenter,
        [[sample] for sample in batch],
        truth_of,
        {"never": never, "at once": at_once},
        ignore_label=255,
        num_classes=3,
        patch=4,
        channel_gates="computed",
    )
    scorer = Scorer([0, 1], "mIoU")
    assert next(iter(runs)) == FULL
    for run in runs.values():
        assert run.counts.sum((1, 2)).tolist() == [64 * 96, 90 * 120]
        assert (run.decoder_ms > 0).all()
        assert (run.total_ms > run.decoder_ms).all()
    assert runs[FULL].lost.tolist() == [0, 0]
    for index, sample in enumerate(batch):
        (first,), *_, (last,) = segmenter.segment([sample], levels=True).levels
        truth = truth_of(sample)
        right = last.numpy() == truth
        lost = (right & (first.numpy() != truth)).sum() / right.sum()
        assert runs["decoder up to level 0"].lost[index] == pytest.approx(lost)
    assert (runs["decoder up to level 0"].lost > 0).all()
    assert runs[FULL].computed == runs["never"].computed == 1
    assert runs["at once"].computed == runs["decoder up to level 0"].computed == 0
    # The same answers but for the way of resizing.
    for name, other in (("never", FULL), ("at once", "decoder up to level 0")):
        moved = np.abs(runs[name].counts - runs[other].counts).sum() / runs[name].counts.sum()
        assert moved < 0.1
    # An oracle loses no more than resizing and pooling over fewer pixels do.
    change = scorer.score(runs[ORACLE].counts) - scorer.score(runs[FULL].counts)
    assert change > -3
    for index, sample in enumerate(batch):
        levels = segmenter.segment([sample], levels=True).levels
        truth, encoded = truth_of(sample), segmenter.encode([sample])
        patches = patches_of_pixels(truth.shape, encoded.image_sizes[0], encoded, 4)
        left = np.zeros(4)
        height, width = (-(-side // 4) for side in encoded.maps[-1].shape[-2:])
        for patch in range(height * width):
            own = patches == patch
            right = [(level[0].numpy()[own] == truth[own]).sum() for level in levels]
            left[next(n for n in range(4) if right[n] >= right[-1])] += 1
        assert runs[ORACLE].left[index] == pytest.approx(left / left.sum())
    assert 0 < runs[ORACLE].computed < 1


def synthetic(scores, times, lost=0.0, left=0.0):
    """A run on ten images with ``scores`` of 100 pixels right."""
    right = np.asarray(scores)
    counts = np.zeros((10, 2, 2), np.int64)
    counts[:, 1, 1], counts[:, 1, 0], counts[:, 0, 0] = right, 100 - right, 100
    shares = np.tile([left, 1 - left], (10, 1))
    times = np.full(10, float(times))
    return Run(counts, np.full(10, float(lost)), times, times + 50, shares)


RUNS = {
    FULL: synthetic([90] * 10, 100),
    "safe": synthetic([90] * 10, 80, lost=0.0, left=0.3),
    "middle": synthetic([88] * 10, 60, lost=0.02, left=0.5),
    "risky": synthetic([70] * 10, 20, lost=0.3, left=0.9),
}
SETTINGS = {name: {"kind": "patch", "name": name} for name in RUNS if name != FULL}
SETTINGS_SAFE = {"safe": SETTINGS["safe"]}
HALVES = [range(5), range(5, 10)]


def chosen(**target):
    scorers = [Scorer(range(5), "mIoU")] * 2
    return choose(RUNS, SETTINGS, HALVES, scorers, Target(metric="sem_seg/mIoU", **target))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ({"max_ap_drop": 0.0}, "safe"),
        ({"max_ap_drop": 3.0}, "middle"),
        ({"max_ap_drop": 60.0}, "risky"),
        ({"latency_ms": 140.0}, "safe"),
        ({"latency_ms": 115.0}, "middle"),
        ({"exit_rate": 0.4}, "middle"),
        ({"risk": 0.4, "delta": 0.2}, "middle"),
        ({"risk": 0.9, "delta": 0.2}, "risky"),
        ({"risk": 0.01, "delta": 0.2}, FULL),
    ],
)
def test_the_choice_for_a_target(target, name):
    found = chosen(**target)
    assert found.name == name
    assert found.setting == SETTINGS.get(name)
    assert [row.name for row in found.rows] == list(RUNS)
    assert found.rows[1].decoder_share.value == pytest.approx(0.8)


def test_the_guarantee_counts_volumes():
    """Five slices that lose nothing are not five images if they are of two volumes."""
    target = Target(risk=0.3, delta=0.2, metric="sem_seg/mIoU")
    runs = {name: RUNS[name] for name in (FULL, "safe")}
    alone, of_volumes = Scorer(range(5), "mIoU"), Scorer([0, 0, 0, 1, 1], "mIoU")
    assert choose(runs, SETTINGS_SAFE, HALVES, [alone] * 2, target).name == "safe"
    assert choose(runs, SETTINGS_SAFE, HALVES, [of_volumes] * 2, target).name == FULL


def test_a_target_out_of_reach():
    with pytest.raises(ConfigError, match=r"--latency-ms 60: .* The fastest takes 70.0 ms"):
        chosen(latency_ms=60.0)
    with pytest.raises(ConfigError, match=r"--exit-rate 0.95: .* skips 0.90 of the later"):
        chosen(exit_rate=0.95)


def test_a_drop_within_its_deviation_is_not_sure():
    """Twice the same mean drop: of all images alike, or of one that stands for the others."""
    target = Target(max_ap_drop=2.0, metric="sem_seg/mIoU")
    scorers = [Scorer(range(5), "mIoU")] * 2
    for scores, name in (([88] * 10, "safe"), ([80, *[90] * 4] * 2, FULL)):
        runs = {FULL: RUNS[FULL], "safe": synthetic(scores, 80)}
        change = scorers[0].difference(runs[FULL].counts[:5], runs["safe"].counts[:5])
        assert -2 < change.value < -1.5
        assert choose(runs, SETTINGS_SAFE, HALVES, scorers, target).name == name


def test_a_drop_on_the_other_half_is_no_calibration():
    worse = {**RUNS, "safe": synthetic([90] * 5 + [60] * 5, 80)}
    scorers = [Scorer(range(5), "mIoU")] * 2
    target = Target(max_ap_drop=0.1, metric="sem_seg/mIoU")
    found = choose(worse, SETTINGS_SAFE, HALVES, scorers, target)
    assert (found.name, found.setting) == (FULL, None)
    assert "'safe' loses" in found.missed


def test_settings_that_are_worth_running(segmenter, batch):
    _, _, records = recorded(segmenter, batch, patch=8)
    found = list(settings_of(records, 50, 0))
    assert len(found) == 50
    assert {one["kind"] for one in found} == {"image", "patch"}
    assert found == list(settings_of(records, 50, 0))
    trials = [
        MapTrial({"kind": "patch", "name": name}, drop, work)
        for name, drop, work in [
            ("best", 0.01, 0.9),
            ("worse", 0.03, 0.95),
            ("cheap", 0.9, 0.3),
            ("bad", 9.0, 0.1),
            ("full", 0.0, 1.0),
        ]
    ]
    assert [one["name"] for one in worth_running(trials)] == ["best", "cheap"]
