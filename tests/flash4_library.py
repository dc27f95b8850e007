"""A stand-in for flash-attn-4: its conventions, by the definition."""

import sys
from collections import namedtuple
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from decmem.ops import flash4, reference

Tables = namedtuple(
    "Tables", "mask_block_cnt mask_block_idx full_block_cnt full_block_idx block_size"
)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None,
    block_sparse_tensors: Tables, block_sparse_tensors_bwd: Tables | None,
) -> tuple[Tensor, None]:  # fmt: skip
    """Not a number where nothing is listed."""
    there, back = block_sparse_tensors, block_sparse_tensors_bwd
    count, index = there.full_block_cnt, there.full_block_idx
    rows, keys = there.block_size
    assert there.mask_block_cnt.sum() == 0
    lists = torch.where(torch.arange(index.shape[3]) < count[..., None], index, -1)
    assert (back is not None) == (rows == flash4.GRADIENT_TILE)
    for table in (there, back) if back else (there,):
        # It takes no tables that lie across.
        assert all(t.is_contiguous() for t in table[:4])
    if back:
        for b, h, j in torch.cartesian_prod(*map(torch.arange, back.full_block_cnt.shape)).tolist():
            who = back.full_block_idx[b, h, j, : back.full_block_cnt[b, h, j]].tolist()
            assert who == [i for i, own in enumerate(lists[b, h].tolist()) if j in own]
    q, k, v = (
        t.transpose(1, 2).unflatten(2, (-1, n)) for t, n in ((q, rows), (k, keys), (v, keys))
    )
    out = reference.block_sparse_attention(q, k, v, lists, None, softmax_scale)
    out = torch.where(count[..., None, None] > 0, out, float("nan"))
    return out.flatten(2, 3).transpose(1, 2), None


MODULES: dict[str, dict[str, Any]] = {
    "flash_attn": {},
    "flash_attn.cute": {"flash_attn_func": flash_attn_func},
    "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": Tables},
}


def install(patch: pytest.MonkeyPatch, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes modules of that name and with these members what is imported."""
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        patch.setitem(sys.modules, name, module)
