"""Block-sparse attention by PyTorch's FlexAttention, whose compiler writes the kernel.

Always through `torch.compile`: called plainly, FlexAttention ignores which blocks are listed.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.errors import UserError
from decmem.ops.reference import slots_of


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def tile(slots: int) -> int:
    """The widest tile FlexAttention may use in a block of so many slots, 64 at most."""
    return min(64, slots & -slots)


def block_mask(
    lists: Int[Tensor, "#B G Nq K"],
    tokens: tuple[int, int],
    block: tuple[int, int],
    valid: Bool[Tensor, "period Pk"] | None = None,
) -> Any:
    """The lists as FlexAttention's block mask, for `tokens` query and key tokens in all."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = tokens[1] // block[1]
    # Indices of all key blocks: the listed ones first, in the order of the lists.
    filled = (lists >= 0).sum(-1, dtype=torch.int32)
    indices = torch.zeros(*lists.shape[:3], blocks, dtype=torch.int32, device=lists.device)
    indices[..., : lists.shape[-1]] = lists.clamp(min=0)
    if valid is None:
        nothing = torch.zeros_like(filled)
        return BlockMask.from_kv_blocks(
            nothing, torch.zeros_like(indices), filled, indices, block, seq_lengths=tokens
        )

    def holds_a_token(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return valid[key // block[1] % valid.shape[0], key % block[1]]

    return BlockMask.from_kv_blocks(
        filled, indices, BLOCK_SIZE=block, mask_mod=holds_a_token, seq_lengths=tokens
    )


def block_sparse_attention(
    q: Float[Tensor, "B H Nq Pq D"],
    k: Float[Tensor, "#B H Nk Pk D"],
    v: Float[Tensor, "#B H Nk Pk D"],
    lists: Int[Tensor, "#B G Nq K"],
    valid: Bool[Tensor, "period Pk"] | Int[Tensor, " period"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H Nq Pq D"]:
    """Contract of `decmem.ops.block_sparse`.

    Raises:
        UserError: on blocks that are no multiple of 16 slots, or more slots in a list than blocks.
    """
    B, H, Nq, Pq, D = q.shape
    Nk, Pk = k.shape[2:4]
    rows, keys = tile(Pq), tile(Pk)
    if min(rows, keys) < 16:
        raise UserError(
            "backend",
            f"'flex' takes blocks of a multiple of 16 slots, not {Pq} x {Pk}",
            "Use backend='triton'",
        )
    if lists.shape[-1] > Nk:
        lists = lists[..., :Nk]
    # The backward wants one tile to divide the other.
    both = min(rows, keys)
    options = {
        "BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_M1": both, "BLOCK_N1": both, "BLOCK_M2": both,
        "BLOCK_N2": both,
    }  # fmt: skip
    mask = block_mask(lists, (Nq * Pq, Nk * Pk), (Pq, Pk), slots_of(valid, Pk))
    k, v = (x.expand(B, H, Nk, Pk, D).flatten(2, 3) for x in (k, v))
    out = _compiled()(
        q.flatten(2, 3), k, v, block_mask=mask, scale=scale, kernel_options=options
    )  # fmt: skip
    return out.view(q.shape)
