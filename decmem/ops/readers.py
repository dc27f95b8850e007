"""Who reads each key block: lists turned round, for gradients of keys and values."""

import torch
from jaxtyping import Int
from torch import Tensor

try:
    from decmem.ops import readers_cuda_kernels
except ImportError:  # The driver's Python bindings come with PyTorch for CUDA.
    readers_cuda_kernels = None


def inverse_lists(
    lists: Int[Tensor, "B G Nq K"], blocks: int
) -> tuple[Int[Tensor, "B G entries"], Int[Tensor, "B G offsets"]]:
    """Query blocks sorted by the key block they read, ascending for each, and offsets.

    Args:
        lists: int32, -1 where empty; no block is listed twice in one list.
        blocks: number of key blocks Nk.

    Returns:
        readers, int32, in Nq K places, of which the first `offsets[..., Nk]` count, and offsets
        of the Nk key blocks and one more, int32.
    """
    if readers_cuda_kernels is not None and readers_cuda_kernels.suits(lists, blocks):
        return readers_cuda_kernels.run_inverse(lists, blocks)
    B, G, Nq, K = lists.shape
    flat = torch.where(lists < 0, blocks, lists).reshape(B, G, Nq * K)
    flat, order = flat.sort(dim=-1, stable=True)
    edges = torch.arange(blocks + 1, dtype=flat.dtype, device=flat.device).expand(B, G, -1)
    offsets = torch.searchsorted(flat, edges.contiguous())
    return (order // K).to(torch.int32), offsets.to(torch.int32)
