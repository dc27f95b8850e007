"""An episode and a session whose every figure is known beforehand."""

from collections.abc import Sequence

import numpy as np
import torch

from decmem.world.episode import Episode

SIZE = (16, 24)
CODEC_ERROR, FULL_ERROR, OFF_ERROR = 1, 3, 30
"""By how much every value of every frame is wrong: PSNR = 20 log10(255 / error)."""


def psnr_of(error: int) -> float:
    return 20 * float(np.log10(255 / error))


def fake_episode(seed: int, frames: int, turned_from: int | None = None) -> Episode:
    """Random pictures of a flat wall straight ahead; the camera stands still, and looks the other
    way from frame ``turned_from`` on."""
    generator = np.random.default_rng(seed)
    pictures = generator.integers(60, 196, (frames, *SIZE, 3)).astype(np.uint8)
    poses = np.repeat(np.eye(4)[None], frames, axis=0)
    if turned_from is not None:
        poses[turned_from:, 0, 0] = poses[turned_from:, 2, 2] = -1.0
    lens = np.array([[20.0, 0, SIZE[1] / 2], [0, 20.0, SIZE[0] / 2], [0, 0, 1]])
    actions = np.zeros((frames, 6), np.float32)
    actions[1:, 0] = 1
    return Episode(
        frames=pictures,
        world_to_camera=poses,
        intrinsics=np.repeat(lens[None], frames, axis=0),
        actions=actions,
        fps=10,
        depth=np.full((frames, *SIZE), 5.0, np.float32),
        block_id=None,
        provenance={"seed": seed},
    )


class FakeSession:
    """Knows the truth of its seeds, and is wrong by a fixed amount that depends on its memory."""

    def __init__(self, episodes: dict[int, Episode], error: int = FULL_ERROR) -> None:
        self.episodes = episodes
        self.error = error
        self.batch = 1
        self.seeds: list[int] = [0]
        self.global_memory = True
        self.timings = {"encode": 0.0, "prefill": 0.5, "rollout": 2.0, "decode": 0.25}
        self.weights_sha256: str | None = "f" * 64
        self.codec_sha256: str | None = "c" * 64
        self.recordings: list[tuple[bool, bool]] = []  # global memory, frames coded
        self.rollouts: list[tuple[list[int], bool, bool]] = []
        self.reset()

    def reset(self) -> None:
        self.position = 0
        self.order: list[int] | None = None
        self.latents: torch.Tensor | None = None

    def observe(
        self,
        frames: np.ndarray,
        actions: np.ndarray,
        world_to_camera: np.ndarray,
        intrinsics: np.ndarray,
        latents: torch.Tensor | None = None,
    ) -> None:
        shape = (self.batch, (frames.shape[1] + 3) // 4, 1, 2, 3)
        assert latents is None or latents.shape == shape
        self.recordings.append((self.global_memory, latents is None))
        self.latents = torch.zeros(shape) if latents is None else latents
        assert len(frames) == len(actions) == len(intrinsics) == self.batch
        assert frames.shape[1] == world_to_camera.shape[1] == actions.shape[1]
        for seed, shown in zip(self.seeds, frames, strict=True):
            assert (shown == self.episodes[seed].frames[: len(shown)]).all()
        self.position = self.observed = frames.shape[1]
        self.remembers = self.global_memory

    def step(self, actions: np.ndarray, world_to_camera: np.ndarray | None = None) -> np.ndarray:
        assert world_to_camera is not None
        assert actions.shape[1] % 4 == 0
        if self.position == 0:
            raise AssertionError("step before observe")
        part = slice(self.position, self.position + actions.shape[1])
        if self.position == self.observed:
            self.rollouts.append((self.seeds, self.global_memory, self.order is not None))
        self.position = part.stop
        truths = np.stack([self.episodes[seed].frames[part] for seed in self.seeds])
        assert truths.shape[1] == actions.shape[1]
        good = self.remembers and self.global_memory and self.order is None
        return truths + np.uint8(self.error if good else OFF_ERROR)

    def rewind(self, latents: int) -> None:
        assert 4 * (latents - 1) + 1 == self.observed
        assert self.order is None  # another's memory is not given back
        self.position = self.observed

    def shuffle_history(self, order: Sequence[int]) -> None:
        assert sorted(order) == list(range(self.batch))
        assert all(i != j for i, j in enumerate(order))
        self.order = list(order)

    def codec_roundtrip(self, frames: np.ndarray) -> np.ndarray:
        assert len(frames) == self.batch
        return frames + np.uint8(CODEC_ERROR)
