"""One layer's part of the bank: arenas of keys and values, with pooled keys beside.

A pass *stages* its keys and values in the slots behind the history and reads history and itself
from one pool, without concatenation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.errors import UserError
from decmem.memory.layout import TokenLayout
from decmem.memory.quantised import FP8, quantise, restore
from decmem.ops.selection import pool_blocks, pool_blocks_into
from decmem.ops.window import Tiles

_SEGMENT = 64


def arena(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for (B, H, ..., D), uninitialised.

    On a CPU all heads of a token lie side by side, as projections leave them: nothing is turned
    round on its way in, and a block of all heads is gathered in one piece.

    Raises:
        UserError: where the device has no room for it.
    """
    try:
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        B, H, *tokens, D = shape
        return torch.empty(B, *tokens, H, D, dtype=dtype).movedim(-2, 1)
    except torch.OutOfMemoryError as error:
        size = torch.Size(shape).numel() * dtype.itemsize / 2**30
        raise UserError(
            "history",
            f"no room on the device for {size:.1f} GiB of it",
            "Store it in fewer bits (fp8), or keep a shorter history",
        ) from error


class Scratch:
    """Room in which stored numbers are read where the format of storage is not arithmetic's; all
    layers use it in turn."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of that shape, with what was last left in it; the same one while it fits."""
        known = self._rooms.get(name)
        if known is None or known.shape != like.shape or known.dtype != dtype:
            known = self._rooms[name] = arena(tuple(like.shape), dtype, like.device)
        return known


@dataclass(frozen=True)
class Desk:
    """Where chunks are worked on while their place behind the history is known to the device alone.

    All shapes and addresses stay as they are while the history grows, as CUDA graphs ask for.

    Attributes:
        near: arena slots of the history that the local window reaches.
        slots: those of the pass's latents; None where nobody may retrieve them.
        blocks: those of its blocks.
        keys, values: what the local window reaches, the pass's own last. All layers use them in
            turn.
        tiles: of the window, and blocks of the arena that they see: it is read where it lies, and
            `keys` and `values` are not used. None: it is fetched.
    """

    near: Int[Tensor, "near"]
    slots: Int[Tensor, "T"] | None
    blocks: Int[Tensor, "TM"] | None
    keys: Float[Tensor, "B H window S D"]
    values: Float[Tensor, "B H window S D"]
    tiles: Tiles | None = None

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """Of the window's keys and values those of the pass's own latents."""
        near = len(self.near)
        return self.keys[:, :, near:], self.values[:, :, near:]


