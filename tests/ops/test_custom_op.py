"""The Triton kernels as PyTorch operators: schema, fake kernels, autograd, same bits every time."""

import pytest
import torch

from decmem.ops.block_sparse import block_sparse_attention

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


def test_gradients_have_the_same_bits_every_time() -> None:
    q, k, v, lists, valid, *_ = arguments(True)

    def gradients() -> tuple:
        out = block_sparse_attention(q, k, v, lists, valid, backend="triton")
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


def test_readers_are_the_lists_turned_round() -> None:
    from decmem.ops.sparse_backward_kernels import inverse_lists

    lists = torch.tensor([[0, 2, 3], [2, -1, -1], [-1, -1, -1], [0, 3, -1]], dtype=torch.int32)
    readers, offsets = inverse_lists(lists[None, None], 5)
    assert offsets[0, 0].tolist() == [0, 2, 2, 4, 6, 6]
    assert readers[0, 0, :6].tolist() == [0, 3, 0, 1, 0, 3]
