"""The tool that lets kernel tests run without a GPU does its sums right.

Known trap: in the interpreter `tl.dot` of bfloat16 operands is wrong without any error, so kernel
tests use float32 and float16 there; bfloat16 is tested on a GPU only.
"""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreter


@triton.jit
def _matmul(a, b, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + rows, tl.dot(tl.load(a + rows), tl.load(b + rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_dot_equals_torch(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    _matmul[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-5, rtol=1e-5)
