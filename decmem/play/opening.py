"""Where a world begins: a seed, or what the visitor handed in."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decmem.errors import UserError
from decmem.play.defaults import Bounds
from decmem.play.journey import Journey, Progress
from decmem.play.jpeg import load_picture
from decmem.play.parcels import Parcels
from decmem.saved_world import load_world
from decmem.world.episode import Episode
from decmem.world.version import FPS


def beginning(
    journey: Journey, request: dict[str, Any], parcels: Parcels, owner: str, bounds: Bounds
) -> Iterator[Progress]:
    """The work a `start` message asks for, piece by piece.

    A video is taken together with the owner's newest track.

    Raises:
        UserError: for an upload that is not there, or cannot be used.
    """
    if request["from"] == "seed":
        yield from journey.begin_seed(request["seed"], bounds.memory_frames)
        return
    if request["from"] == "file":
        yield from _from_file(journey, request["path"], bounds)
        return
    parcel = parcels.find(request["upload"], owner)
    if parcel is None:
        raise UserError("upload", "no such upload", "Upload the file again")
    if parcel.kind == "track":
        raise UserError("upload", "a track begins no world", "Start from the video")
    track = parcels.newest("track", owner)
    yield from _from_kind(journey, parcel.kind, parcel.path, track and track.path, bounds)


def kind_of(path: Path) -> str:
    """What a file of the person who runs the server is: world, video or picture.

    Raises:
        UserError: when it is not there.
    """
    if not path.is_file():
        raise UserError("memory", f"no file {path}", "Give a .world, a picture or a video")
    suffix = path.suffix.lower()
    if suffix == ".world":
        return "world"
    return "video" if suffix in (".mp4", ".mkv", ".webm", ".mov", ".avi") else "picture"


def _from_file(journey: Journey, path: Path, bounds: Bounds) -> Iterator[Progress]:
    beside = [path.with_suffix(".npz"), path.with_name("track.npz")]
    track = next((file for file in beside if file.is_file()), None)
    yield from _from_kind(journey, kind_of(path), path, track, bounds)


def _from_kind(
    journey: Journey, kind: str, path: Path, track: Path | None, bounds: Bounds
) -> Iterator[Progress]:
    size = journey.session.config.size
    if kind == "picture":
        yield from journey.begin_picture(load_picture(path, size))
    elif kind == "world":
        saved = load_world(path)
        if saved.length > bounds.latents:
            raise UserError("world", f"{saved.length} latents", f"Give at most {bounds.latents}")
        yield from journey.begin_saved(saved)
    elif track is None:
        raise UserError("track", "a video needs its track", "Give the track (.npz) first")
    else:
        yield Progress("encode", 0, 1)
        _check_unpacked(track, bounds.unpacked_bytes)
        yield from journey.begin_clip(_newest(path, track, size, bounds))


def _check_unpacked(track: Path, most: int) -> None:
    """Raises `UserError` for an archive that would unpack to more than `most` bytes."""
    try:
        with zipfile.ZipFile(track) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError("track", "not a readable npz file", "Write it again") from error
    if size > most:
        problem = f"it unpacks to {size / 2**20:.0f} MiB, more than {most / 2**20:.0f}"
        raise UserError("track", problem, "Leave depth out, or give a shorter one")


def _newest(video: Path, track: Path, size: tuple[int, int], bounds: Bounds) -> Episode:
    """The newest frames of a clip, whole latents of them."""
    # Here, so that a server without PyAV lacks nothing but video.
    from decmem.data.clip import load_clip, whole_latents

    clip, _ = load_clip(video, track, size, FPS, limit=bounds.video_read)
    newest = slice(max(0, len(clip) - bounds.video_frames), None)
    return whole_latents(
        Episode(
            clip.frames[newest],
            clip.world_to_camera[newest],
            clip.intrinsics[newest],
            clip.actions[newest],
            clip.fps,
        )
    )
