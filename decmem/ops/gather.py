"""Block-sparse attention by gathering the listed blocks and calling PyTorch's fused attention.

Runs on every device, differentiable; the default on the CPU.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.ops.reference import slots_of


def _gathered(x: Tensor, lists: Tensor) -> Tensor:
    """The listed blocks, (B H Nq K, Pk D); worlds may share theirs.

    One flat list over worlds and heads, so that it is a single index_select.
    """
    worlds, H, Nk, Pk, D = x.shape
    B, G, Nq, K = lists.shape
    world_head = torch.arange(worlds * H, device=x.device).view(worlds, H, 1, 1) * Nk
    index = (world_head + lists).flatten()
    return x.reshape(worlds * H * Nk, Pk * D).index_select(0, index)


def block_sparse_attention(
    q: Float[Tensor, "B H Nq Pq D"],
    k: Float[Tensor, "#B H Nk Pk D"],
    v: Float[Tensor, "#B H Nk Pk D"],
    lists: Int[Tensor, "#B G Nq K"],
    valid: Bool[Tensor, "period Pk"] | Int[Tensor, " period"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H Nq Pq D"]:
    """Same contract as `decmem.ops.reference.block_sparse_attention`."""
    B, H, Nq, Pq, D = q.shape
    Nk, Pk = k.shape[2:4]
    K = lists.shape[-1]
    valid = slots_of(valid, Pk)
    lists = lists.expand(B, -1, Nq, K)
    filled = lists >= 0
    # Without empty slots no mask is needed; asking costs a synchronisation anywhere but here.
    on_cpu = not lists.is_cuda and not torch.compiler.is_compiling()
    full = valid is None and on_cpu and bool(filled.all())
    if not full:
        # An empty slot repeats a block that is read anyway (and masks it): what was never
        # selected, NaN included, does not enter the arithmetic.
        first = lists.amax(-1, keepdim=True).clamp(min=0)
        lists = torch.where(filled, lists, first)

    keys, values = (_gathered(x, lists).view(B, H * Nq, K * Pk, D) for x in (k, v))
    empty = None if full else ~filled.any(-1)
    if empty is not None and not (on_cpu and not empty.any()):
        # An empty list reads no block at all: what stands in for it is blanked.
        blank = empty.expand(B, H, Nq).reshape(B, H * Nq, 1, 1)
        keys, values = keys.masked_fill(blank, 0.0), values.masked_fill(blank, 0.0)

    mask = nothing = None
    if not full:
        slots = filled[..., None].expand(*filled.shape, Pk)
        if valid is not None:
            slots = slots & valid[lists % valid.shape[0]]
        slots = slots.flatten(3)  # (B, G, Nq, K Pk)
        nothing = ~slots.any(-1, keepdim=True)
        # A row without keys would be NaN: let it read anything and blank the result.
        mask = (slots | nothing).expand(B, H, Nq, K * Pk).reshape(B, H * Nq, 1, K * Pk)
    out = F.scaled_dot_product_attention(
        q.reshape(B, H * Nq, Pq, D), keys, values, attn_mask=mask, scale=scale
    ).view(B, H, Nq, Pq, D)
    if nothing is not None:
        out = torch.where(nothing[..., None], 0.0, out)
    return out
