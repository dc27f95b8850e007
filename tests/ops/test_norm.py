"""The norm: the short cut of the CPU beside its plain form."""

import pytest
import torch
import torch.nn.functional as F

from decmem.ops.norm import rms_norm

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
