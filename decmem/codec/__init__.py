"""Frames <-> latents."""

from decmem.codec.autoencoder import Autoencoder, CodecConfig
from decmem.codec.base import Codec, DecoderStream, EncoderStream

__all__ = ["Autoencoder", "Codec", "CodecConfig", "DecoderStream", "EncoderStream"]
