"""From held keys and mouse movement to the actions of a chunk."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from decmem.world.actions import ACTION_FIELDS, FORWARD, JUMP, PITCH, RIGHT, SPRINT, YAW, A

LOOK_RATE = 5.0
"""Degrees a frame while a look key is held."""
_YAW_FIELD = ACTION_FIELDS[YAW]
# A flick of the mouse longer than this is cut: nobody wants to spin on for seconds.
_MOST_LOOK = 180.0


@dataclass
class Steering:
    """What a client holds down now, and how far it has looked round since the last chunk."""

    keys: frozenset[str] = frozenset()
    yaw: float = 0.0
    pitch: float = 0.0
    sequence: int = 0

    def hear(self, keys: list[str], look: list[float], sequence: int) -> None:
        """Takes in an `input` message."""
        self.keys = frozenset(keys)
        self.yaw = float(np.clip(self.yaw + look[0], -_MOST_LOOK, _MOST_LOOK))
        self.pitch = float(np.clip(self.pitch + look[1], -_MOST_LOOK, _MOST_LOOK))
        self.sequence = sequence

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.keys) or self.yaw != 0 or self.pitch != 0

    def actions(self, frames: int) -> Float32[np.ndarray, "F A"]:
        """The next frames' actions, within the limits; what was looked is used up."""
        made = np.zeros((frames, A), np.float32)
        made[:, FORWARD] = self._axis("forward", "back")
        made[:, RIGHT] = self._axis("right", "left")
        made[:, JUMP] = "jump" in self.keys
        made[:, SPRINT] = "sprint" in self.keys
        yaw, self.yaw = _spread(self.yaw, frames)
        pitch, self.pitch = _spread(self.pitch, frames)
        made[:, YAW] = yaw + LOOK_RATE * self._axis("look_right", "look_left")
        made[:, PITCH] = pitch + LOOK_RATE * self._axis("look_up", "look_down")
        turn = slice(YAW, PITCH + 1)
        made[:, turn] = made[:, turn].clip(_YAW_FIELD.low, _YAW_FIELD.high)
        return made

    def _axis(self, plus: str, minus: str) -> int:
        return (plus in self.keys) - (minus in self.keys)


def _spread(degrees: float, frames: int) -> tuple[np.ndarray, float]:
    """Whole action steps for each frame, as even as can be, and the degrees left over."""
    most = int(_YAW_FIELD.high * _YAW_FIELD.steps) * frames
    steps = int(np.clip(round(degrees * _YAW_FIELD.steps), -most, most))
    edges = np.rint(np.linspace(0, steps, frames + 1))
    left = degrees - steps / _YAW_FIELD.steps
    # Less than half a step is rounding, not a wish.
    return np.diff(edges) / _YAW_FIELD.steps, left if abs(left) >= 0.5 else 0.0
