"""Decoding beside other work: on a GPU a chunk becomes frames while the next is computed."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decmem.codec.base import Codec, DecoderStream


class SideDecoder:
    """A codec's decoder on a stream of its own where it lies on a GPU; the frames are the same.

    Elsewhere nothing runs beside anything: frames are decoded when they are asked for.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.codec = codec
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(
        self, latents: Float[Tensor, "B T C h w"], stream: DecoderStream
    ) -> Callable[[], UInt8[Tensor, "B F H W 3"]]:
        """Begins `Codec.decode`; what comes back waits for the frames. Each chunk's is called once,
        in the order of the chunks."""
        if self.side is None:
            return lambda: self.codec.decode(latents, stream)
        side, read = self.side, (latents, stream.previous)
        side.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(side):
            frames = self.codec.decode(latents, stream)
        done = side.record_event()
        # Their memory must not go to other work of this stream before the other has read it.
        for tensor in read:
            if tensor is not None:
                tensor.record_stream(side)

        def finished() -> Tensor:
            here = torch.cuda.current_stream(frames.device)
            here.wait_event(done)
            frames.record_stream(here)
            return frames

        return finished
