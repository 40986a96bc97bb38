"""The search on objectives whose best settings are known, and its parameters."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_records import make_recorded_scene

from cascade_det.calibration.search import TRADE_OFFS, Search, loss_of
from cascade_det.calibration.search_space import exit_parameters
from cascade_det.calibration.trials import TrialSummary
from cascade_det.config import exit_arguments, get_cfg, with_exits
from cascade_det.config.cascade_keys import EXIT_DEFAULTS
from cascade_det.core.exits import ExitPolicy
from cascade_det.core.exits.learned import REGION_PARTS

SOME = settings(max_examples=10)


def outcome(ap, work, *, lost=(0.0,), lost_well_placed=(0.0,)):
    entered = np.zeros((3, len(lost)), np.int64)
    none = np.zeros(entered.shape[1], np.int64)
    lost = np.array(lost), np.array(lost_well_placed)
    return TrialSummary({"AP": ap}, entered, *lost, work, none, np.zeros((4, len(none)), np.int64))


class Separable:
    """Each parameter loses AP and saves work independently.

    Args:
        table: for each parameter and level, what it loses and what it saves; nothing at level 0.
    """

    def __init__(self, table):
        self.table = table
        self.runs = []

    def __call__(self, setting):
        self.runs.append(tuple(setting.get(f"K{k}", 0) for k in range(len(self.table))))
        return self.of(self.runs[-1])

    def of(self, levels):
        rows = [row[level] for row, level in zip(self.table, levels, strict=True)]
        return outcome(50 - sum(lost for lost, _ in rows), 1 - sum(saved for _, saved in rows))

    def search(self):
        parameters = {
            f"K{k}": [{}, *({f"K{k}": level} for level in range(1, len(row)))]
            for k, row in enumerate(self.table)
        }
        return Search(parameters, self)

    def everything(self):
        return list(itertools.product(*(range(len(row)) for row in self.table)))


def make_table(seed, sizes=(4, 3, 5)):
    generator = np.random.default_rng(seed)
    tables = [generator.uniform(0, [2.0, 0.3], (size, 2)).tolist() for size in sizes]
    return [[(0.0, 0.0), *table[1:]] for table in tables]


class TestSearch:
    @given(seed=st.integers(0, 10_000))
    @SOME
    def test_it_finds_the_best_setting_for_each_trade_off(self, seed):
        objective = Separable(make_table(seed))
        search = objective.search()
        search.search(1000)
        full = objective.of((0, 0, 0))

        def regret(levels, trade_off):
            found = objective.of(levels)
            return loss_of(found, full) + trade_off * found.work

        for trade_off in TRADE_OFFS:
            best = min(regret(levels, trade_off) for levels in objective.everything())
            assert min(regret(levels, trade_off) for levels in search.tried) == pytest.approx(best)

    @given(seed=st.integers(0, 100), most=st.integers(1, 40))
    @SOME
    def test_it_never_tries_more_than_it_may_nor_anything_twice(self, seed, most):
        objective = Separable(make_table(seed))
        search, told = objective.search(), []
        search.on_trial = lambda: told.append(len(search.tried))
        search.search(most)
        assert objective.runs[0] == (0, 0, 0)
        assert len(objective.runs) == len(set(objective.runs)) == len(search.tried) <= most
        assert told == list(range(1, len(search.tried) + 1))
        assert len(objective.runs) == most or len(objective.runs) > 9  # all levels of one parameter

    def test_the_ap_of_masks_may_be_the_one_that_counts(self):
        """Of two parameters that save the same, it turns the one that loses less of the metric."""
        aps = {(0, 0): (50.0, 40.0), (1, 0): (30.0, 40.0), (0, 1): (50.0, 20.0)}

        def evaluate(setting):
            levels = setting.get("A", 0), setting.get("B", 0)
            ap, segm = aps.get(levels, (0.0, 0.0))
            trial = outcome(ap, 1 - 0.5 * sum(levels))
            return dataclasses.replace(trial, metrics={"AP": ap, "segm/AP": segm})

        for metric, best in (("AP", (0, 1)), ("segm/AP", (1, 0))):
            parameters = {name: [{}, {name: 1}] for name in "AB"}
            search = Search(parameters, evaluate, metric=metric)
            search.search(4)
            full = search.trial(search.full)
            losses = {
                levels: loss_of(trial, full, metric) for levels, trial in search.tried.items()
            }
            assert min(losses, key=lambda levels: (losses[levels], -sum(levels))) == best

    def test_nothing_is_turned_where_it_only_hurts(self):
        objective = Separable([[(0, 0), (5, 0.001)], [(0, 0), (9, 0.0), (20, 0.01)]])
        search = objective.search()
        search.search(100)
        # One parameter at a time: no trial was taken as the start of others.
        assert all(sum(level > 0 for level in levels) <= 1 for levels in search.tried)

    def test_a_trial_is_remembered(self):
        objective = Separable(make_table(1))
        search = objective.search()
        assert search.trial([1, 0, 2]) is search.trial((1, 0, 2))
        assert objective.runs == [(1, 0, 2)]

    def test_settings_of_several_parameters(self):
        parameters = {
            "a": [{}, {"REDUNDANCY_IOU": 0.8}],
            "b": [{}, {"PRUNE_THRESHOLDS": (0.1, 0.0)}],
            "c": [{}, {"PRUNE_THRESHOLDS": (0.0, 0.3)}],
            "d": [{}, {"REGION_BUDGET": (0, 40, 0)}],
        }
        search = Search(parameters, lambda _: outcome(1, 1))
        assert search.setting([0, 0, 0, 0]) == {}
        assert search.setting([0, 1, 0, 0]) == {"PRUNE_THRESHOLDS": (0.1, 0.0)}
        assert search.setting([1, 1, 1, 1]) == {
            "REDUNDANCY_IOU": 0.8,
            "PRUNE_THRESHOLDS": (0.1, 0.3),
            "REGION_BUDGET": (0, 40, 0),
        }


def test_the_loss_by_hand():
    full = outcome(50.0, 1.0, lost=(0.0, 0.0), lost_well_placed=(0.0, 0.0))
    # A half of the objects of one of two images, and a quarter of the well placed ones.
    worse = outcome(49.5, 0.5, lost=(0.5, 0.0), lost_well_placed=(0.25, 0.0))
    assert loss_of(worse, full) == pytest.approx(0.5 + 100 * (0.25 + 0.125) / 2)
    # What is won in AP does not pay for that.
    luckier = outcome(53.0, 0.5, lost=(0.5, 0.0), lost_well_placed=(0.25, 0.0))
    assert loss_of(luckier, full) == pytest.approx(100 * (0.25 + 0.125) / 2)
    assert loss_of(full, full) == 0


OBJECTNESS = np.random.default_rng(0).beta(0.3, 2.0, 4000).astype(np.float32)


def make_parameters(*, objectness=OBJECTNESS, num_stages=3, proposals=1000, learned=()):
    return exit_parameters(
        num_stages=num_stages,
        objectness=objectness,
        proposals_per_image=proposals,
        learned=learned,
    )


class TestParameters:
    @pytest.mark.parametrize("num_stages", [2, 3, 4])
    @pytest.mark.parametrize("learned", [(), REGION_PARTS])
    def test_every_setting_makes_a_policy_and_off_comes_first(self, num_stages, learned):
        cfg = get_cfg()
        cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS = (0.5, 0.6, 0.7, 0.75)[:num_stages]
        cfg.MODEL.CASCADE.EXIT.LEARNED = learned
        for name, values in make_parameters(num_stages=num_stages, learned=learned).items():
            assert values[0] == {}
            assert len(values) > 3, name
            for setting in values[1:]:
                assert setting
                assert setting.keys() <= EXIT_DEFAULTS.keys()
                arguments = exit_arguments(with_exits(cfg, setting))
                if not learned:
                    policy = ExitPolicy(**{**arguments, "learned": None})
                    assert policy.rules, (name, setting)

    def test_learned_parts_have_parameters_where_they_are(self):
        plain, pruner = make_parameters(), make_parameters(learned=("pruner",))
        assert pruner.keys() - plain.keys() == {f"pruner at gate {gate}" for gate in range(3)}
        (accept, *_) = plain["acceptance"][1:]
        assert (accept["CONFIDENCE"], accept["LOCALISATION"]) == ("max_prob", "refinement")
        (accept, *_) = make_parameters(learned=("gate", "iou_head"))["acceptance"][1:]
        assert (accept["CONFIDENCE"], accept["LOCALISATION"]) == ("learned", "predicted_iou")

    def test_from_safe_to_risky(self):
        record = make_recorded_scene(num_proposals=(300, 250), num_classes=3).record
        objectness = 1 / (1 + np.exp(-record.objectness.numpy()))
        parameters = make_parameters(objectness=objectness, proposals=300)
        cfg = get_cfg()
        for name, values in parameters.items():
            if name in ("redundancy", "acceptance"):
                continue  # a region that goes no longer keeps others from going
            computed = []
            for setting in values:
                arguments = exit_arguments(with_exits(cfg, setting))
                replay = record.replay(ExitPolicy(**{**arguments, "learned": None}))
                computed.append(int(replay.entered.sum()))
            assert computed == sorted(computed, reverse=True), name
            assert computed[0] == 3 * 550

    def test_thresholds_of_objectness_drop_some_and_not_all(self):
        values = [s["PROPOSAL_THRESHOLD"] for s in make_parameters()["objectness"][1:]]
        dropped = [np.mean(value > OBJECTNESS) for value in values]
        np.testing.assert_allclose(dropped, (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9), atol=0.01)
        assert len(set(values)) == 7
        for extreme in (OBJECTNESS * 1e-8, 1 - OBJECTNESS * 1e-3):
            parameter = make_parameters(objectness=extreme)["objectness"]
            values = [setting["PROPOSAL_THRESHOLD"] for setting in parameter[1:]]
            assert values
            assert all(0 < value < 1 and 0 < (extreme < value).mean() < 1 for value in values)

    @pytest.mark.parametrize("same", [0.0, 0.5, 1.0])
    def test_alike_proposals_have_no_threshold(self, same):
        alike = np.full(50, same, np.float32)
        assert make_parameters(objectness=alike)["objectness"] == [{}]

    def test_without_proposals(self):
        parameters = make_parameters(objectness=np.zeros(0, np.float32), proposals=0)
        assert (
            parameters["objectness"]
            == parameters["proposals"]
            == parameters["regions in stage 1"]
            == [{}]
        )

    def test_numbers_of_regions_are_below_those_of_the_proposals(self):
        parameters = make_parameters(proposals=120)
        assert [s["REGION_BUDGET"] for s in parameters["proposals"][1:]] == [
            (100, 0, 0),
            (50, 0, 0),
        ]
        later = [s["REGION_BUDGET"][2] for s in parameters["regions in stage 2"][1:]]
        assert later == [100, 70, 50, 30]
