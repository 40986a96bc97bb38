"""The type and the layout of mixed precision, by device."""

import pytest
import torch

from cascade_det.engine import devices
from cascade_det.engine.devices import resolve_amp_dtype
from cascade_det.engine.precision import channels_last_in_half


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "dtype"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, None),
    ],
)
def test_auto_is_bfloat16_where_the_device_has_it(monkeypatch, device, has_bfloat16, dtype):
    monkeypatch.setattr(devices, "has_bfloat16", lambda _: has_bfloat16)
    assert resolve_amp_dtype("auto", torch.device(device)) is dtype
    assert resolve_amp_dtype("float16", torch.device(device)) is torch.float16
    assert resolve_amp_dtype(None, torch.device(device)) is None


def test_images_of_a_cpu_keep_their_layout():
    images = torch.zeros(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert channels_last_in_half(images) is images
