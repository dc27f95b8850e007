"""Block-sparse attention for Hopper GPUs, backward, in CUDA C++, launched.

dQ is `sparse_query_gradient_cuda.cu`, dK and dV are `sparse_key_gradient_cuda.cu`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decmem.ops.cuda_module import Kernel, compiled, defined, texts
from decmem.ops.matrix_instructions import products, weighted
from decmem.ops.readers import inverse_lists
from decmem.ops.sparse_cuda_kernels import LIST_ENTRY, boxes
from decmem.ops.sparse_tiles import (
    LOG2E,
    CudaKeyTiles,
    CudaQueryTiles,
    blocks,
    cdiv,
    cuda_key_tiles,
    cuda_query_tiles,
    rest_columns,
)


def query_source(
    PQ: int, PK: int, D: int, tiles: CudaQueryTiles, masked: bool, *, half: bool = False
) -> str:
    """The kernel of dQ for one shape."""
    constants = {
        "D": D, "PQ": PQ, "PK": PK, "SPAN": tiles.span, "UNIT": tiles.unit,
        "MASKED": int(masked), "WHOLE": int(not masked and PK % tiles.span == 0),
        "GROUPS": tiles.groups, "STAGES": tiles.stages, "HALF": int(half),
    }  # fmt: skip
    instructions = products({tiles.span}, half) + weighted(D, half)
    names = "numbers", "hopper", "listed", "sparse_query_gradient"
    return defined(constants) + instructions + texts(*names)


def key_source(PQ: int, PK: int, D: int, tiles: CudaKeyTiles, *, half: bool = False) -> str:
    """The kernel of dK and dV for one shape."""
    # What the register file has for three groups and one more, or for two.
    registers, spared = (160, 32) if tiles.groups == 3 else (240, 24)
    constants = {
        "D": D, "PQ": PQ, "PK": PK, "SPAN": tiles.span, "GROUPS": tiles.groups,
        "STAGES": tiles.stages, "REGISTERS": registers, "SPARED": spared,
        "AHEAD": int(tiles.groups == 2),
        "HALF": int(half),
    }  # fmt: skip
    instructions = products({tiles.span}, half) + weighted(D, half)
    return defined(constants) + instructions + texts("numbers", "hopper", "sparse_key_gradient")


@functools.cache
def _kernel(name: str, device: torch.device, source: Callable[..., str], *shape: Any) -> Kernel:
    """The kernel of that name for one shape: what `source` takes, and whether it is float16."""
    *sizes, half = shape
    return Kernel(compiled(source(*sizes, half=half), "sm_90a"), name, "shared_bytes", device)


def suits_queries(q: Tensor, k: Tensor, valid: Tensor | None, slots: int) -> bool:
    """Whether dQ is taken of inputs that have no `sparse_cuda_kernels.obstacle`."""
    PQ, PK, D = q.shape[3], k.shape[3], q.shape[4]
    tiles = cuda_query_tiles(PQ, PK, D, valid is not None)
    return tiles is not None and (slots + 1) * LIST_ENTRY <= tiles.room(D)


def suits_keys(q: Tensor, k: Tensor) -> bool:
    """The same for dK and dV: not of keys that worlds share."""
    tiles = cuda_key_tiles(q.shape[3], k.shape[3], q.shape[4])
    return tiles is not None and k.shape[0] == q.shape[0]


def run_query_gradient(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    grad: Tensor, lse: Tensor, delta: Tensor, tiles: CudaQueryTiles | None = None,
) -> Tensor:  # fmt: skip
    """dQ."""
    B, H, NQ, PQ, D = q.shape
    PK, slots = k.shape[3], lists.shape[-1]
    tiles = tiles or cuda_query_tiles(PQ, PK, D, valid is not None)
    assert tiles is not None
    keys, values, dq = blocks(k), blocks(v), torch.empty_like(q)
    half = q.dtype == torch.float16
    kernel = _kernel(
        "query_gradient", q.device, query_source, PQ, PK, D, tiles, valid is not None, half
    )
    kernel.launch(
        B * H * NQ * cdiv(PQ, 64 * tiles.groups), 128 * (tiles.groups + 1),
        (slots + 1) * LIST_ENTRY,
        q, boxes(keys, tiles.heights, 64), boxes(values, tiles.heights, 64),
        boxes(values, tiles.heights, rest_columns(D) or 16), lists, valid, grad, lse, delta, dq,
        B, H, lists.shape[1], NQ, slots, 0 if lists.shape[0] == 1 else lists.stride(0),
        keys.world, keys.head, values.world, values.head,
        0 if valid is None else valid.shape[0], float(scale), float(scale * LOG2E),
    )  # fmt: skip
    return dq


def run_key_gradient(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    grad: Tensor, lse: Tensor, delta: Tensor, tiles: CudaKeyTiles | None = None,
    inverse: tuple[Tensor, Tensor] | None = None, taken: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV. With `inverse` lists and `taken`, a zero, that were there before, the kernel may
    begin where the one launched just before it, that of dQ, leaves multiprocessors idle."""
    B, H, NQ, PQ, D = q.shape
    NK, PK = k.shape[2:4]
    tiles = tiles or cuda_key_tiles(PQ, PK, D)
    assert tiles is not None
    readers, offsets = inverse or inverse_lists(lists, NK)
    keys, values = blocks(k), blocks(v)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    widths = (64, rest_columns(D) or 16)
    early = inverse is not None and taken is not None
    taken = torch.zeros(1, dtype=torch.int32, device=q.device) if taken is None else taken
    half = q.dtype == torch.float16
    kernel = _kernel("key_gradient", q.device, key_source, PQ, PK, D, tiles, half)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    kernel.launch(
        min(programs, B * H * NK), 128 * (tiles.groups + 1), 0,
        *(boxes(x, [PK], width) for x in (keys, values) for width in widths),
        *(boxes(blocks(x), [tiles.span], 64) for x in (q, grad)),
        *(boxes(blocks(x), [PK], width) for x in (dk, dv) for width in widths),
        dk, dv, readers, offsets, valid, lse, delta, taken,
        B, H, lists.shape[1], NQ, NK, readers.shape[-1], int(lists.shape[0] > 1),
        keys.world, keys.head, values.world, values.head,
        0 if valid is None else valid.shape[0], float(scale), float(scale * LOG2E), early=early,
    )  # fmt: skip
    return dk, dv
