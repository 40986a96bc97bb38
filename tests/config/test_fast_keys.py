"""``MODEL.CASCADE.FAST``: what it becomes, and what is told."""

import pytest

from cascade_det import config
from cascade_det.errors import ConfigError

NODE = "MODEL.CASCADE.FAST"


def merged(cfg, *options):
    config.merge_config(cfg, None, ["MODEL.DEVICE", "cpu", *options])
    return cfg


def test_off_by_default(cfg):
    assert config.fast_arguments(cfg) is None


def test_every_key_arrives(cfg):
    merged(cfg, f"{NODE}.ENABLED", "True", f"{NODE}.DTYPE", "bfloat16")
    merged(cfg, f"{NODE}.FLOAT32_PARTS", "['stem', 'fpn']", f"{NODE}.COMPILE", "True")
    config.check_config(cfg)
    expected = {"dtype": "bfloat16", "float32_parts": ("stem", "fpn"), "compile": True}
    assert config.fast_arguments(cfg) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("DTYPE", "int8"), "DTYPE is 'int8'. Supported: 'auto'"),
        (("FLOAT32_PARTS", "['neck']"), "Give a list out of 'stem', 'backbone'"),
        (("ENABLED", "True", "DTYPE", "float16"), "but MODEL.DEVICE is cpu"),
    ],
)
def test_what_is_wrong_is_told(cfg, options, message):
    keys = [f"{NODE}.{o}" if i % 2 == 0 else o for i, o in enumerate(options)]
    with pytest.raises(ConfigError) as caught:
        config.check_config(merged(cfg, *keys))
    assert message in str(caught.value)


def test_float16_is_for_gpus(cfg):
    merged(cfg, f"{NODE}.ENABLED", "True", f"{NODE}.DTYPE", "float16", "MODEL.DEVICE", "cuda")
    config.check_config(cfg)


def test_heads_that_are_not_ours_may_have_it(cfg):
    # The same YAML in Detectron2 and here.
    config.check_unread_cascade(merged(cfg, f"{NODE}.ENABLED", "True"))
