"""Norms and activation: the short cuts of the CPU beside their plain forms."""

import pytest
import torch
import torch.nn.functional as F

from decmem.model.linear import gelu, rms_norm

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [(4, 1, 1), (4, 1, 6)], ids=["per-head", "per-channel"])
def test_rms_norm(dtype: torch.dtype, gain: tuple[int, ...]) -> None:
    x, by = torch.randn(2, 4, 5, 6).to(dtype) * 3, torch.rand(gain)
    x[0, 0, 0] = 0
    plain, before = rms_norm(x, by), x.clone()
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, F.rms_norm(x.float(), (6,), eps=1e-6) * by)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, by), plain)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu(dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-30, 30, 999), torch.tensor([0.0, 1e4, -1e4]))).to(dtype)
    plain, before = gelu(x), x.clone()
    assert torch.equal(plain, F.gelu(x, approximate="tanh"))
    with torch.no_grad():
        torch.testing.assert_close(gelu(x), plain, atol=1e-6, rtol=1e-5)
    assert torch.equal(x, before)
