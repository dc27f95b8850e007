"""Which blocks to read: pooled features, their scores, and a deterministic top-k (figure 4)."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from decmem.ops.untraced import untraced


def pool_blocks(
    x: Float[Tensor, "B H N P D"], valid: Bool[Tensor, "period P"] | None = None
) -> Float[Tensor, "B H N D"]:
    """Mean over the valid tokens of each block, in fp32."""
    x = x.float()
    if valid is None:
        return x.mean(dim=3)
    weight = valid.float() / valid.sum(-1, keepdim=True)
    weight = weight.repeat(x.shape[2] // valid.shape[0], 1)
    return torch.einsum("bhnpd,np->bhnd", x, weight)


def block_scores(
    q: Float[Tensor, "B H Nq D"], k: Float[Tensor, "B H Nk D"], per_head: bool
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
    k: Float[Tensor, "B H Nk D"],
    candidates: Bool[Tensor, "Nq Nk"] | Bool[Tensor, "B 1 Nq Nk"],
    count: int,
    per_head: bool = False,
) -> Int[Tensor, "B G Nq K"]:
    """The `count` best candidate blocks of each query block, ascending, then -1 where short.

    `q` and `k` are pooled features (`pool_blocks`). Scores are compared in fp32 and ties go to
    the lowest index. No gradient flows through the choice.
    """
    with torch.no_grad():
        scores = block_scores(q, k, per_head)
        candidates = candidates.expand_as(scores)
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
