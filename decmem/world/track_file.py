"""Track files: an episode's poses, intrinsics and actions as npz without pickles."""

import json
import os
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from decmem.errors import UserError
from decmem.world.actions import ACTION_SCHEMA, validate_actions
from decmem.world.episode import Episode
from decmem.world.kinematics import check_rigid

TRACK_SCHEMA = "decmem-track/1"

# What reading a broken archive may raise; zipfile meets odd flags with RuntimeErrors.
_DAMAGE = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class TrackFile:
    """What a track file holds. size: height and width of the frames; actions and depth optional."""

    world_to_camera: Float64[np.ndarray, "F 4 4"]
    intrinsics: Float64[np.ndarray, "F 3 3"]
    actions: Float32[np.ndarray, "F A"] | None
    fps: float
    size: tuple[int, int]
    depth: Float32[np.ndarray, "F H W"] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.world_to_camera)


def save_track(path: str | Path, episode: Episode, with_depth: bool = False) -> None:
    """Write an episode's track; the file appears whole or not at all.

    Raises `UserError` if it cannot be written.
    """
    target = Path(path)
    arrays: dict[str, Any] = {
        "schema": np.array(TRACK_SCHEMA),
        "fps": np.array(float(episode.fps)),
        "size": np.array(episode.frames.shape[1:3], np.int64),
        "world_to_camera": episode.world_to_camera,
        "intrinsics": episode.intrinsics,
        "actions": episode.actions,
        "action_schema": np.array(ACTION_SCHEMA),
        "provenance": np.array(json.dumps(episode.provenance)),
    }
    if with_depth and episode.depth is not None:
        arrays["depth"] = episode.depth
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        os.replace(partial, target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        problem = f"cannot write {target} ({error.strerror or error})"
        raise UserError("track", problem, "choose a folder with room and write access") from error


def load_track(path: str | Path, argument: str = "track") -> TrackFile:
    """Read and check a track file.

    Raises `UserError` naming `argument` if the file is missing, damaged or of another schema, if
    counts disagree, a pose is not rigid or an action is out of range.
    """
    arrays = _arrays(path, argument)
    needed = ("schema", "fps", "size", "world_to_camera", "intrinsics")
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise UserError(argument, f"{path} lacks {', '.join(missing)}", f"it needs {needed}")
    schema = str(arrays["schema"])
    if schema != TRACK_SCHEMA:
        cure = "convert the file or update decmem"
        raise UserError(argument, f"schema '{schema}', expected '{TRACK_SCHEMA}'", cure)
    numbers = ("fps", "size", "world_to_camera", "intrinsics")
    for name in (*numbers, "depth") if "depth" in arrays else numbers:
        if arrays[name].dtype.kind not in "iuf":
            raise UserError(argument, f"{name} is not made of numbers", "write it as numbers")
    poses = np.atleast_1d(arrays["world_to_camera"]).astype(np.float64)
    count = len(poses)
    shapes = {
        "world_to_camera": (count, 4, 4), "intrinsics": (count, 3, 3), "size": (2,), "fps": ()
    }  # fmt: skip
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            problem = f"{name} has shape {arrays[name].shape}, expected {shape}"
            cure = "give one entry per frame" if len(shape) > 1 else "give height and width"
            raise UserError(argument, problem, cure if shape else "give one number")
    check_rigid(poses, argument)
    actions = None
    if "actions" in arrays:
        named = str(arrays.get("action_schema", ACTION_SCHEMA))
        if named != ACTION_SCHEMA:
            problem = f"action_schema '{named}', expected '{ACTION_SCHEMA}'"
            raise UserError(argument, problem, "convert the actions")
        actions = validate_actions(arrays["actions"], argument)
        if len(actions) != count:
            problem = f"{len(actions)} actions for {count} poses"
            raise UserError(argument, problem, "give one action per frame")
    height, width = (int(side) for side in arrays["size"])
    return TrackFile(
        world_to_camera=poses,
        intrinsics=arrays["intrinsics"].astype(np.float64),
        actions=actions,
        fps=float(arrays["fps"]),
        size=(height, width),
        depth=arrays["depth"].astype(np.float32) if "depth" in arrays else None,
        provenance=_provenance(arrays, argument),
    )


def _arrays(path: str | Path, argument: str) -> dict[str, np.ndarray]:
    """What an npz file holds."""
    try:
        with Path(path).open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise UserError(argument, f"no file {path}", "give the path of a track (.npz)") from error
    except _DAMAGE as error:
        cure = "write it again, without pickled objects"
        raise UserError(argument, f"{path} is not a readable npz file", cure) from error


def _provenance(arrays: dict[str, np.ndarray], argument: str) -> dict[str, Any]:
    """What made the track, where it says so."""
    try:
        found = json.loads(str(arrays.get("provenance", "{}")))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(argument, "provenance is not a JSON object", "leave it out or mend it")
    return found
