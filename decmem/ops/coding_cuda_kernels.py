"""Coding of heads in CUDA C++ (`coding_cuda.cu`), forward, on any NVIDIA GPU that has bfloat16.

What it computes, and its other form in Triton, which has the gradients: `coding_kernels`.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from decmem.ops.cuda_module import Kernel, compiled, compiler_found, defined, texts
from decmem.ops.fp8 import LARGEST, LEAST
from decmem.ops.sparse_tiles import cdiv

_THREADS = 256
_ROOM = 96 * 1024
"""Shared memory, in bytes, beyond which too few programs run side by side."""


def suits(x: Tensor, heads: int, groups: list[int], *others: Tensor | None) -> bool:
    """Whether these kernels take heads of such groups, and `others` with them."""
    if not x.is_cuda or not compiler_found():
        return False
    alike = all(other is None or other.dtype == x.dtype for other in others)
    whole = sum(groups) % 8 == 0 and groups[0] % 4 == 0
    fits = _shared_bytes(3, heads, sum(groups)) <= _ROOM
    modern = torch.cuda.get_device_capability(x.device) >= (8, 0)
    return modern and x.element_size() == 2 and alike and whole and fits


def _tokens(heads: int, D: int) -> int:
    """Of a program: few, so that the last round of programs is short, but with work for all
    threads."""
    return 2 if heads * D >= 4 * _THREADS else 4


def _shared_bytes(parts: int, heads: int, D: int) -> int:
    """Of `parts` rows of each head, rotations and matrices of each token, and norms."""
    return _tokens(heads, D) * (parts * heads * D * 2 + D * 8 + 128 + 8 * heads)


def source(groups: list[int], *, heads: int, tokens: int, half: bool, **kinds: bool) -> str:
    """The kernels for heads whose channels lie in these groups; `kinds`: what else is defined in
    front of `coding_cuda.cu`, 0 where it is not named."""
    camera, space, surface, time = groups
    D = sum(groups)
    constants: dict[str, int | str] = {
        "D": D, "CAMERA": camera, "SPACE": space, "SURFACE": surface, "TIME": time, "H": heads,
        "TOKENS": tokens, "THREADS": _THREADS, "HALF": int(half),
        "LARGEST": f"{LARGEST}f", "LEAST": f"{LEAST}f",
    }  # fmt: skip
    for kind in (
        "turned", "normed", "timed", "local", "values", "heads_last", "slotted", "packed",
        "gated", "per_head", "rounded",
    ):  # fmt: skip
        constants[kind.upper()] = int(kinds.get(kind, False))
    return defined(constants) + texts("numbers", "coding")


@functools.cache
def _kernel(
    name: str, device: torch.device, groups: tuple[int, ...], heads: int, tokens: int, **kinds: bool
) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    text = source(list(groups), heads=heads, tokens=tokens, **kinds)
    code = compiled(text, f"sm_{major}{minor}")
    return Kernel(code, name, "shared_bytes", device)


def run_encode(
    qkv: Tensor, gains: Tensor | None, tables: tuple[Tensor | None, ...], out: list[Tensor],
    groups: list[int], eps: float, *, local: bool, values: bool, heads_last: bool,
    latents: int | None = None, slots: Tensor | None = None, source: Tensor | None = None,
    query_factor: float = 1.0,
) -> None:  # fmt: skip
    """As the operator `decmem::encode_heads`, into `out`, for inputs that `suits` takes.

    `tables`: both matrices, then cosines and sines of space, surface and time. `latents`: for which
    `out` has room in each head's keys and values, None if for those of `qkv`; `slots`:
    where these lie there, None if in front. `source`: the token of each slot, None if there are as
    many of both. `query_factor`: what queries are multiplied by.
    """
    B, T, N, channels = qkv.shape
    D, S = sum(groups), N if source is None else len(source)
    H, tokens = channels // (3 * D), B * T * S
    each = _tokens(H, D)
    timed = tables[6] is not None
    kernel = _kernel(
        "encode", qkv.device, tuple(groups), H, each, half=qkv.dtype == torch.float16,
        turned=tables[4] is not None, normed=gains is not None, timed=timed and not local,
        local=local, values=values, heads_last=heads_last, slotted=slots is not None,
        packed=source is not None,
    )  # fmt: skip
    kernel.launch(
        cdiv(tokens, each), _THREADS, _shared_bytes(3, H, D), qkv, gains, *tables, *out,
        slots, source, tokens, T, S, N, latents or T, eps, query_factor,
    )  # fmt: skip


def run_decode(
    o: Tensor, far: Tensor | None, gate: Tensor | None, tables: Sequence[Tensor | None],
    groups: list[int], out: Tensor, scale: Tensor | None = None, kept: Tensor | None = None,
) -> None:  # fmt: skip
    """As the operator `decmem::decode_heads`, into `out`, for inputs that `suits` takes; in 8 bits
    with a `scale` for each row. `tables`: the matrix, then cosines and sines of space and surface.
    `kept`: slots that hold tokens, None if all do."""
    B, H, T, S, D = o.shape
    N = S if kept is None else len(kept)
    each = _tokens(H, D)
    kernel = _kernel(
        "decode", o.device, tuple(groups), H, each, half=o.dtype == torch.float16,
        turned=tables[3] is not None, gated=far is not None,
        per_head=gate is not None and gate.shape[-1] == H, rounded=scale is not None,
        packed=kept is not None,
    )  # fmt: skip
    tokens, parts = B * T * N, 1 + (far is not None) + (scale is not None)
    kernel.launch(
        cdiv(tokens, each), _THREADS, _shared_bytes(parts, H, D),
        o, far, gate, *tables, out, scale, kept, tokens, T, S, N,
    )  # fmt: skip
