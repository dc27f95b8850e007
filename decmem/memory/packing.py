"""Tokens side by side, as products and norms take them, and in slots, as attention does.

Where the blocks of a latent differ in size, slots are more than tokens: `paper` has 960 for 880.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Packing(NamedTuple):
    """From tokens to slots and back.

    Attributes:
        spread: the token of each slot; padding repeats one. kept: the slot of each token.
    """

    spread: Int[Tensor, "S"]
    kept: Int[Tensor, "tokens"]


def spread(x: Tensor, packing: Packing | None, dim: int) -> Tensor:
    """Tokens side by side along `dim` as they lie in slots. Gradients of padding, which nothing may
    depend on, are left out."""
    return x if packing is None else _spread(x, *packing, dim)


def kept(x: Tensor, packing: Packing | None, dim: int) -> Tensor:
    """Of slots along `dim` those that hold tokens."""
    return x if packing is None else _keep(x, *packing, dim)


# Operators, because gradients of either are the other: those that PyTorch finds by itself add up
# numbers one by one.
@torch.library.custom_op("decmem::spread_tokens", mutates_args=())
def _spread(x: Tensor, spread: Tensor, kept: Tensor, dim: int) -> Tensor:
    return x.index_select(dim, spread)


@_spread.register_fake
def _(x, spread, kept, dim):
    return _resized(x, dim, len(spread))


@torch.library.custom_op("decmem::keep_tokens", mutates_args=())
def _keep(x: Tensor, spread: Tensor, kept: Tensor, dim: int) -> Tensor:
    return x.index_select(dim, kept)


@_keep.register_fake
def _(x, spread, kept, dim):
    return _resized(x, dim, len(kept))


@torch.library.custom_op("decmem::keep_tokens_backward", mutates_args=())
def _keep_backward(grad: Tensor, spread: Tensor, kept: Tensor, dim: int) -> Tensor:
    return _resized(grad, dim, len(spread)).zero_().index_copy_(dim, kept, grad)


@_keep_backward.register_fake
def _(grad, spread, kept, dim):
    return _resized(grad, dim, len(spread))


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([size if i == dim % x.dim() else n for i, n in enumerate(x.shape)])


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, spread, kept, ctx.dim = inputs
    ctx.save_for_backward(spread, kept)


def _spread_autograd(ctx: Any, grad: Tensor) -> tuple:
    return _keep(grad, *ctx.saved_tensors, ctx.dim), None, None, None


def _keep_autograd(ctx: Any, grad: Tensor) -> tuple:
    return _keep_backward(grad, *ctx.saved_tensors, ctx.dim), None, None, None


_spread.register_autograd(_spread_autograd, setup_context=_remember)
_keep.register_autograd(_keep_autograd, setup_context=_remember)
