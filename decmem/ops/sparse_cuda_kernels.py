"""Block-sparse attention for Hopper GPUs, forward, in CUDA C++: `sparse_cuda.cu`, launched.

One kernel is compiled per shape of blocks.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from decmem.ops.cuda_module import BoxMap, Kernel, box_map, compiled, compiler_found, defined, texts
from decmem.ops.matrix_instructions import products, weighted
from decmem.ops.sparse_forward_kernels import Parts, gated, merge
from decmem.ops.sparse_tiles import (
    LOG2E,
    Blocks,
    CudaTiles,
    blocks,
    cdiv,
    cuda_split_of,
    cuda_tiles,
    rest_columns,
)

LIST_ENTRY = 8
"""Bytes of shared memory for each listed block."""


def source(
    PQ: int, PK: int, D: int, tiles: CudaTiles, *, masked: bool, half: bool = False, gate: int = 0,
    exponents: bool = False, partial: bool = False, rowed: bool = False,
    alm_type: str = "unsigned short", gate_type: str = "unsigned short",
) -> str:  # fmt: skip
    """The kernel for one shape; `gate`: columns of the gate, 0 without a local branch;
    `exponents`: products of queries and keys are exponents of two, with no factor; `rowed`: rows of
    queries and results lie where a table tells."""
    constants = {
        "D": D, "PQ": PQ, "PK": PK, "SPAN": tiles.span, "UNIT": tiles.unit,
        "MASKED": int(masked), "WHOLE": int(not masked and PK % tiles.span == 0),
        "GROUPS": tiles.groups, "STAGES": tiles.stages, "HELD": int(tiles.held),
        "HALF": int(half), "GATED": gate, "PARTIAL": int(partial), "ROWED": int(rowed),
        # float16 does not reach far enough.
        "STEADY": int(not half), "EXPONENTS": int(exponents and not half),
        "out_t": "float" if partial else "unsigned short", "alm_t": alm_type, "gate_t": gate_type,
    }  # fmt: skip
    instructions = products({tiles.span}, half) + weighted(D, half)
    return defined(constants) + instructions + texts("numbers", "hopper", "listed", "sparse")


@functools.cache
def _kernel(device: torch.device, PQ: int, PK: int, D: int, tiles: CudaTiles, **kinds) -> Kernel:
    code = compiled(source(PQ, PK, D, tiles, **kinds), "sm_90a")
    return Kernel(code, "forward", "shared_bytes", device)


def obstacle(q: Tensor, k: Tensor, valid: Tensor | None, slots: int) -> str | None:
    """Why these kernels cannot take these inputs and lists of so many `slots`; None if they can."""
    PQ, PK, D = q.shape[3], k.shape[3], q.shape[4]
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "needs a Hopper GPU"
    if not compiler_found():
        return "needs NVRTC, the compiler that comes with PyTorch for CUDA"
    if q.element_size() != 2:
        return f"takes bfloat16 and float16, not {q.dtype}"
    if D % 8 or not 32 <= D <= 128:
        return f"takes head dims from 32 to 128 in multiples of 8, not {D}"
    if valid is not None and valid.dtype == torch.bool:
        return "takes `valid` as counts, not as slots"
    tiles = cuda_tiles(PQ, PK, D, valid is not None)
    if PQ <= 32 or tiles is None:
        return f"takes blocks of more than 32 slots of queries, 16 n of keys, not {PQ} x {PK}"
    most = tiles.room(D) // LIST_ENTRY - 1
    return None if slots <= most else f"takes lists of {most} blocks at most here, not {slots}"


def _split_of(programs: int, tiles: CudaTiles, slots: int, device: torch.device) -> int:
    """Parts to cut lists into. Two rounds of programs and more are left as they are: at its power
    limit the GPU runs faster where some multiprocessors idle, so that a last round that is not
    full costs less than putting parts together."""
    if programs >= 2 * torch.cuda.get_device_properties(device).multi_processor_count:
        return 1
    return cuda_split_of(programs, tiles.groups, slots, device)


def boxes(x: Blocks, heights: Sequence[int], width: int) -> BoxMap:
    """The lines of `x`, from its first to its last, for the copy engine."""
    B, H, N, P, D = x.tensor.shape
    lines = ((B - 1) * x.world + (H - 1) * x.head + N) * P
    return box_map(x.tensor, lines, D, heights, width)


def _element(x: Tensor | None) -> str:
    return "float" if x is not None and x.dtype == torch.float32 else "unsigned short"


def _readable(x: Tensor | None, q: Tensor) -> Tensor | None:
    """`x` in a type that the kernel reads."""
    return x if x is None or x.dtype in (q.dtype, torch.float32) else x.to(q.dtype)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    sizes: tuple[int, int, int], tiles: CudaTiles, target: Parts, alm: Tensor | None = None,
    gate: Tensor | None = None, split: int = 1, rows: Tensor | None = None,
    lines: tuple[int, int, int, int] = (0, 0, 0, 0), early: bool = False,
) -> None:  # fmt: skip
    """`sizes`: worlds of queries, their blocks, rows of a block. `rows`, `lines`: as the kernel
    takes them; `early`: as `Kernel.launch`."""
    (B, NQ, PQ), H, D = sizes, q.shape[1], q.shape[-1]
    keys, values, slots = blocks(k), blocks(v), lists.shape[-1]
    kernel = _kernel(
        q.device, PQ, k.shape[3], D, tiles, masked=valid is not None,
        half=q.dtype == torch.float16, gate=gated(gate), exponents=abs(scale * LOG2E - 1) < 1e-9,
        partial=split > 1, rowed=rows is not None,
        alm_type=_element(alm), gate_type=_element(gate),
    )  # fmt: skip
    kernel.launch(
        B * H * NQ * cdiv(PQ, 64 * tiles.groups) * split, 128 * (tiles.groups + 1),
        (slots + 1) * LIST_ENTRY,
        q, boxes(keys, tiles.heights, 64), boxes(keys, tiles.heights, rest_columns(D) or 16),
        boxes(values, tiles.heights, 64),
        lists, valid, *target, alm, gate,
        B, H, lists.shape[1], NQ, slots, 0 if lists.shape[0] == 1 else lists.stride(0),
        keys.world, keys.head, values.world, values.head,
        0 if valid is None else valid.shape[0], split, rows, *lines, float(scale * LOG2E),
        early=early,
    )  # fmt: skip


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    alm: Tensor | None = None, gate: Tensor | None = None, split: int | None = None,
    tiles: CudaTiles | None = None, early: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `sparse_forward_kernels.run_forward`, for inputs without an `obstacle`; `early`: as
    `Kernel.launch`, of another forward pass that came just before."""
    B, H, NQ, PQ, D = q.shape
    PK = k.shape[3]
    tiles = tiles or cuda_tiles(PQ, PK, D, valid is not None)
    assert tiles is not None
    if split is None:
        programs = B * H * NQ * cdiv(PQ, 64 * tiles.groups)
        split = _split_of(programs, tiles, lists.shape[-1] * PK, q.device)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:4], dtype=torch.float32)
    target = Parts(out, lse) if split == 1 else Parts.like(q, split)
    alm, gate = _readable(alm, q), _readable(gate, q)
    joined = (alm, gate) if split == 1 else (None, None)
    _launch(
        q, k, v, lists, valid, scale, (B, NQ, PQ), tiles, target, *joined, split=split, early=early
    )  # fmt: skip
    if split > 1:
        merge(target, out, lse, alm, gate)
    return out, lse


