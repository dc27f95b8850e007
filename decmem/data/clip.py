"""A user's own clip: a video and its track, brought to the size and rate a model wants."""

import itertools
import logging
import warnings
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
    video: str | Path,
    track: str | Path,
    size: tuple[int, int],
    fps: float,
    limit: int | None = None,
) -> tuple[Episode, TrackFile | None]:
    """The clip as an episode of this size and rate, and what the track holds beyond the video.

    Frames are resized and resampled with a warning; intrinsics, poses and actions go along. A
    track longer than its video says how the clip goes on: the rest is given back.

    Raises:
        UserError: for files that cannot be read or do not belong together, and for a video of more
            than `limit` frames, which is not read to its end.
    """
    known = _load_sound_track(track, "--track")
    most = None if limit is None else limit + 1
    frames, rate = read_video(video, size, known.fps, limit=most, argument="--memory")
    if limit is not None and len(frames) > limit:
        raise UserError("--memory", f"a video of more than {limit} frames", "give a shorter one")
    if len(frames) > len(known):
        raise UserError(
            "--track",
            f"{len(known)} poses for a video of {len(frames)} frames at {rate:g} per second",
            "give one pose per frame of the video, at the rate the track states",
        )
    known = _scaled(known, size)
    if _differ(rate, fps):
        logger.warning("%s runs at %g frames per second, resampled to %g", video, rate, fps)
        # Past and future in one go: the beat does not start afresh where the video ends.
        kept = _nearest_frames(len(known), rate, fps)
        known, frames = _resampled(known, kept), frames[kept[kept < len(frames)]]
    past, future = _cut(known, 0, len(frames)), _cut(known, len(frames), len(known))
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
    actions = episode.actions[spare:].copy()
    actions[0] = 0  # what led to a first frame is a no-op, also in a track cut from a longer one
    return Episode(
        frames=episode.frames[spare:],
        world_to_camera=episode.world_to_camera[spare:],
        intrinsics=episode.intrinsics[spare:],
        actions=actions,
        fps=episode.fps,
        provenance=episode.provenance,
    )


def load_actions(
    given: str, fps: float, argument: str = "--actions"
) -> tuple[Float32[np.ndarray, "F A"], Float64[np.ndarray, "F 4 4"] | None]:
    """Future actions from an .npz or .csv file or a script, and poses where an .npz holds them.

    An .npz of another rate is resampled with a warning; its first row follows the memory's last
    frame.

    Raises:
        UserError: for a file or a script that cannot be read, and for actions out of range.
    """
    path = Path(given)
    if path.suffix == ".npz":
        held = _load_sound_track(path, argument)
        if held.actions is None:
            raise UserError(argument, f"{path} holds no actions", "add an array named actions")
        if len(held) and _differ(held.fps, fps):
            logger.warning("%s runs at %g frames per second, resampled to %g", path, held.fps, fps)
            # Row -1 stands for the memory's last frame, from which the actions lead on.
            kept = _nearest_frames(1 + len(held), held.fps, fps) - 1
            held = _cut(_resampled(held, kept), 1, len(kept))
            assert held.actions is not None
        return held.actions, held.world_to_camera
    if path.suffix == ".csv":
        try:
            with warnings.catch_warnings(action="ignore"):  # of a file without rows
                rows = np.loadtxt(path, delimiter=",", ndmin=2, comments="#", dtype=np.float32)
        except (OSError, ValueError) as error:
            raise UserError(
                argument,
                f"{path} cannot be read ({error})",
                f"give rows of {', '.join(field.name for field in ACTION_FIELDS)}",
            ) from error
        return validate_actions(rows if rows.size else np.zeros((0, A)), argument), None
    return parse_script(given, argument), None


def _load_sound_track(path: str | Path, argument: str) -> TrackFile:
    """A track whose rate, size and lenses can be reckoned with."""
    track = load_track(path, argument)
    if not 0 < track.fps < np.inf:
        raise UserError(
            argument, f"{path} has {track.fps:g} frames per second", "give a rate above zero"
        )
    if min(track.size) < 1:
        raise UserError(
            argument,
            f"{path} is of frames of {track.size[0]} x {track.size[1]} pixels",
            "give the height and width that its intrinsics are for",
        )
    focal = track.intrinsics[:, [0, 1], [0, 1]]
    bad = ~(np.isfinite(track.intrinsics).all((1, 2)) & (focal > 0).all(1))
    if bad.any():
        raise UserError(
            argument,
            f"the intrinsics of frame {int(bad.argmax()) + 1} are not those of a lens",
            "give 3x3 matrices in pixels with focal lengths above zero",
        )
    return track


def _differ(rate: float, fps: float) -> bool:
    return abs(rate - fps) > fps / 1000


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
    # Halves always up: rounding them to even would make a halved or doubled rate limp.
    return np.minimum(np.floor(times * rate + 0.5 + 1e-6).astype(int), count - 1)


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
