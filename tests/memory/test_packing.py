"""Tokens side by side and in slots: both ways, gradients, and as operators."""

import pytest
import torch
from torch import Tensor

from decmem.memory import TokenLayout
from decmem.memory.packing import Packing, kept, spread


def ragged() -> Packing:
    packing = TokenLayout((3, 5), (2, 3)).packing
    assert packing is not None
    return packing


@pytest.mark.parametrize("dim", [1, -2])
def test_there_and_back(dim: int) -> None:
    packing = ragged()
    x = torch.randn(2, 15, 3)
    slots = spread(x, packing, dim)
    assert slots.shape == (2, 96, 3)
    assert torch.equal(slots, x[:, packing.spread])
    assert torch.equal(kept(slots, packing, dim), x)
    assert spread(x, None, dim) is x
    assert kept(x, None, dim) is x


def test_gradients_are_those_of_tokens() -> None:
    packing = ragged()

    def through(x: Tensor) -> Tensor:
        # Padding may differ, as long as nothing depends on it.
        return kept(spread(x, packing, 1).sin(), packing, 1)

    x = torch.randn(2, 15, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (x,))
    assert torch.autograd.gradcheck(lambda y: kept(y, packing, 1), (spread(x, packing, 1),))


def test_operators_pass_opcheck() -> None:
    packing = ragged()
    x = torch.randn(2, 15, 3, requires_grad=True)
    operators = torch.ops.decmem
    # Gradients of padding are left out on purpose.
    some = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.spread_tokens, (x, *packing, 1), test_utils=some)
    torch.library.opcheck(operators.keep_tokens, (spread(x, packing, 1).detach(), *packing, 1))
    torch.library.opcheck(operators.keep_tokens_backward, (x.detach(), *packing, 1))
