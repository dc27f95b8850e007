"""Block-sparse attention in plain PyTorch: the definition every backend is tested against.

Dense masked softmax in fp32; slow and exact. Layouts are those of `decmem.ops.block_sparse`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def block_mask(lists: Int[Tensor, "#B G Nq K"], blocks: int) -> Bool[Tensor, "B G Nq Nk"]:
    """Which key blocks each query block reads; -1 marks an empty slot of a list."""
    B, G, Nq, _ = lists.shape
    mask = torch.zeros(B, G, Nq, blocks + 1, dtype=torch.bool, device=lists.device)
    mask.scatter_(-1, torch.where(lists < 0, blocks, lists).long(), True)
    return mask[..., :blocks]


def slots_of(
    valid: Bool[Tensor, "period Pk"] | Int[Tensor, " period"] | None, slots: int
) -> Bool[Tensor, "period Pk"] | None:
    """Counts of tokens that come first in their block as the slots they are in."""
    if valid is None or valid.dtype == torch.bool:
        return valid
    return torch.arange(slots, device=valid.device) < valid[:, None]


def restored(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Stored numbers times the scale of their token, in `dtype`; as they are without a scale."""
    return x if scale is None else (x.float() * scale.float()).to(dtype)


def block_sparse_attention(
    q: Float[Tensor, "B H Nq Pq D"],
    k: Float[Tensor, "#B H Nk Pk D"],
    v: Float[Tensor, "#B H Nk Pk D"],
    lists: Int[Tensor, "#B G Nq K"],
    valid: Bool[Tensor, "period Pk"] | Int[Tensor, " period"] | None = None,
    scale: float | None = None,
    k_scale: Float[Tensor, "#B H Nk Pk 1"] | None = None,
    v_scale: Float[Tensor, "#B H Nk Pk 1"] | None = None,
) -> Float[Tensor, "B H Nq Pq D"]:
    """Every token of query block i attends densely to every token of the blocks in its list.

    Figure 4, "context-aware attention". A query block whose list is empty reads zeros.
    """
    B, H, Nq, Pq, D = q.shape
    Nk, Pk = k.shape[2:4]
    k, v = restored(k, k_scale, torch.float32), restored(v, v_scale, torch.float32)
    valid = slots_of(valid, Pk)
    mask = block_mask(lists, Nk)  # (B, G, Nq, Nk)
    mask = mask[..., None].expand(*mask.shape, Pk)
    if valid is not None:
        mask = mask & valid[torch.arange(Nk, device=valid.device) % valid.shape[0]]
    mask = mask.flatten(3)[:, :, :, None, :]  # (B, G, Nq, 1, Nk Pk)

    # Unread memory may hold anything, NaN included: blank it before it meets the arithmetic.
    read = mask.any(dim=3).any(dim=2)  # (B, G, Nk Pk): read by any query block
    keep = read[..., None].expand(B, read.shape[1], Nk * Pk, D)
    if read.shape[1] != H:
        keep = keep.expand(B, H, Nk * Pk, D)
    keys = torch.where(keep, k.flatten(2, 3).float(), 0.0)
    values = torch.where(keep, v.flatten(2, 3).float(), 0.0)

    scores = torch.einsum("bhnpd,bhkd->bhnpk", q.float(), keys)
    scores = scores * (D**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top.isinf(), 0.0, top))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return torch.einsum("bhnpk,bhkd->bhnpd", weights, values).to(q.dtype)
