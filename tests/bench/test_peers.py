"""Calls of other libraries: stand-ins with their conventions must give the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from decmem.bench.operator_shapes import OperatorShape
from decmem.bench.operators import OperatorBench
from decmem.bench.peers import PEERS
from decmem.errors import UserError
from decmem.ops.reference import block_sparse_attention

from ..flash4_library import MODULES, install

SHAPE = OperatorShape("friendly", 2, 2, 64, 128, (128,), 2, 1, 2)


def sparse(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, rows: int, keys: int) -> Tensor:
    """The definition on (B, H, tokens, D), by tiles."""
    q, k, v = q.unflatten(2, (-1, rows)), k.unflatten(2, (-1, keys)), v.unflatten(2, (-1, keys))
    return block_sparse_attention(q, k, v, lists).flatten(2, 3)


def vsa(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, sizes: Tensor) -> Any:
    assert len(q) == 1
    assert counts.shape == lists.shape[:3]
    assert (counts == lists.shape[3]).all()
    assert sizes.tolist() == [64] * (k.shape[2] // 64)
    return sparse(q, k, v, lists, 64, 64), None


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, *, sparse_block_size: int) -> Any:
    out = sparse(q, k, v, lists, sparse_block_size, sparse_block_size)
    return {"o_tensor": out, "lse_tensor": q[..., 0].float()}


def cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: Tensor, *,
    sparse_block_size: int,
) -> Any:  # fmt: skip
    assert out.shape == grad.shape == q.shape
    assert lse.shape == q.shape[:3]
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        again = sparse(*leaves, lists, sparse_block_size, sparse_block_size)
        gradients = torch.autograd.grad(again, leaves, grad)
    return dict(zip(("dq_tensor", "dk_tensor", "dv_tensor"), gradients, strict=True))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {
        "fastvideo_kernel": {"block_sparse_attn_from_indices": vsa},
        "cudnn": {},
        "cudnn.block_sparse_attention": {
            "block_sparse_attention_forward": cudnn_forward,
            "block_sparse_attention_backward": cudnn_backward,
        },
    }
    install(monkeypatch, functions | MODULES)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("peer", PEERS)
def test_calls_follow_the_conventions(peer: str) -> None:
    cpu = torch.device("cpu")
    rows = list(OperatorBench([SHAPE], [3], [peer], cpu, torch.bfloat16, 1).rows())
    assert [(row["pass"], row["failure"]) for row in rows] == [
        ("forward", None), ("backward", None),
    ]  # fmt: skip


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("peer", PEERS)
def test_blocks_that_do_not_suit_are_refused(peer: str) -> None:
    shape = OperatorShape("paper-like", 1, 1, 64, 160, (154, 143), 2, 1, 2)
    x = shape.inputs(2, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="64 n tokens"):
        PEERS[peer].prepare(x)
