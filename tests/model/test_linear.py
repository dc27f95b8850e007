"""The activation: the short cut of the CPU beside their plain forms."""

import pytest
import torch
import torch.nn.functional as F

from decmem.model.linear import gelu

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu(dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-30, 30, 999), torch.tensor([0.0, 1e4, -1e4]))).to(dtype)
    plain, before = gelu(x), x.clone()
    assert torch.equal(plain, F.gelu(x, approximate="tanh"))
    with torch.no_grad():
        torch.testing.assert_close(gelu(x), plain, atol=1e-6, rtol=1e-5)
    assert torch.equal(x, before)
