"""Optimised segmenters: the same logits up to rounding, and what is refused."""

import copy

import pytest
import torch
from small_segmenter import SEGMENTER, TRUNKS, labelled, make_segmenter
from torch import nn

from cascade_det.backbones.decoder_blocks import UpConv
from cascade_det.backbones.fast_upconv import FastUpConv
from cascade_det.config import check_config, check_run, get_cfg
from cascade_det.errors import ConfigError
from cascade_det.layers.winograd import WinogradConv2d, min_channels
from cascade_det.standalone import optimize_segmenter


@pytest.mark.parametrize("name", TRUNKS)
def test_logits_are_the_same(name):
    plain = make_segmenter(*TRUNKS[name])
    fast = optimize_segmenter(copy.deepcopy(plain))
    # Sides that are no multiples of a stride too: there, upsampling does not double.
    for batch in ([labelled(96, 128), labelled(80, 100)], [labelled(75, 93)]):
        expected = plain.segment(batch).sem_seg
        spread = max(float(x.abs().max()) for x in expected)
        torch.testing.assert_close(
            fast.segment(batch).sem_seg, expected, rtol=0, atol=1e-4 * spread
        )
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fast.modules())
    up = [m for m in fast.modules() if isinstance(m, UpConv)]
    by_winograd = [m for m in up if isinstance(m.up[0], WinogradConv2d)]
    assert up
    assert all(isinstance(m, FastUpConv) for m in up if m not in by_winograd)
    images, _ = fast.preprocess([labelled(40, 50)])
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_winograds_convolutions_are_the_wide_ones():
    plain = make_segmenter(*TRUNKS["resnet"])
    wanted = [
        m
        for m in plain.modules()
        if isinstance(m, nn.Conv2d)
        and (m.kernel_size, m.stride) == ((3, 3), (1, 1))
        and min(m.in_channels, m.out_channels) >= min_channels()
        and max(m.in_channels, m.out_channels) <= 256
    ]
    fast = optimize_segmenter(plain)
    assert sum(isinstance(m, WinogradConv2d) for m in fast.modules()) == len(wanted) > 0
    assert any(s.startswith(f"{len(wanted)} convolutions") for s in fast.optimizations)


def test_training_and_a_second_time_are_refused():
    fast = optimize_segmenter(make_segmenter())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fast.losses([labelled(32, 32)])
    with pytest.raises(ValueError, match="optimised already"):
        optimize_segmenter(fast)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.CASCADE.FAST.DTYPE", "bfloat16"), "Give 'auto' or 'float32'"),
        (("MODEL.CASCADE.FAST.COMPILE", True), "Set it to False"),
        (("MODEL.CASCADE.FAST.IMAGES", 8), "Set it to 0"),
        (("MODEL.DUAL_SCALE.MODE", "parallel"), "two scales .* do not have that"),
        (("MODEL.CASCADE.FAST.FLOAT32_PARTS", ["stem"]), r"Set it to \(\)"),
    ],
)
def test_settings_of_detectors_are_refused(options, message):
    cfg = get_cfg()
    cfg.merge_from_list([*SEGMENTER, "MODEL.CASCADE.FAST.ENABLED", True])
    check_config(cfg)
    cfg.merge_from_list(list(options))
    with pytest.raises(ConfigError, match=message):
        check_config(cfg)


def test_patches_that_leave_are_the_same():
    """Also where the decoder's convolutions, whose weights they copy, are Winograd's."""
    exits = {"kind": "patch", "thresholds": [0.4, 0.4, 0.4], "channel_gates": "dense"}
    plain = make_segmenter()
    fast = optimize_segmenter(copy.deepcopy(plain))
    for segmenter in (plain, fast):
        segmenter.sem_seg_head.set_exits(exits)
    batch = [labelled(96, 128)]
    expected, found = plain.segment(batch), fast.segment(batch)
    assert sum(1 for left in expected.stats.left if sum(left.values()) > 0) > 1
    assert found.stats.left == expected.stats.left
    spread = float(expected.sem_seg[0].abs().max())
    torch.testing.assert_close(found.sem_seg, expected.sem_seg, rtol=0, atol=1e-4 * spread)


def test_in_detectron2_segmenters_are_not_optimised():
    cfg = get_cfg()
    cfg.merge_from_list([*SEGMENTER, "DATASETS.TRAIN", ("squares",), "DATASETS.TEST", ()])
    check_run(cfg)
    cfg.MODEL.CASCADE.FAST.ENABLED = True
    with pytest.raises(ConfigError, match="segmenters in Detectron2 do not have that"):
        check_run(cfg)
