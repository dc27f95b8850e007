"""Decoding beside other work gives the frames that decoding alone gives."""

import pytest
import torch

from decmem.codec import Autoencoder, CodecConfig, DecoderStream, SideDecoder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = CodecConfig(
    channels=4, widths=(8, 8, 8), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1)
)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_chunks_are_decoded_as_if_alone(device: str) -> None:
    torch.manual_seed(0)
    codec = Autoencoder(SMALL).eval().to(device)
    chunks = [torch.randn(2, n, 4, 8, 12, device=device) for n in (2, 4, 1)]
    alone = DecoderStream()
    expected = [codec.decode(chunk, alone).cpu() for chunk in chunks]
    decoder, stream, made = SideDecoder(codec, torch.device(device)), DecoderStream(), []
    for chunk in chunks:
        latents = chunk.clone()
        made.append(decoder.begin(latents, stream))
        if device == "cuda":
            # What follows takes the memory of what is still being read, and overwrites it.
            del latents
            for _ in range(50):
                torch.full_like(chunk, float("nan"))
    for finished, frames in zip(made, expected, strict=True):
        assert torch.equal(finished().cpu(), frames)


@pytest.mark.gpu
def test_a_gpu_decodes_on_a_stream_of_its_own() -> None:
    decoder = SideDecoder(Autoencoder(SMALL).to("cuda"), torch.device("cuda"))
    assert decoder.side not in (None, torch.cuda.current_stream())
