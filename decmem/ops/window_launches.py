"""How the window kernels run: sizes of tiles and blocks, by head dimension, type and rows.

Chosen by `benchmarks/tune_window.py`, which tries them side by side on one GPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Launch(NamedTuple):
    """How one kernel runs.

    Attributes:
        rows, columns: of a tile, and of the blocks it walks; powers of two, at least 16.
        warps, stages: warps of a program; blocks that are loaded ahead, and the one at work.
        registers: most registers of a thread, so that more programs fit side by side; 0 sets no
            limit.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int = 0


class Launches(NamedTuple):
    """Of the forward pass, of dQ, and of dK and dV, where rows are keys."""

    forward: Launch
    query_gradient: Launch
    key_gradient: Launch

    def pack(self) -> list[int]:
        """As an operator takes them."""
        return [x for launch in self for x in launch]

    @classmethod
    def unpack(cls, packed: Sequence[int]) -> "Launches":
        """Inverse of `pack`."""
        size = len(Launch._fields)
        return cls(*(Launch(*packed[i : i + size]) for i in range(0, len(packed), size)))


# Multiplied in fp32, by no tensor core: small tiles, which compile sooner.
_EXACT = Launches(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1))

# By channels a head is padded to. More registers than 128 or 168 would leave room for fewer
# programs of 256 or 128 threads on a multiprocessor.
_BY_WIDTH = {
    64: Launches(Launch(64, 64, 4, 2, 128), Launch(64, 64, 4, 2, 128), Launch(64, 64, 4, 3, 168)),
    80: Launches(Launch(128, 64, 8, 3, 128), Launch(128, 32, 8, 3, 128), Launch(64, 64, 4, 3)),
    96: Launches(Launch(128, 64, 8, 3, 128), Launch(128, 32, 8, 2, 128), Launch(64, 64, 4, 2)),
    128: Launches(Launch(128, 64, 8, 3), Launch(64, 32, 4, 2, 168), Launch(64, 32, 4, 2)),
}
_WIDER = Launches(Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(64, 16, 8, 2))

# Fewer rows than this leave a GPU half empty in tiles of 128.
_FEW_ROWS = 2 * 132 * 128
_FEW = Launch(64, 64, 4, 3)


def head_pieces(D: int) -> tuple[int, int]:
    """Channels of the one or two pieces a head is taken in: powers of two, at least 16.

    72 as 64 + 16 and 96 as 64 + 32, where one piece would be 128; 0 where one is as good.
    """
    whole = max(16, 1 << (D - 1).bit_length())
    rest = D - whole // 2
    second = max(16, 1 << (rest - 1).bit_length())
    return (whole // 2, second) if whole > 16 and second < whole // 2 else (whole, 0)


def choose_launches(q: Float[Tensor, "B H T S D"]) -> Launches:
    """How the kernels run for queries like these."""
    if q.dtype == torch.float32:
        return _EXACT
    B, H, T, S, D = q.shape
    width = sum(head_pieces(D))
    launches = next((of for most, of in _BY_WIDTH.items() if width <= most), _WIDER)
    if width <= 128 and B * H * T * S < _FEW_ROWS:
        launches = launches._replace(forward=_FEW)
    return launches
