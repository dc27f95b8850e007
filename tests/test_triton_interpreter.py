"""The tool that lets kernel tests run without a GPU does its sums right.

Known trap: in the interpreter `tl.dot` of bfloat16 operands is wrong without any error, so kernel
tests use float32 and float16 there; bfloat16 is tested on a GPU only.
"""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

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


@triton.jit
def _doubled(x):
    return 2 * x


@triton.jit
def _sum_of_doubles(a, out, SIZE: tl.constexpr, WRONG: tl.constexpr):
    tl.static_assert(not WRONG)
    x = tl.load(a + tl.program_id(0) * SIZE + tl.arange(0, SIZE))
    tl.store(out + tl.program_id(0), tl.sum(_doubled(_doubled(x)), 0))


def test_a_launch_leaves_the_language_as_it_was() -> None:
    a = torch.randn(3, 16)
    before = {name: getattr(tl, name) for name in ("load", "arange", "range", "static_assert")}
    for wrong in (False, True, False):
        out = torch.empty(3)
        if wrong:
            with pytest.raises(InterpreterError):
                _sum_of_doubles[(3,)](a, out, SIZE=16, WRONG=True)
        else:
            _sum_of_doubles[(3,)](a, out, SIZE=16, WRONG=False)
            torch.testing.assert_close(out, 4 * a.sum(1))
        assert {name: getattr(tl, name) for name in before} == before
