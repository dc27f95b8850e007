"""What a session is given, checked: settings, pictures, actions, poses of its worlds."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from decmem.codec.base import FRAMES_PER_LATENT
from decmem.errors import UserError
from decmem.model import Conditions
from decmem.model.conditioning import conditions_of_frames
from decmem.world.actions import validate_actions
from decmem.world.kinematics import check_rigid, integrate


def per_world(x: np.ndarray, dims: int, name: str, worlds: int) -> np.ndarray:
    """The worlds stacked in front; for one world that dimension may be missing.

    Raises:
        UserError: for another number of worlds or dimensions.
    """
    x = np.asarray(x)
    x = x[None] if x.ndim == dims else x
    if x.ndim != dims + 1 or len(x) != worlds:
        raise UserError(
            name,
            f"shape {x.shape} for {worlds} worlds",
            f"Give {dims} dimensions for one world, or the worlds stacked in front",
        )
    return x


def checked_seeds(seeds: Sequence[int], worlds: int) -> list[int]:
    """The seeds as a list. Raises `UserError` unless there is one per world."""
    if len(seeds) != worlds:
        raise UserError("seeds", f"{len(seeds)} for {worlds} worlds", "Give one per world")
    return list(seeds)


def check_frames(frames: np.ndarray, size: tuple[int, int], first: bool) -> None:
    """Raises `UserError` unless these are 1 + 4n (or later 4n) uint8 frames of the model's size."""
    F = frames.shape[1]
    if (F - first) % FRAMES_PER_LATENT or F == 0:
        form = "1 + 4n" if first else "4n"
        raise UserError("frames", f"{F} frames, expected {form}", "Drop the oldest ones")
    if frames.dtype != np.uint8:
        raise UserError("frames", f"numbers of type {frames.dtype}", "Give uint8 RGB")
    if frames.shape[2:4] != size:
        raise UserError(
            "frames",
            f"pictures of {frames.shape[2]} x {frames.shape[3]}, the model makes "
            f"{size[0]} x {size[1]}",
            "Resize them (decmem rollout does)",
        )


def check_counts(frames: np.ndarray, **beside: np.ndarray) -> None:
    """Raises `UserError` unless everything beside the frames has an entry per frame."""
    for name, x in beside.items():
        if x.shape[1] != frames.shape[1]:
            problem = f"{x.shape[1]} for {frames.shape[1]} frames"
            raise UserError(name, problem, "Give one per frame")


def valid_actions(actions: np.ndarray) -> Float[np.ndarray, "B F A"]:
    """Actions as float32. Raises `UserError` for values out of range."""
    return np.stack([validate_actions(world) for world in actions.astype(np.float32)])


def whole_latents(actions: np.ndarray) -> Float[np.ndarray, "B F A"]:
    """Actions of whole latents as float32. Raises `UserError` for other counts, and values out of
    range."""
    acted, F = valid_actions(actions), actions.shape[1]
    if F == 0 or F % FRAMES_PER_LATENT:
        raise UserError("actions", f"{F} actions, expected a multiple of 4", "Pad with no-ops")
    return acted


def valid_poses(world_to_camera: np.ndarray) -> Float[np.ndarray, "B F 4 4"]:
    """Poses as float64. Raises `UserError` unless all are rigid."""
    check_rigid(poses := world_to_camera.astype(np.float64))
    return poses


def poses_after(
    last: Float[np.ndarray, "B 4 4"],
    actions: Float[np.ndarray, "B F A"],
    given: np.ndarray | None,
) -> Float[np.ndarray, "B F 4 4"]:
    """The poses given for these actions; without, what the motion law makes of them after `last`.

    Raises:
        UserError: for poses of another count, or not rigid.
    """
    if given is None:
        # Motion's own first row is the start itself.
        led = np.concatenate((np.zeros_like(actions[:, :1]), actions), 1)
        return np.stack([integrate(p, a)[1:] for p, a in zip(last, led, strict=True)])
    posed = valid_poses(per_world(given, 3, "world_to_camera", len(last)))
    if posed.shape[1] != actions.shape[1]:
        problem = f"{posed.shape[1]} for {actions.shape[1]} actions"
        raise UserError("world_to_camera", problem, "Give one each")
    return posed


def conditions_after(
    before: Conditions, actions: Float[np.ndarray, "B F A"], given: np.ndarray | None
) -> Conditions:
    """What steers the latents of these actions behind `before`; poses as `poses_after`.

    Raises:
        UserError: as `poses_after`.
    """
    last = before.world_to_camera[:, -1, -1].cpu().numpy()
    posed = torch.from_numpy(poses_after(last, actions, given))
    lens = before.lens[:, -1:].cpu().expand(-1, actions.shape[1], -1)
    return conditions_of_frames(torch.from_numpy(actions), posed, lens, len(before.time))


def check_settings(
    sizes: tuple[int, ...],
    chunk: int,
    steps: int,
    retrieved: int | None,
    guidance: float | None,
) -> None:
    """Raises `UserError` for settings that do not fit a model trained with these chunk sizes."""
    if chunk not in sizes:
        raise UserError("chunk", f"{chunk} latents, trained with {sizes}", "Use one of these")
    if type(steps) is not int or steps < 1:
        raise UserError("steps", f"{steps} denoising steps", "Use at least 1")
    if retrieved is not None and (type(retrieved) is not int or retrieved < 1):
        raise UserError("retrieved", f"{retrieved} blocks", "Use at least 1")
    if guidance is not None and not (isinstance(guidance, int | float) and math.isfinite(guidance)):
        raise UserError("guidance", f"{guidance!r}", "Give a number, or None for one branch")


def slices_of(latents: int, sizes: tuple[int, ...], largest: int) -> list[slice]:
    """Slices of the largest trained chunk sizes that fit, none above `largest`.

    Raises:
        UserError: when a rest is smaller than every trained size.
    """
    fitting = sorted((s for s in sizes if s <= largest), reverse=True)
    found, start = [], 0
    while start < latents:
        size = next((s for s in fitting if s <= latents - start), None)
        if size is None:
            raise UserError(
                "actions",
                f"{latents - start} latents are left, chunks have {fitting}",
                f"Give a multiple of {4 * fitting[-1]} actions",
            )
        found.append(slice(start, start + size))
        start += size
    return found
