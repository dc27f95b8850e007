"""Block-sparse attention by flash-attn-4, where that library is installed.

Faster than our kernels in one place measured: backward, blocks of 128 x 128 that many query blocks
read. Its kernels take no slots without a token, and are compiled when first needed, for a minute.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.errors import UserError

GRADIENT_TILE = 128
"""Tokens of the tiles in which it goes back."""


def in_tiles(
    lists: Int[Tensor, "B H Nq K"], rows: int, keys: int
) -> Int[Tensor, "B H QueryTiles KeyTiles"]:
    """Lists of blocks as lists of tiles, where a block has `rows` tiles of queries and `keys` of
    keys. Empty slots stay empty."""
    tiles = lists[..., None] * keys + torch.arange(keys, dtype=torch.int32, device=lists.device)
    tiles = torch.where(lists[..., None] < 0, -1, tiles)
    return tiles.flatten(3).repeat_interleave(rows, 2).contiguous()


def readers(
    lists: Int[Tensor, "B H Nq K"], blocks: int
) -> tuple[Int[Tensor, "B H Nk"], Int[Tensor, "B H Nk Nq"]]:
    """Who reads each key block: how many query blocks, and which, ascending, first."""
    # Empty slots name a block of their own, which is dropped.
    named = torch.where(lists < 0, blocks, lists).long()
    reads = torch.zeros(*lists.shape[:3], blocks + 1, dtype=torch.bool, device=lists.device)
    reads = reads.scatter_(-1, named, True)[..., :blocks].mT
    order = (~reads).to(torch.int8).argsort(dim=-1, stable=True)
    return reads.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


class Tables(NamedTuple):
    """Lists as the library takes them, forward and, where blocks suit it, backward."""

    forward: Any
    backward: Any

    @classmethod
    def of(cls, lists: Int[Tensor, "B H Nq K"], blocks: int, slots: int) -> "Tables":
        """For `blocks` key blocks of `slots` tokens."""
        from flash_attn.cute.block_sparsity import (  # pyright: ignore[reportMissingImports]
            BlockSparseTensorsTorch,
        )

        def table(count: Tensor, index: Tensor, tile: tuple[int, int]) -> Any:
            nothing = torch.zeros_like(count)
            return BlockSparseTensorsTorch(
                mask_block_cnt=nothing, mask_block_idx=torch.zeros_like(index),
                full_block_cnt=count, full_block_idx=index, block_size=tile,
            )  # fmt: skip

        keys = next(n for n in (1, 2, 3, 4) if slots % (16 * n) == 0 and slots // n <= 128)
        index = in_tiles(lists, 1, keys)
        count = (index >= 0).sum(-1, dtype=torch.int32)
        forward = table(count, index.clamp(min=0), (slots, slots // keys))
        back = slots == GRADIENT_TILE
        return cls(forward, table(*readers(lists, blocks), (slots, slots)) if back else None)


def attend(
    q: Float[Tensor, "B H Nq P D"], k: Float[Tensor, "B H Nk P D"],
    v: Float[Tensor, "B H Nk P D"], tables: Tables, scale: float | None = None,
) -> Float[Tensor, "B H Nq P D"]:  # fmt: skip
    """The library's attention over listed blocks; undefined where a list is empty."""
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    P = q.shape[3]
    q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
    out = flash_attn_func(
        q, k, v, softmax_scale=scale, block_sparse_tensors=tables.forward,
        block_sparse_tensors_bwd=tables.backward,
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2).unflatten(2, (-1, P))


def obstacle(q: Tensor, k: Tensor, valid: Tensor | None) -> str | None:
    """Why the library cannot take these inputs; None if it can."""
    P, D = q.shape[3:]
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn-4, which is not installed"
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        return "needs a Hopper or Blackwell GPU"
    if q.element_size() != 2 or k.dtype != q.dtype:
        return f"takes bfloat16 and float16, not {q.dtype} and {k.dtype}"
    if valid is not None:
        return "takes no slots without a token"
    if k.shape[3] != P or P % 64 or P > 192 or D % 8 or D > 128:
        return f"takes blocks of 64, 128 or 192 slots and head dims of 8 n up to 128, not {P} x {D}"
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if learning and P != GRADIENT_TILE:
        return f"has gradients for blocks of {GRADIENT_TILE} slots alone, not {P}"
    return None


@torch.compiler.disable
def block_sparse_attention(
    q: Float[Tensor, "B H Nq P D"],
    k: Float[Tensor, "#B H Nk P D"],
    v: Float[Tensor, "#B H Nk P D"],
    lists: Int[Tensor, "#B G Nq K"],
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H Nq P D"]:
    """As `decmem.ops.block_sparse.block_sparse_attention`.

    Raises:
        UserError: if the library cannot take these inputs.
    """
    reason = obstacle(q, k, valid)
    if reason is not None:
        raise UserError("backend", f"'flash4' {reason}", "Use backend='auto'")
    B, H = q.shape[:2]
    k, v = (t.expand(B, -1, -1, -1, -1) for t in (k, v))
    lists = lists.expand(B, H, -1, -1)
    out = attend(q, k, v, Tables.of(lists, k.shape[2], k.shape[3]), scale)
    some = (lists >= 0).any(-1)[..., None, None]
    return torch.where(some, out, torch.zeros_like(out))
