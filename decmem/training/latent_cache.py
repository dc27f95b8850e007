"""Coded training walks, held on the device that trains."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.codec import Codec
from decmem.codec.base import FRAMES_PER_LATENT
from decmem.model import Conditions
from decmem.model.conditioning import (
    camera_centres,
    group_frames,
    normalised_lens,
    relative_to,
)
from decmem.training.walk_cache import rendered_walks


class LatentCache:
    """Latents, cameras and actions of training walks.

    Args:
        codec: frozen, on `device`. walks: how many; rank r holds walks r * walks onwards.
        latents: latents of a walk, 1 + 4 (latents - 1) frames.
    """

    def __init__(
        self,
        codec: Codec,
        walks: int,
        latents: int,
        size: tuple[int, int],
        device: torch.device,
        rank: int,
    ) -> None:
        frames = 1 + FRAMES_PER_LATENT * (latents - 1)
        coded, cameras, actions = [], [], []
        lens = None
        for batch in rendered_walks(rank * walks, walks, frames, size, device):
            for part in batch.frames.split(16):
                coded.append(codec.encode(part).half())
            poses = torch.from_numpy(batch.world_to_camera)
            # Relative to the walk's middle: what is left fits fp32 well.
            anchor = camera_centres(poses[:, frames // 2])
            cameras.append(group_frames(relative_to(poses, anchor), True).float().to(device))
            actions.append(group_frames(torch.from_numpy(batch.actions), True).float().to(device))
            lens = normalised_lens(torch.from_numpy(batch.intrinsics), size).to(device)
        assert lens is not None
        self.latents: Float[Tensor, "N T C h w"] = torch.cat(coded)
        self.world_to_camera: Float[Tensor, "N T 4 4 4"] = torch.cat(cameras)
        self.actions: Float[Tensor, "N T 4 A"] = torch.cat(actions)
        self.lens = lens

    def clips(
        self, walk: Int[Tensor, "B"], start: Int[Tensor, "B"], length: int
    ) -> tuple[Float[Tensor, "B T C h w"], Conditions]:
        """Clips of `length` latents of these walks, from these latents on."""
        device = self.latents.device
        index = (start[:, None] + torch.arange(length)).to(device)
        walk = walk[:, None].to(device)
        conditions = Conditions(
            self.actions[walk, index],
            self.world_to_camera[walk, index],
            self.lens.expand(len(walk), length, -1),
            torch.arange(length, device=device),
        )
        return self.latents[walk, index].float(), conditions