@dataclass
class LayerBank:
    """One layer's arena. `length` latents are history; scales belong to storage in 8 bits.

    `limit` latents are all that may ever be history, None sets no limit. At a `desk`, staging
    follows the device's cursor instead of `length`.
    """

    keys: Tensor
    values: Tensor
    pooled: Float[Tensor, "B H blocks D"]
    length: int = 0
    key_scale: Float[Tensor, "B H room S 1"] | None = None
    value_scale: Float[Tensor, "B H room S 1"] | None = None
    limit: int | None = None
    desk: Desk | None = None
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int, int], blocks: int, dtype: torch.dtype,
        device: torch.device, limit: int | None, scratch: Scratch,
    ) -> "LayerBank":  # fmt: skip
        """Room for (B, H, latents, S, D), with `blocks` pooled keys a latent."""
        B, H, room, _, D = shape
        scales = [
            arena((*shape[:-1], 1), torch.bfloat16, device) if dtype == FP8 else None
            for _ in range(2)
        ]
        return cls(
            arena(shape, dtype, device),
            arena(shape, dtype, device),
            arena((B, H, room * blocks, D), torch.float32, device),
            0,
            *scales,
            limit=limit,
            scratch=scratch,
        )

    @property
    def room(self) -> int:
        return self.keys.shape[2]

    def arenas(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that is stored, by name."""
        for name in ("keys", "values", "pooled", "key_scale", "value_scale"):
            stored = getattr(self, name)
            if stored is not None:
                yield name, stored

    @property
    def nbytes(self) -> int:
        """Of all arenas, spare room included."""
        return sum(stored.numel() * stored.element_size() for _, stored in self.arenas())

    def _stored(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return quantise(x) if self.keys.dtype == FP8 else (x.to(self.keys.dtype), None)

    def stage(
        self,
        k: Float[Tensor, "B H T S D"],
        v: Float[Tensor, "B H T S D"],
        layout: TokenLayout,
        passing: int = 0,
    ) -> None:
        """Puts a pass behind the history; a later stage overwrites it unless committed.

        The last `passing` latents never will be, and do not count against the limit.
        """
        if self.desk is not None:
            self._stage_at_desk(self.desk, k, v, layout)
            return
        parts = (*self._stored(k), *self._stored(v))
        end = self.length + k.shape[2]
        self.reserve(end, layout.M, passing)
        here = slice(self.length, end)
        for place, part in zip(self._places, parts, strict=True):
            if place is not None and part is not None:
                place[:, :, here] = part
        self.pooled[:, :, self.length * layout.M : end * layout.M] = _pooled(k, layout)

    def place_of_own(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Room for a pass's keys and values where they will be read, at a desk; where that is the
        arena, their slots in it."""
        if self.desk is None:
            return None
        if self.desk.tiles is None:
            return *self.desk.own, None
        return self.keys, self.values, self.desk.slots

    def _stage_at_desk(self, desk: Desk, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
        if k.data_ptr() == self.keys.data_ptr():  # computed where they belong
            assert desk.blocks is not None
            blocks = _blocks(self.keys, layout)
            pool_blocks_into(blocks, desk.blocks, self.pooled, layout.valid_on(k.device))
            return
        parts = (*self._stored(k), *self._stored(v))
        if desk.slots is not None and desk.blocks is not None:
            for place, part in zip(self._places, parts, strict=True):
                if place is not None and part is not None:
                    _put(place, desk.slots, part)
            self.pooled.index_copy_(2, desk.blocks, _pooled(k, layout))
        if desk.tiles is None:
            self._fetch_window(desk, parts)

    def _fetch_window(self, desk: Desk, parts: tuple[Tensor | None, ...]) -> None:
        k, k_scale, v, v_scale = parts
        assert k is not None
        assert v is not None
        near = len(desk.near)
        for window, stored, scale, own, own_scale in (
            (desk.keys, self.keys, self.key_scale, k, k_scale),
            (desk.values, self.values, self.value_scale, v, v_scale),
        ):
            _take(stored, scale, desk.near, window[:, :, :near])
            place = window[:, :, near:]
            # They may have been computed where they belong.
            if own.data_ptr() != place.data_ptr():
                place.copy_(restore(own, own_scale, window.dtype))

    @property
    def _places(self) -> tuple[Tensor | None, ...]:
        return self.keys, self.key_scale, self.values, self.value_scale

    def read(self, part: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of these latents, in `dtype`."""
        return (
            restore(self.keys[:, :, part], _cut(self.key_scale, part), dtype),
            restore(self.values[:, :, part], _cut(self.value_scale, part), dtype),
        )

    def rewrite(self, part: slice, k: Tensor, v: Tensor) -> None:
        """Stores these latents anew; their pooled keys are the caller's business."""
        stored = (*self._stored(k), *self._stored(v))
        for place, new in zip(self._places, stored, strict=True):
            if place is not None and new is not None:
                place[:, :, part] = new

    def pool(self, latents: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as attention reads them, of at least the first `latents` (all the room
        at a desk). The arenas themselves where they are in `dtype`, and in 8 bits at a desk, whose
        window holds what the local branch reads; else a copy that lasts until the next layer
        asks."""
        if self.keys.dtype == dtype or (self.desk is not None and self.key_scale is not None):
            return self.keys, self.values
        read = slice(0, self.room if self.desk is not None else latents)
        found = []
        for name, stored, scale in (
            ("keys", self.keys, self.key_scale),
            ("values", self.values, self.value_scale),
        ):
            room = self.scratch.room(name, stored, dtype)[:, :, read]
            if scale is None:
                room.copy_(stored[:, :, read])
            else:
                room.copy_(stored[:, :, read]).mul_(scale[:, :, read])
            found.append(room)
        return found[0], found[1]

    def reserve(self, latents: int, blocks: int, passing: int = 0) -> None:
        """Moves to larger arenas, whole segments of latents, where there is no room for so many;
        `passing` as in `stage`.

        Raises:
            UserError: beyond the limit, and where the device has no room.
        """
        lasting = latents - passing
        if self.limit is not None and lasting > self.limit:
            raise UserError(
                "history",
                f"{lasting} latents, the bank was made for {self.limit}",
                "Rewind, or make the bank for more",
            )
        if latents <= self.room:
            return
        room = -(-latents // _SEGMENT) * _SEGMENT
        if self.limit is not None:
            room = min(room, self.limit + passing)
        for name, old in self.arenas():
            per_latent = blocks if name == "pooled" else 1
            shape = (*old.shape[:2], room * per_latent, *old.shape[3:])
            new = arena(shape, old.dtype, old.device)
            kept = self.length * per_latent
            new[:, :, :kept] = old[:, :, :kept]
            setattr(self, name, new)

    def run(self, first: int, room: int, limit: int, blocks: int) -> "LayerBank":
        """`room` slots from `first` on as a bank of their own, without history."""
        part = replace(self, length=0, limit=limit, desk=None)
        for name, stored in self.arenas():
            per_latent = blocks if name == "pooled" else 1
            slots = slice(first * per_latent, (first + room) * per_latent)
            setattr(part, name, stored[:, :, slots])
        return part

    def fork(self, scratch: Scratch) -> "LayerBank":
        """An independent copy, at no desk."""
        twin = replace(self, desk=None, scratch=scratch)
        for name, stored in self.arenas():
            setattr(twin, name, stored.clone())
        return twin


def _cut(scale: Tensor | None, part: slice) -> Tensor | None:
    return None if scale is None else scale[:, :, part]


def _blocks(k: Tensor, layout: TokenLayout) -> Float[Tensor, "B H TM P D"]:
    return k.reshape(*k.shape[:2], -1, layout.P, k.shape[-1])


def _pooled(k: Tensor, layout: TokenLayout) -> Float[Tensor, "B H TM D"]:
    return pool_blocks(_blocks(k, layout), layout.valid_on(k.device))


def _wide(x: Tensor) -> torch.dtype:
    """Eight bytes at a time where rows are whole multiples of them: what copies by index goes
    number by number, and not in 8 bits at all."""
    for wide in (torch.int64, torch.int32, torch.int16):
        if x.shape[-1] * x.element_size() % wide.itemsize == 0:
            return wide
    return x.dtype


def _put(place: Tensor, slots: Tensor, part: Tensor) -> None:
    """`place[:, :, slots] = part`."""
    wide = _wide(part)
    whole = all(step * part.element_size() % wide.itemsize == 0 for step in part.stride()[:-1])
    part = part if part.stride(-1) == 1 and whole else part.contiguous()
    place.view(wide).index_copy_(2, slots, part.view(wide))


def _take(stored: Tensor, scale: Tensor | None, slots: Tensor, out: Tensor) -> None:
    """`stored[:, :, slots]` as numbers of the type of `out`, into it."""
    wide = _wide(stored)
    if stored.dtype == out.dtype:
        torch.index_select(stored.view(wide), 2, slots, out=out.view(wide))
        return
    taken = stored.view(wide).index_select(2, slots).view(stored.dtype)
    scale = None if scale is None else scale.index_select(2, slots)
    out.copy_(restore(taken, scale, out.dtype))
