"""The trained video autoencoder: convolutions over groups of four frames, 8x8 smaller in space."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from decmem.codec.base import FRAMES_PER_LATENT, Codec

_PICTURE = 3 * FRAMES_PER_LATENT


@dataclass(frozen=True)
class CodecConfig:
    """Shape of the autoencoder.

    Args:
        channels: latent channels.
        widths: channels at 1/2, 1/4 and 1/8 of the picture.
        encoder_depths, decoder_depths: residual blocks at those sizes.
    """

    channels: int = 32
    widths: tuple[int, int, int] = (64, 128, 160)
    encoder_depths: tuple[int, int, int] = (2, 2, 3)
    decoder_depths: tuple[int, int, int] = (2, 3, 4)


class Conv2d(nn.Conv2d):
    """A convolution whose weight follows the dtype of its input."""

    def forward(self, x: Float[Tensor, "N inputs H W"]) -> Float[Tensor, "N outputs H W"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, padding=self.padding)


def _conv(inputs: int, outputs: int, size: int = 3) -> Conv2d:
    return Conv2d(inputs, outputs, size, padding=size // 2)


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))); starts as the identity, so that no norm is needed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = _conv(width, width)
        nn.init.zeros_(self.second.weight)
        assert self.second.bias is not None
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Float[Tensor, "N width H W"]) -> Float[Tensor, "N width H W"]:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Encoder(nn.Module):
    """Pictures to features at an eighth of their size; space goes into channels, never lost."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = _PICTURE
        for width, depth in zip(config.widths, config.encoder_depths, strict=True):
            # Pictures deserve a look around; features were just mixed and are only regrouped.
            layers += [
                nn.PixelUnshuffle(2),
                _conv(inputs * 4, width, 3 if inputs == _PICTURE else 1),
            ]
            layers += [Residual(width) for _ in range(depth)]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.SiLU(), _conv(inputs, config.channels, 1))

    def forward(self, x: Float[Tensor, "N 12 H W"]) -> Float[Tensor, "N C h w"]:
        return self.layers(x)


class Decoder(nn.Module):
    """Mirror of the encoder; also sees the latent before, which shows much of the same place."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(2 * config.channels, config.widths[2])]
        outputs = (*config.widths[1::-1], _PICTURE)
        stages = zip(config.widths[::-1], config.decoder_depths[::-1], outputs, strict=True)
        for width, depth, after in stages:
            layers += [Residual(width) for _ in range(depth)]
            layers += [nn.SiLU(), _conv(width, after * 4, 3 if after == _PICTURE else 1)]
            layers += [nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "N C2 h w"]) -> Float[Tensor, "N 12 H W"]:
        return self.layers(x)


class Autoencoder(Codec):
    """Encoder, decoder and the statistics that normalise latents.

    Raw latents have unit RMS over their channels at every place: a bound without a penalty, and
    what noise of a given size means is settled.
    """

    spatial_stride = 8

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("deviation", torch.ones(config.channels))
        self.mean: Tensor
        self.deviation: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: bf16 on GPUs, fp32 elsewhere."""
        return torch.bfloat16 if self.mean.is_cuda else torch.float32

    def raw_latents(self, groups: Float[Tensor, "N 12 H W"]) -> Float[Tensor, "N C h w"]:
        """Latents before normalisation, fp32, unit RMS over channels."""
        x = groups.to(self.dtype, memory_format=torch.channels_last)
        z = self.encoder(x).float()
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-6)

    def pictures(
        self, raw: Float[Tensor, "N C h w"], previous: Float[Tensor, "N C h w"]
    ) -> Float[Tensor, "N 12 H W"]:
        """Frames of raw latents and those before them, fp32."""
        x = torch.cat((raw, previous), dim=1)
        return self.decoder(x.to(self.dtype, memory_format=torch.channels_last)).float()

    def encode_groups(self, groups: Float[Tensor, "N 12 H W"]) -> Float[Tensor, "N C h w"]:
        return self._normalise(self.raw_latents(groups))

    def decode_groups(
        self, latents: Float[Tensor, "N C h w"], previous: Float[Tensor, "N C h w"]
    ) -> Float[Tensor, "N 12 H W"]:
        started = previous.abs().amax((1, 2, 3), keepdim=True) > 0
        # At a clip's start the context is zero before it is de-normalised, and stays zero.
        before = torch.where(started, self._denormalise(previous), 0.0)
        return self.pictures(self._denormalise(latents), before)

    def _normalise(self, z: Tensor) -> Tensor:
        return (z - self.mean[:, None, None]) / self.deviation[:, None, None]

    def _denormalise(self, z: Tensor) -> Tensor:
        return z.float() * self.deviation[:, None, None] + self.mean[:, None, None]
