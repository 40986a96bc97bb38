"""The score calibration of a setting: its meaning, and where it is used."""

import numpy as np
import pytest
from recorded_trials import make_calibrator, make_trials

from cascade_det.calibration.calibrator import Calibrator
from cascade_det.calibration.score_calibration import UNCHANGED, ScoreMap, to_last_stage
from cascade_det.calibration.target import Target

ACCEPT = {"THRESHOLDS": (0.6, 2.0)}


@pytest.fixture(scope="module")
def many():
    """Enough images to fit scores to."""
    trials = make_trials(seeds=range(16))
    return make_calibrator(trials.recording, trials.matcher, tries=1)


class TestScores:
    def test_mapped_scores_mean_what_those_of_the_last_stage_do(self):
        fitted = [ScoreMap(0.5, 0.3), ScoreMap(2.0, -1.0), ScoreMap(0.8, 0.6)]
        maps = to_last_stage(fitted)
        logits = np.linspace(-4, 4, 50)

        def by(maps, logits, stage):
            return maps[stage].scale * logits + maps[stage].shift

        for stage in range(3):
            as_last = by(fitted, by(maps, logits, stage), 2)
            np.testing.assert_allclose(as_last, by(fitted, logits, stage), atol=1e-12)
        np.testing.assert_allclose(by(maps, logits, 2), logits, atol=1e-12)

    def test_what_could_not_be_fitted_stays(self):
        maps = to_last_stage([UNCHANGED, ScoreMap(2.0, -1.0), ScoreMap(0.8, 0.6)])
        assert maps[0] == UNCHANGED

    def test_no_score_is_mapped_to_a_last_stage_without_a_fit(self, many, monkeypatch):
        fitted = [ScoreMap(0.5, 0.3), ScoreMap(2.0, -1.0), UNCHANGED]
        monkeypatch.setattr("cascade_det.calibration.calibrator.fit_score_maps", lambda *_: fitted)
        assert many.with_scores(ACCEPT) is ACCEPT

    def test_they_are_mapped_where_that_helps(self, many):
        plain = many.trials.replay(many.policy(ACCEPT))
        mapped = many.with_scores(ACCEPT)
        assert mapped.keys() - ACCEPT.keys() == {"SCORE_SCALES", "SCORE_SHIFTS"}
        assert (mapped["SCORE_SCALES"][-1], mapped["SCORE_SHIFTS"][-1]) == (1.0, 0.0)
        trial = many.trials.replay(many.policy(mapped))
        assert trial.metrics["AP"] > plain.metrics["AP"]
        assert trial.entered.tolist() == plain.entered.tolist()

    def test_what_is_chosen_has_the_map_and_is_reported_with_it(self, monkeypatch):
        trials = make_trials(seeds=range(16))
        monkeypatch.setattr(Calibrator, "_front", lambda _: [{}, ACCEPT])
        many = make_calibrator(trials.recording, trials.matcher, tries=1)
        found = many.calibrate(Target(exit_rate=0.1))
        assert found.plain == ACCEPT
        assert found.setting == many.with_scores(ACCEPT)
        mapped, plain = (many.others.replay(many.policy(s)) for s in (found.setting, ACCEPT))
        assert found.reported.metrics == mapped.metrics != plain.metrics
        change = mapped.metrics["AP"] - many.others.full.metrics["AP"]
        assert found.differences["AP"].value == pytest.approx(change)

    def test_nothing_is_fitted_to_the_images_that_judge(self):
        trials = make_trials(seeds=range(16))
        path = make_calibrator(trials.recording, trials.matcher)
        assert path.with_scores(ACCEPT) is ACCEPT

    def test_they_stay_where_it_does_not(self, many, monkeypatch):
        # What left after stage 0 comes out in a row with what did not, but below or above it.
        plain = many.trials.replay(many.policy(ACCEPT)).metrics["AP"]
        wrong = [ScoreMap(0.5, 9.0), ScoreMap(0.5, 9.0), ScoreMap(1.1, 0.1)]
        scales, shifts = zip(*to_last_stage(wrong), strict=True)
        worse = {**ACCEPT, "SCORE_SCALES": scales, "SCORE_SHIFTS": shifts}
        assert many.trials.replay(many.policy(worse)).metrics["AP"] < plain
        monkeypatch.setattr("cascade_det.calibration.calibrator.fit_score_maps", lambda *_: wrong)
        assert many.with_scores(ACCEPT) == ACCEPT

    def test_they_stay_where_all_leave_after_one_stage(self, many):
        for setting in ({}, {"REDUNDANCY_IOU": 0.8}):
            assert many.with_scores(setting) is setting
