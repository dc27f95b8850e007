"""Files to take home: the world itself, and its film."""

from collections.abc import Iterator
from pathlib import Path

from decmem.codec.base import DecoderStream
from decmem.play.journey import Journey, Progress
from decmem.saved_world import save_world
from decmem.world.version import FPS

_PIECE = 8


def pack_world(journey: Journey, path: Path) -> Iterator[Progress]:
    """Writes the `.world` file."""
    save_world(path, journey.snapshot())
    yield Progress("remember", 1, 1)


def film(journey: Journey, path: Path) -> Iterator[Progress]:
    """Writes the whole walk as a video: memory as the codec shows it, then the dream.

    Raises:
        UserError: where PyAV is not installed.
    """
    # Here, so that a server without PyAV lacks nothing but video.
    from decmem.data.video import video_writer

    latents = journey.session.latents
    assert latents is not None
    stream, codec = DecoderStream(), journey.session.codec
    with video_writer(path, journey.session.config.size, FPS) as writer:
        for first in range(0, latents.shape[1], _PIECE):
            part = latents[:, first : first + _PIECE]
            writer.write(codec.decode(part, stream)[0].cpu().numpy())
            yield Progress("render", min(first + _PIECE, latents.shape[1]), latents.shape[1])
