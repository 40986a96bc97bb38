"""The tile gate as a second step of a choice, with budgets of regions in place of thresholds."""

import math

import numpy as np
import pytest
from recorded_trials import make_trials
from scipy.stats import t as student

from cascade_det.calibration.bootstrap import average_precision, paired_bootstrap
from cascade_det.calibration.calibrator import build_policy
from cascade_det.calibration.evidence import FOLDS, ROUNDS, Evidence
from cascade_det.calibration.exit_sequence import Choice, ExitSequence
from cascade_det.calibration.image_matching import join_images
from cascade_det.calibration.search_space import TILE_THRESHOLDS, tile_steps
from cascade_det.calibration.trials import ExitTrials
from cascade_det.config import get_cfg

SETTINGS = [
    {},
    *({"REDUNDANCY_IOU": iou} for iou in (0.95, 0.9, 0.8)),
    *({"REDUNDANCY_IOU": 0.7, "PRUNE_THRESHOLDS": (p, p)} for p in (0.3, 0.4, 0.5)),
    {"REDUNDANCY_IOU": 0.3, "PRUNE_THRESHOLDS": (0.9, 0.9)},
]
UNKNOWN = (math.inf,) * len(SETTINGS)
NO_DROPS = (0.0,) * 5
STEPS = [{}, *({"REGION_BUDGET": (most, 0, 0)} for most in (18, 12, 6, 2))]
FALLING = dict(zip(map(str, STEPS), (10.0, 9.0, 8.0, 7.0, 6.0), strict=True))
PLACE = 2


def policy(setting):
    return build_policy(get_cfg(), setting, None)


def make_sequence(trials, *, scales=UNKNOWN, drops=NO_DROPS):
    evidence = Evidence(trials, policy, metric="AP", seed=0)
    return ExitSequence(evidence, SETTINGS, scales, (STEPS, drops))


def cost_by(costs):
    """Of a setting, by its step alone."""
    budget = "REGION_BUDGET"
    return lambda setting: costs[str({budget: setting[budget]} if budget in setting else {})]


@pytest.fixture(scope="module")
def trials():
    return make_trials(seeds=range(6))


@pytest.fixture(scope="module")
def sequence(trials):
    return make_sequence(trials)


@pytest.fixture(scope="module")
def bounds(trials):
    """Of each step at ``PLACE``, from the summary of its bootstrap."""
    count = len(trials.recording.image_ids)
    # As many further images deviate too: the square root of 2.
    factor = student.ppf(0.95, count - 1) * np.sqrt(2 * count / (count - 1))
    found = []
    for step in STEPS:
        matched = trials.replay(policy({**SETTINGS[PLACE], **step})).matched
        change = paired_bootstrap(trials.full.matched, matched, rounds=ROUNDS)["AP"]
        found.append(-change.value + factor * change.deviation)
    assert found == sorted(found)
    return found


class TestDrop:
    def test_the_last_step_before_the_first_that_is_not_sure(self, sequence, bounds):
        chosen = []
        for bound in bounds:
            most, wanted = bound + 1e-6, 0
            while wanted + 1 < len(bounds) and bounds[wanted + 1] <= most:
                wanted += 1
            found = sequence.within_tiles(sequence.always(PLACE), most, cost_by(FALLING))
            assert (found.place, found.tile) == (PLACE, wanted)
            chosen.append(wanted)
        assert len(set(chosen)) > 2

    @pytest.mark.parametrize(
        ("costs", "wanted"),
        [
            ((10, 9, 9.5, 8, 8), 3),
            ((10, 11, 12, 13, 14), 0),
            ((10, 9.95, 9.92, 9.95, 9.91), 0),  # less than 1%
            ((10, 12, 9, 12, 12), 2),
        ],
    )
    def test_it_is_the_one_that_takes_least(self, sequence, costs, wanted):
        cost = cost_by(dict(zip(map(str, STEPS), costs, strict=True)))
        assert sequence.within_tiles(sequence.always(PLACE), 100.0, cost).tile == wanted

    def test_one_that_fails_ends_the_steps_whatever_it_costs(self, sequence, bounds):
        costs = dict(zip(map(str, STEPS), (10, 9, 20, 5, 4), strict=True))
        found = sequence.within_tiles(sequence.always(PLACE), bounds[2] - 1e-6, cost_by(costs))
        assert found.tile == 1

    def test_what_is_usual_elsewhere_adds_up(self, trials, sequence, bounds):
        """Where almost nothing is usual, further images alone deviate, not the mean."""
        usual = make_sequence(
            trials, scales=(1e-9,) * len(SETTINGS), drops=(0.0, *(1e-9,) * (len(STEPS) - 1))
        )
        for tile in range(len(STEPS)):
            setting = {**SETTINGS[PLACE], **STEPS[tile]}
            change = trials.replay(policy(setting)).metrics["AP"] - trials.full.metrics["AP"]
            wanted = max((bounds[tile] + change) / np.sqrt(2), -change)
            assert usual.bounds(PLACE, tile=tile)[0] == pytest.approx(wanted, abs=1e-6)
            assert sequence.bounds(PLACE, tile=tile)[0] >= usual.bounds(PLACE, tile=tile)[0]

    def test_images_that_are_left_out_have_no_say(self, trials, sequence):
        changed = []
        for fold in range(FOLDS):
            images = np.flatnonzero(sequence.evidence.folds == fold)
            outside = np.flatnonzero(sequence.evidence.folds != fold)
            kept = trials.recording.of_images(outside.tolist())
            alone = ExitTrials(kept, trials.matcher, score=0.3)
            assert len(kept.image_ids) + len(images) == 12
            for most in (5.0, 20.0, 40.0):
                found = sequence.within_tiles(sequence.within(most), most, cost_by(FALLING))
                place, tile = found.pairs[:, fold].tolist()
                # The drops that were within the limit, on the other images.
                setting = {**SETTINGS[place], **STEPS[tile]}
                drop = alone.full.metrics["AP"] - alone.replay(policy(setting)).metrics["AP"]
                assert drop <= most
                changed.append((place, tile) != (found.place, found.tile))
        assert any(changed)


