"""Decoding of heads in CUDA C++ (`coding_cuda.cu`), on any NVIDIA GPU that has bfloat16.

What it computes, and its other form in Triton: `coding_kernels`.
"""

import functools
from importlib import resources

import torch
from torch import Tensor

from decmem.ops.cuda_module import Kernel, compiled

_TOKENS, _THREADS = 4, 256


def suits(o: Tensor, far: Tensor | None, gate: Tensor | None, groups: list[int]) -> bool:
    """Whether this kernel takes such inputs."""
    alike = all(x is None or x.dtype == o.dtype for x in (far, gate))
    whole = sum(groups) % 8 == 0 and groups[0] % 4 == 0
    fits = _shared_bytes(o.shape[1], sum(groups), far is not None) <= 96 * 1024
    return o.is_cuda and o.element_size() == 2 and alike and whole and fits


def _shared_bytes(heads: int, D: int, gated: bool) -> int:
    return _TOKENS * (heads * D * 2 * (2 if gated else 1) + D * 12 + 64)


def source(groups: list[int], *, turned: bool, gated: bool, per_head: bool, half: bool) -> str:
    """The kernel for heads whose channels lie in these groups."""
    camera, space, surface, time = groups
    constants = {
        "D": sum(groups), "CAMERA": camera, "SPACE": space, "SURFACE": surface, "TIME": time,
        "TURNED": int(turned), "GATED": int(gated), "PER_HEAD": int(per_head),
        "TOKENS": _TOKENS, "THREADS": _THREADS, "HALF": int(half),
    }  # fmt: skip
    text = resources.files("decmem.ops").joinpath("coding_cuda.cu").read_text(encoding="utf-8")
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + text


@functools.cache
def _kernel(device: torch.device, groups: tuple[int, ...], **kinds: bool) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(source(list(groups), **kinds), f"sm_{major}{minor}")
    return Kernel(code, "decode", "shared_bytes", device)


def run_decode(
    o: Tensor, far: Tensor | None, gate: Tensor | None, matrix: Tensor | None,
    space_cos: Tensor | None, space_sin: Tensor | None,
    surface_cos: Tensor | None, surface_sin: Tensor | None, groups: list[int],
) -> Tensor:  # fmt: skip
    """As the operator `decmem::decode_heads`, for inputs that `suits` takes."""
    B, H, T, S, D = o.shape
    out = o.new_empty(B, T, S, H * D)
    kernel = _kernel(
        o.device, tuple(groups), turned=surface_cos is not None, gated=far is not None,
        per_head=gate is not None and gate.shape[-1] == H, half=o.dtype == torch.float16,
    )  # fmt: skip
    tokens = B * T * S
    kernel.launch(
        -(-tokens // _TOKENS), _THREADS, _shared_bytes(H, D, far is not None),
        o, far, gate, matrix, space_cos, space_sin, surface_cos, surface_sin, out,
        tokens, T, S, H,
    )  # fmt: skip
    return out
