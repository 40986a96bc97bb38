"""Budgets of regions and of time, with a clock that the test advances."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from region_views import make_view, policy, reasons_of, view_of
from small_cascades import assert_same_detections, make_cascade, make_scene, truncate

from cascade_det.core import cascade as cascade_module
from cascade_det.core.exits.budget import RegionBudget, TimeBudget

CPU = torch.device("cpu")
NUM_REGIONS = 41


class Clock:
    """A clock that the test advances."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


class TestRegionBudget:
    def test_the_best_of_every_image_enter(self):
        probs = [[p, 1 - p] for p in (0.2, 0.9, 0.5, 0.4, 0.3, 0.8)]
        view = view_of(probs, image_index=[0, 0, 0, 0, 1, 1])
        rule = RegionBudget((0, 2, 0))
        assert [rule.is_active(stage) for stage in (-1, 0, 1)] == [False, True, False]
        assert rule.exit_mask(view).tolist() == [True, False, False, True, False, False]

    def test_of_equal_scores_the_first_enter(self):
        view = view_of([[0.5, 0.5]] * 5, image_index=[0, 0, 0, 1, 1])
        assert RegionBudget((0, 2)).exit_mask(view).tolist() == [False, False, True, False, False]

    def test_before_stage_0_by_objectness(self):
        view = make_view(stage=-1, counts=(3, 1))
        view.objectness = torch.tensor([0.0, 2.0, 1.0, -5.0])
        assert RegionBudget((1, 0)).exit_mask(view).tolist() == [True, False, True, False]

    @pytest.mark.parametrize("seed", range(5))
    def test_never_more_than_the_budget_and_never_a_better_one_left(self, seed):
        view = make_view(counts=(20, 3, 0, 8), seed=seed)
        leaves = RegionBudget((0, 5)).exit_mask(view)
        for image, count in enumerate((20, 3, 0, 8)):
            own = view.image_index == image
            assert (own & ~leaves).sum() == min(count, 5)
            if count > 5:
                assert view.scores[own & ~leaves].min() >= view.scores[own & leaves].max()


class Call:
    """One call of a time budget, with stages of given seconds."""

    def __init__(self, budget, clock, *, num_images=1, started=None):
        self.budget, self.clock = budget, clock
        self.deadline = budget.start(num_images, started)
        assert not self.exit_mask(make_view(stage=-1, counts=(10,)))
        self.stage = 0

    def exit_mask(self, view):
        assert self.deadline.is_active(view.stage)
        leaves = self.deadline.exit_mask(view)
        assert leaves.dtype == torch.bool
        assert leaves.shape == (len(view),)
        assert leaves.all() == leaves.any()
        return bool(leaves.all())

    def ends_after(self, seconds, *, live=10):
        """Whether all exit after a stage of so many seconds with so many live regions."""
        self.clock.tick(seconds)
        view = make_view(stage=self.stage, counts=(live,))
        self.stage += 1
        return self.exit_mask(view)

    def report(self, seconds):
        self.deadline.mark_stages_done(CPU)
        self.clock.tick(seconds)
        return self.deadline.finish(CPU)


class TestTimeBudget:
    def setup_method(self):
        self.clock = Clock()

    def call(self, milliseconds, **arguments):
        return Call(TimeBudget(milliseconds, clock=self.clock), self.clock, **arguments)

    def test_goes_on_while_another_stage_fits(self):
        call = self.call(300)
        assert not call.ends_after(0.125)  # at 250 the next stage would end
        assert call.ends_after(0.125)  # at 375
        assert call.report(0.0) == 0.0

    def test_what_just_fits_fits(self):
        assert not self.call(250).ends_after(0.125)
        assert self.call(249).ends_after(0.125)

    def test_a_stage_takes_as_long_as_its_regions(self):
        # 10 regions took 0.2 seconds; with 301 ms, 5 fit and 6 do not.
        assert not self.call(301).ends_after(0.2, live=5)
        assert self.call(301).ends_after(0.2, live=6)
        # After that, 5 regions took 0.05 seconds.
        call = self.call(301)
        assert not call.ends_after(0.2, live=5)
        assert not call.ends_after(0.05, live=5)
        call = self.call(299)
        assert not call.ends_after(0.19, live=5)
        assert call.ends_after(0.06, live=5)

    def test_time_from_before_the_cascade_counts(self):
        self.clock.tick(0.1)
        assert self.call(300, started=self.clock.now - 0.1).ends_after(0.11)
        assert not self.call(300, started=self.clock.now).ends_after(0.11)

    def test_for_each_image_or_for_the_batch(self):
        for per_image, ends in ((True, False), (False, True)):
            budget = TimeBudget(100, per_image=per_image, clock=self.clock)
            assert Call(budget, self.clock, num_images=4).ends_after(0.15) == ends
        budget = TimeBudget(100, per_image=True, clock=self.clock)
        assert Call(budget, self.clock, num_images=4).ends_after(0.21)

    def test_keeps_time_to_report(self):
        budget = TimeBudget(1000, clock=self.clock)
        call = Call(budget, self.clock)
        assert not call.ends_after(0.375)
        assert call.report(0.5) == 0.0
        # As long as the last one took: 0.375 + 0.375 + 0.5 is too much.
        call = Call(budget, self.clock)
        assert call.ends_after(0.375)
        assert call.report(0.25) == 0.0
        call = Call(budget, self.clock)
        assert not call.ends_after(0.375)

    def test_the_overrun_is_measured(self):
        call = self.call(100)
        assert call.ends_after(0.25)
        assert call.report(0.05) == pytest.approx(200)
        assert Call(call.budget, self.clock).report(0.05) == 0.0

    def test_without_a_deadline_no_region_exits(self):
        exits = policy(time_budget_ms=1.0, clock=self.clock)
        exits.time_budget.start(1, None)
        self.clock.tick(1.0)
        assert exits.decide(make_view()).kept is None

    def test_the_time_budget_applies_last(self):
        exits = policy(prune_thresholds=(0.3, 0.3), time_budget_ms=1.0, clock=self.clock)
        deadline = exits.time_budget.start(1, None)
        self.clock.tick(1.0)
        view = view_of([[0.5, 0.5], [0.2, 0.8], [0.4, 0.6]])
        assert reasons_of(exits.decide(view, deadline), 3) == ["budget", "background", "budget"]

    def test_calls_in_other_threads_do_not_change_a_deadline(self):
        budget = TimeBudget(10, clock=self.clock)
        call = Call(budget, self.clock)

        def another():
            assert Call(budget, self.clock).report(0.0) == 0.0

        with ThreadPoolExecutor(1) as pool:
            pool.submit(another).result()
        assert call.ends_after(99)
        assert call.report(0.0) == pytest.approx(98_990)


