"""A short language for actions: "forward 20, turn-left 9x10, back 20"."""

import re

import numpy as np
from jaxtyping import Float32

from decmem.errors import UserError
from decmem.world.actions import ACTION_FIELDS, FORWARD, JUMP, PITCH, RIGHT, SPRINT, YAW, A

_MOVES: dict[str, dict[int, float]] = {
    "wait": {},
    "forward": {FORWARD: 1},
    "back": {FORWARD: -1},
    "right": {RIGHT: 1},
    "left": {RIGHT: -1},
    "sprint-forward": {FORWARD: 1, SPRINT: 1},
    "jump": {JUMP: 1},
}
_TURNS: dict[str, tuple[int, int]] = {
    "turn-right": (YAW, 1),
    "turn-left": (YAW, -1),
    "look-up": (PITCH, 1),
    "look-down": (PITCH, -1),
}
_TOKEN = re.compile(r"(?P<names>[a-z+-]+)\s+((?P<degrees>\d+(\.\d+)?)\s*x\s*)?(?P<frames>\d+)")


def _bad(argument: str, token: str, problem: str) -> UserError:
    words = ", ".join([*_MOVES, *_TURNS])
    return UserError(
        argument,
        f"'{token}' {problem}",
        f'write moves as "forward 20" (frames), turns as "turn-left 9x10" (degrees x frames), '
        f'both at once as "forward+turn-left 9x10"; the words are {words}',
    )


def parse_script(script: str, argument: str = "actions") -> Float32[np.ndarray, "F A"]:
    """The actions (F, 6) that a script spells out, in order, one row a frame.

    Comma-separated steps: `WORD FRAMES` for moves, `WORD DEGREESxFRAMES` for turns, words joined
    with `+` act together. Raises `UserError` naming the first step that cannot be read.
    """
    rows: list[np.ndarray] = []
    limit = ACTION_FIELDS[YAW].high
    for token in (part.strip() for part in script.lower().split(",")):
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise _bad(argument, token, "cannot be read")
        row = np.zeros(A, np.float32)
        names = match["names"].split("+")
        turning = [name for name in names if name in _TURNS]
        if bool(turning) != bool(match["degrees"]):
            problem = "needs degrees x frames" if turning else "takes frames only"
            raise _bad(argument, token, problem)
        degrees = float(match["degrees"] or 0)
        if degrees > limit:
            raise _bad(argument, token, f"turns by more than {limit:g} degrees a frame")
        for name in names:
            if name in _MOVES:
                for column, value in _MOVES[name].items():
                    row[column] = value
            elif name in _TURNS:
                column, sign = _TURNS[name]
                row[column] = sign * degrees
            else:
                raise _bad(argument, token, f"has the unknown word '{name}'")
        rows.extend([row] * int(match["frames"]))
    return np.array(rows, np.float32).reshape(-1, A)
