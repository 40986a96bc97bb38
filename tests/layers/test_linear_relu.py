"""A layer with ReLU against PyTorch's own, in float64 too, which oneDNN lacks."""

import pytest
import torch
from torch.nn import functional as F

from cascade_det.layers.linear_relu import linear_relu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_is_linear_and_relu(rows, dtype):
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 5), (3, 5), (3,)))
    out = torch.full((rows, 3), torch.nan, dtype=dtype)
    linear_relu(x, weight, bias, out)
    torch.testing.assert_close(out, F.linear(x, weight, bias).relu())
