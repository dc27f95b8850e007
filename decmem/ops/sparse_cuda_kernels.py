"""Block-sparse attention for Hopper GPUs, forward, in CUDA C++: `sparse_cuda.cu`, launched.

Faster than the same in Gluon (`sparse_hopper_kernels`), which stays for what this does not take and
for the backward. One kernel is compiled per shape of blocks.
"""

import functools
from importlib import resources

import torch
from torch import Tensor

from decmem.ops.cuda_module import Kernel, box_map, compiled, compiler_found
from decmem.ops.sparse_forward_kernels import Parts, gated, merge
from decmem.ops.sparse_tiles import (
    LOG2E,
    Blocks,
    CudaTiles,
    blocks,
    cdiv,
    cuda_tiles,
    hopper_split_of,
    rest_columns,
)

_LIST_ENTRY = 8
"""Bytes of shared memory for each listed block."""


def _matrix_instruction(
    name: str, width: int, room: str, *, of_registers: bool, fresh: bool, half: bool
) -> str:
    """A function of one instruction: 64 rows times 16 deep times `width` columns, added to `d`.

    The left side comes from registers (weights, met with values) or shared memory (queries, met
    with keys); `fresh` overwrites `d`.
    """
    results = width // 2
    d = ", ".join(f"%{i}" for i in range(results))
    if of_registers:
        left, right = ", ".join(f"%{results + i}" for i in range(4)), f"%{results + 4}"
        left, taken = f"{{{left}}}", "const unsigned (&a)[4]"
        given = ", ".join(f'"r"(a[{i}])' for i in range(4))
    else:
        left, right, taken, given = (
            f"%{results}",
            f"%{results + 1}",
            "unsigned long long a",
            '"l"(a)',
        )
    kind = "f16" if half else "bf16"
    # Scaled by 1 and 1; values are stored with their columns side by side, all else by rows.
    flags = "1, 1, 1" if of_registers else "1, 1, 0, 0"
    written = ", ".join(f'"{"=" if fresh else "+"}f"(d[{i}])' for i in range(results))
    return (
        f"__device__ __forceinline__ void {name}"
        f"(float (&d)[{room}], {taken}, unsigned long long b) {{\n"
        f'  asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, {int(not fresh)}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} '
        f'{{{d}}}, {left}, {right}, more, {flags};\\n}}"\n'
        f'      : {written} : {given}, "l"(b));\n}}\n'
    )


def source(
    PQ: int, PK: int, D: int, tiles: CudaTiles, *, half: bool = False, gate: int = 0,
    partial: bool = False, alm_type: str = "unsigned short", gate_type: str = "unsigned short",
) -> str:  # fmt: skip
    """The kernel for one shape; `gate`: columns of the gate, 0 without a local branch."""
    constants = {
        "D": D, "PQ": PQ, "PK": PK, "SPAN": tiles.span, "BRIEF": tiles.brief,
        "GROUPS": tiles.groups, "STAGES": tiles.stages, "AHEAD": int(tiles.ahead),
        "HALF": int(half), "GATED": gate, "PARTIAL": int(partial),
        # float16 does not reach far enough.
        "STEADY": int(not half),
        "out_t": "float" if partial else "unsigned short", "alm_t": alm_type, "gate_t": gate_type,
    }  # fmt: skip
    scores = "template <int W> struct Scores;\n"
    for width in sorted({tiles.span, tiles.brief}):
        both = [
            "static "
            + _matrix_instruction(
                name, width, "SPAN / 2", of_registers=False, fresh=name == "first", half=half
            )
            for name in ("first", "more")
        ]
        scores += f"template <> struct Scores<{width}> {{\n{''.join(both)}}};\n"
    weighted = _matrix_instruction(
        "weighted", D, "D / 2", of_registers=True, fresh=False, half=half
    )
    defined = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    text = resources.files("decmem.ops").joinpath("sparse_cuda.cu").read_text(encoding="utf-8")
    return defined + scores + weighted + text


