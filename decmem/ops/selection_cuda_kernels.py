"""Choice of blocks in CUDA C++ (`selection_cuda.cu`), on any NVIDIA GPU from Ampere on."""

import functools

import torch
from torch import Tensor

from decmem.ops.cuda_module import Kernel, compiled, compiler_found, texts

_THREADS = 256


def suits(scores: Tensor) -> bool:
    """Whether there are a GPU and a compiler for it."""
    if not scores.is_cuda or not compiler_found():
        return False
    return torch.cuda.get_device_capability(scores.device) >= (8, 0)


@functools.cache
def _kernel(device: torch.device) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(texts("selection"), f"sm_{major}{minor}")
    return Kernel(code, "choose", "shared_bytes", device)


def run_choose(scores: Tensor, candidates: Tensor, out: Tensor) -> None:
    """As the operator `decmem::choose_blocks`, into `out`; candidates as bytes."""
    B, G, Nq, Nk = scores.shape
    _kernel(scores.device).launch(
        B * G * Nq, _THREADS, 4 * Nk,
        scores, candidates, out, G, Nq, Nk, out.shape[-1], *candidates.stride(),
    )  # fmt: skip
