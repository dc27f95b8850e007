"""What a codec promises: frames to latents and back, causally, as a stream or as a whole."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from decmem.errors import UserError

FRAMES_PER_LATENT = 4


@dataclass
class EncoderStream:
    """Where an encoder stands: frames not yet coded, and whether the first frame is behind it."""

    pending: Tensor | None = None
    started: bool = False


@dataclass
class DecoderStream:
    """Where a decoder stands: the latent before (its context), None at the start of a clip."""

    previous: Tensor | None = None


class Codec(nn.Module):
    """Frames <-> latents. The first frame is coded alone, then four frames a latent.

    Subclasses give `encode_groups` and `decode_groups`. Latents leave normalised: zero mean and
    unit variance per channel on the training set; no scale constant lives outside the codec.
    """

    spatial_stride: int
    latent_channels: int
    # Groups of frames worked on at once: bounds memory, changes no result.
    slab: int = 16

    def encode_groups(self, groups: Float[Tensor, "N 12 H W"]) -> Float[Tensor, "N C h w"]:
        """Four frames (RGB in [-1, 1], stacked in channels) to one latent."""
        raise NotImplementedError

    def decode_groups(
        self, latents: Float[Tensor, "N C h w"], previous: Float[Tensor, "N C h w"]
    ) -> Float[Tensor, "N 12 H W"]:
        """A latent and the one before it (zeros at a clip's start) to four frames."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(
        self, frames: UInt8[Tensor, "B F H W 3"], stream: EncoderStream | None = None
    ) -> Float[Tensor, "B T C h w"]:
        """Latents of a clip; with a stream, of all groups completed so far.

        Without a stream the clip must have 1 + 4n frames.

        Raises:
            UserError: on a number of frames or a picture size the codec cannot code.
        """
        whole, given = stream is None, frames.shape[1]
        stream = stream or EncoderStream()
        stride = self.spatial_stride
        if frames.shape[2] % stride or frames.shape[3] % stride:
            raise UserError(
                "frames",
                f"pictures of {frames.shape[2]} x {frames.shape[3]} pixels",
                f"Resize them to multiples of {stride}",
            )
        if stream.pending is not None:
            frames = torch.cat((stream.pending, frames), dim=1)
        if not stream.started and frames.shape[1]:
            frames = torch.cat((frames[:, :1].expand(-1, 3, -1, -1, -1), frames), dim=1)
            stream.started = True
        count = frames.shape[1] // FRAMES_PER_LATENT
        rest = frames.shape[1] % FRAMES_PER_LATENT
        if whole and (rest or not count):
            raise UserError(
                "frames",
                f"{given} frames, but a clip is 1 + 4n",
                "Drop the oldest frames until it is",
            )
        stream.pending = frames[:, -rest:].clone() if rest else None
        device = next(self.parameters()).device
        out = []
        for first in range(0, count, self.slab):
            part = frames[:, first * 4 : min(first + self.slab, count) * 4]
            groups = part.unflatten(1, (-1, FRAMES_PER_LATENT)).to(device)
            x = groups.movedim(-1, 3).flatten(0, 1).flatten(1, 2).float() / 127.5 - 1
            out.append(self.encode_groups(x).unflatten(0, groups.shape[:2]).float())
        if out:
            return torch.cat(out, dim=1)
        h, w = frames.shape[2] // stride, frames.shape[3] // stride
        return torch.zeros(len(frames), 0, self.latent_channels, h, w, device=device)

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "B T C h w"], stream: DecoderStream | None = None
    ) -> UInt8[Tensor, "B F H W 3"]:
        """Frames of these latents: 1 + 4(T-1) at a clip's start, else 4T."""
        stream = stream or DecoderStream()
        if not latents.shape[1]:
            h, w = (n * self.spatial_stride for n in latents.shape[3:])
            return torch.zeros(len(latents), 0, h, w, 3, dtype=torch.uint8, device=latents.device)
        start = stream.previous is None
        before = torch.zeros_like(latents[:, :1]) if stream.previous is None else stream.previous
        previous = torch.cat((before, latents[:, :-1]), dim=1)
        stream.previous = latents[:, -1:].clone()
        out = []
        for first in range(0, latents.shape[1], self.slab):
            part = slice(first, first + self.slab)
            x = self.decode_groups(latents[:, part].flatten(0, 1), previous[:, part].flatten(0, 1))
            x = x.unflatten(0, (len(latents), -1)).unflatten(2, (FRAMES_PER_LATENT, 3))
            frames = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            out.append(frames.flatten(1, 2).movedim(2, -1))
        frames = torch.cat(out, dim=1)
        return frames[:, FRAMES_PER_LATENT - 1 :] if start else frames