def run_rows(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    rows: Tensor, lines: int = 0,
) -> Tensor:  # fmt: skip
    """As the operator `decmem::rows_attention`."""
    B, H, L, D = q.shape
    NQ, PQ = rows.shape[:2]
    tiles = cuda_tiles(PQ, k.shape[3], D, valid is not None)
    assert tiles is not None
    out = q.new_empty(B, lines, H, D) if lines else torch.empty_like(q)
    places = (lines * H * D, D, H * D) if lines else (H * L * D, L * D, D)
    target = Parts(out, q.new_empty(0, dtype=torch.float32))
    _launch(
        q, k, v, lists, valid, scale, (B, NQ, PQ), tiles, target, rows=rows, lines=(L, *places)
    )  # fmt: skip
    return out


def run_near_and_far(
    q: Tensor, k: Tensor, v: Tensor, near: Tensor, rows: Tensor, far: Tensor,
    valid: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the operator `decmem::near_and_far`."""
    # What the first kernel writes is held: the second is given its room while that may still run.
    o_near = run_rows(q, k, v, near, valid, scale, rows)
    blocks = q.unflatten(2, (far.shape[2], -1))
    o_far, _ = run_forward(blocks, k, v, far, valid, scale, early=True)
    return o_near, o_far.view_as(q)
