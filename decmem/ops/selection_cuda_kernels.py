"""Scores and choice of blocks in CUDA C++ (`scores_cuda.cu`, `selection_cuda.cu`), on any NVIDIA
GPU from Ampere on."""

import functools

import torch
from torch import Tensor

from decmem.ops.cuda_module import Kernel, compiled, compiler_found, defined, texts
from decmem.ops.sparse_tiles import cdiv

_CHOOSING, _SCORING = 256, 128
"""Threads of a program."""

_MOST_ROWS, _FEWEST_KEYS = 48, 2048
"""What these kernels score; of fewer keys Triton's does it in less time."""

_KEYS, _AT_ONCE = 64, 5
"""Of scores: keys that a program takes at a time, and programs that a multiprocessor runs."""


def suits(scores: Tensor) -> bool:
    """Whether there are a GPU and a compiler for it."""
    if not scores.is_cuda or not compiler_found():
        return False
    return torch.cuda.get_device_capability(scores.device) >= (8, 0)


def suits_scores(q: Tensor, k: Tensor) -> bool:
    """Whether these kernels score such pooled queries and keys."""
    rows = q.shape[0] // k.shape[0] * q.shape[2]
    whole = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and k.data_ptr() % 16 == 0
    return suits(q) and whole and 0 < rows <= _MOST_ROWS and k.shape[2] >= _FEWEST_KEYS


def score_source(D: int, rows: int) -> str:
    """The kernel that scores for so many query blocks with these kept beside each other."""
    return defined({"D": D, "ROWS": rows}) + texts("scores")


@functools.cache
def _choosing(device: torch.device) -> Kernel:
    return _kernel(device, texts("selection"), "choose")


@functools.cache
def _scoring(device: torch.device, D: int, rows: int) -> Kernel:
    return _kernel(device, score_source(D, rows), "score")


def _kernel(device: torch.device, source: str, name: str) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(compiled(source, f"sm_{major}{minor}"), name, "shared_bytes", device)


def _rounds(parts: int, programs: int) -> int:
    """How many parts of the keys a program takes, so that hardly more than `programs` are needed:
    each lays out the queries anew."""
    return max(1, cdiv(parts, programs))


def run_score(q: Tensor, k: Tensor) -> Tensor:
    """As the operator `decmem::score_blocks`, of fp32, for inputs that `suits_scores`."""
    B, H, Nq, D = q.shape
    worlds, _, Nk, _ = k.shape
    if k.stride()[2:] != (D, 1):
        k = k.contiguous()
    rows, parts = B // worlds * Nq, cdiv(Nk, _KEYS)
    at_once = _AT_ONCE * torch.cuda.get_device_properties(q.device).multi_processor_count
    rounds = _rounds(parts * worlds * H, at_once)
    tiles = cdiv(parts, rounds)
    out = q.new_empty(B, H, Nq, Nk)
    # Few sizes, so that few kernels are compiled.
    room = next(n for n in (8, 24, _MOST_ROWS) if n >= rows)
    _scoring(q.device, D, room).launch(
        worlds * H * tiles, _SCORING, 0,
        q, k, out, H, Nq, rows, Nk, tiles, rounds, k.stride(0), k.stride(1),
    )  # fmt: skip
    return out


def run_choose(scores: Tensor, candidates: Tensor, out: Tensor) -> None:
    """As the operator `decmem::choose_blocks`, into `out`; candidates as bytes."""
    B, G, Nq, Nk = scores.shape
    _choosing(scores.device).launch(
        B * G * Nq, _CHOOSING, 4 * Nk,
        scores, candidates, out, G, Nq, Nk, out.shape[-1], *candidates.stride(),
    )  # fmt: skip
