"""Exit policies and score ensembles on their own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.core import EXIT_REASONS, ConfidenceExit
from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits import STAY

NEVER = 1.1


def decide(policy, stage, probs):
    reasons = policy.decide(stage, probs).tolist()
    return ["stay" if reason == STAY else EXIT_REASONS[reason] for reason in reasons]


def test_reasons_by_hand():
    policy = ExitPolicy(num_stages=3, thresholds=(0.8, 0.5), prune_thresholds=(0.1, 0.3))
    probs = torch.tensor(
        [
            [0.80, 0.05, 0.15],  # reaches the threshold of stage 0
            [0.10, 0.70, 0.20],
            [0.09, 0.08, 0.83],
            [0.10, 0.00, 0.90],  # just not below the prune threshold of stage 0
            [0.25, 0.25, 0.50],  # background is the top class, and never what counts
        ]
    )
    assert decide(policy, 0, probs) == ["confident", "stay", "background", "stay", "stay"]
    wanted = ["confident", "confident", "background", "background", "background"]
    assert decide(policy, 1, probs) == wanted


def test_background_comes_before_confident():
    policy = ExitPolicy(num_stages=3, thresholds=(0.2,), prune_thresholds=(0.6,))
    assert decide(policy, 0, torch.tensor([[0.4, 0.6], [0.7, 0.3]])) == ["background", "confident"]


def test_neutral_thresholds_let_nobody_go():
    policy = ExitPolicy(num_stages=3, thresholds=(NEVER,), prune_thresholds=(0.0,))
    assert decide(policy, 0, torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == ["stay", "stay"]


def test_nobody_is_there():
    policy = ExitPolicy(num_stages=3, thresholds=(0.5,), prune_thresholds=(0.1,))
    assert policy.decide(0, torch.zeros(0, 4)).shape == (0,)


def test_thresholds_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 thresholds but 1 prune"):
        ExitPolicy(num_stages=3, thresholds=(0.5, 0.6), prune_thresholds=(0.1,))


pair = st.tuples(st.floats(0, 1.2), st.floats(0, 1.2)).map(sorted)


@given(pair=pair, seed=st.integers(0, 50))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_thresholds_are_monotone_for_each_region(pair, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(3 * torch.randn(30, 4, generator=generator), dim=1)
    low, high = (
        ExitPolicy(num_stages=3, thresholds=(value,), prune_thresholds=(0.0,)).decide(0, probs)
        == STAY
        for value in pair
    )
    assert bool((high | ~low).all())
    low, high = (
        ExitPolicy(num_stages=3, thresholds=(NEVER,), prune_thresholds=(value,)).decide(0, probs)
        == STAY
        for value in pair
    )
    assert bool((low | ~high).all())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # Odds of 3 : 1, then 1 : 9, then 1 : 1, for the first class.
        ("mean_probs", [3 / 4, (3 / 4 + 1 / 10) / 2, (3 / 4 + 1 / 10 + 1 / 2) / 3]),
        ("last_boxes", [3 / 4, (3 / 4 + 1 / 10) / 2, (3 / 4 + 1 / 10 + 1 / 2) / 3]),
        ("last", [3 / 4, 1 / 10, 1 / 2]),
        # Odds of logits are averaged geometrically.
        ("mean_logits", [3 / 4, 1 / (1 + 3 ** (1 / 2)), 1 / (1 + 3 ** (1 / 3))]),
    ],
)
def test_running_scores_by_hand(name, wanted):
    ensemble = ScoreEnsemble(name)
    total = None
    for stage, odds in enumerate((3.0, 1 / 9, 1.0)):
        total = ensemble.add(total, torch.tensor([[math.log(odds), 0.0]]))
        probs = ensemble.probs(total, stage + 1)
        torch.testing.assert_close(probs, torch.tensor([[wanted[stage], 1 - wanted[stage]]]))


def test_only_last_boxes_runs_heads_again():
    assert {name: ScoreEnsemble(name).reruns_heads for name in ("mean_probs", "last_boxes")} == {
        "mean_probs": False,
        "last_boxes": True,
    }


def test_unknown_ensemble_is_named():
    with pytest.raises(ValueError, match=r"'median'.*mean_probs, last, mean_logits, last_boxes"):
        ScoreEnsemble("median")
