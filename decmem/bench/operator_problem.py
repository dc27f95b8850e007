"""Attention as a problem to be timed: inputs, nominal work, and the truth about a part of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.bench.operator_shapes import OperatorInputs, OperatorShape
from decmem.ops.reference import slots_of

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Results = tuple[Tensor, ...]
Plain = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of N groups of queries to their own L keys, some slots of which may be hidden."""

_ROWS = 256
"""Query tokens of the dense problem whose truth is computed."""


class Problem(NamedTuple):
    """Leaves q, k, v, the gradient of the output, and the work of the forward pass.

    `part` takes output, dq, dk and dv, or the output alone, and leaves what `truth` speaks of: the
    first head of the first world. `truth` computes these four in a given dtype, in a plain way.
    """

    leaves: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    flop: int
    part: Callable[[Sequence[Tensor]], Results]
    truth: Callable[[torch.dtype, Plain], Results]


def written_out(
    q: Float[Tensor, "N P D"],
    k: Float[Tensor, "N L D"],
    v: Float[Tensor, "N L D"],
    slots: Bool[Tensor, "N 1 L"] | None,
) -> Float[Tensor, "N P D"]:
    """Attention as two products and a softmax, in the dtype of the inputs throughout."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if slots is not None:
        scores = scores.masked_fill(~slots, float("-inf"))
    return scores.softmax(-1) @ v


def fused(
    q: Float[Tensor, "N P D"],
    k: Float[Tensor, "N L D"],
    v: Float[Tensor, "N L D"],
    slots: Bool[Tensor, "N 1 L"] | None,
) -> Float[Tensor, "N P D"]:
    """The same by PyTorch's attention."""
    mask = None if slots is None else slots[:, None]
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask)[:, 0]


def _leaves(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    return q, k, v


def sparse_problem(x: OperatorInputs, shape: OperatorShape) -> Problem:
    """Each query block reads the blocks in its list."""
    lists = x.lists[0, 0].long()
    valid = slots_of(x.valid, shape.slots)
    slots = None if valid is None else valid[lists % len(valid)].flatten(1)[:, None]

    def truth(dtype: torch.dtype, attention: Plain = written_out) -> Results:
        wide = torch.promote_types(dtype, torch.float32)
        leaves = _leaves([t[0, 0].to(wide) for t in x[:3]])
        # Gradients of a block that many read are added up in the wider type.
        keys, values = (t[lists].flatten(1, 2).to(dtype) for t in leaves[1:])
        out = attention(leaves[0].to(dtype), keys, values, slots)
        return out.detach(), *torch.autograd.grad(out, leaves, x.grad[0, 0].to(dtype))

    def part(results: Sequence[Tensor]) -> Results:
        return tuple(t[0, 0] for t in results)

    return Problem(_leaves(x[:3]), x.grad, shape.flop(x), part, truth)


def dense_problem(x: OperatorInputs, shape: OperatorShape) -> Problem:
    """Every token reads all tokens; there are no slots without one."""

    def tokens(t: Tensor) -> Tensor:
        present: Int[Tensor, " tokens"] = shape.present(t.shape[2], t.device)
        return t.flatten(2, 3).index_select(2, present)

    q, k, v, grad = (tokens(t) for t in (x.q, x.k, x.v, x.grad))
    # The first head's keys then owe their gradients to the first rows alone.
    grad[0, 0, _ROWS:] = 0

    def truth(dtype: torch.dtype, attention: Plain = written_out) -> Results:
        leaves = _leaves([t[:1, 0].to(dtype) for t in (q[:, :, :_ROWS], k, v)])
        out = attention(*leaves, None)
        gradients = torch.autograd.grad(out, leaves, grad[:1, 0, :_ROWS].to(dtype))
        return tuple(t[0] for t in (out.detach(), *gradients))

    def part(results: Sequence[Tensor]) -> Results:
        rows = (_ROWS, _ROWS, None, None)
        return tuple(t[0, 0, :end] for t, end in zip(results, rows, strict=False))

    flop = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
    return Problem(_leaves((q, k, v)), grad, flop, part, truth)


class Verdict(NamedTuple):
    """Largest errors, as parts of the largest true value, and whether ours is small enough."""

    error: float
    of_pytorch: float
    good: bool


def judged(results: Results, usual: Sequence[Results], truth: Results) -> Verdict:
    """At most twice the error of PyTorch in the same dtype, plus the rounding of the result.

    `usual` is what PyTorch makes of it, in one way or several; the worst counts. Of several tensors
    the one that comes nearest to its limit speaks.
    """
    worst, verdict = -1.0, Verdict(0.0, 0.0, True)
    for got, true, *others in zip(results, truth, *usual, strict=True):
        largest = float(true.abs().max())
        error, *theirs = (
            float((x.to(true.dtype) - true).abs().max()) / largest for x in (got, *others)
        )
        error = error if error == error else float("inf")
        usually = max(theirs)
        limit = 2 * usually + torch.finfo(got.dtype).eps
        if error / limit > worst:
            worst, verdict = error / limit, Verdict(error, usually, error <= limit)
    return verdict
