"""Learning the codec: clips in, the same clips out through a narrow latent."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from decmem.codec import Autoencoder
from decmem.codec.base import FRAMES_PER_LATENT
from decmem.experiment import CodecTraining
from decmem.training.seeds import device_generator, host_generator
from decmem.training.trainer import Task
from decmem.training.walk_cache import rendered_walks

_SHRUNK_SHARE = 4
"""One clip in so many is also asked for at half its size."""


def reconstruction_loss(
    out: Float[Tensor, "N 12 H W"], truth: Float[Tensor, "N 12 H W"], config: CodecTraining
) -> Float[Tensor, ""]:
    """L1 + MSE + L1 of picture gradients, on values in [-1, 1], fp32."""
    error = out - truth
    loss = config.l1 * error.abs().mean() + config.mse * error.square().mean()
    down, across = error.diff(dim=-2), error.diff(dim=-1)
    return loss + config.gradient * (down.abs().mean() + across.abs().mean()) / 2


def halved(raw: Float[Tensor, "N C h w"]) -> Float[Tensor, "N C h2 w2"]:
    """Raw latents at half their size, of unit RMS over channels again (zeros stay zeros)."""
    z = F.avg_pool2d(raw, 2)
    return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-6)


class CodecTask(Task):
    """Random clips of rendered walks.

    Args:
        codec: on `device`. seed, rank: of the batches. Walks of different ranks differ.
    """

    network: Autoencoder

    def __init__(
        self,
        codec: Autoencoder,
        config: CodecTraining,
        size: tuple[int, int],
        device: torch.device,
        seed: int,
        rank: int,
    ) -> None:
        super().__init__()
        self.network = codec
        self.config = config
        self.device = device
        self.seed, self.rank = seed, rank
        batches = rendered_walks(rank * config.walks, config.walks, config.frames, size, device)
        self.frames: UInt8[Tensor, "N F H W 3"] = torch.cat([b.frames for b in batches])
        self._learn = torch.compile(self._loss) if device.type == "cuda" else self._loss

    def clips(self, step: int) -> UInt8[Tensor, "B T 4 H W 3"]:
        """The step's clips in groups of four frames; a lone first frame is repeated."""
        config = self.config
        draw = host_generator(self.seed, self.rank, step)
        N, frames = self.frames.shape[:2]
        length = FRAMES_PER_LATENT * config.latents
        walk = torch.randint(N, (config.batch, 1), generator=draw)
        start = torch.randint(frames - length + 1, (config.batch, 1), generator=draw)
        index = start + torch.arange(length)
        lone = torch.rand(config.batch, generator=draw) < config.lone
        index[lone, : FRAMES_PER_LATENT - 1] = index[
            lone, FRAMES_PER_LATENT - 1 : FRAMES_PER_LATENT
        ]
        picked = self.frames[walk.to(self.device), index.to(self.device)]
        return picked.unflatten(1, (-1, FRAMES_PER_LATENT))

    def _loss(self, groups: Tensor, noise: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        codec = self.network
        x = groups.movedim(-1, 3).flatten(0, 1).flatten(1, 2).float() / 127.5 - 1
        z = codec.raw_latents(x)
        z = (z + self.config.noise * noise).unflatten(0, groups.shape[:2])
        previous = torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1)
        previous = torch.where(known[:, :, None, None, None], previous, 0.0)
        out = codec.pictures(z.flatten(0, 1), previous.flatten(0, 1))
        loss = reconstruction_loss(out, x, self.config)
        if self.config.equivariance:
            count = groups.shape[1] * max(1, len(groups) // _SHRUNK_SHARE)
            small = (t.flatten(0, 1)[:count] for t in (z, previous))
            out_small = codec.pictures(*(halved(t) for t in small))
            small_loss = reconstruction_loss(out_small, F.avg_pool2d(x[:count], 2), self.config)
            loss = loss + self.config.equivariance * small_loss
        with torch.no_grad():
            shown = (out.clamp(-1, 1) - x).square().unflatten(1, (FRAMES_PER_LATENT, 3))
            psnr = 10 * torch.log10(4 / shown.mean((2, 3, 4)).clamp(min=1e-8)).mean()
        return loss, psnr

    def forward(self, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        groups = self.clips(step)
        draw = device_generator(self.seed, self.rank, step, self.device)
        B, T = groups.shape[:2]
        h, w = groups.shape[3] // 8, groups.shape[4] // 8
        shape = (B * T, self.network.latent_channels, h, w)
        noise = torch.randn(shape, generator=draw, device=self.device)
        # Sometimes the latent before is not known: as at the start of a clip.
        known = torch.rand((B, T), generator=draw, device=self.device) > 0.1
        loss, psnr = self._learn(groups, noise, known)
        return loss, {"psnr": psnr}

    @torch.no_grad()
    def measure(self, clips: int = 256) -> None:
        """Sets the statistics that normalise latents, from the training walks."""
        codec = self.network
        codec.eval()
        total = torch.zeros(2, codec.latent_channels, dtype=torch.float64, device=self.device)
        count = 0
        for step in range(max(1, clips // self.config.batch)):
            groups = self.clips(-1 - step)
            x = groups.movedim(-1, 3).flatten(0, 1).flatten(1, 2).float() / 127.5 - 1
            z = codec.raw_latents(x).double()
            total += torch.stack((z.sum((0, 2, 3)), z.square().sum((0, 2, 3))))
            count += z.shape[0] * z.shape[2] * z.shape[3]
        mean, square = (total / count).unbind()
        codec.mean.copy_(mean)
        codec.deviation.copy_((square - mean.square()).clamp(min=1e-6).sqrt())
