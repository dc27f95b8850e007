"""Blocks stored in 8 bits, restored in Triton for kernels that read 16: only those in a list."""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from decmem.ops.sparse_tiles import Blocks, blocks

_STEP = 2048
"""Numbers restored at a time."""


@triton.jit
@no_type_check
def _restored(
    X, SCALE, OUT, at, D: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """One block; `RUN` numbers side by side are of one token."""
    for start in range(0, SIZE, STEP):
        run = start + tl.arange(0, STEP // RUN) * RUN
        scale = tl.load(SCALE + run // D, mask=run < SIZE, other=0.0).to(tl.float32)
        i = run[:, None] + tl.arange(0, RUN)[None, :]
        inside = i < SIZE
        x = tl.load(X + i, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        tl.store(OUT + at + i, x.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "G", "NK", "k_world", "k_head", "v_world", "v_head"])
@no_type_check
def restore_kernel(
    K, V, K_SCALE, V_SCALE, K_OUT, V_OUT, READ, H, G, NK, k_world, k_head, v_world, v_head,
    PK: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A program has one block of one head. READ is (worlds, G, NK + 1); the last says nothing."""
    pid = tl.program_id(0)
    j = pid % NK
    h = (pid // NK) % H
    b = pid // (NK * H)
    SIZE: tl.constexpr = PK * D
    if tl.load(READ + (b * G + tl.where(G > 1, h, 0)) * (NK + 1) + j) != 0:
        at = ((b * H + h) * NK + j).to(tl.int64) * SIZE
        k = (b * k_world + h * k_head + j).to(tl.int64)
        v = (b * v_world + h * v_head + j).to(tl.int64)
        _restored(K + k * SIZE, K_SCALE + k * PK, K_OUT, at, D, SIZE, STEP, RUN)
        _restored(V + v * SIZE, V_SCALE + v * PK, V_OUT, at, D, SIZE, STEP, RUN)


def alike(x: Tensor, scale: Tensor | None) -> tuple[Blocks, Tensor | None]:
    """Blocks and their scales, which lie in memory as far apart."""
    found = blocks(x)
    if scale is None:
        return found, None
    scales = blocks(scale)
    if found[1:] != scales[1:]:
        found, scales = blocks(x.contiguous()), blocks(scale.contiguous())
    return found, scales.tensor


def restore_listed(
    k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, lists: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values in `dtype`; blocks in no list are left undefined."""
    worlds, H, NK, PK, D = k.shape
    G = lists.shape[1]
    read = torch.zeros(lists.shape[0], G, NK + 1, dtype=torch.int8, device=k.device)
    read.scatter_(-1, torch.where(lists < 0, NK, lists).flatten(2).long(), 1)
    if worlds != len(read):
        # Worlds share keys, or lists.
        read = read.amax(0, keepdim=True).expand(worlds, -1, -1).contiguous()
    keys, k_scales = alike(k, k_scale)
    values, v_scales = alike(v, v_scale)
    k_out, v_out = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    restore_kernel[(worlds * H * NK,)](
        keys.tensor, values.tensor, k_scales, v_scales, k_out, v_out, read, H, G, NK,
        keys.world, keys.head, values.world, values.head, PK=PK, D=D, STEP=_STEP,
        RUN=math.gcd(D, 8),
    )  # fmt: skip
    return k_out, v_out
