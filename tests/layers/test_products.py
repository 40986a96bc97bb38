"""Products by either library against PyTorch's own, in float64 too, which oneDNN lacks."""

import pytest
import torch
from torch.nn import functional as F

from cascade_det.layers import products
from cascade_det.layers.products import batched_product, linear_relu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_is_linear_and_relu(rows, dtype):
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 5), (3, 5), (3,)))
    out = torch.full((rows, 3), torch.nan, dtype=dtype)
    linear_relu(x, weight, bias, out)
    torch.testing.assert_close(out, F.linear(x, weight, bias).relu())


def test_further_rows_are_ignored():
    x, weight, bias = torch.randn(6, 5), torch.randn(3, 5), torch.randn(3)
    for dtype in (torch.float32, torch.float64):
        inputs = [tensor.to(dtype) for tensor in (x, weight, bias)]
        out = torch.empty(4, 3, dtype=dtype)
        linear_relu(*inputs, out)
        torch.testing.assert_close(out, F.linear(*inputs)[:4].relu())


@pytest.mark.parametrize("by_onednn", [True, False])
def test_batched_products(by_onednn, monkeypatch):
    if by_onednn and not products._has_onednn():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "mkl_lacks_avx512", lambda: by_onednn)
    a, b, out = torch.randn(4, 6, 5), torch.randn(4, 5, 3), torch.full((4, 6, 3), torch.nan)
    batched_product(a, b, out)
    torch.testing.assert_close(out, torch.einsum("bmc,bck->bmk", a, b))
