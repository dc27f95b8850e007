"""A user's own clip: a video and its track, brought to the size and rate a model wants."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from decmem.data.video import read_video
from decmem.errors import UserError
from decmem.world.actions import ACTION_FIELDS, JUMP, PITCH, SPRINT, YAW, A, validate_actions
from decmem.world.episode import Episode
from decmem.world.script import parse_script
from decmem.world.track_file import TrackFile, load_track

logger = logging.getLogger(__name__)


def load_clip(
    video: str | Path, track: str | Path, size: tuple[int, int], fps: float
) -> tuple[Episode, TrackFile | None]:
    """The clip as an episode of this size and rate, and what the track holds beyond the video.

    Frames are resized and resampled with a warning; intrinsics, poses and actions go along. A
    track longer than its video says how the clip goes on: the rest is given back.

    Raises:
        UserError: for files that cannot be read or do not belong together.
    """
    known = load_track(track, "--track")
    frames, rate = read_video(video, size, known.fps, argument="--memory")
    if len(frames) > len(known):
        raise UserError(
            "--track",
            f"{len(known)} poses for a video of {len(frames)} frames at {rate:g} per second",
            "give one pose per frame of the video, at the rate the track states",
        )
    known = _scaled(known, size)
    past, future = _cut(known, 0, len(frames)), _cut(known, len(frames), len(known))
    if abs(rate - fps) > fps / 1000:
        kept = _nearest_frames(len(frames), rate, fps)
        logger.warning("%s runs at %g frames per second, resampled to %g", video, rate, fps)
        frames, past = frames[kept], _resampled(past, kept)
        if len(future):
            future = _resampled(future, _nearest_frames(len(future), rate, fps))
    if past.actions is None:
        logger.warning("%s has no actions: the clip is taken as unsteered", track)
    actions = np.zeros((len(frames), A), np.float32) if past.actions is None else past.actions
    episode = Episode(
        frames=frames,
        world_to_camera=past.world_to_camera,
        intrinsics=past.intrinsics,
        actions=actions,
        fps=fps,
        provenance={"video": Path(video).name, "track": Path(track).name} | known.provenance,
    )
    return episode, future if len(future) else None


def whole_latents(episode: Episode, frames_per_latent: int = 4) -> Episode:
    """The newest 1 + 4n frames of a clip; what is too old goes, with a warning."""
    spare = (len(episode) - 1) % frames_per_latent
    if spare:
        logger.warning(
            "the memory has %d frames and needs 1 + %dn: the oldest %d are left out",
            len(episode),
            frames_per_latent,
            spare,
        )
    return Episode(
        frames=episode.frames[spare:],
        world_to_camera=episode.world_to_camera[spare:],
        intrinsics=episode.intrinsics[spare:],
        actions=episode.actions[spare:],
        fps=episode.fps,
        provenance=episode.provenance,
    )


def load_actions(
    given: str, argument: str = "--actions"
) -> tuple[Float32[np.ndarray, "F A"], Float64[np.ndarray, "F 4 4"] | None]:
    """Future actions from an .npz or .csv file or a script, and poses where an .npz holds them.

    Raises:
        UserError: for a file or a script that cannot be read, and for actions out of range.
    """
    path = Path(given)
    if path.suffix == ".npz":
        held = load_track(path, argument)
        if held.actions is None:
            raise UserError(argument, f"{path} holds no actions", "add an array named actions")
        return held.actions, held.world_to_camera
    if path.suffix == ".csv":
        try:
            rows = np.loadtxt(path, delimiter=",", ndmin=2, comments="#", dtype=np.float32)
        except (OSError, ValueError) as error:
            raise UserError(
                argument,
                f"{path} cannot be read ({error})",
                f"give rows of {', '.join(field.name for field in ACTION_FIELDS)}",
            ) from error
        return validate_actions(rows, argument), None
    return parse_script(given, argument), None


def _cut(track: TrackFile, first: int, last: int) -> TrackFile:
    part: dict[str, Any] = {
        "world_to_camera": track.world_to_camera[first:last],
        "intrinsics": track.intrinsics[first:last],
        "actions": None if track.actions is None else track.actions[first:last],
    }
    return TrackFile(**part, fps=track.fps, size=track.size, provenance=track.provenance)


def _scaled(track: TrackFile, size: tuple[int, int]) -> TrackFile:
    """Intrinsics of the resized picture."""
    down, across = size[0] / track.size[0], size[1] / track.size[1]
    intrinsics = track.intrinsics * np.array([[across], [down], [1.0]])
    return TrackFile(
        track.world_to_camera, intrinsics, track.actions, track.fps, size, None, track.provenance
    )


def _nearest_frames(count: int, rate: float, fps: float) -> np.ndarray:
    """Indices of the frames nearest the times 0, 1/fps, 2/fps, ..."""
    times = np.arange(int(np.floor((count - 1) / rate * fps + 1e-6)) + 1) / fps
    return np.minimum(np.rint(times * rate).astype(int), count - 1)


def _resampled(track: TrackFile, kept: np.ndarray) -> TrackFile:
    """The kept rows; actions between them are taken together, so that they lead as far."""
    actions = track.actions
    if actions is not None:
        merged = np.zeros((len(kept), A), np.float32)
        for row, (before, now) in enumerate(itertools.pairwise(kept), start=1):
            between = actions[before + 1 : now + 1]
            if not len(between):
                continue
            merged[row] = between.mean(0)
            merged[row, [YAW, PITCH]] = between[:, [YAW, PITCH]].sum(0)
            merged[row, [JUMP, SPRINT]] = between[:, [JUMP, SPRINT]].max(0)
        low, high = np.array([(f.low, f.high) for f in ACTION_FIELDS], np.float32).T
        actions = merged.clip(low, high)
    return TrackFile(
        track.world_to_camera[kept],
        track.intrinsics[kept],
        actions,
        track.fps,
        track.size,
        None,
        track.provenance,
    )
