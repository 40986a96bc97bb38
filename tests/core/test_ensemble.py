"""Score ensembles on their own."""

import math

import pytest
import torch

from cascade_det.core.ensemble import ScoreEnsemble


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
    state = None
    for stage, odds in enumerate((3.0, 1 / 9, 1.0)):
        state = ensemble.update(state, torch.tensor([[math.log(odds), 0.0]]))
        probs = ensemble.probs(state, stage + 1)
        torch.testing.assert_close(probs, torch.tensor([[wanted[stage], 1 - wanted[stage]]]))


def test_unknown_ensemble_is_named():
    with pytest.raises(ValueError, match=r"'median'.*mean_probs, last, mean_logits, last_boxes"):
        ScoreEnsemble("median")
