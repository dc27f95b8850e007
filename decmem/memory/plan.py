"""Who may see whom: the tables a pass of the model is run with.

A *pool* is what a layer's memory reads: the sequence itself in training ([clean | noisy ...]), or
the bank followed by the chunk at work in a roll-out. Both come down to two tables over latents,
so training, prefill, denoising and the write pass are one code path.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.errors import UserError
from decmem.ops.window import WindowTable


@dataclass(frozen=True)
class Reach:
    """What a chunk may see.

    Args:
        window: latents of the local window; None sees all history.
        window_includes_chunk: count the chunk's own latents into the window (figure 4) rather
            than adding them to it.
        own_candidates: the chunk's own blocks compete in the retrieval (figure 4); else history.
        write_chunk: latents that see each other in the clean stream, that is in the pass that
            writes the bank. 0 means the chunk the noisy stream uses (the paper); 1 makes the
            bank independent of the chunk size.
    """

    window: int | None = 8
    window_includes_chunk: bool = False
    own_candidates: bool = False
    write_chunk: int = 0


@dataclass(frozen=True)
class Cursor:
    """Where a chunk at a desk (`decmem.memory.arena`) lies in an arena: the device alone knows.

    Attributes:
        length: latents of history. room: latents the arena has room for.
        own: which of the pass's own latents, in the slots behind the history, may be retrieved.
    """

    length: Int[Tensor, "1"]
    room: int
    own: Bool[Tensor, "Tq Tq"]

    def candidates(self) -> Bool[Tensor, "Tq room"]:
        """Slots of the arena that may be retrieved."""
        behind = torch.arange(self.room, device=self.length.device) - self.length
        last = len(self.own) - 1
        return (behind < 0) | (self.own[:, behind.clamp(0, last)] & (behind <= last))


@dataclass(frozen=True)
class Plan:
    """Tables of one pass.

    Attributes:
        windows: local visibility; its columns are pool latents from `window_first` on.
        window_first: first pool latent any window reaches.
        candidates: (Tq, Tc) bool, blocks of pool latents that may be retrieved; the pool's last
            latents are left out where none may.
        history: latents of the pool that lie before the pass's own (0 in training).
        predicted: first query latent whose velocity is wanted; as many as there are queries
            where none is.
        unsteered: latents at the pass's end that are the chunk before them once more, for guidance.
            Both see the same history and themselves, and these are never committed.
        cursor: of a chunk at a desk; None goes by `history` and `candidates`.
    """

    windows: WindowTable
    window_first: int
    candidates: Bool[Tensor, "Tq Tc"]
    history: int = 0
    predicted: int = 0
    unsteered: int = 0
    cursor: Cursor | None = None
    _forms: dict = field(default_factory=dict, compare=False, repr=False)

    def prepare(self, blocks: int, q: Float[Tensor, "B H T S D"]) -> None:
        """Makes every form the layers will ask for, so that compiled blocks find them made.

        Args:
            blocks: of a latent. q: of the shape, type and device of the layers' queries.
        """
        if self.cursor is not None:
            # Once a pass, by the device's count as it is by then.
            self._forms[blocks, q.device] = _of_blocks(self.cursor.candidates(), blocks)
        self.block_candidates(blocks, q.device)
        self.windows.prepare(q)

    def block_candidates(self, blocks: int, device: torch.device) -> Bool[Tensor, "Nq Nk"]:
        """`candidates` for `blocks` blocks a latent."""
        if (blocks, device) not in self._forms:
            self._forms[blocks, device] = _of_blocks(self.candidates.to(device), blocks)
        return self._forms[blocks, device]

    def lists_for_all(self, lists: Int[Tensor, "B G n K"], blocks: int) -> Int[Tensor, "B G Nq K"]:
        """Lists of all but the unsteered latents, and for these the chunk's once more: its own
        blocks become theirs."""
        chunk = self.unsteered * blocks
        own = self.history + self.predicted if self.cursor is None else self.cursor.length
        again = lists[:, :, -chunk:]
        again = torch.where(again >= own * blocks, again + chunk, again)
        return torch.cat((lists, again), 2)


def _of_blocks(table: Bool[Tensor, "Tq Tc"], blocks: int) -> Bool[Tensor, "Nq Nk"]:
    rows, columns = table.shape
    spread = table[:, None, :, None].expand(-1, blocks, -1, blocks)
    return spread.reshape(rows * blocks, columns * blocks)


def _chunk_rows(reach: Reach, start: int, end: int, pool: int) -> tuple[Tensor, Tensor]:
    """Local row and candidate row of a chunk [start, end) over clean pool latents."""
    index = torch.arange(pool)
    if reach.window is None:
        first = 0
    else:
        first = (end if reach.window_includes_chunk else start) - reach.window
    local = (index >= min(first, start)) & (index < end)
    candidates = index < (end if reach.own_candidates else start)
    return local, candidates


def _plan(
    local: Tensor, candidates: Tensor, history: int, predicted: int, unsteered: int = 0
) -> Plan:
    first = int(local.any(0).nonzero()[0])
    # Latents nobody may retrieve (the noisy streams, the chunk at work) need no scores.
    reachable = candidates.any(0).nonzero()
    candidates = candidates[:, : int(reachable[-1]) + 1 if len(reachable) else 1]
    return Plan(WindowTable(local[:, first:]), first, candidates, history, predicted, unsteered)


@lru_cache(maxsize=64)
def training_plan(reach: Reach, latents: int, chunk: int, noisy_streams: int = 1) -> Plan:
    """Teacher forcing with all chunks in parallel: the sequence [clean | noisy | ...].

    A clean chunk sees clean latents only. A noisy chunk sees the clean latents before it and
    itself, never its own clean version.
    """
    write = reach.write_chunk or chunk
    if latents % chunk or chunk % write:
        raise UserError(
            "chunk",
            f"chunks of {chunk} do not divide {latents} latents, or {write} does not divide it",
            "Choose latents in multiples of the chunk, and chunks in multiples of write_chunk",
        )
    total = latents * (1 + noisy_streams)
    local = torch.zeros(total, total, dtype=torch.bool)
    candidates = torch.zeros(total, total, dtype=torch.bool)
    for start in range(0, latents, write):
        rows = slice(start, start + write)
        local[rows, :latents], candidates[rows, :latents] = _chunk_rows(
            reach, start, start + write, latents
        )
    for stream in range(1, noisy_streams + 1):
        for start in range(0, latents, chunk):
            past, retrievable = _chunk_rows(reach, start, start + chunk, latents)
            own = slice(start, start + chunk)
            noisy = slice(stream * latents + start, stream * latents + start + chunk)
            past[own] = False
            local[noisy, :latents] = past
            local[noisy, noisy] = True
            if reach.own_candidates:
                retrievable[own] = False
                candidates[noisy, noisy] = True
            candidates[noisy, :latents] = retrievable
    return _plan(local, candidates, 0, latents)


def bank_plan(reach: Reach, history: int, latents: int, chunk: int, writes: bool = False) -> Plan:
    """The chunk(s) at work behind `history` latents of a bank.

    Denoising passes one chunk (`latents == chunk`); the write pass and the prefill pass any
    number of latents in chunks of `chunk`, and with `writes` predict nothing.
    """
    pool = history + latents
    local = torch.zeros(latents, pool, dtype=torch.bool)
    candidates = torch.zeros(latents, pool, dtype=torch.bool)
    for start in range(0, latents, chunk):
        end = min(start + chunk, latents)
        local[start:end], candidates[start:end] = _chunk_rows(
            reach, history + start, history + end, pool
        )
    return _plan(local, candidates, history, latents if writes else 0)


def joint_plan(
    reach: Reach, history: int, clean: int, write: int, chunk: int, branches: int = 1
) -> Plan:
    """`clean` latents that are written in chunks of `write`, and a noisy chunk behind them.

    With two `branches` the noisy chunk comes twice, with its actions and without. Who sees whom is
    as in passes one after the other; velocities are those of the noisy latents.
    """
    start = history + clean
    pool = start + branches * chunk
    local = torch.zeros(pool - history, pool, dtype=torch.bool)
    candidates = torch.zeros(pool - history, pool, dtype=torch.bool)
    for first in range(0, clean, write):
        last = min(first + write, clean)
        local[first:last], candidates[first:last] = _chunk_rows(
            reach, history + first, history + last, pool
        )
    own = slice(start, start + chunk)
    for branch in range(branches):
        shift = branch * chunk
        rows = slice(clean + shift, clean + shift + chunk)
        for table, row in zip(
            (local, candidates), _chunk_rows(reach, own.start, own.stop, pool), strict=True
        ):
            table[rows, :start] = row[:start]
            table[rows, own.start + shift : own.stop + shift] = row[own]
    return _plan(local, candidates, history, clean, (branches - 1) * chunk)


def window_before(reach: Reach, chunk: int) -> int | None:
    """Latents of history that the window of a chunk reaches, once there are as many; None: all."""
    if reach.window is None:
        return None
    return max(0, reach.window - chunk) if reach.window_includes_chunk else reach.window


def desk_plan(reach: Reach, chunk: int, branches: int, room: int, length: Int[Tensor, "1"]) -> Plan:
    """A chunk at a desk (`decmem.memory.arena`): the same tables for every length of the history
    from the window's on, with the device's count of the latents in an arena of this room."""
    near = window_before(reach, chunk)
    assert near is not None
    plan = joint_plan(reach, near, 0, 1, chunk, branches)
    own = torch.zeros(branches * chunk, branches * chunk, dtype=torch.bool)
    seen = plan.candidates[:, near:]
    own[:, : seen.shape[1]] = seen
    return replace(plan, cursor=Cursor(length, room, own.to(length.device)))
