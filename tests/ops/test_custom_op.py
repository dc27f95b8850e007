"""The Triton kernels as PyTorch operators: schema, fake kernels, autograd, same bits every time."""

import pytest
import torch

from decmem.ops.block_sparse import block_sparse_attention
from decmem.ops.window import WindowTable
from decmem.ops.window_launches import Launch, Launches

pytestmark = pytest.mark.interpreter


def arguments(requires_grad: bool) -> tuple:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, n, 16, 16, generator=generator, requires_grad=requires_grad)
        for n in (2, 3, 3)
    )
    lists = torch.tensor([[[[0, 2], [1, -1]]]], dtype=torch.int32)
    return q, k, v, lists, torch.ones(1, 16, dtype=torch.bool), 0.25, "triton"


def test_operators_pass_opcheck() -> None:
    from decmem.ops import sparse_kernels  # registers them

    assert sparse_kernels
    forward = torch.ops.decmem.block_sparse_forward
    backward = torch.ops.decmem.block_sparse_backward
    torch.library.opcheck(forward, arguments(True))
    inputs = arguments(False)
    out, lse = forward(*inputs)
    # The gradient of a gradient is not offered.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (*inputs, out, lse, torch.ones_like(out)), test_utils=tests)


def test_operators_without_gradients_pass_opcheck() -> None:
    from decmem.ops import sparse_kernels  # registers them

    assert sparse_kernels
    q, *rest = arguments(False)
    decoupled = torch.ops.decmem.decoupled_forward
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(decoupled, (q, q[..., :1].contiguous(), q, *rest), test_utils=tests)
    # The check itself has no arithmetic for 8 bits: scales of other numbers do as well.
    scale = torch.ones(1, 1, 3, 16, 1, dtype=torch.bfloat16)
    stored = (None, None, q, *rest, scale, scale)
    torch.library.opcheck(decoupled, stored, test_utils=tests)


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
def test_window_operators_pass_opcheck(padded: bool) -> None:
    from decmem.ops.window_kernels import valid_words

    windows = WindowTable(torch.tensor([[1, 0, 1], [0, 1, 1]]).bool())
    launches = Launches(*[Launch(16, 16, 1, 1)] * 3)
    tiles = windows.tiles(launches, 6, torch.device("cpu"))
    words = valid_words(torch.arange(6) < 4) if padded else None

    def inputs(requires_grad: bool) -> tuple:
        q, k, v = (torch.randn(1, 2, n, 6, 16, requires_grad=requires_grad) for n in (2, 3, 3))
        return q, k, v, tiles, words, launches.pack()

    scale = 0.2

    forward, backward = torch.ops.decmem.window_forward, torch.ops.decmem.window_backward
    torch.library.opcheck(forward, (*inputs(True), scale, None, None))
    arguments = inputs(False)
    out, lse = forward(*arguments, scale, None, None)
    tests = ("test_schema", "test_faketensor")
    given = (*arguments, out, lse, torch.ones_like(out), scale)
    torch.library.opcheck(backward, given, test_utils=tests)


def test_words_hold_the_validity_of_what_follows() -> None:
    from decmem.ops.window_kernels import valid_words

    valid = torch.arange(6) % 4 < 3
    for first, word in enumerate(valid_words(valid).tolist()):
        bits = [bool(word >> i & 1) for i in range(64)]
        assert bits == [bool(valid[(first + i) % 6]) for i in range(64)]


def test_gradients_have_the_same_bits_every_time() -> None:
    q, k, v, lists, valid, *_ = arguments(True)

    def gradients() -> tuple:
        out = block_sparse_attention(q, k, v, lists, valid, backend="triton")
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)
