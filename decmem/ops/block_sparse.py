"""Block-sparse attention, the public operator: one contract, several backends.

Tokens come in blocks: queries `(B, H, Nq, Pq, D)`, keys and values `(B, H, Nk, Pk, D)`. Query
block i reads the key blocks named by `lists[b, g, i]` (-1 = empty slot). `G` is 1 when all heads
share a list, else H; one list may also stand for all worlds. Empty slots come last, and no block
is listed twice. `valid` marks the token slots of a key block that hold a token; it repeats with
its first dimension, so one row per kind of block is enough. Blocks listed nowhere are never
touched.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.errors import UserError
from decmem.ops import gather, reference

Backend = Literal["auto", "reference", "gather", "triton"]


def _triton(*args: object, **kwargs: object) -> Tensor:
    from decmem.ops import sparse_kernels

    return sparse_kernels.block_sparse_attention(*args, **kwargs)  # pyright: ignore


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.block_sparse_attention,
    "gather": gather.block_sparse_attention,
    "triton": _triton,
}


# Asked once: compiled code cannot search for packages.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_available() -> bool:
    """Whether the triton package is installed."""
    return _TRITON_INSTALLED


def choose_backend(backend: Backend, q: Tensor) -> Backend:
    """The backend that will run: what was asked for, or the best one for where `q` lies.

    Raises:
        UserError: on an unknown backend, or Triton asked for where it cannot run.
    """
    if backend == "auto":
        backend = "triton" if q.is_cuda and triton_available() else "gather"
    if backend not in _BACKENDS:
        known = ", ".join(get_args(Backend))
        raise UserError("backend", f"{backend!r} is unknown", f"Choose one of: {known}")
    if backend == "triton" and not triton_available():
        raise UserError(
            "backend",
            "'triton' needs the triton package, which is not installed",
            "Install decmem[gpu], or use backend='gather'",
        )
    if backend == "triton" and not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            "backend", "'triton' needs a GPU, the tensors are on the CPU", "Use backend='gather'"
        )
    return backend


def block_sparse_attention(
    q: Float[Tensor, "B H Nq Pq D"],
    k: Float[Tensor, "B H Nk Pk D"],
    v: Float[Tensor, "B H Nk Pk D"],
    lists: Int[Tensor, "#B G Nq K"],
    valid: Bool[Tensor, "period Pk"] | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "B H Nq Pq D"]:
    """Attention of each query block over its own list of key blocks (figure 4).

    `scale` defaults to D^-1/2. `backend="auto"` takes Triton on a GPU where it is installed and
    gather + SDPA elsewhere. A query block with an empty list reads zeros.

    Raises:
        UserError: on an unknown backend, or Triton asked for where it cannot run.
    """
    chosen = choose_backend(backend, q)
    if lists.shape[-1] == 0:
        return torch.zeros_like(q)
    return _BACKENDS[chosen](q, k, v, lists, valid=valid, scale=scale)