@pytest.fixture(scope="module")
def known(trials):
    """Where each setting usually loses as much as the second step."""
    scales = (0.0, *(20.0,) * (len(SETTINGS) - 1))
    return make_sequence(trials, scales=scales, drops=(0.0, 1.0, 5.0, 30.0, 40.0))


class TestCheaper:
    """Of a gate after the place is chosen, and a gate beside each place."""

    @pytest.mark.parametrize("most", [10.0, 25.0, 40.0])
    @pytest.mark.parametrize("costs", [(10, 9, 5, 4, 3), (10, 9.9, 9.8, 9.7, 9.6)])
    def test_it_is_the_cheaper_one_everywhere(self, known, most, costs):
        by_step = cost_by(dict(zip(map(str, STEPS), costs, strict=True)))

        def cost(setting):
            return by_step(setting) - 0.2 * SETTINGS.index(
                {key: x for key, x in setting.items() if key != "REGION_BUDGET"}
            )

        after = known.within_tiles(known.within(most), most, cost)
        beside = known.within(most, tile_gate=True)
        assert {0, 2} >= set(beside.pairs[1].tolist())
        found = known.within_gated(most, cost)
        for own, *both in (
            ((found.place, found.tile), (after.place, after.tile), (beside.place, beside.tile)),
            *zip(found.pairs.T, after.pairs.T, beside.pairs.T, strict=True),
        ):
            prices = [cost(known.setting(place, tile=tile)) for place, tile in both]
            wanted = both[prices[1] < 0.99 * prices[0]]
            assert tuple(own) == tuple(wanted)

    def test_without_saving_there_is_no_gate(self, known):
        cost = cost_by(dict.fromkeys(map(str, STEPS), 1.0))
        found = known.within_gated(25.0, cost)
        assert found.place == known.within(25.0).place
        assert found.tile == 0
        assert not found.pairs[1].any()


def test_each_image_is_reported_with_what_was_chosen_without_it(trials, sequence):
    places, steps = [1, 4, 6, 4, 7], [0, 2, 1, 1, 3]
    choice = sequence.within(30.0)
    choice.others[:FOLDS] = places
    tiles = np.zeros_like(choice.others)
    tiles[:FOLDS] = steps
    matched = []
    for index, image_id in enumerate(trials.recording.image_ids):
        fold = sequence.evidence.folds[index]
        setting = {**SETTINGS[places[fold]], **STEPS[steps[fold]]}
        alone = ExitTrials(trials.recording.of_images([index]), trials.matcher, score=0.3)
        matched.append(trials.matcher.match(image_id, alone.detections(policy(setting))[0]))
    wanted = average_precision(join_images(matched))
    found = sequence.changes(Choice(choice.place, choice.others, 1, tiles))
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value - trials.full.metrics[name])


class TestOtherTargets:
    scales = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    drops = (0.0, 0.01, 0.03, 0.1, 2.0)
    usual = (0, 1, 1, 2, 3, 3, 3, 3)

    def test_a_step_that_loses_no_more_than_the_setting(self, trials, sequence):
        known = make_sequence(trials, scales=self.scales, drops=self.drops)
        assert tuple(map(known.usual_tile, range(len(SETTINGS)))) == self.usual
        unknown = make_sequence(trials, scales=(math.inf,) * len(SETTINGS), drops=self.drops)
        assert unknown.usual_tile(0) == unknown.usual_tile(5) == 1

    def test_the_safest_that_reaches_it_with_or_without_a_step(self, trials):
        known = make_sequence(trials, scales=self.scales, drops=self.drops)

        def reaches(most):
            return lambda trial, images: trial.entered[:, images].sum() / len(images) <= most

        def work(place, tile):
            return known.trial(place, tile=tile).entered.sum() / 12

        for most in (75.0, 60.0, 45.0, 30.0):
            found = known.reaching(reaches(most), tile_gate=True)
            order = [
                (place, tile)
                for place, usual in enumerate(self.usual)
                for tile in sorted({0, usual})
            ]
            wanted = next(pair for pair in order if work(*pair) <= most)
            assert (found.place, found.tile) == wanted
            assert known.reaching(reaches(most)).tile == 0

    def test_a_guarantee_is_tested_with_the_steps(self, trials):
        known, seen = make_sequence(trials, scales=self.scales, drops=self.drops), []

        def last_passed(given, images):
            seen.append(given)
            return len(set(images.tolist())) % len(given)

        found = known.passing(last_passed, tile_gate=True)
        assert seen[0] == [known.trial(place, tile=tile) for place, tile in enumerate(self.usual)]
        assert (found.place, found.tile) == (12 % 8, self.usual[12 % 8])
        assert found.pairs[1].tolist() == [self.usual[place] for place in found.others]


def test_steps_are_of_recorded_thresholds_from_safe_to_risky():
    settings, drops = tile_steps(TILE_THRESHOLDS)
    assert [setting.get("TILE_THRESHOLD", 0) for setting in settings] == list(TILE_THRESHOLDS)
    assert drops == sorted(drops)
    assert len(settings) == len(drops) > 3
    assert tile_steps(()) == ([{}], [0.0])