class TestInACascade:
    """Each region costs a millisecond in each stage, each call 20 to report."""

    @pytest.fixture(autouse=True)
    def timed(self, monkeypatch):
        self.clock = Clock()
        self.cascade, self.scene = make_cascade(), make_scene()
        self.rows = []

        def on_pool(_, arguments, output):
            self.rows.append(len(output))
            self.clock.tick(len(output) / 1000)

        self.cascade.pooler.register_forward_hook(on_pool)
        select = cascade_module.select_detections

        def select_slowly(*arguments, **options):
            self.clock.tick(0.02)
            return select(*arguments, **options)

        monkeypatch.setattr(cascade_module, "select_detections", select_slowly)

    def detect(self, milliseconds, *, per_image=False, started=None, scene=None, **others):
        if milliseconds is not None:
            self.cascade.exits = policy(
                time_budget_ms=milliseconds,
                time_budget_per_image=per_image,
                clock=self.clock,
                **others,
            )
            # What it takes to report is known after a call.
            self.run(make_scene(num_proposals=(1, 1)), None)
        self.rows.clear()
        return self.run(scene or self.scene, started)

    def run(self, scene, started):
        return self.cascade.detect(
            scene.features, scene.proposals, scene.image_sizes, started=started
        )

    @pytest.mark.parametrize(
        ("milliseconds", "stages", "overrun"),
        [
            (3 * NUM_REGIONS + 21, 3, 0),
            (3 * NUM_REGIONS + 19, 2, 0),
            (2 * NUM_REGIONS + 21, 2, 0),
            (2 * NUM_REGIONS + 19, 1, 0),
            (NUM_REGIONS + 21, 1, 0),
            (1, 1, NUM_REGIONS + 19),  # stage 0 always runs
        ],
    )
    def test_as_many_stages_as_fit(self, milliseconds, stages, overrun):
        detections, stats = self.detect(milliseconds)
        assert self.rows == [NUM_REGIONS] * stages
        assert stats.entered == [NUM_REGIONS] * stages + [0] * (3 - stages)
        assert stats.left[stages - 1] == {"completed" if stages == 3 else "budget": NUM_REGIONS}
        assert stats.overrun_ms == pytest.approx(overrun, abs=1e-6)
        wanted, _ = truncate(self.cascade, stages).detect(
            self.scene.features, self.scene.proposals, self.scene.image_sizes
        )
        assert_same_detections(detections, wanted, exact=True)

    def test_for_each_image(self):
        # Two images: 70 each are 140.
        assert self.detect(70, per_image=False)[1].entered == [NUM_REGIONS, 0, 0]
        assert self.detect(70, per_image=True)[1].entered == [NUM_REGIONS, NUM_REGIONS, 0]

    def test_work_before_the_cascade_counts(self):
        _, stats = self.detect(3 * NUM_REGIONS + 21)
        assert stats.entered == [NUM_REGIONS] * 3
        assert self.cascade.now() == self.clock.now
        _, stats = self.run(self.scene, self.clock.now - 0.01)
        assert stats.entered == [NUM_REGIONS, NUM_REGIONS, 0]
        assert stats.overrun_ms == 0.0

    def test_early_exits_leave_time_for_other_regions(self):
        _, stats = self.detect(100, prune_thresholds=(0.5, 0.0))
        going_on = stats.entered[1]
        assert 0 < going_on < (100 - 20 - NUM_REGIONS) / 2
        assert stats.entered == [NUM_REGIONS, going_on, going_on]
        assert "budget" not in stats.left[0]

    def test_nothing_to_do(self):
        empty = make_scene(num_proposals=(0, 0))
        detections, stats = self.detect(10, scene=empty)
        assert [len(d) for d in detections] == [0, 0]
        assert stats.entered == [0, 0, 0]
        assert stats.overrun_ms == pytest.approx(10)  # of 20 to report

    def test_without_a_budget_no_clock_is_read(self):
        assert self.cascade.now() is None
        _, stats = self.detect(None)
        assert stats.overrun_ms == 0.0
        self.cascade.exits = policy()
        assert self.cascade.now() is None
