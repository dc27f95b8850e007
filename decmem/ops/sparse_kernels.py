"""Block-sparse attention as PyTorch operators: which kernels run, and autograd.

The operators have fake kernels, so compiled code takes them in whole; nothing waits for the device,
so CUDA graphs do too; and no length of a history is a compile-time constant of a kernel.
"""

from typing import Any

import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.ops import sparse_backward_kernels, sparse_forward_kernels, sparse_restore_kernels
from decmem.ops.readers import inverse_lists
from decmem.ops.reference import restored

try:
    from decmem.ops import sparse_cuda_backward_kernels, sparse_cuda_kernels
except ImportError:  # The driver's Python bindings come with PyTorch for CUDA.
    sparse_cuda_backward_kernels = sparse_cuda_kernels = None


def hopper_obstacle(q: Tensor, k: Tensor, valid: Tensor | None, lists: Tensor) -> str | None:
    """Why the kernels for Hopper GPUs cannot take these inputs; None if they can."""
    if sparse_cuda_kernels is None:
        return "needs the package cuda-bindings"
    if k.dtype not in (q.dtype, torch.float8_e4m3fn):
        return f"takes keys in the type of the queries, {q.dtype}, not {k.dtype}"
    return sparse_cuda_kernels.obstacle(q, k, valid, lists.shape[-1])


def _hopper_chosen(kernels: str, q: Tensor, k: Tensor, valid: Tensor | None, lists: Tensor) -> bool:
    """Whether the kernels for Hopper GPUs do the work: what runs is decided by shapes alone."""
    if kernels == "triton":
        return False
    obstacle = hopper_obstacle(q, k, valid, lists)
    if obstacle is not None and kernels == "hopper":
        raise UserError("backend", f"'hopper' {obstacle}", "Use backend='triton'")
    return obstacle is None


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    kernels: str, o_alm: Tensor | None = None, gate: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chosen = _hopper_chosen(kernels, q, k, valid, lists)
    if chosen and k_scale is not None and v_scale is not None:
        # These read 16 bits. They make up for it at every length of the history that was timed
        # (`benchmarks/stored.py`).
        k, v = sparse_restore_kernels.restore_listed(k, v, k_scale, v_scale, lists, q.dtype)
    if chosen and sparse_cuda_kernels is not None:
        return sparse_cuda_kernels.run_forward(q, k, v, lists, valid, scale, o_alm, gate)
    return sparse_forward_kernels.run_forward(
        q, k, v, lists, valid, scale, o_alm, gate, k_scale=k_scale, v_scale=v_scale
    )  # fmt: skip


# `kernels` is "triton", "hopper", or "auto" for the second wherever it can run. What it means is
# settled inside the operator, where compiled code does not have to follow.
@torch.library.custom_op("decmem::block_sparse_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float, kernels: str
) -> tuple[Tensor, Tensor]:
    return _run_forward(q, k, v, lists, valid, scale, kernels)


