"""Video files: the only module that touches PyAV, which training and evaluation do not need."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from decmem.errors import UserError
from decmem.storage import atomic_file

try:
    import av
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream
except ImportError as error:
    # Whoever needs no video never imports this file.
    raise UserError(
        "video", "PyAV, which reads and writes it, is not installed", "pip install av"
    ) from error

logger = logging.getLogger(__name__)

# The AV1 encoder prints its settings on stderr unless told to report errors only.
os.environ.setdefault("SVT_LOG", "1")

VideoCodec = Literal["h264", "vp9", "av1", "ffv1"]

# Aspect ratios further apart than this make circles visibly oval.
_ASPECT_TOLERANCE = 0.02
# Containers may declare a frame or two that no player shows (edit lists).
_FRAMES_UNDECODED = 2


@dataclass(frozen=True)
class _Encoder:
    """How one codec is asked for: the names and settings of FFmpeg."""

    name: str
    pixels: str
    options: dict[str, str]
    suffixes: tuple[str, ...]


_ENCODERS: dict[VideoCodec, _Encoder] = {
    "h264": _Encoder("libx264", "yuv420p", {"crf": "17", "preset": "veryfast"}, (".mp4", ".mkv")),
    "vp9": _Encoder(
        "libvpx-vp9",
        "yuv420p",
        {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"},
        (".mp4", ".webm", ".mkv"),
    ),
    "av1": _Encoder("libsvtav1", "yuv420p", {"crf": "24", "preset": "8"}, (".mp4", ".mkv")),
    "ffv1": _Encoder("ffv1", "bgr0", {}, (".mkv",)),
}


class VideoWriter:
    """What ``video_writer`` gives: takes frames in pieces of any length."""

    def __init__(self, container: OutputContainer, stream: VideoStream, pixels: str) -> None:
        self._container = container
        self._stream = stream
        self._pixels = pixels

    def write(self, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Append RGB frames of the declared size."""
        declared = (self._stream.height, self._stream.width)
        if frames.shape[1:3] != declared:
            raise ValueError(f"frames are {frames.shape[1:3]}, the video is {declared}")
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if self._pixels == "yuv420p":
                picture = picture.reformat(
                    format=self._pixels, dst_colorspace="ITU601", dst_color_range="MPEG"
                )
            else:
                picture = picture.reformat(format=self._pixels)
            self._container.mux(self._stream.encode(picture))


def check_video(
    path: str | Path,
    size: tuple[int, int],
    fps: float,
    *,
    lossless: bool = False,
    codec: VideoCodec = "h264",
) -> None:
    """Raise the ``UserError`` that ``video_writer`` would: worth asking before hours of work."""
    name = _codec_name(lossless, codec)
    encoder = _ENCODERS[name]
    suffix = Path(path).suffix
    if suffix not in encoder.suffixes:
        raise UserError(
            str(path),
            f"a {name} video cannot be stored in a {suffix or 'suffixless'} file",
            f"end the name in {' or '.join(encoder.suffixes)}",
        )
    if fps <= 0:
        raise UserError("fps", f"a video cannot have {fps:g} frames a second", "use 1 or more")
    if min(size) < 1 or (encoder.pixels == "yuv420p" and any(side % 2 for side in size)):
        raise UserError(
            "size",
            f"{name} needs an even height and width, got {size[0]} x {size[1]}",
            "use even numbers, or write a lossless .mkv",
        )
    if encoder.name not in av.codecs_available:
        raise UserError(
            "codec",
            f"this build of FFmpeg has no {encoder.name} encoder",
            "reinstall PyAV from its wheel (pip install --force-reinstall av), "
            "or choose another codec",
        )


