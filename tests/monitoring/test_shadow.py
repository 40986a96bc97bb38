"""Shadow runs: which images, what they say, and when that is drift."""

from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest

from cascade_det.core.structures import StageOutput
from cascade_det.monitoring.shadow import (
    ShadowEvaluator,
    ShadowRules,
    image_key,
    shadow_evaluators,
    shadow_metrics,
    watch_drift,
)

BOX, OTHER = (10, 10, 100, 100), (200, 50, 60, 80)


def test_the_share_of_images_is_chosen():
    rules = ShadowRules(share=0.2)
    count = sum(rules.chooses(f"images/{number:06d}.jpg") for number in range(5000))
    # Five standard deviations of a binomial count.
    assert abs(count - 1000) < 5 * math.sqrt(5000 * 0.2 * 0.8)
    assert all(ShadowRules(share=1.0).chooses(number) for number in range(1000))
    assert not any(ShadowRules(share=0.0).chooses(number) for number in range(1000))


def test_there_is_an_evaluator_where_images_are_chosen():
    assert shadow_evaluators(share=0.0, seed=1) == []
    assert [type(e) for e in shadow_evaluators(share=0.1, seed=1)] == [ShadowEvaluator]


def test_the_choice_is_fixed_for_good():
    """The same on any machine and in any process: these numbers are part of the behaviour."""
    chosen = [number for number in range(40) if ShadowRules(share=0.1).chooses(number)]
    assert chosen == [1, 9, 25, 28, 29]


def test_seeds_choose_independently_and_larger_shares_choose_more():
    few, many = ShadowRules(share=0.3), ShadowRules(share=0.6)
    other = ShadowRules(share=0.3, seed=1)
    keys = range(3000)
    assert all(many.chooses(key) for key in keys if few.chooses(key))
    both = sum(few.chooses(key) and other.chooses(key) for key in keys)
    assert abs(both - 270) < 5 * math.sqrt(3000 * 0.09)


def test_images_are_known_by_id_then_name_then_number():
    assert image_key({"image_id": 0, "file_name": "a.jpg"}, 5) == 0
    assert image_key({"file_name": "a.jpg"}, 5) == "a.jpg"
    assert image_key({"file_name": None}, 5) == 5


@pytest.fixture
def make_output(detections, detector_output):
    """Output of a batch in which image ``k`` loses the share ``losses[k]`` of four detections."""

    def make(losses):
        full = detections(*(((150 * k, 0, 100, 100), 0.9, 0) for k in range(4)))
        early = [full[round(4 * loss) :] for loss in losses]
        other = [detections()] * len(losses)
        stages = [StageOutput(found, [], []) for found in (other, [full] * len(losses))]
        return detector_output(early, stages=stages)

    return make


def test_metrics_do_not_depend_on_batches_or_order(make_output):
    rng = random.Random(0)
    losses = {number: rng.choice([0, 0, 0.25, 0.5, 1]) for number in range(60)}
    found = []
    for seed, size in ((1, 1), (2, 7), (3, 60)):
        order = random.Random(seed).sample(list(losses), len(losses))
        evaluator = ShadowEvaluator(ShadowRules(share=0.5))
        for start in range(0, len(order), size):
            ids = order[start : start + size]
            batch = [{"image_id": number} for number in ids]
            evaluator.process(batch, make_output([losses[number] for number in ids]))
        found.append(evaluator.evaluate()["shadow"])
    assert found[0] == found[1] == found[2]
    chosen = [number for number in losses if ShadowRules(share=0.5).chooses(number)]
    assert found[0]["images"] == len(chosen)
    assert found[0]["loss"] == pytest.approx(np.mean([losses[number] for number in chosen]))
    changed = sum(losses[number] > 0 for number in chosen)
    assert found[0]["changed"] == pytest.approx(changed / len(chosen))
    assert found[0]["loss_low"] < found[0]["loss"] < found[0]["loss_high"]
    assert "drift" not in found[0]


