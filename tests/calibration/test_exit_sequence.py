"""One setting of a sequence: which one, by which images, and what is reported of it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from recorded_trials import make_trials
from scipy.stats import norm
from scipy.stats import t as student

from cascade_det.calibration.bootstrap import average_precision, paired_bootstrap
from cascade_det.calibration.calibrator import build_policy
from cascade_det.calibration.evidence import FOLDS, ROUNDS, Evidence
from cascade_det.calibration.exit_sequence import ExitSequence
from cascade_det.calibration.image_matching import join_images, mix_images
from cascade_det.calibration.trials import ExitTrials
from cascade_det.config import get_cfg

SETTINGS = [
    {},
    *({"REDUNDANCY_IOU": iou} for iou in (0.95, 0.9, 0.8)),
    *({"REDUNDANCY_IOU": 0.7, "PRUNE_THRESHOLDS": (p, p)} for p in (0.3, 0.4, 0.5)),
    {"REDUNDANCY_IOU": 0.3, "PRUNE_THRESHOLDS": (0.9, 0.9)},
]
UNKNOWN = (math.inf,) * len(SETTINGS)


def policy(setting):
    return build_policy(get_cfg(), setting, None)


def make_sequence(trials, settings=SETTINGS, scales=UNKNOWN):
    return ExitSequence(Evidence(trials, policy, metric="AP", seed=0), settings, scales)


@pytest.fixture(scope="module")
def trials():
    """Twelve images, in records of two."""
    return make_trials(seeds=range(6))


@pytest.fixture(scope="module")
def sequence(trials):
    return make_sequence(trials)


def bounds(trials):
    """Of the drop of each setting, from the summary of its bootstrap; nothing else is known."""
    count = len(trials.recording.image_ids)
    # The quantile of Student, for a deviation with n - 1 in its denominator, and for the deviation
    # of as many further images.
    factor = student.ppf(0.95, count - 1) * np.sqrt(2 * count / (count - 1))
    found = []
    for setting in SETTINGS[1:]:
        matched = trials.replay(policy(setting)).matched
        change = paired_bootstrap(trials.full.matched, matched, rounds=ROUNDS)["AP"]
        found.append(-change.value + factor * change.deviation)
    return [0.0, *found]


def _predictive_bound(grid, probabilities, deviation):
    """Below which the drop of further images is with 95%: 40 halvings of an interval."""
    low, high = grid[0], grid[-1]
    for _ in range(40):
        middle = (low + high) / 2
        if probabilities @ norm.cdf(middle, grid, deviation) < 0.95:
            low = middle
        else:
            high = middle
    return low


def test_the_work_that_is_left_where_ap_changes_little(trials, sequence):
    """Up to the first setting whose bound, if it lost nothing, is above the limit."""
    widths = [
        bound + sequence.trial(place).metrics["AP"] - trials.full.metrics["AP"]
        for place, bound in enumerate(bounds(trials))
    ]
    found = set()
    for most in (0.0, *(width + 1e-6 for width in widths), 1000.0):
        place = 0
        while place + 1 < len(widths) and widths[place + 1] <= most:
            place += 1
        assert sequence.steady_work(most) == sequence.trial(place).work
        found.add(place)
    assert len(found) > 3
    reordered = make_sequence(trials, [SETTINGS[0], SETTINGS[-1], *SETTINGS[1:-1]])
    assert widths[1] < widths[-1]
    assert reordered.steady_work(widths[1] + 1e-6) == 1  # what comes behind has no say


class TestDrop:
    def test_the_last_setting_before_the_first_that_is_not_sure(self, trials, sequence):
        wanted, chosen = bounds(trials), []
        for most in (0.0, *(bound + 1e-6 for bound in wanted), 100.0):
            place = 0
            while place + 1 < len(wanted) and wanted[place + 1] <= most:
                place += 1
            assert sequence.within(most).place == place
            chosen.append(place)
        assert len(set(chosen)) > 3
        assert chosen[-1] == len(SETTINGS) - 1

    def test_other_data_weigh_the_more_the_less_these_say(self, trials, sequence):
        """As many further images lose less with 95%, by the posterior on a grid of drops."""
        wanted = bounds(trials)
        places = [p for p, one in enumerate(SETTINGS) if sequence.evidence.deviation(one) > 0]
        grid = np.linspace(-60, 60, 24_001)
        for scale in (0.5, 3.0, 1e4):
            found = make_sequence(trials, scales=(scale,) * len(SETTINGS))
            for place in places[:2]:
                change = sequence.trial(place).metrics["AP"] - trials.full.metrics["AP"]
                deviation = (wanted[place] + change) / norm.ppf(0.95) / np.sqrt(2)
                density = norm.pdf(grid, scale / 2, scale) * norm.pdf(-change, grid, deviation)
                bound = _predictive_bound(grid, density / density.sum(), deviation)
                assert found.bounds(place)[0] == pytest.approx(max(bound, -change), abs=2e-3)

    def test_what_these_images_lose_is_not_excused(self, trials, sequence):
        """However little is usual elsewhere."""
        safe = make_sequence(trials, scales=(0.001,) * len(SETTINGS))
        drops = [
            trials.full.metrics["AP"] - sequence.trial(p).metrics["AP"]
            for p in range(len(SETTINGS))
        ]
        for most in (1.0, 5.0, 20.0):
            assert max(drops[: safe.within(most).place + 1]) <= most
        assert safe.within(max(drops) - 1).place < len(SETTINGS) - 1

    def test_what_comes_behind_a_failure_is_no_longer_looked_at(self, trials):
        """The setting that loses most comes first: those behind it are never chosen."""
        reordered = make_sequence(trials, [SETTINGS[0], SETTINGS[-1], *SETTINGS[1:-1]])
        most = bounds(trials)[1] + 1e-6
        assert most < bounds(trials)[-1]
        assert make_sequence(trials).within(most).place > 0
        assert reordered.within(most).place == 0

    def test_nor_where_resamples_would_go_on(self, trials):
        reordered = make_sequence(trials, [SETTINGS[0], SETTINGS[-1], *SETTINGS[1:-1]])
        found = reordered.within(reordered.bounds(1)[0] - 1e-6)
        assert found.place == 0
        assert found.others.max() > 1

    def test_more_may_be_lost_at_a_higher_limit(self, sequence):
        found = [sequence.within(most) for most in np.linspace(0, 100, 15)]
        for before, after in itertools.pairwise(found):
            assert before.place <= after.place
            assert (before.others <= after.others).all()

    def test_images_that_are_left_out_have_no_say(self, trials, sequence):
        """Another outcome on the images of one fold changes the other choices alone."""
        changed = []
        for fold in range(FOLDS):
            images = np.flatnonzero(sequence.evidence.folds == fold)
            other = make_sequence(_shuffled(trials, images))
            for most in (5.0, 20.0, 40.0):
                ours, theirs = sequence.within(most), other.within(most)
                assert ours.others[fold] == theirs.others[fold]
                changed.append(ours.others.tolist() != theirs.others.tolist())
        assert any(changed)

    def test_every_image_is_left_out_once(self, sequence):
        assert np.bincount(sequence.evidence.folds).tolist() == [3, 3, 2, 2, 2]

    def test_without_objects_on_some_resamples(self, trials):
        """Two images in one fold have all objects: without it, nothing may leave."""
        sequence = make_sequence(trials)
        kept = np.flatnonzero(sequence.evidence.folds == 2)
        lone = _with_objects_in(trials, kept)
        found = make_sequence(lone).within(100.0)
        assert found.others[2] == 0
        assert found.place > 0
        change = make_sequence(lone).changes(found)["AP"]
        assert np.isfinite([change.value, change.deviation, change.low, change.high]).all()


class TestOtherTargets:
    def test_the_safest_that_reaches_it(self, sequence, trials):
        rates = [sequence.trial(p).exit_rate(trials.full) for p in range(len(SETTINGS))]

        def reaches(rate):
            def skips(trial, images):
                full = trials.full.entered[1:, images].sum()
                return 1 - trial.entered[1:, images].sum() / full >= rate

            return skips

        for rate in (0.0, 0.3, 0.6):
            place = sequence.reaching(reaches(rate)).place
            assert rates[place] >= rate
            assert all(other < rate for other in rates[:place])
        assert sequence.reaching(reaches(1.1)) is None

    def test_a_test_sees_the_images_that_count(self, sequence):
        seen = []

        def last_passed(trials, images):
            seen.append(images)
            return len(images) % len(trials)

        found = sequence.passing(last_passed)
        assert found.place == 12 % len(SETTINGS)
        assert seen[0].tolist() == list(range(12))
        for fold in range(FOLDS):
            outside = np.flatnonzero(sequence.evidence.folds != fold)
            assert seen[1 + fold].tolist() == outside.tolist()
            assert found.others[fold] == len(seen[1 + fold]) % len(SETTINGS)
        assert all(len(images) == 12 for images in seen[1 + FOLDS :])
        assert any(len(set(images.tolist())) < 12 for images in seen[1 + FOLDS :])


class TestReport:
    def test_each_image_has_the_setting_that_was_chosen_without_it(self, trials, sequence):
        choice = sequence.within(30.0)
        choice.others[:FOLDS] = [1, 4, 6, 4, 7]
        matched = []
        for index, image_id in enumerate(trials.recording.image_ids):
            alone = trials.recording.of_images([index])
            setting = SETTINGS[choice.others[sequence.evidence.folds[index]]]
            own = ExitTrials(alone, trials.matcher, score=0.3)
            (found,) = own.detections(policy(setting))
            matched.append(trials.matcher.match(image_id, found))
        wanted = average_precision(join_images(matched))
        changes = sequence.changes(choice)
        assert changes.keys() == wanted.keys()
        for name, value in wanted.items():
            assert changes[name].value == pytest.approx(value - trials.full.metrics[name])

    def test_where_all_choose_the_same_it_is_the_paired_bootstrap(self, trials, sequence):
        choice = sequence.within(100.0)
        choice.others[:] = choice.place
        trial = trials.replay(policy(SETTINGS[choice.place]))
        wanted = paired_bootstrap(trials.full.matched, trial.matched, rounds=ROUNDS)
        for name, change in sequence.changes(choice).items():
            assert change.value == pytest.approx(wanted[name].value)
            assert change.deviation == pytest.approx(wanted[name].deviation)
            width = wanted[name].high - wanted[name].low
            assert change.high - change.low == pytest.approx(width)

    def test_the_order_of_ids_means_nothing(self, sequence):
        backwards = make_sequence(make_trials(seeds=range(6), backwards=True))
        choice = sequence.always(2)
        choice.others[:FOLDS] = [1, 4, 6, 4, 7]
        found = backwards.changes(choice)
        for name, change in sequence.changes(choice).items():
            assert vars(found[name]) == pytest.approx(vars(change))

    def test_choices_that_differ_widen_the_interval(self, sequence):
        choice = sequence.within(100.0)
        choice.others[:] = choice.place
        same = sequence.changes(choice)["AP"]
        choice.others[FOLDS::2] = 0
        assert sequence.changes(choice)["AP"].deviation > 1.2 * same.deviation

    def test_nothing_changes_where_nothing_leaves(self, sequence):
        choice = sequence.within(0.0)
        choice.others[:] = 0
        for change in sequence.changes(choice, {"GATES_OFF": (1,)}).values():
            assert dataclasses.astuple(change) == (0, 0, 0, 0)

    def test_further_keys_are_of_settings_that_let_something_leave(self, trials, sequence):
        off = {"GATES_OFF": (1,)}
        assert sequence.setting(0, off) == {}
        assert sequence.setting(3, off) == {**SETTINGS[3], **off}
        choice = sequence.within(100.0)
        choice.others[:] = choice.place
        trial = trials.replay(policy({**SETTINGS[choice.place], **off}))
        change = trial.metrics["AP"] - trials.full.metrics["AP"]
        assert sequence.changes(choice, off)["AP"].value == pytest.approx(change)


def test_images_of_several_detectors(trials):
    versions = [trials.replay(policy(setting)).matched for setting in SETTINGS[:4]]
    which = np.random.default_rng(0).integers(0, 4, len(versions[0].image_ids))
    mixed = mix_images(versions, which)
    for image, index in enumerate(which.tolist()):
        own, wanted = mixed.images == image, versions[index].images == image
        for name in ("classes", "scores", "exit_stages", "hits", "ignored"):
            got, expected = getattr(mixed, name), getattr(versions[index], name)
            assert got[..., own].tolist() == expected[..., wanted].tolist()
    assert (np.diff(mixed.images) >= 0).all()


def _shuffled(trials, images):
    """The trials with the classes of regions shuffled in these images."""
    records = []
    for place in range(len(trials.recording.image_ids)):
        record = trials.recording.of_images([place]).records[0]
        if place in images:
            order = torch.randperm(
                len(record.proposals), generator=torch.Generator().manual_seed(1)
            )
            stages = [
                dataclasses.replace(stage, score_state=stage.score_state[order])
                for stage in record.stages
            ]
            record = dataclasses.replace(record, stages=stages)
        records.append(record)
    return ExitTrials(
        dataclasses.replace(trials.recording, records=records), trials.matcher, score=0.3
    )


class _FewObjects:
    """A matcher for which only some of the images have objects."""

    def __init__(self, matcher, kept):
        self.matcher, self.kept = matcher, kept

    def objects_of(self, image_id):
        boxes, classes = self.matcher.objects_of(image_id)
        return (boxes, classes) if image_id in self.kept else (boxes[:0], classes[:0])

    def match(self, image_id, detections):
        matched = self.matcher.match(image_id, detections)
        if image_id in self.kept:
            return matched
        none = np.zeros_like(matched.hits)
        return dataclasses.replace(
            matched, hits=none, ignored=none, objects=np.zeros_like(matched.objects)
        )


def _with_objects_in(trials, images):
    kept = {trials.recording.image_ids[index] for index in images}
    return ExitTrials(trials.recording, _FewObjects(trials.matcher, kept), score=0.3)
