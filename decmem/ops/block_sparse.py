"""Block-sparse attention, the public operator: one contract, several backends.

Tokens come in blocks: queries `(B, H, Nq, Pq, D)`, keys and values `(B, H, Nk, Pk, D)`. Query
block i reads the key blocks named by `lists[b, g, i]` (-1 = empty slot). `G` is 1 when all heads
share a list, else H; one list may also stand for all worlds, and keys and values of one world for
all worlds (a history that both branches of a guidance pair read). Empty slots come last, and no
block is listed twice. Ascending lists are faster: programs then sweep the history together.

`valid` says which token slots of a key block hold a token: how many, where they come first (faster:
only the tile where they end is masked), or any slots. It repeats with its first dimension, so one
row per kind of block is enough. Slots without a token may hold any finite number. Blocks listed
nowhere are never touched.

Keys and values may be stored in 8 bits (e4m3) with a scale for every token: `k_scale` and
`v_scale`, shaped as the blocks with one number a token. Then there are no gradients.

Backends: `hopper` (H100, H200; 16-bit numbers, head dims 32-128, more than 32 slots of queries and
16 n of keys; in CUDA C++, compiled by PyTorch's own compiler when first needed), `triton` (any GPU
with Triton, any shape), `flex` (any GPU, by PyTorch's compiler, again for every length of the
history), `flash4` (by flash-attn-4 where that is installed; full blocks of 64 n slots), `gather`
(everywhere; copies what is listed) and `reference` (everywhere; the definition, dense and fp32).
Unasked, the first of `hopper`, `triton` and `gather` that can run.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.errors import UserError
from decmem.ops import flash4, flex, gather, reference

Backend = Literal["auto", "reference", "gather", "triton", "hopper", "flex", "flash4"]

_PLAIN: dict[str, Callable[..., Tensor]] = {
    "reference": reference.block_sparse_attention,
    "gather": gather.block_sparse_attention,
}

_LIBRARIES: dict[str, Callable[..., Any]] = {
    "flex": flex.block_sparse_attention,
    "flash4": flash4.block_sparse_attention,
}

# Asked once: compiled code cannot search for packages.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_available() -> bool:
    """Whether the triton package is installed."""
    return _TRITON_INSTALLED


def choose_backend(backend: Backend, q: Tensor) -> Backend:
    """The backend that will run: what was asked for, or the best one for where `q` lies.

    Of "auto", "triton" says that kernels will run: theirs or, where the shapes suit them, those of
    `hopper`, which is for the operators to decide.

    Raises:
        UserError: on an unknown backend, or one asked for where it cannot run.
    """
    if backend == "auto":
        return "triton" if q.is_cuda and triton_available() else "gather"
    if backend not in get_args(Backend):
        known = ", ".join(get_args(Backend))
        raise UserError("backend", f"{backend!r} is unknown", f"Choose one of: {known}")
    if backend in ("triton", "hopper") and not triton_available():
        raise UserError(
            "backend",
            f"{backend!r} needs the triton package, which is not installed",
            "Install decmem[gpu], or use backend='gather'",
        )
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend in ("triton", "hopper", "flex", "flash4") and not q.is_cuda and not interpreted:
        raise UserError(
            "backend", f"{backend!r} needs a GPU, the tensors are on the CPU", "Use 'gather'"
        )
    return backend


def _check_scales(
    k_scale: Tensor | None, v_scale: Tensor | None, learning: tuple[Tensor, ...]
) -> None:
    if (k_scale is None) != (v_scale is None):
        raise UserError("k_scale", "keys and values must both have scales", "Give v_scale too")
    if k_scale is not None and torch.is_grad_enabled() and any(x.requires_grad for x in learning):
        raise UserError(
            "k_scale",
            "what is stored with scales has no gradients",
            "Call it under torch.no_grad(), or restore keys and values first",
        )


def block_sparse_attention(
    q: Float[Tensor, "B H Nq Pq D"],
    k: Float[Tensor, "#B H Nk Pk D"],
    v: Float[Tensor, "#B H Nk Pk D"],
    lists: Int[Tensor, "#B G Nq K"],
    valid: Bool[Tensor, "period Pk"] | Int[Tensor, " period"] | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    k_scale: Float[Tensor, "#B H Nk Pk 1"] | None = None,
    v_scale: Float[Tensor, "#B H Nk Pk 1"] | None = None,
) -> Float[Tensor, "B H Nq Pq D"]:
    """Attention of each query block over its own list of key blocks (figure 4).

    Differentiable in q, k and v; where worlds share keys, the gradients of these add up. `scale`
    defaults to D^-1/2. `backend="auto"` takes `hopper` where that can run, else `triton` on a GPU
    where Triton is installed, and gather + SDPA elsewhere. A query block with an empty list reads
    zeros.

    Raises:
        UserError: on an unknown backend, or one that cannot run here or with these inputs, and
            where scales come one without the other, or with gradients.
    """
    _check_scales(k_scale, v_scale, (q, k, v))
    chosen = choose_backend(backend, q)
    if lists.shape[-1] == 0:
        return torch.zeros_like(q)
    if chosen in _LIBRARIES:
        k, v = (reference.restored(x, s, q.dtype) for x, s in ((k, k_scale), (v, v_scale)))
        return _LIBRARIES[chosen](q, k, v, lists, valid=valid, scale=scale)
    if chosen in _PLAIN:
        return _PLAIN[chosen](q, k, v, lists, valid, scale, k_scale, v_scale)
    from decmem.ops import sparse_kernels

    kernels = "auto" if backend == "auto" else chosen
    return sparse_kernels.block_sparse_attention(
        q, k, v, lists, valid, scale, kernels, k_scale, v_scale
    )  # fmt: skip


def decoupled_attention(
    o_alm: Float[Tensor, "B H Nq Pq D"],
    gate: Float[Tensor, "#B #H #Nq #Pq gates"],
    q: Float[Tensor, "B H Nq Pq D"],
    k: Float[Tensor, "#B H Nk Pk D"],
    v: Float[Tensor, "#B H Nk Pk D"],
    lists: Int[Tensor, "#B G Nq K"],
    valid: Bool[Tensor, "period Pk"] | Int[Tensor, " period"] | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    k_scale: Float[Tensor, "#B H Nk Pk 1"] | None = None,
    v_scale: Float[Tensor, "#B H Nk Pk 1"] | None = None,
) -> Float[Tensor, "B H Nq Pq D"]:
    """o_alm + g o_sgm (equation 3), where o_sgm is `block_sparse_attention` of the rest.

    `gate` has one value per channel, or one per token. Without gradients the kernels write the sum
    themselves, and o_sgm never reaches memory; with gradients, and in the other backends, this is
    the plain composition.

    Raises:
        UserError: as `block_sparse_attention`, and on a gate of another width.
    """
    if gate.shape[-1] not in (1, q.shape[-1]):
        raise UserError(
            "gate",
            f"{gate.shape[-1]} values per token, expected 1 or {q.shape[-1]}",
            "Give one per token or one per channel",
        )
    chosen = choose_backend(backend, q)
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (o_alm, gate, q, k, v))
    if chosen in (*_PLAIN, *_LIBRARIES) or learning or lists.shape[-1] == 0:
        o_sgm = block_sparse_attention(q, k, v, lists, valid, scale, backend, k_scale, v_scale)
        return o_alm + (gate * o_sgm).to(o_alm.dtype)
    from decmem.ops import sparse_kernels

    kernels = "auto" if backend == "auto" else chosen
    return sparse_kernels.decoupled_attention(
        o_alm, gate, q, k, v, lists, valid, scale, kernels, k_scale, v_scale
    )  # fmt: skip