def test_only_the_last_stage_counts_and_it_has_to_be_there(make_output, detector_output):
    evaluator = ShadowEvaluator(ShadowRules(share=1.0))
    evaluator.process([{"image_id": 1}], make_output([0.25]))
    assert evaluator.evaluate()["shadow"]["loss"] == 0.25
    with pytest.raises(ValueError, match="stages=True"):
        evaluator.process([{"image_id": 1}], detector_output([]))
    evaluator.reset()
    assert evaluator.evaluate()["shadow"]["images"] == 0


def test_the_score_that_counts_is_the_one_of_the_rules(detections, detector_output):
    full = detections((BOX, 0.9, 0), (OTHER, 0.4, 1))
    output = detector_output([full[:1]], stages=[StageOutput([full], [], [])])
    losses = []
    for min_score in (0.5, 0.3):
        evaluator = ShadowEvaluator(ShadowRules(share=1.0, min_score=min_score))
        evaluator.process([{"image_id": 1}], output)
        losses.append(evaluator.evaluate()["shadow"]["loss"])
    assert losses == [0, 0.5]


def test_no_image_says_nothing():
    metrics = shadow_metrics([], ShadowRules(share=0.1, expected_loss=0.0))
    assert math.isnan(metrics["loss"])
    assert (metrics["loss_low"], metrics["loss_high"], metrics["drift"]) == (0, 1, 0)


def streams(mean, seed, count=400):
    """Losses of many images: most have none, the others lose a quarter, a half or everything."""
    rng = np.random.default_rng(seed)
    return (rng.random(count) < mean * 12 / 7) * rng.choice([0.25, 0.5, 1.0], count)


def drifts(losses, **promise):
    rules = ShadowRules(share=1.0, **promise)
    return [shadow_metrics(losses[:n], rules)["drift"] for n in range(20, len(losses) + 1, 20)]


def test_drift_is_rarely_seen_where_there_is_none():
    """In at most 2.5 % of the streams, although each is looked at twenty times."""
    alarms = sum(any(drifts(streams(0.05, seed), expected_loss=0.05)) for seed in range(80))
    assert alarms <= 5


def test_drift_is_seen_where_it_is():
    assert all(any(drifts(streams(0.2, seed), expected_loss=0.05)) for seed in range(20))


def test_an_uncertain_promise_is_given_the_benefit_of_the_doubt():
    losses = streams(0.2, 0)
    low = shadow_metrics(losses, ShadowRules(share=1.0))["loss_low"]
    assert low > 0.1
    for deviation, expected in ((0.0, 1), ((low - 0.05) / 2 - 1e-6, 1), (low / 2, 0)):
        promise = {"expected_loss": 0.05, "expected_deviation": deviation}
        assert drifts(losses, **promise)[-1] == expected


def metrics(drift):
    return {
        "images": 9, "loss": 0.3, "loss_low": 0.2, "loss_high": 0.4,
        "expected_loss": 0.1, "expected_deviation": 0.01, "drift": drift,
    }  # fmt: skip


def test_drift_is_logged_when_it_begins_and_ends(caplog):
    caplog.set_level(logging.INFO)
    drifted = False
    for drift in (0, 1, 1, 1, 0, 0, 1):
        drifted = watch_drift(metrics(drift), drifted)
        assert drifted == bool(drift)
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, logging.INFO, logging.WARNING]
    assert "0.3000" in caplog.messages[0]
    assert "9 shadow images" in caplog.messages[0]


def test_an_evaluation_warns_of_drift(make_output, caplog):
    evaluator = ShadowEvaluator(ShadowRules(share=1.0, expected_loss=0.01))
    for number in range(50):
        evaluator.process([{"image_id": number}], make_output([0.5]))
    metrics = evaluator.evaluate()["shadow"]
    assert metrics["drift"] == 1
    assert len(caplog.records) == 1


def test_names_that_are_no_unicode_choose_too():
    names = [f"gr\udcf6\udcdfe{number}.png" for number in range(100)]
    chosen = [ShadowRules(share=0.5).chooses(name) for name in names]
    assert 20 < sum(chosen) < 80
