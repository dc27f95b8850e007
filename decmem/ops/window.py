"""Attention of latents over windows of other latents, given as a table of who sees whom."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from decmem.ops import block_sparse

WindowBackend = Literal["auto", "gather", "triton", "flex"]


@dataclass(frozen=True)
class Span:
    """Query latents [first, last) that see the same key latents: `keys`, ascending."""

    first: int
    last: int
    keys: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        return self.keys[-1] - self.keys[0] + 1 == len(self.keys)


def spans(table: Bool[Tensor, "Tq Tk"]) -> tuple[Span, ...]:
    """Runs of equal rows of the table. `table` lies on the CPU."""
    rows = [tuple(row.nonzero().flatten().tolist()) for row in table]
    found: list[Span] = []
    for i, keys in enumerate(rows):
        if found and found[-1].keys == keys:
            found[-1] = Span(found[-1].first, i + 1, keys)
        else:
            found.append(Span(i, i + 1, keys))
    return tuple(found)


class WindowTable:
    """Who sees whom, with the forms the backends want of it, each made once.

    Args:
        table: (Tq, Tk) bool on the CPU; query latent i sees key latent j. No empty row.
    """

    def __init__(self, table: Bool[Tensor, "Tq Tk"]) -> None:
        self.table = table
        self.spans = spans(table)
        self._forms: dict[object, object] = {}

    def lists(self, device: torch.device) -> list[tuple[Span, int, Tensor]]:
        """Runs of consecutive spans of one length: (first span, spans in the run, key lists).

        Lists are (spans, K) int32, -1 where a window is short.
        """
        if ("lists", device) not in self._forms:
            runs: list[list[Span]] = []
            for span in self.spans:
                length = span.last - span.first
                if runs and runs[-1][0].last - runs[-1][0].first == length:
                    runs[-1].append(span)
                else:
                    runs.append([span])
            made = []
            for run in runs:
                most = max(len(s.keys) for s in run)
                rows = [list(s.keys) + [-1] * (most - len(s.keys)) for s in run]
                made.append((run[0], len(run), torch.tensor(rows, dtype=torch.int32).to(device)))
            self._forms["lists", device] = made
        return self._forms["lists", device]  # pyright: ignore[reportReturnType]

    def block_mask(self, tokens: int, device: torch.device) -> Any:
        """The table as FlexAttention's BlockMask, for `tokens` tokens a latent."""
        if ("flex", tokens, device) not in self._forms:
            from torch.nn.attention.flex_attention import create_block_mask

            table = self.table.to(device)

            def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return table[q // tokens, k // tokens]

            Tq, Tk = self.table.shape
            self._forms["flex", tokens, device] = create_block_mask(
                sees, None, None, Tq * tokens, Tk * tokens, device=str(device)
            )
        return self._forms["flex", tokens, device]


@lru_cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, windows: WindowTable) -> Tensor:
    mask = windows.block_mask(q.shape[3], q.device)
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention as attend
    else:
        attend = _compiled_flex()
    out = attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), block_mask=mask)
    return out.view_as(q)


def window_attention(
    q: Float[Tensor, "B H Tq S D"],
    k: Float[Tensor, "B H Tk S D"],
    v: Float[Tensor, "B H Tk S D"],
    windows: WindowTable,
    valid: Bool[Tensor, "S"] | None = None,
    backend: WindowBackend = "auto",
) -> Float[Tensor, "B H Tq S D"]:
    """Tokens of query latent i attend densely to all tokens of the key latents its window holds.

    `valid` marks the token slots of a latent that hold a token. `k` and `v` may have more latents
    than the table has columns (a bank's spare room); those are never read.
    """
    S = q.shape[3]
    if backend == "flex":
        assert valid is None, "flex: ragged layouts go through gather"
        return _flex(q, k, v, windows)
    slots = None if valid is None else valid[None]
    pieces = []
    for first, count, lists in windows.lists(q.device):
        size = first.last - first.first
        part = q[:, :, first.first : first.first + count * size]
        if count == 1 and first.contiguous and backend in ("auto", "gather"):
            seen = slice(first.keys[0], first.keys[-1] + 1)
            mask = None if valid is None else valid.repeat(len(first.keys))[None]
            out = F.scaled_dot_product_attention(
                part.flatten(2, 3), k[:, :, seen].flatten(2, 3), v[:, :, seen].flatten(2, 3), mask
            ).view_as(part)
        else:
            grouped = part.unflatten(2, (count, size)).flatten(3, 4)
            out = block_sparse.block_sparse_attention(
                grouped, k, v, lists[None, None], valid=slots, backend=backend
            )
            out = out.unflatten(3, (size, S)).flatten(2, 3)
        pieces.append(out)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
