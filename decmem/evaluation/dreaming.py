"""Roll-outs of recorded episodes: the bank from the truth, then only actions and poses."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from decmem.codec.base import FRAMES_PER_LATENT
from decmem.world.episode import Episode

PIECE = 16
"""Frames asked of the session at a time, so that a bar can move: the paper's chunk."""

Watch = Callable[[str, int, int], None]
"""Called with what is being done, and how much of that is done of how much."""


def unwatched(stage: str, done: int, total: int) -> None:
    """A ``Watch`` that shows nothing."""


@runtime_checkable
class Dreamer(Protocol):
    """What evaluation needs of ``decmem.rollout.Session``, which documents each part."""

    batch: int
    seeds: list[int]
    global_memory: bool
    timings: dict[str, float]
    weights_sha256: str | None
    codec_sha256: str | None

    @property
    def latents(self) -> Tensor | None:
        """All latents so far."""
        ...

    def reset(self) -> None:
        """Forget the world."""
        ...

    def observe(
        self,
        frames: np.ndarray,
        actions: np.ndarray,
        world_to_camera: np.ndarray,
        intrinsics: np.ndarray,
        latents: Tensor | None = None,
    ) -> None:
        """Write known frames into memory."""
        ...

    def rewind(self, latents: int) -> None:
        """Go back to what was known after so many latents."""
        ...

    def step(self, actions: np.ndarray, world_to_camera: np.ndarray | None = None) -> np.ndarray:
        """Generate a frame per action."""
        ...

    def shuffle_history(self, order: Sequence[int]) -> None:
        """Give each world another's memory beyond its local window."""
        ...

    def codec_roundtrip(self, frames: np.ndarray) -> np.ndarray:
        """Whole clips through the codec and back."""
        ...


def begin(session: Dreamer, seeds: Sequence[int]) -> None:
    """A fresh start with one world per seed; the seed of a world is the seed of its noise."""
    session.batch, session.seeds = len(seeds), list(seeds)
    session.reset()


def remember(
    session: Dreamer,
    episodes: Sequence[Episode],
    bank: int,
    *,
    seeds: Sequence[int],
    global_memory: bool = True,
    latents: Float[Tensor, "B T C h w"] | None = None,
) -> Float[Tensor, "B T C h w"]:
    """Shows the first ``bank`` frames of each episode; gives back their latents.

    Args:
        episodes: of one length and size; all advance together.
        seeds: one noise seed per episode. Same seeds, same noise, whatever else changes.
        global_memory: False switches the global branch off, for the recording and the dream.
        latents: as given back before for the same frames and codec: they are not coded again.
    """
    begin(session, seeds)
    session.global_memory = global_memory
    session.observe(
        *(
            np.stack([getattr(episode, name)[:bank] for episode in episodes])
            for name in ("frames", "actions", "world_to_camera", "intrinsics")
        ),
        latents=latents,
    )
    assert session.latents is not None
    return session.latents


def dream(
    session: Dreamer,
    episodes: Sequence[Episode],
    bank: int,
    *,
    foreign_memory: bool = False,
    watch: Callable[[int], None] | None = None,
) -> UInt8[np.ndarray, "B F H W 3"]:
    """What the model makes of the frames behind those it was shown (`remember`).

    Args:
        episodes, bank: as they were remembered. A dream had before is forgotten.
        foreign_memory: give each world the long past of the next one, its own window kept. The
            memory stays so until it is recorded anew.
        watch: called with the number of frames finished after every piece.
    """
    session.rewind((bank - 1) // FRAMES_PER_LATENT + 1)
    if foreign_memory:
        session.shuffle_history(np.roll(np.arange(len(episodes)), -1).tolist())
    actions = np.stack([episode.actions for episode in episodes])
    poses = np.stack([episode.world_to_camera for episode in episodes])
    made = []
    for start in range(bank, actions.shape[1], PIECE):
        piece = slice(start, start + PIECE)
        made.append(session.step(actions[:, piece], poses[:, piece]))
        if watch is not None:
            watch(min(start + PIECE, actions.shape[1]) - bank)
    session.global_memory = True
    return np.concatenate(made, axis=1)


def through_codec(
    session: Dreamer, episode: Episode, bank: int, seed: int
) -> UInt8[np.ndarray, "F H W 3"]:
    """The frames behind the first ``bank`` (1 + 4n) through the autoencoder and back: the ceiling
    of everything the model can show.

    A frame hangs on its own latent and the one before: one latent of the bank is enough to begin
    with, and the frames are those of the whole clip.
    """
    begin(session, [seed])
    start = max(0, bank - 1 - FRAMES_PER_LATENT)
    return session.codec_roundtrip(episode.frames[None, start:])[0, bank - start :]