@functools.cache
def _kernel(device: torch.device, PQ: int, PK: int, D: int, tiles: CudaTiles, **kinds) -> Kernel:
    code = compiled(source(PQ, PK, D, tiles, **kinds), "sm_90a")
    return Kernel(code, "forward", "shared_bytes", device)


def suits(q: Tensor, k: Tensor, valid: Tensor | None, slots: int) -> bool:
    """Whether these kernels take inputs that have no `sparse_hopper_kernels.obstacle`.

    `slots`: blocks that a list may name.
    """
    tiles = cuda_tiles(q.shape[3], k.shape[3], q.shape[4], valid is not None)
    return compiler_found() and tiles is not None and slots * _LIST_ENTRY <= tiles.room(q.shape[4])


def _split_of(programs: int, tiles: CudaTiles, slots: int, device: torch.device) -> int:
    """Parts to cut lists into. Two rounds of programs and more are left as they are: at its power
    limit the GPU runs faster where some multiprocessors idle, so that a last round that is not
    full costs less than putting parts together."""
    if programs >= 2 * torch.cuda.get_device_properties(device).multi_processor_count:
        return 1
    return hopper_split_of(programs, tiles.groups, slots, device)


def _boxes(x: Blocks, tiles: CudaTiles, width: int):
    """The lines of `x`, from its first to its last, for the copy engine."""
    B, H, N, P, D = x.tensor.shape
    lines = ((B - 1) * x.world + (H - 1) * x.head + N) * P
    return box_map(x.tensor, lines, D, (tiles.span, width))


def _element(x: Tensor | None) -> str:
    return "float" if x is not None and x.dtype == torch.float32 else "unsigned short"


def _readable(x: Tensor | None, q: Tensor) -> Tensor | None:
    """`x` in a type that the kernel reads."""
    return x if x is None or x.dtype in (q.dtype, torch.float32) else x.to(q.dtype)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    alm: Tensor | None = None, gate: Tensor | None = None, split: int | None = None,
    tiles: CudaTiles | None = None, heads_last: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `sparse_kernels.run_forward`, for inputs that these kernels take (`suits`).

    `heads_last`: the output is (B, Nq, Pq, H, D); not with a local branch.
    """
    B, H, NQ, PQ, D = q.shape
    PK, slots = k.shape[3], lists.shape[-1]
    tiles = tiles or cuda_tiles(PQ, PK, D, valid is not None)
    assert tiles is not None
    keys, values = blocks(k), blocks(v)
    programs = B * H * NQ * cdiv(PQ, 64 * tiles.groups)
    if split is None:
        split = _split_of(programs, tiles, slots * PK, q.device)
    split = 1 if heads_last else split
    out = q.new_empty(B, NQ, PQ, H, D) if heads_last else torch.empty_like(q)
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    target = Parts(out, lse) if split == 1 else Parts.like(q, split)
    alm, gate = _readable(alm, q), _readable(gate, q)
    joined = (alm, gate) if split == 1 else (None, None)
    kernel = _kernel(
        q.device, PQ, PK, D, tiles, half=q.dtype == torch.float16, gate=gated(joined[1]),
        partial=split > 1, alm_type=_element(joined[0]), gate_type=_element(joined[1]),
    )  # fmt: skip
    rest = rest_columns(D)
    kernel.launch(
        programs * split, 128 * tiles.groups, slots * _LIST_ENTRY,
        q, _boxes(keys, tiles, 64), _boxes(keys, tiles, rest or 16), _boxes(values, tiles, 64),
        lists, valid, *target, *joined,
        B, H, lists.shape[1], NQ, slots, 0 if lists.shape[0] == 1 else lists.stride(0),
        keys.world, keys.head, values.world, values.head,
        0 if valid is None else valid.shape[0], split, int(heads_last), float(scale * LOG2E),
    )  # fmt: skip
    if split > 1:
        merge(target, out, lse, alm, gate)
    return out, lse
