"""Modules in evaluation mode for a while, also where several calls need it at once."""

import torch
from torch import nn

from cascade_det.core.modes import evaluation_mode


def modes(model):
    return [module.training for module in model.modules()]


def make_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout()))
    model.train()[1][1].eval()
    return model


def test_who_begins_later_keeps_evaluation_mode_when_the_first_one_ends():
    model, image = make_model(), torch.rand(2, 3, 8, 8)
    before, mean = modes(model), model[1][0].running_mean.clone()
    first, second = evaluation_mode(model), evaluation_mode(model[1])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(modes(model[1]))
    model[1](model[0](image))
    assert torch.equal(model[1][0].running_mean, mean)
    second.__exit__(None, None, None)
    assert modes(model) == before


def test_what_is_in_training_within_a_block_is_so_again_after_an_inner_one():
    model = make_model()
    before = modes(model)
    with evaluation_mode(model):
        model[1].training = True
        with evaluation_mode(model):
            assert not any(modes(model))
        assert modes(model) == [False, False, True, False, False]
        model[1].training = False
    assert modes(model) == before
