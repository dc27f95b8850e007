"""Which blocks to read: pooled features, their scores, and a deterministic top-k (figure 4)."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from decmem.ops.untraced import bare_kernels_serve, kernels_serve, untraced

try:
    from decmem.ops import selection_cuda_kernels
except ImportError:  # The driver's Python bindings come with PyTorch for CUDA.
    selection_cuda_kernels = None

_MOST = 16384
"""Scores that one program holds; longer rows are sorted."""

_FEW = 64
"""Query blocks that read one world's keys, in a program of their scores; more are a product that
libraries are good at."""


def pool_blocks(
    x: Float[Tensor, "B H N P D"], valid: Bool[Tensor, "period P"] | None = None
) -> Float[Tensor, "B H N D"]:
    """Mean over the valid tokens of each block, in fp32."""
    if bare_kernels_serve(x):
        return _pool(x, valid)
    x = x.float()
    if valid is None:
        return x.mean(dim=3)
    weight = valid.float() / valid.sum(-1, keepdim=True)
    weight = weight.repeat(x.shape[2] // valid.shape[0], 1)
    return torch.einsum("bhnpd,np->bhnd", x, weight)


def pool_blocks_into(
    x: Float[Tensor, "B H N P D"],
    blocks: Int[Tensor, " n"],
    out: Float[Tensor, "B H N D"],
    valid: Bool[Tensor, "period P"] | None = None,
) -> None:
    """`out[:, :, blocks]`, in fp32, as `pool_blocks` of those blocks, without gradients."""
    if bare_kernels_serve(x) and x.is_contiguous() and out.is_contiguous():
        _pool_into(x, blocks, out, valid)
        return
    kinds = None if valid is None else valid[blocks % len(valid)]
    out.index_copy_(2, blocks, pool_blocks(x.index_select(2, blocks), kinds))


def block_scores(
    q: Float[Tensor, "B H Nq D"], k: Float[Tensor, "#B H Nk D"], per_head: bool
) -> Float[Tensor, "B G Nq Nk"]:
    """Attention scores of pooled features, fp32; summed over heads unless `per_head`."""
    q, k = q.float(), k.float()
    if per_head:
        return q @ k.mT
    # One product over all heads' channels, without a copy where they lie side by side.
    q, k = (x.movedim(1, 2).flatten(2) for x in (q, k))
    return (q @ k.mT)[:, None]


def ranking_keys(
    scores: Float[Tensor, "... Nk"], candidates: Bool[Tensor, "... Nk"]
) -> Shaped[Tensor, "... Nk"]:
    """Integers that sort as (score, then lowest index first); below zero where no candidate.

    Floats compare as their bit patterns once negative ones are flipped, so score and index fit
    one int64 and every device breaks ties alike.
    """
    bits = scores.float().view(torch.int32).long()
    order = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) + 2**31
    blocks = scores.shape[-1]
    tie = torch.arange(blocks - 1, -1, -1, device=scores.device)
    return torch.where(candidates, order * blocks + tie, -1 - tie)


def select_blocks(
    q: Float[Tensor, "B H Nq D"],
    k: Float[Tensor, "#B H Nk D"],
    candidates: Bool[Tensor, "Nq Nk"] | Bool[Tensor, "B 1 Nq Nk"],
    count: int,
    per_head: bool = False,
) -> Int[Tensor, "B G Nq K"]:
    """The `count` best candidate blocks of each query block, ascending, then -1 where short.

    `q` and `k` are pooled features (`pool_blocks`); keys of one world may serve the queries of
    many. Scores are compared in fp32 and ties go to the lowest index. No gradient flows through the
    choice.
    """
    with torch.no_grad():
        few = per_head and q.shape[0] // k.shape[0] * q.shape[2] <= _FEW
        scores = _score(q, k) if few and kernels_serve(q) else block_scores(q, k, per_head)
        candidates = candidates.expand_as(scores)
        if kernels_serve(scores) and scores.shape[-1] <= _MOST:
            return _choose(scores, candidates[:, 0], min(count, scores.shape[-1]))
        clear = _clear_choice(scores, candidates, count) if untraced(q) else None
        return _ranked_choice(scores, candidates, count) if clear is None else clear


def _ranked_choice(
    scores: Float[Tensor, "B G Nq Nk"], candidates: Bool[Tensor, "B G Nq Nk"], count: int
) -> Int[Tensor, "B G Nq K"]:
    ranked = ranking_keys(scores, candidates)
    best, index = ranked.topk(min(count, scores.shape[-1]), dim=-1)
    blocks = scores.shape[-1]
    index = torch.where(best >= 0, index, blocks).sort(dim=-1).values
    return torch.where(index < blocks, index, -1).to(torch.int32)


def _clear_choice(
    scores: Float[Tensor, "B G Nq Nk"], candidates: Bool[Tensor, "B G Nq Nk"], count: int
) -> Int[Tensor, "B G Nq K"] | None:
    """The short cut, over a long history a third of the work: `count` blocks of every list lie
    strictly above all others, so that no tie needs breaking. None where they do not."""
    if scores.shape[-1] <= count:
        return None
    best, index = scores.masked_fill(~candidates, float("-inf")).topk(count + 1, dim=-1)
    if not bool((best[..., -2] > best[..., -1]).all()):
        return None
    return index[..., :-1].sort(dim=-1).values.to(torch.int32)


@torch.library.custom_op("decmem::score_blocks", mutates_args=())
def _score(q: Tensor, k: Tensor) -> Tensor:
    """`block_scores` per head, of few query blocks; keys are read once for all worlds they serve.

    Products in fp32, or in three parts of TF32, which is as exact.
    """
    q, k, cuda = q.float().contiguous(), k.float(), selection_cuda_kernels
    if cuda is not None and cuda.suits_scores(q, k):
        return cuda.run_score(q, k)
    from decmem.ops.selection_kernels import run_score

    return run_score(q, k)


@_score.register_fake
def _(q, k):
    return q.new_empty((*q.shape[:3], k.shape[2]), dtype=torch.float32)


@torch.library.custom_op("decmem::choose_blocks", mutates_args=())
def _choose(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """`_ranked_choice` of at most `_MOST` blocks; candidates (B, Nq, Nk), the same for all groups.

    Never waits for the device.
    """
    from decmem.ops.selection_kernels import _choose_kernel

    B, G, Nq, Nk = scores.shape
    out = scores.new_empty((B, G, Nq, count), dtype=torch.int32)
    cuda = selection_cuda_kernels
    if cuda is not None and cuda.suits(scores):
        cuda.run_choose(scores.contiguous(), candidates.view(torch.uint8), out)
        return out
    block = max(64, 1 << (Nk - 1).bit_length())
    constants: dict[str, Any] = {
        "BLOCK": block, "LIST": 1 << (count - 1).bit_length(),
        "num_warps": min(16, max(1, block // 512)),
    }  # fmt: skip
    _choose_kernel[(B * G * Nq,)](
        scores.contiguous(), candidates.view(torch.uint8), out, G, Nq, Nk, count,
        *candidates.stride(), **constants,
    )  # fmt: skip
    return out


@_choose.register_fake
def _(scores, candidates, count):
    return scores.new_empty((*scores.shape[:3], count), dtype=torch.int32)


def _run_pool(
    x: Tensor, blocks: Tensor | None, valid: Tensor | None, out: Tensor, room: int
) -> None:
    from decmem.ops.selection_kernels import _pool_kernel

    B, H, N, P, D = x.shape
    n = N if blocks is None else len(blocks)
    kinds = None if valid is None else valid.contiguous().view(torch.uint8)
    constants: dict[str, Any] = {
        "P": P, "D": D, "WIDTH": 1 << (D - 1).bit_length(), "TOKENS": 16, "num_warps": 2,
    }  # fmt: skip
    _pool_kernel[(B * H * n,)](
        x, blocks, kinds, out, n, N if valid is None else len(valid), room, out.shape[2],
        **constants, MASKED=valid is not None, LISTED=blocks is not None,
    )  # fmt: skip


@torch.library.custom_op("decmem::pool_blocks_into", mutates_args=("out",))
def _pool_into(x: Tensor, blocks: Tensor, out: Tensor, valid: Tensor | None) -> None:
    _run_pool(x, blocks, valid, out, x.shape[2])


@_pool_into.register_fake
def _(x, blocks, out, valid):
    return None


@torch.library.custom_op("decmem::pool_blocks", mutates_args=())
def _pool(x: Tensor, valid: Tensor | None) -> Tensor:
    B, H, N, P, D = x.shape
    out = x.new_empty((B, H, N, D), dtype=torch.float32)
    block, head = P * D, x.stride(1)
    # Some of the blocks of each head of a larger tensor are read where they lie.
    apart = x.stride()[2:] == (block, D, 1) and head % block == 0
    if not (apart and (B == 1 or x.stride(0) == H * head)):
        x, head = x.contiguous(), N * block
    _run_pool(x, None, valid, out, head // block)
    return out


@_pool.register_fake
def _(x, valid):
    return x.new_empty((*x.shape[:3], x.shape[4]), dtype=torch.float32)
