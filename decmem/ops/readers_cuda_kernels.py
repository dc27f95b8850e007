"""Lists turned round in CUDA C++ (`readers_cuda.cu`), on any NVIDIA GPU from Ampere on."""

import functools

import torch
from torch import Tensor

from decmem.ops.cuda_module import Kernel, compiled, compiler_found, texts

_THREADS = 128

_MOST = 24_000
"""Key blocks whose places the shared memory of every such GPU holds."""


def suits(lists: Tensor, blocks: int) -> bool:
    """Whether there are a GPU and a compiler for it, and room."""
    if not lists.is_cuda or not compiler_found() or blocks > _MOST:
        return False
    return torch.cuda.get_device_capability(lists.device) >= (8, 0)


@functools.cache
def _kernel(device: torch.device) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(texts("readers"), f"sm_{major}{minor}")
    return Kernel(code, "turn_round", "shared_bytes", device)


def run_inverse(lists: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """As `readers.inverse_lists`, for lists that `suits` takes."""
    B, G, Nq, K = lists.shape
    readers = lists.new_empty(B, G, Nq * K)
    offsets = lists.new_empty(B, G, blocks + 1)
    _kernel(lists.device).launch(
        B * G, _THREADS, 4 * blocks, lists.contiguous(), readers, offsets, Nq, K, blocks
    )
    return readers, offsets
