"""The actions of a player: columns, units, limits, and how they are made whole numbers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Int64

from decmem.errors import UserError
from decmem.world.angles import EIGHTHS

ACTION_SCHEMA = "decmem-actions/1"


@dataclass(frozen=True)
class ActionField:
    """A column of an action: its unit, its limits, and how many steps make one unit."""

    name: str
    unit: str
    low: float
    high: float
    steps: int


ACTION_FIELDS: tuple[ActionField, ...] = (
    ActionField("forward", "fraction of walking speed", -1, 1, 64),
    ActionField("right", "fraction of walking speed", -1, 1, 64),
    ActionField("yaw", "degrees per frame, positive turns right", -15, 15, EIGHTHS),
    ActionField("pitch", "degrees per frame, positive looks up", -15, 15, EIGHTHS),
    ActionField("jump", "0 or 1", 0, 1, 1),
    ActionField("sprint", "0 or 1", 0, 1, 1),
)
FORWARD, RIGHT, YAW, PITCH, JUMP, SPRINT = range(len(ACTION_FIELDS))
A = len(ACTION_FIELDS)

_STEPS = np.array([field.steps for field in ACTION_FIELDS], np.int64)


def validate_actions(
    actions: npt.ArrayLike, argument: str = "actions"
) -> Float32[np.ndarray, "F A"]:
    """Actions as float32 (F, 6), checked.

    Raises `UserError` naming `argument` if the shape is wrong, a value is not finite or outside
    its column's limits, or jump or sprint is neither 0 nor 1.
    """
    try:
        array = np.asarray(actions, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(
            argument, "not a table of numbers", f"give (frames, {A}) numbers"
        ) from error
    if array.ndim != 2 or array.shape[1] != A:
        names = ", ".join(field.name for field in ACTION_FIELDS)
        raise UserError(
            argument, f"shape {array.shape}, expected (frames, {A})", f"its columns are {names}"
        )
    for number, field in enumerate(ACTION_FIELDS):
        column = array[:, number]
        bad = ~(np.isfinite(column) & (column >= field.low) & (column <= field.high))
        if field.steps == 1:
            bad |= column != np.round(column)
        if bad.any():
            frame = int(bad.argmax())
            raise UserError(
                argument,
                f"{field.name} is {column[frame]:g} in frame {frame + 1}, "
                f"expected {field.low:g} to {field.high:g} ({field.unit})",
                "clip or rescale that column",
            )
    return array


def quantise_actions(actions: Float32[np.ndarray, "*F A"]) -> Int64[np.ndarray, "*F A"]:
    """Whole steps of each column, nearest with halves to even: what the motion law sees."""
    return np.rint(actions.astype(np.float64) * _STEPS).astype(np.int64)


def action_values(steps: Int64[np.ndarray, "*F A"]) -> Float32[np.ndarray, "*F A"]:
    """The inverse of `quantise_actions`."""
    return (steps / _STEPS).astype(np.float32)