@_forward.register_fake
def _(q, k, v, lists, valid, scale, kernels):
    return torch.empty_like(q), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op("decmem::block_sparse_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    kernels: str, out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = sparse_backward_kernels.run_delta(out, grad)
    of_queries = of_keys = sparse_backward_kernels
    faster = sparse_cuda_backward_kernels
    if _hopper_chosen(kernels, q, k, valid, lists) and faster is not None:
        of_queries = faster if faster.suits_queries(q, k, valid, lists.shape[-1]) else of_queries
        of_keys = faster if faster.suits_keys(q, k) else of_keys
    known = q, k, v, lists, valid, scale, grad, lse, delta
    more: dict[str, Any] = {}
    if of_queries is of_keys is faster:
        # Made first, so that nothing comes between: one kernel begins where the other ends.
        more["inverse"] = inverse_lists(lists, k.shape[2])
        more["taken"] = torch.zeros(1, dtype=torch.int32, device=q.device)
    dq = of_queries.run_query_gradient(*known)
    return dq, *of_keys.run_key_gradient(*known, **more)


@_backward.register_fake
def _(q, k, v, lists, valid, scale, kernels, out, lse, grad):
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    return torch.empty_like(q), dk, dv


# Without gradients: tiles of rows that lie anywhere, for the kernels for Hopper GPUs alone.
@torch.library.custom_op("decmem::rows_attention", mutates_args=())
def _rows(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    rows: Tensor, lines: int,
) -> Tensor:  # fmt: skip
    assert sparse_cuda_kernels is not None
    return sparse_cuda_kernels.run_rows(q, k, v, lists, valid, scale, rows, lines)


@_rows.register_fake
def _(q, k, v, lists, valid, scale, rows, lines):
    B, H, _, D = q.shape
    return q.new_empty(B, lines, H, D) if lines else torch.empty_like(q)


# Without gradients, for the kernels for Hopper GPUs alone.
@torch.library.custom_op("decmem::near_and_far", mutates_args=())
def _near_and_far(
    q: Tensor, k: Tensor, v: Tensor, near: Tensor, rows: Tensor, far: Tensor,
    valid: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert sparse_cuda_kernels is not None
    return sparse_cuda_kernels.run_near_and_far(q, k, v, near, rows, far, valid, scale)


@_near_and_far.register_fake
def _(q, k, v, near, rows, far, valid, scale):
    return torch.empty_like(q), torch.empty_like(q)


# What has no gradients: the join with a local branch, and keys and values stored in 8 bits.
@torch.library.custom_op("decmem::decoupled_forward", mutates_args=())
def _decoupled(
    o_alm: Tensor | None, gate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lists: Tensor,
    valid: Tensor | None, scale: float, kernels: str, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _run_forward(
        q, k, v, lists, valid, scale, kernels, o_alm, gate, k_scale, v_scale
    )[0]  # fmt: skip


@_decoupled.register_fake
def _(o_alm, gate, q, k, v, lists, valid, scale, kernels, k_scale=None, v_scale=None):
    return torch.empty_like(q)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, lists, valid, scale, kernels = inputs
    ctx.save_for_backward(q, k, v, lists, valid, *output)
    ctx.scale, ctx.kernels = scale, kernels


def _autograd(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple:
    q, k, v, lists, valid, out, lse = ctx.saved_tensors
    grads = _backward(
        q, k, v, lists, valid, ctx.scale, ctx.kernels, out, lse, grad.contiguous()
    )  # fmt: skip
    return *grads, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _settled(q: Tensor, lists: Tensor, valid: Tensor | None, scale: float | None) -> tuple:
    if valid is not None:
        valid = valid.contiguous() if valid.dtype == torch.bool else valid.to(torch.int32)
    lists = lists.to(torch.int32).contiguous()
    return q.contiguous(), lists, valid, q.shape[-1] ** -0.5 if scale is None else scale


def _readable(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys and values with their scales; restored beforehand where a GPU has no 8-bit numbers."""
    if k_scale is None or not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (8, 9):
        return k, v, k_scale, v_scale
    return restored(k, k_scale, q.dtype), restored(v, v_scale, q.dtype), None, None


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
    kernels: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Contract of `decmem.ops.block_sparse`."""
    q, lists, valid, scale = _settled(q, lists, valid, scale)
    if k_scale is not None:
        k, v, *scales = _readable(q, k, v, k_scale, v_scale)
        return _decoupled(None, None, q, k, v, lists, valid, scale, kernels, *scales)
    return _forward(q, k, v, lists, valid, scale, kernels)[0]


def rows_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, rows: Tensor,
    lines: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """As `block_sparse_attention`, of tiles whose rows lie anywhere; without gradients, and for
    inputs that have no `hopper_obstacle`.

    Args:
        q: (B, H, L, D), lines of each head.
        lists: (1, 1, tiles, K).
        rows: (tiles, Pq, 2) int32, of each row of each tile the line of queries and that of
            results, both -1 where a tile has no row; what a tile has comes first.
        lines: of results, heads last; 0: as many as of queries, and laid out like them.

    Returns:
        (B, lines, H, D), or (B, H, L, D); lines that no row names hold anything.
    """
    q, lists, valid, scale = _settled(q, lists, valid, scale)
    return _rows(q, k, v, lists, valid, scale, rows, lines)


def near_and_far_attention(
    q: Tensor, k: Tensor, v: Tensor, near: Tensor, rows: Tensor, far: Tensor,
    valid: Tensor | None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both branches of a decoupled memory. The second kernel begins where the first, at its end,
    leaves multiprocessors idle; so lists are made before. Limits as of `rows_attention`.

    Args:
        q: (B, H, L, D), lines of each head.
        near: (1, 1, tiles, K), what the tiles of the window see.
        rows: of these tiles, as of `rows_attention`.
        far: (#B, G, Nq, K), what blocks of queries, which lie side by side, have retrieved.

    Returns:
        o_alm and o_sgm, like q; lines of o_alm that no row names hold anything.
    """
    q, near, valid, scale = _settled(q, near, valid, scale)
    far = far.to(torch.int32).contiguous()
    return _near_and_far(q, k, v, near, rows, far, valid, scale)


def decoupled_attention(
    o_alm: Tensor,
    gate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
    kernels: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """o_alm + gate o_sgm in one kernel, without gradients."""
    q, lists, valid, scale = _settled(q, lists, valid, scale)
    gate = gate.expand(*q.shape[:4], gate.shape[-1]).contiguous()
    k, v, *scales = _readable(q, k, v, k_scale, v_scale)
    return _decoupled(o_alm.contiguous(), gate, q, k, v, lists, valid, scale, kernels, *scales)
