"""Frames <-> latents."""

from decmem.codec.autoencoder import Autoencoder, CodecConfig
from decmem.codec.base import Codec, DecoderStream, EncoderStream
from decmem.codec.side_decoder import SideDecoder

__all__ = ["Autoencoder", "Codec", "CodecConfig", "DecoderStream", "EncoderStream", "SideDecoder"]
