"""Ways to compute attention over a long history, ours and others', under one call."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decmem.bench.operator_problem import Attention
from decmem.bench.operator_shapes import OperatorInputs
from decmem.bench.peers import PEERS, present_peers
from decmem.ops import block_sparse_attention
from decmem.ops.block_sparse import Backend

OperatorWay = Literal[
    "triton", "gather", "reference", "dense_cudnn", "dense_flash", "dense_efficient", "hopper",
    "flex",
]  # fmt: skip
"""Backends of `decmem.ops.block_sparse_attention` (`gather` is gathering and PyTorch's attention,
`flex` is FlexAttention), and PyTorch's attention over all tokens by each of its kernels."""

_DENSE = {
    "dense_cudnn": SDPBackend.CUDNN_ATTENTION,
    "dense_flash": SDPBackend.FLASH_ATTENTION,
    "dense_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_BACKENDS: dict[str, Backend] = {
    "triton": "triton", "gather": "gather", "reference": "reference", "hopper": "hopper",
    "flex": "flex",
}  # fmt: skip

UNPROVEN = ("hopper", *PEERS)
"""Ways that are first tried in a process of their own, for they may hang or take it along."""

LATE = ("flex",)
"""Ways that compile for long: last, so that they take nobody else's time."""


def known_ways() -> tuple[str, ...]:
    """All names, whether they run here or not."""
    return *get_args(OperatorWay), *PEERS


def is_dense(way: str) -> bool:
    """Whether the way reads all tokens, not the lists."""
    return way in _DENSE


def usual_ways(device: torch.device) -> tuple[str, ...]:
    """What is worth comparing there."""
    if device.type != "cuda":
        return "gather", "reference", "dense_flash"
    ours = ("triton", "gather", "dense_cudnn", "dense_flash", "dense_efficient", "hopper", "flex")
    return *ours, *present_peers()


def prepared(way: str, x: OperatorInputs) -> Attention:
    """Attention this way, as a function of q, k and v alone."""
    if is_dense(way):
        return _dense(_DENSE[way])
    if way in PEERS:
        return PEERS[way].prepare(x)
    backend = _BACKENDS[way]
    return lambda q, k, v: block_sparse_attention(q, k, v, x.lists, x.valid, backend=backend)


def _dense(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v)

    return attention
