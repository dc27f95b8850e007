"""Block-sparse attention of other libraries, where they are installed.

Each takes the tensors as they are: blocks that do not suit a library are its row's failure, not
padded for it. Tables are made beforehand, outside the clock.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decmem.bench.operator_problem import Attention
from decmem.bench.operator_shapes import OperatorInputs
from decmem.errors import UserError
from decmem.ops import flash4
from decmem.ops.flash4 import in_tiles


class Peer(NamedTuple):
    """A library, the package it comes in, the module to import, and how to call it."""

    package: str
    module: str
    prepare: Callable[[OperatorInputs], Attention]


def _require(suits: bool, peer: str, what: str) -> None:
    if not suits:
        raise UserError("backend", f"{peer!r} takes {what}", "Leave it out at this shape")


def _cudnn(x: OperatorInputs) -> Attention:
    from cudnn.block_sparse_attention import (  # pyright: ignore[reportMissingImports]
        block_sparse_attention_backward,
        block_sparse_attention_forward,
    )

    P = x.q.shape[3]
    _require(P % 64 == 0 and x.valid is None, "cudnn_bsa", "full blocks of 64 n tokens")
    index = in_tiles(x.lists, P // 64, P // 64)

    class Sparse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.flatten(2, 3) for t in (q, k, v))
            done = block_sparse_attention_forward(q, k, v, index, sparse_block_size=64)
            ctx.save_for_backward(q, k, v, done["o_tensor"], done["lse_tensor"])
            return done["o_tensor"].unflatten(2, (-1, P))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            q, k, v, out, lse = ctx.saved_tensors
            grad = grads[0].flatten(2, 3).contiguous()
            done = block_sparse_attention_backward(
                grad, q, k, v, out, lse, index, sparse_block_size=64
            )  # fmt: skip
            names = ("dq_tensor", "dk_tensor", "dv_tensor")
            return tuple(done[name].unflatten(2, (-1, P)) for name in names)

    return lambda q, k, v: Sparse.apply(q, k, v)  # pyright: ignore[reportReturnType]


def _fa4(x: OperatorInputs) -> Attention:
    P = x.q.shape[3]
    _require(P % 64 == 0 and x.valid is None, "fa4", "full blocks of 64 n tokens")
    tables = flash4.Tables.of(x.lists, x.k.shape[2], P)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        suits = tables.backward is not None or not torch.is_grad_enabled()
        _require(suits, "fa4", f"blocks of {flash4.GRADIENT_TILE} tokens where it has to go back")
        return flash4.attend(q, k, v, tables)

    return attention


def _vsa(x: OperatorInputs) -> Attention:
    from fastvideo_kernel import (  # pyright: ignore[reportMissingImports]
        block_sparse_attn_from_indices,
    )

    P, D, blocks = x.q.shape[3], x.q.shape[4], x.k.shape[2]
    suits = P % 64 == 0 and D in (64, 128) and x.valid is None
    _require(suits, "vsa", "full blocks of 64 n tokens and head dims 64 and 128")
    # Its kernel for Hopper GPUs takes one world: the heads of all lie side by side.
    index = in_tiles(x.lists, P // 64, P // 64).flatten(0, 1)[None]
    count = torch.full_like(index[..., 0], index.shape[-1])
    sizes = torch.full((blocks * (P // 64),), 64, dtype=torch.int32, device=index.device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (t.flatten(2, 3).flatten(0, 1)[None] for t in (q, k, v))
        out, _ = block_sparse_attn_from_indices(*flat, index, count, sizes)
        return out.view(q.shape)

    return attention


PEERS = {
    "fa4": Peer("flash-attn-4", "flash_attn.cute", _fa4),
    "cudnn_bsa": Peer("nvidia-cudnn-frontend", "cudnn.block_sparse_attention.api", _cudnn),
    # Without its compiled part it would silently run Triton instead.
    "vsa": Peer("fastvideo-kernel", "fastvideo_kernel._C.fastvideo_kernel_ops", _vsa),
}

_NOT_CALLED = {
    "flashinfer-python": "not called: it compiles its kernels when first run, and plans every new "
    "set of lists on the processor",
}


@cache
def obstacle(module: str) -> str | None:
    """Why a module cannot be used here; None if it can be imported."""
    try:
        importlib.import_module(module)
    except Exception as failure:
        # A library built for another CUDA or PyTorch fails in ways of its own.
        return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    return None


def present_peers() -> list[str]:
    """Names of the libraries that can be compared here."""
    return [name for name, peer in PEERS.items() if obstacle(peer.module) is None]


def absent_peers() -> list[dict[str, str]]:
    """The packages that are not compared here, with the reason."""
    found = {peer.package: obstacle(peer.module) for peer in PEERS.values()} | _NOT_CALLED
    return [{"peer": package, "reason": reason} for package, reason in found.items() if reason]
