"""Checkpoints: folders `step_00012000/`, whole or absent; weights apart from state."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from decmem.errors import UserError
from decmem.storage import atomic_folder, write_json


def save_checkpoint(
    run: Path,
    step: int,
    weights: dict[str, Tensor],
    state: dict[str, Tensor],
    config: dict[str, Any],
    loop: dict[str, Any],
) -> Path:
    """Writes `run/step_XXXXXXXX/` with model and state, each .safetensors and .json."""
    target = run / f"step_{step:08d}"
    with atomic_folder(target) as folder:
        save_file(_plain(weights), folder / "model.safetensors")
        save_file(_plain(state), folder / "state.safetensors")
        write_json(folder / "config.json", config)
        write_json(folder / "state.json", {"step": step, **loop})
    return target


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps, or None. A folder without state.json does not count."""
    return max(_complete(run), default=None)


def _complete(run: Path) -> list[Path]:
    """The checkpoints that can be resumed, oldest first."""
    found = (p.parent for p in run.glob("step_*/state.json"))
    return sorted(p for p in found if re.fullmatch(r"step_\d{8}", p.name))


def load_checkpoint(
    checkpoint: Path, config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, state and loop of a checkpoint written with the same configuration.

    Raises:
        UserError: when it is damaged or belongs to another configuration.
    """
    require_same_settings(checkpoint, config)
    try:
        weights = load_file(checkpoint / "model.safetensors")
        state = load_file(checkpoint / "state.safetensors")
        loop = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(checkpoint, error) from error
    return weights, state, loop


def require_same_settings(checkpoint: Path, config: dict[str, Any]) -> None:
    """Refuses a checkpoint that was written with another configuration.

    Raises:
        UserError: names the settings that differ, or the file that is damaged.
    """
    try:
        stored = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(checkpoint, error) from error
    differing = sorted(_differing(stored, config))
    if differing:
        raise UserError(
            "resume",
            f"{checkpoint} was made with another configuration ({', '.join(differing)} differ)",
            "Resume with the same options, or start a new run with another --out",
        )


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    problem = f"{checkpoint} cannot be read ({error})"
    return UserError("resume", problem, "Remove it; an older one is used")


def _differing(stored: dict[str, Any], config: dict[str, Any], path: str = "") -> list[str]:
    """Names of the settings that disagree; what an older version did not write down cannot."""
    names = []
    for key, value in stored.items():
        other = config.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            names += _differing(value, other, f"{path}{key}.")
        elif value != other:
            names.append(path + key)
    return names


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a killed process left half-written.

    Folders that are no checkpoints do not count: they must not push out one that is.
    """
    stored = _complete(run)
    for old in (*stored[: max(0, len(stored) - keep)], *run.glob(".step_*.part")):
        shutil.rmtree(old, ignore_errors=True)
