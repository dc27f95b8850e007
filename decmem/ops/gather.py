"""Block-sparse attention by gathering the listed blocks and calling PyTorch's fused attention.

Runs on every device, differentiable; the default on the CPU.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.ops.reference import restored, slots_of
from decmem.ops.untraced import untraced

_SLAB = 2**19
"""Numbers gathered at a time: they are read again while they are still in the cache."""


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
    """Same contract as `decmem.ops.reference.block_sparse_attention`."""
    Pk = k.shape[3]
    valid = slots_of(valid, Pk)
    lists = lists.expand(len(q), -1, -1, -1)
    filled = lists >= 0
    # Without empty slots no mask is needed; asking costs a synchronisation anywhere but here.
    on_cpu = not lists.is_cuda and not torch.compiler.is_compiling()
    full = valid is None and on_cpu and bool(filled.all())
    slots = empty = nothing = None
    if not full:
        # An empty slot repeats a block that is read anyway (and masks it): what was never
        # selected, NaN included, does not enter the arithmetic.
        first = lists.amax(-1, keepdim=True).clamp(min=0)
        lists = torch.where(filled, lists, first)
        empty = ~filled.any(-1)
        slots = filled[..., None].expand(*filled.shape, Pk)
        if valid is not None:
            slots = slots & valid[lists % valid.shape[0]]
        slots = slots.flatten(3)  # (B, G, Nq, K Pk)
        nothing = ~slots.any(-1, keepdim=True)
        # A row without keys would be NaN: let it read anything and blank the result.
        slots = slots | nothing
    if untraced(q) and lists.shape[1] == 1 and k_scale is None:
        out = _slab_by_slab(q, k, v, lists, slots, scale)
    else:
        if empty is not None and on_cpu and not empty.any():
            empty = None
        out = _at_once(q, (k, k_scale), (v, v_scale), lists, slots, empty, scale)
    return out if nothing is None else torch.where(nothing[..., None], 0.0, out)


def _at_once(
    q: Float[Tensor, "B H Nq Pq D"],
    stored_keys: tuple[Tensor, Tensor | None],
    stored_values: tuple[Tensor, Tensor | None],
    lists: Int[Tensor, "B G Nq K"],
    slots: Bool[Tensor, "B G Nq KPk"] | None,
    empty: Bool[Tensor, "B G Nq"] | None,
    scale: float | None,
) -> Float[Tensor, "B H Nq Pq D"]:
    """One flat list of blocks over batch and heads, so that the gather is a single index_select.

    Keys and values come with the scales they are stored with, if any: only what is gathered is
    restored.
    """
    B, H, Nq, Pq, D = q.shape
    worlds, _, Nk, Pk, _ = stored_keys[0].shape
    K = lists.shape[-1]
    world_head = torch.arange(worlds * H, device=q.device).view(worlds, H, 1, 1) * Nk
    index = (world_head + lists).flatten()

    def gathered(x: Tensor) -> Tensor:
        found = x.reshape(worlds * H * Nk, -1).index_select(0, index)
        return found.view(B, H * Nq, K * Pk, x.shape[-1])

    keys, values = (
        restored(gathered(x), None if scales is None else gathered(scales), q.dtype)
        for x, scales in (stored_keys, stored_values)
    )
    if empty is not None:
        # An empty list reads no block at all: what stands in for it is blanked.
        blank = empty.expand(B, H, Nq).reshape(B, H * Nq, 1, 1)
        keys, values = keys.masked_fill(blank, 0.0), values.masked_fill(blank, 0.0)
    mask = None
    if slots is not None:
        mask = slots.expand(B, H, Nq, K * Pk).reshape(B, H * Nq, 1, K * Pk)
    out = F.scaled_dot_product_attention(
        q.reshape(B, H * Nq, Pq, D), keys, values, attn_mask=mask, scale=scale
    )
    return out.view(B, H, Nq, Pq, D)


def _slab_by_slab(
    q: Float[Tensor, "B H Nq Pq D"],
    k: Float[Tensor, "#B H Nk Pk D"],
    v: Float[Tensor, "#B H Nk Pk D"],
    lists: Int[Tensor, "B 1 Nq K"],
    slots: Bool[Tensor, "B 1 Nq KPk"] | None,
    scale: float | None,
) -> Float[Tensor, "B H Nq Pq D"]:
    """The short cut for lists that heads share: a few query blocks after another.

    Where the heads of a token lie side by side (`decmem.memory.bank`) a block of all heads is one
    piece of memory. What is gathered goes into one place again and again: fresh memory of that
    size costs more than the copy.
    """
    B, H, Nq, Pq, D = q.shape
    worlds, _, Nk, Pk, _ = k.shape
    K = lists.shape[-1]
    queries = q.movedim(1, 3).reshape(B * Nq, Pq, H, D)
    stored = [x.movedim(1, 3).reshape(worlds * Nk, Pk * H * D) for x in (k, v)]
    world = torch.arange(worlds)[:, None, None] * Nk
    index = (world + lists[:, 0]).view(B * Nq, K)
    mask = None if slots is None else slots.view(B * Nq, 1, 1, K * Pk)
    slabs = -(-B * Nq * K * Pk * H * D // _SLAB)
    size = -(-B * Nq // slabs)
    places = [x.new_empty(size * K, Pk * H * D) for x in (k, v)]
    out = torch.empty_like(queries)
    for first in range(0, B * Nq, size):
        part = slice(first, min(first + size, B * Nq))
        count, chosen = part.stop - first, index[part].flatten()
        keys, values = (
            torch.index_select(x, 0, chosen, out=place[: len(chosen)])
            .view(count, K * Pk, H, D)
            .transpose(1, 2)
            for x, place in zip(stored, places, strict=True)
        )
        seen = None if mask is None else mask[part]
        out[part] = F.scaled_dot_product_attention(
            queries[part].transpose(1, 2), keys, values, attn_mask=seen, scale=scale
        ).transpose(1, 2)
    return out.view(B, Nq, Pq, H, D).movedim(3, 1)
