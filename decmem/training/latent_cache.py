"""Coded training walks, held on the device that trains."""

from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.codec import Codec
from decmem.codec.base import FRAMES_PER_LATENT
from decmem.memory.surface import FARTHEST, NEAREST
from decmem.model import Conditions
from decmem.model.conditioning import (
    REFERENCE_FRAME,
    camera_centres,
    group_frames,
    normalised_lens,
    relative_to,
)
from decmem.training.walk_cache import Probe, rendered_walks

_RAYS = 4
"""Depth of a token's patch is sounded by so many rays in each direction."""


def log_depths(
    depth: Float[Tensor, "N T h w"], grid: tuple[int, int]
) -> Float[Tensor, "N T tokens 2"]:
    """Mean and variance of log depth (metres) over each token's patch, raster order."""
    rows, columns = grid
    patches = depth.log().clamp(NEAREST, FARTHEST).unflatten(3, (columns, -1))
    patches = patches.unflatten(2, (rows, -1)).movedim(3, 4).flatten(4).flatten(2, 3)
    return torch.stack((patches.mean(-1), patches.var(-1, correction=0)), dim=-1)


class LatentCache:
    """Latents, cameras and actions of training walks, and the depths of their tokens.

    Args:
        codec: frozen, on `device`. walks: how many; rank r holds walks r * walks onwards.
        latents: latents of a walk, 1 + 4 (latents - 1) frames.
        grid: tokens down and across, where depths are wanted. stills: as `train_walks`.
    """

    def __init__(
        self,
        codec: Codec,
        walks: int,
        latents: int,
        size: tuple[int, int],
        device: torch.device,
        rank: int,
        grid: tuple[int, int] | None = None,
        stills: int = 0,
    ) -> None:
        frames = 1 + FRAMES_PER_LATENT * (latents - 1)
        coded, cameras, actions, depths = [], [], [], []
        lens = probe = None
        if grid is not None:
            shown = chain((0,), range(1 + REFERENCE_FRAME, frames, FRAMES_PER_LATENT))
            probe = Probe((grid[0] * _RAYS, grid[1] * _RAYS), tuple(shown))
        for batch in rendered_walks(rank * walks, walks, frames, size, device, probe, stills):
            for part in batch.frames.split(16):
                coded.append(codec.encode(part).half())
            poses = torch.from_numpy(batch.world_to_camera)
            # Relative to the walk's middle: what is left fits fp32 well.
            anchor = camera_centres(poses[:, frames // 2])
            cameras.append(group_frames(relative_to(poses, anchor), True).float().to(device))
            actions.append(group_frames(torch.from_numpy(batch.actions), True).float().to(device))
            if grid is not None and batch.depth is not None:
                depths.append(log_depths(batch.depth, grid).half())
            lens = normalised_lens(torch.from_numpy(batch.intrinsics), size).to(device)
        assert lens is not None
        self.latents: Float[Tensor, "N T C h w"] = torch.cat(coded)
        self.world_to_camera: Float[Tensor, "N T 4 4 4"] = torch.cat(cameras)
        self.actions: Float[Tensor, "N T 4 A"] = torch.cat(actions)
        self.lens = lens
        self.depths: Float[Tensor, "N T tokens 2"] | None = torch.cat(depths) if depths else None

    def parts(self) -> dict[str, Tensor]:
        """All it holds, for `of_parts`."""
        return {name: x for name, x in vars(self).items() if x is not None}

    @classmethod
    def of_parts(cls, parts: dict[str, Tensor]) -> "LatentCache":
        """A cache of what another one held."""
        made = cls.__new__(cls)
        vars(made).update({"depths": None} | parts)
        return made

    def clips(
        self, walk: Int[Tensor, "B"], start: Int[Tensor, "B"], length: int
    ) -> tuple[Float[Tensor, "B T C h w"], Conditions]:
        """Clips of `length` latents of these walks, from these latents on."""
        walk, index = self._placed(walk, start, length)
        conditions = Conditions(
            self.actions[walk, index],
            self.world_to_camera[walk, index],
            self.lens.expand(len(walk), length, -1),
            torch.arange(length, device=index.device),
        )
        return self.latents[walk, index].float(), conditions

    def patch_depths(
        self, walk: Int[Tensor, "B"], start: Int[Tensor, "B"], length: int
    ) -> Float[Tensor, "B T tokens 2"] | None:
        """Mean and variance of the log depths of the same clips' tokens, where they were probed."""
        if self.depths is None:
            return None
        walk, index = self._placed(walk, start, length)
        return self.depths[walk, index].float()

    def _placed(
        self, walk: Int[Tensor, "B"], start: Int[Tensor, "B"], length: int
    ) -> tuple[Int[Tensor, "B 1"], Int[Tensor, "B T"]]:
        """Where clips lie, on the device; a GPU at work is not waited for."""
        device = self.latents.device
        both = torch.stack((walk, start))[..., None]
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        walk, start = both.to(device).unbind()
        return walk, start + torch.arange(length, device=device)
