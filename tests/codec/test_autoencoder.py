"""The codec: a stream in any pieces is the whole clip, and the past never hears of the future."""

import pytest
import torch
from torch import Tensor

from decmem.codec import Autoencoder, CodecConfig, DecoderStream, EncoderStream
from decmem.codec.autoencoder import Residual
from decmem.errors import UserError

CONFIG = CodecConfig(
    channels=4, widths=(8, 8, 8), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1)
)
H, W = 16, 24


@pytest.fixture(scope="module")
def codec() -> Autoencoder:
    """Random parameters everywhere: fresh residual branches are silent."""
    codec = Autoencoder(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in codec.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
        codec.mean.copy_(torch.randn(4, generator=generator) / 2)
        codec.deviation.copy_(torch.rand(4, generator=generator) + 0.5)
    return codec.eval()


def clip(frames: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, frames, H, W, 3), dtype=torch.uint8, generator=generator)


def pieces(x: Tensor, lengths: list[int]) -> list[Tensor]:
    assert sum(lengths) == x.shape[1]
    return list(x.split(lengths, dim=1))


def test_shapes(codec: Autoencoder) -> None:
    latents = codec.encode(clip(9))
    assert latents.shape == (2, 3, 4, 2, 3)
    assert latents.dtype == torch.float32
    frames = codec.decode(latents)
    assert frames.shape == (2, 9, H, W, 3)
    assert frames.dtype == torch.uint8
    assert frames.float().std() > 10, "the codec under test is not silent"


@pytest.mark.parametrize(
    "lengths", [[1, 4, 4, 4, 4], [3, 3, 3, 8], [1] * 17, [2, 15], [16, 1], [0, 5, 0, 12]], ids=str
)
def test_encoding_in_pieces_is_the_whole_clip(lengths: list[int], codec: Autoencoder) -> None:
    frames, stream = clip(17), EncoderStream()
    parts = [codec.encode(piece, stream) for piece in pieces(frames, lengths)]
    # Convolutions of another batch size may add in another order.
    torch.testing.assert_close(torch.cat(parts, 1), codec.encode(frames), atol=1e-5, rtol=1e-5)
    assert stream.pending is None


@pytest.mark.parametrize("lengths", [[1] * 5, [2, 3], [4, 1], [0, 3, 0, 2, 0]], ids=str)
def test_decoding_in_pieces_is_the_whole_clip(lengths: list[int], codec: Autoencoder) -> None:
    latents, stream = codec.encode(clip(17)), DecoderStream()
    whole = codec.decode(latents)
    frames = torch.cat([codec.decode(piece, stream) for piece in pieces(latents, lengths)], 1)
    assert frames.shape == whole.shape
    assert (frames.int() - whole.int()).abs().max() <= 1
    assert (frames != whole).float().mean() < 1e-3


def test_groups_of_one_size_are_coded_to_the_same_bits(
    codec: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "slab", 1, raising=False)
    frames, encoder, decoder = clip(17), EncoderStream(), DecoderStream()
    whole = codec.encode(frames)
    parts = [codec.encode(piece, encoder) for piece in pieces(frames, [1, 4, 4, 4, 4])]
    assert torch.equal(torch.cat(parts, 1), whole)
    decoded = [codec.decode(piece, decoder) for piece in whole.split(1, dim=1)]
    assert torch.equal(torch.cat(decoded, 1), codec.decode(whole))


@pytest.mark.parametrize("slab", [1, 2, 3, 100])
def test_slab_size_changes_nothing(
    slab: int, codec: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = clip(17)
    latents = codec.encode(frames)
    pictures = codec.decode(latents)
    monkeypatch.setattr(codec, "slab", slab, raising=False)
    torch.testing.assert_close(codec.encode(frames), latents, atol=1e-5, rtol=1e-5)
    assert (codec.decode(latents).int() - pictures.int()).abs().max() <= 1


def test_memory_of_a_stream_is_constant(codec: Autoencoder) -> None:
    encoder, decoder = EncoderStream(), DecoderStream()
    for piece in pieces(clip(33), [11] * 3):
        codec.decode(codec.encode(piece, encoder), decoder)
        # Three frames wait at most, and one latent is remembered; neither holds a larger tensor.
        if encoder.pending is not None:
            assert encoder.pending.untyped_storage().nbytes() <= 3 * piece[:, :1].nbytes
        assert decoder.previous is not None
        assert (
            decoder.previous.untyped_storage().nbytes() == decoder.previous.nbytes == 2 * 4 * 6 * 4
        )


def test_batch_company_changes_nothing(codec: Autoencoder) -> None:
    together = codec.encode(clip(9, batch=3))
    alone = codec.encode(clip(9, batch=3)[1:2])
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=1e-5)


def changed(before: Tensor, after: Tensor) -> list[bool]:
    """Which latents or frames differ."""
    return (before != after).flatten(2).any(2).any(0).tolist()


def test_a_frame_changes_its_own_latent_only(codec: Autoencoder) -> None:
    frames = clip(13)
    before = codec.encode(frames)
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (12, 3)):
        other = frames.clone()
        other[:, frame] = 255 - other[:, frame]
        assert changed(before, codec.encode(other)) == [i == latent for i in range(4)]


def test_a_latent_changes_its_own_frames_and_the_next_latents(codec: Autoencoder) -> None:
    latents = codec.encode(clip(13))
    before = codec.decode(latents)
    for latent in range(4):
        other = latents.clone()
        other[:, latent] += 1.0
        first = 0 if latent == 0 else 1 + 4 * (latent - 1)
        last = 1 + 4 * (latent + 1)
        expected = [first <= frame < last for frame in range(13)]
        assert changed(before, codec.decode(other)) == expected


def test_nothing_comes_before_the_first_latent(codec: Autoencoder) -> None:
    # Zero where latents are not normalised; zero where they are would be the mean latent.
    latents = codec.encode(clip(5))
    raw = latents[:, 0] * codec.deviation[:, None, None] + codec.mean[:, None, None]
    picture = codec.pictures(raw, torch.zeros_like(raw))[:, -3:].movedim(1, -1)
    expected = ((picture + 1) * 127.5).clamp(0, 255)
    assert (codec.decode(latents)[:, 0].float() - expected).abs().max() <= 0.51


def test_raw_latents_have_unit_rms(codec: Autoencoder) -> None:
    groups = torch.randn(3, 12, H, W, generator=torch.Generator().manual_seed(2))
    raw = codec.raw_latents(groups)
    torch.testing.assert_close(raw.square().mean(1), torch.ones(3, 2, 3), atol=1e-3, rtol=0)
    normalised = (raw - codec.mean[:, None, None]) / codec.deviation[:, None, None]
    torch.testing.assert_close(codec.encode_groups(groups), normalised)


@pytest.mark.parametrize("frames", [0, 2, 3, 4, 6, 8])
def test_whole_clips_have_1_plus_4n_frames(frames: int, codec: Autoencoder) -> None:
    with pytest.raises(UserError, match=rf"frames: {frames} frames, but a clip is 1 \+ 4n"):
        codec.encode(clip(frames))


@pytest.mark.parametrize("size", [(12, 24), (16, 20)])
def test_odd_picture_sizes_are_refused(size: tuple[int, int], codec: Autoencoder) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        codec.encode(torch.zeros(1, 1, *size, 3, dtype=torch.uint8))


def test_fresh_residual_branches_are_the_identity() -> None:
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(Residual(8)(x), x)
