"""Who may see whom: the tables a pass of the model is run with.

A *pool* is what a layer's memory reads: the sequence itself in training ([clean | noisy ...]), or
the bank followed by the chunk at work in a roll-out. Both come down to two tables over latents,
so training, prefill, denoising and the write pass are one code path.
"""

from dataclasses import dataclass, field
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
    """Where chunks at a desk (`decmem.memory.arena`) lie in an arena: the device alone knows.

    A pass may have several rows, chunks of worlds that know nothing of each other. Each world has a
    run of the arena's slots to itself, and slots and blocks count from its first.

    Attributes:
        first: slot where the run of each row begins. length: latents of its history.
        room: slots of the longest run.
        own: which of a row's own latents, in the slots behind the history, may be retrieved.
    """

    first: Int[Tensor, "rows"]
    length: Int[Tensor, "rows"]
    room: int
    own: Bool[Tensor, "T T"]

    @property
    def rows(self) -> int:
        return len(self.length)

    def candidates(self) -> Bool[Tensor, "rows T room"]:
        """Slots of its run that each latent of a row may retrieve."""
        behind = torch.arange(self.room, device=self.length.device) - self.length[:, None]
        last = len(self.own) - 1
        own = self.own[:, behind.clamp(0, last)].transpose(0, 1)
        return (behind < 0)[:, None] | (own & (behind <= last)[:, None])

    def runs_of(self, x: Float[Tensor, "1 H slots D"], blocks: int) -> Float[Tensor, "rows H N D"]:
        """The part of a pool that each row may see; behind a shorter run anything may follow."""
        slots = torch.arange(self.room * blocks, device=x.device)
        index = (self.first[:, None] * blocks + slots).clamp(max=x.shape[2] - 1)
        return x[0].index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)

    def in_arena(self, lists: Int[Tensor, "rows G n K"], blocks: int) -> Int[Tensor, "1 G N K"]:
        """Lists of blocks of the runs as lists of blocks of the arena, for one row of queries."""
        first = self.first.to(lists.dtype)[:, None, None, None] * blocks
        return torch.where(lists >= 0, lists + first, lists).transpose(0, 1).flatten(1, 2)[None]


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
        unsteered: latents at the end of the pass, or of each of its rows, that are the chunk before
            them once more, for guidance. Both see the same history and themselves, and these are
            never committed.
        cursor: of chunks at a desk; None goes by `history` and `candidates`.
    """

    windows: WindowTable
    window_first: int
    candidates: Bool[Tensor, "Tq Tc"]
    history: int = 0
    predicted: int = 0
    unsteered: int = 0
    cursor: Cursor | None = None
    _forms: dict = field(default_factory=dict, compare=False, repr=False)

    def prepare(
        self,
        blocks: int,
        q: Float[Tensor, "B H T S D"],
        counts: Int[Tensor, "M"] | None = None,
    ) -> None:
        """Makes every form the layers will ask for, so that compiled blocks find them made.

        Args:
            blocks: of a latent. q: of the shape, type and device of the layers' queries.
            counts: tokens of a latent's blocks; None: all slots hold one.
        """
        if self.cursor is not None:
            # Once a pass, by the device's count as it is by then.
            seen = _of_blocks(self.cursor.candidates(), blocks)
            self._forms[blocks, q.device] = seen[0] if self.rows == 1 else seen[:, None]
        self.block_candidates(blocks, q.device)
        self.windows.prepare(q, counts)

    @property
    def rows(self) -> int:
        """Worlds that lie side by side in the pass, as if they were latents of one."""
        return 1 if self.cursor is None else self.cursor.rows

    def by_row(self, q: Float[Tensor, "B H T S D"]) -> Float[Tensor, "rows H t S D"]:
        """Queries row by row; those of one row as they are, with as many worlds as there are."""
        return q if self.rows == 1 else q[0].unflatten(1, (self.rows, -1)).transpose(0, 1)

    def block_candidates(
        self, blocks: int, device: torch.device
    ) -> Bool[Tensor, "Nq Nk"] | Bool[Tensor, "rows 1 Nq Nk"]:
        """`candidates` for `blocks` blocks a latent, row by row where there are several."""
        if (blocks, device) not in self._forms:
            self._forms[blocks, device] = _of_blocks(self.candidates.to(device), blocks)
        return self._forms[blocks, device]

    def lists_for_all(self, lists: Int[Tensor, "B G n K"], blocks: int) -> Int[Tensor, "B G Nq K"]:
        """Lists of all but the unsteered latents, and for these the chunk's once more: its own
        blocks become theirs."""
        chunk = self.unsteered * blocks
        own = self.history + self.predicted
        if self.cursor is not None:
            own = self.cursor.length[:, None, None, None]
        again = lists[:, :, -chunk:]
        again = torch.where(again >= own * blocks, again + chunk, again)
        return torch.cat((lists, again), 2)


def _of_blocks(table: Bool[Tensor, "... Tq Tc"], blocks: int) -> Bool[Tensor, "... Nq Nk"]:
    spread = table[..., :, None, :, None].expand(*table.shape[:-1], blocks, -1, blocks)
    return spread.flatten(-4, -3).flatten(-2, -1)


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


def desk_plan(
    reach: Reach,
    chunk: int,
    branches: int,
    room: int,
    first: Int[Tensor, "rows"],
    length: Int[Tensor, "rows"],
    writes: int = 0,
) -> Plan:
    """Chunks at a desk (`decmem.memory.arena`), a row each: the same tables for every length of the
    history from the window's on. The device knows how long it is, and in which run of slots.

    The window sees, row after row, what lies before each chunk, and then the chunks. Where it
    `writes`, clean latents see each other by so many, and nothing is predicted.
    """
    near = window_before(reach, min(writes, chunk) or chunk)
    assert near is not None
    if writes:
        plan = bank_plan(reach, near, chunk, writes, writes=True)
    else:
        plan = joint_plan(reach, near, 0, 1, chunk, branches)
    rows, T = len(length), branches * chunk
    own = torch.zeros(T, T, dtype=torch.bool)
    seen = plan.candidates[:, near:]
    own[:, : seen.shape[1]] = seen
    table = plan.windows.table
    before, among = (
        torch.block_diag(*[part] * rows).bool() for part in (table[:, :near], table[:, near:])
    )
    return Plan(
        WindowTable(torch.cat((before, among), 1)),
        0,
        plan.candidates,
        rows * near,
        rows * plan.predicted,
        plan.unsteered,
        Cursor(first, length, room, own.to(length.device)),
    )