@contextlib.contextmanager
def video_writer(
    path: str | Path,
    size: tuple[int, int],
    fps: float,
    *,
    lossless: bool = False,
    codec: VideoCodec = "h264",
    provenance: Mapping[str, Any] | None = None,
) -> Iterator[VideoWriter]:
    """Write a video whose frames arrive in pieces; the file appears when the block ends well.

    ``with video_writer("out.mp4", size=(128, 192), fps=10) as video: video.write(frames)``

    Args:
        path: where the file goes; ``.mp4``, or ``.mkv`` when lossless.
        size: height and width in pixels; even, unless lossless (colour is stored at half size).
        fps: frames per second.
        lossless: store the exact pixels (FFV1 in ``.mkv``, some ten times larger) instead.
        codec: ``h264`` plays everywhere; ``vp9`` and ``av1`` are free of patents.
        provenance: stored as JSON in the file's comment tag; ``read_provenance`` gives it back.

    Raises:
        UserError: a wrong suffix or size, an encoder this FFmpeg lacks, a full disk.
    """
    check_video(path, size, fps, lossless=lossless, codec=codec)
    path = Path(path)
    rate = Fraction(fps).limit_denominator(1001)
    encoder = _ENCODERS[_codec_name(lossless, codec)]
    # faststart: the index goes to the front, so that a browser can play while loading.
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with (
        atomic_file(path) as temporary,
        av.open(str(temporary), "w", options=options) as container,
    ):
        if provenance:
            container.metadata["comment"] = json.dumps(dict(provenance))
        stream = container.add_stream(encoder.name, rate=rate, options=encoder.options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = size
        stream.pix_fmt = encoder.pixels
        if encoder.pixels == "yuv420p":
            _tag_colours(stream)
        yield VideoWriter(container, stream, encoder.pixels)
        container.mux(stream.encode())


def write_video(
    path: str | Path,
    frames: UInt8[np.ndarray, "F H W 3"],
    fps: float,
    *,
    lossless: bool = False,
    codec: VideoCodec = "h264",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write all ``frames`` (RGB) at ``fps``; the options are those of ``video_writer``."""
    height, width = frames.shape[1:3]
    with video_writer(
        path, (height, width), fps, lossless=lossless, codec=codec, provenance=provenance
    ) as video:
        video.write(frames)


def read_video(
    path: str | Path,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    limit: int | None = None,
    argument: str = "video",
) -> tuple[UInt8[np.ndarray, "F H W 3"], float]:
    """Read a video's frames (RGB), resized and resampled where asked for, with a logged warning.

    Args:
        path: any file that FFmpeg can decode.
        size: height and width wanted; other sizes are resized (bicubic, area-weighted when
            smaller), with no cropping.
        fps: rate wanted; other rates are resampled by taking the frame nearest in time.
        limit: stop after this many frames.
        argument: what the user calls this file, for error messages.

    Returns:
        The frames, and their frames per second.

    Raises:
        UserError: the file is missing, damaged, holds no video, or has no frames.
    """
    path = Path(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(argument, f"{path} has no video in it", "give a video file")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise UserError(argument, f"{path} has no frame rate", "convert it to .mp4 first")
            _warn_of_changes(path, stream, float(rate), size, fps)
            target = Fraction(fps).limit_denominator(1001) if fps else rate
            pictures = _at_rate(_decoded(container, stream, path, argument), rate, target)
            frames = [_resized(picture, size) for picture in _first(pictures, limit)]
    except av.FFmpegError as error:
        raise _unreadable(argument, path, error) from error
    except OSError as error:
        raise _unreadable(argument, path, error) from error
    if not frames:
        raise UserError(argument, f"{path} has no frames", "give a video that plays")
    return np.stack(frames), float(target)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What ``provenance`` was given when the video was written; empty for other videos."""
    with av.open(str(path)) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
    try:
        found = json.loads(tags.get("comment", ""))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _codec_name(lossless: bool, codec: VideoCodec) -> VideoCodec:
    return "ffv1" if lossless else codec


def _tag_colours(stream: VideoStream) -> None:
    """Say that colours are BT.601, as converted: players guess otherwise, each its own way."""
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = 6  # smpte170m
    context.color_range = 1  # limited


def _decoded(
    container: InputContainer, stream: VideoStream, path: Path, argument: str
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Frames with their time in seconds from the first; complains when the file ends early."""
    start, count = None, 0
    for picture in container.decode(stream):
        if picture.pts is None or picture.time_base is None:
            time = Fraction(count) / Fraction(stream.average_rate or 1)
        else:
            time = picture.pts * picture.time_base
        start = time if start is None else start
        yield time - start, picture
        count += 1
    if count + _FRAMES_UNDECODED < stream.frames:
        raise UserError(
            argument,
            f"{path} is damaged: it declares {stream.frames} frames and {count} can be read",
            "copy or export it again",
        )


def _at_rate(
    pictures: Iterator[tuple[Fraction, av.VideoFrame]], rate: Fraction, target: Fraction
) -> Iterator[av.VideoFrame]:
    """For the times 0, 1/target, 2/target, ... the picture nearest in time."""
    if abs(rate - target) <= target / 1000:
        yield from (picture for _, picture in pictures)
        return
    wanted, previous = 0, None
    for time, picture in pictures:
        while previous is not None and wanted / target <= (previous[0] + time) / 2:
            yield previous[1]
            wanted += 1
        previous = (time, picture)
    # The last picture is shown for one frame of the source.
    while previous is not None and wanted / target < previous[0] + 1 / rate:
        yield previous[1]
        wanted += 1


def _first(pictures: Iterator[av.VideoFrame], limit: int | None) -> Iterator[av.VideoFrame]:
    for index, picture in enumerate(pictures):
        if limit is not None and index >= limit:
            return
        yield picture


def _resized(picture: av.VideoFrame, size: tuple[int, int] | None) -> UInt8[np.ndarray, "H W 3"]:
    if size is None or size == (picture.height, picture.width):
        return picture.to_ndarray(format="rgb24")
    height, width = size
    # Pillow's bicubic filter widens with the scale, so that a smaller picture does not alias.
    image = picture.to_image().resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _warn_of_changes(
    path: Path,
    stream: VideoStream,
    rate: float,
    size: tuple[int, int] | None,
    fps: float | None,
) -> None:
    found = (stream.height, stream.width)
    if size is not None and size != found:
        aspect = (size[1] / size[0]) / (found[1] / found[0])
        stretched = abs(aspect - 1) > _ASPECT_TOLERANCE
        logger.warning(
            "%s is %d x %d pixels (height x width), resized to %d x %d%s",
            path,
            *found,
            *size,
            ", which changes its proportions: crop it first to avoid that" if stretched else "",
        )
    if fps is not None and abs(rate - fps) > fps / 1000:
        logger.warning("%s has %g frames per second, resampled to %g", path, rate, fps)


def _unreadable(argument: str, path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(argument, f"{path} does not exist", "check the path")
    if isinstance(error, IsADirectoryError) or path.is_dir():
        return UserError(argument, f"{path} is a folder", "give the path of a video file")
    if isinstance(error, PermissionError):
        return UserError(argument, f"{path} cannot be read: no permission", "check its owner")
    return UserError(
        argument, f"{path} is damaged or not a video", "check that a player can show it"
    )
