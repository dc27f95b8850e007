"""What is measured on which frames of which worlds: the paper's windows on held-out seeds.

Walks that stand still have windows of their own: what feeds on itself takes half a minute to show.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decmem.errors import UserError
from decmem.world.version import HELD_OUT_SEED_BASE
from decmem.world.walks import WalkKind

BANK_FRAMES = 221
"""Frames of ground truth in the memory bank before anything is generated."""

SUITES = ("windows",)
WALKS: tuple[WalkKind, ...] = ("retrace", "free")

SEEN_AT_LEAST, NOVEL_AT_MOST = 0.8, 0.2
"""Shares of a window's pixels whose surface the bank shows: on free walks a window counts as
seen from the first on, as novel up to the second, and not at all between them."""


@dataclass(frozen=True)
class Window:
    """A stretch of frames, counted from 1, both ends included."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """As tables and files call it: ``222-229``."""
        return f"{self.first}-{self.last}"

    def of_clip(self) -> slice:
        """The window in an array of the whole clip, which counts from 0."""
        return slice(self.first - 1, self.last)

    def of_dream(self, bank: int) -> slice:
        """The window in an array that starts with the first frame after the bank."""
        return slice(self.first - 1 - bank, self.last - bank)


WINDOWS = (Window(222, 229), Window(334, 341))
LONG_WINDOW = Window(798, 805)
STILL_WINDOWS = (Window(222, 229), Window(270, 277), Window(370, 377), Window(514, 521))
"""At first, and those with the frames after 5, 15 and 30 s; whole latents, as the others are."""


@dataclass(frozen=True)
class Protocol:
    """One evaluation: which worlds, walks and windows; walks that stand still have their own."""

    seeds: tuple[int, ...]
    walks: tuple[WalkKind, ...] = WALKS
    windows: tuple[Window, ...] = WINDOWS
    bank: int = BANK_FRAMES
    still_windows: tuple[Window, ...] = STILL_WINDOWS

    def windows_of(self, walk: str) -> tuple[Window, ...]:
        """Where the episodes of a walk are measured."""
        return self.still_windows if walk == "still" else self.windows

    def frames_of(self, walk: str) -> int:
        """Length of a walk's episodes: up to the end of the last window."""
        return max(window.last for window in self.windows_of(walk))

    def dreamt_of(self, walk: str) -> int:
        """Frames generated in every episode of a walk."""
        return self.frames_of(walk) - self.bank

    @property
    def window_names(self) -> tuple[str, ...]:
        """The ``window`` values of the results, in order."""
        names = (window.name for walk in self.walks for window in self.windows_of(walk))
        return tuple(dict.fromkeys(names))

    @property
    def groups(self) -> tuple[str, ...]:
        """The ``walk`` values of the results, in order."""
        return tuple(group for walk in self.walks for group in groups_of(walk))


def groups_of(walk: str) -> tuple[str, ...]:
    """Under which names the episodes of a walk are reported."""
    return ("free_seen", "free_novel") if walk == "free" else (walk,)


def group_of(walk: str, seen: float) -> str | None:
    """The name under which one window of one episode counts, given the share of its pixels that
    the bank shows; None where it counts nowhere."""
    if walk != "free":
        return walk
    if seen >= SEEN_AT_LEAST:
        return "free_seen"
    return "free_novel" if seen <= NOVEL_AT_MOST else None


def held_out_seeds(base: int, episodes: int) -> tuple[int, ...]:
    """The first ``episodes`` seeds from ``base`` on.

    Raises:
        UserError: fewer than one episode, or a base among the seeds that training uses.
    """
    if base < HELD_OUT_SEED_BASE:
        raise UserError(
            "--seed-base",
            f"{base} lies among the training seeds",
            f"held-out worlds start at {HELD_OUT_SEED_BASE:,}: give that or more",
        )
    if episodes < 1:
        raise UserError("--episodes", f"{episodes}, expected at least 1", "64 give a firm figure")
    return tuple(range(base, base + episodes))


def batches(seeds: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """``seeds`` in order, in groups of at most ``size`` of nearly equal length, but never a group
    of one world when there are two: a shuffled memory needs another world's. So ``size`` 1 gives
    pairs, and an odd number of pairs a group of three.

    Raises:
        UserError: for a size below 1.
    """
    if size < 1:
        raise UserError("--batch", f"{size} worlds at a time, expected at least 1", "Use 2 to 64")
    count = -(-len(seeds) // max(size, 2))
    if len(seeds) > 1 and len(seeds) // count < 2:
        count -= 1
    return [tuple(int(seed) for seed in group) for group in np.array_split(seeds, count)]
