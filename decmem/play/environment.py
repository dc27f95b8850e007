"""A dream as a Gymnasium environment, so that agents can act in it.

`DreamEnv(session, world=7)`, or `gymnasium.make("decmem/Dream-v0", session=session, world=7)`
after this module was imported.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import UInt8

from decmem.errors import UserError
from decmem.play.chunk_message import psnr
from decmem.play.defaults import FRAMES_PER_LATENT, PACES
from decmem.play.journey import MEMORY_FRAMES, Journey, view_of
from decmem.rollout import Session
from decmem.world.actions import ACTION_FIELDS, JUMP, SPRINT, A

_REACH = np.array([field.high for field in ACTION_FIELDS], np.float32)


class DreamEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Acting inside a dream: an action is held for one latent, that is four frames of 0.1 s.

    Args:
        session: of one world. If it has observed something, episodes begin there; else they begin
            in the block world `world`, after its walk of `memory_frames` frames.
        world: seed of the block world; None where the session brings its own past.
        episode: steps after which an episode is truncated.
        truth: compare with the block world's own frames; they are in `info["truth"]`, the PSNR
            in `info["psnr"]`.
        render_mode: `rgb_array`, or None.

    Observations are the newest frame, uint8 (H, W, 3). Actions are six numbers in [-1, 1]: forward
    and right as fractions of walking speed, yaw and pitch as fractions of 15 degrees a frame, and
    jump and sprint, which count above 0. The reward is always 0: what is
    wanted of the agent is the user's to say, for example in a `gymnasium.Wrapper`. `info` holds
    `frames` (all four), `pose` ([x, y, z, yaw, pitch], metres and degrees) and `latents`.

    `reset(seed=...)` chooses the noise of the dream, so the same seed and actions lead to the same
    frames; `reset(options={"world": 7})` goes to another block world.

    Raises:
        UserError: for a session of several worlds, or one that knows nothing without a `world`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        session: Session,
        world: int | None = None,
        *,
        memory_frames: int = MEMORY_FRAMES,
        episode: int = 250,
        truth: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if session.batch != 1:
            raise UserError("session", f"{session.batch} worlds", "Give a session of one")
        if not session.length and world is None:
            raise UserError("world", "the session knows nothing yet", "Give a seed, or observe")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError("render_mode", f"{render_mode!r}", "Use 'rgb_array' or None")
        self.render_mode = render_mode
        self.memory_frames = memory_frames
        self.episode = episode
        self.with_truth = truth
        self.action_space = spaces.Box(-1.0, 1.0, (A,), np.float32)
        self.observation_space = spaces.Box(0, 255, (*session.config.size, 3), np.uint8)
        self._given = session
        self._world = None if session.length else world
        self._journey: Journey | None = None
        self._begun = 0
        self._steps = 0
        self._frame: np.ndarray | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
        """Back to where episodes begin; the last remembered frame, as the codec shows it.

        Raises:
            UserError: for an unknown option.
        """
        super().reset(seed=seed)
        wanted = dict(options or {})
        world = wanted.pop("world", self._world)
        if wanted:
            raise UserError("options", f"{sorted(wanted)} unknown", "Give a world, or nothing")
        if self._journey is None or world != self._world:
            self._begin(world)
        journey = self._journey
        assert journey is not None
        journey.rewind(self._begun)
        journey.session.seeds = [int(self.np_random.integers(2**31))]
        self._steps = 0
        shown = list(journey.pictures(self._begun - 1))
        self._frame = frame = shown[-1][-1]
        return frame, self._told()

    def step(
        self, action: np.ndarray
    ) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool, bool, dict[str, Any]]:
        """Four frames under one action.

        Raises:
            UserError: before `reset`, and for an action out of range.
        """
        if self._journey is None:
            raise UserError("step", "the episode has not begun", "Call reset first")
        held = np.asarray(action, np.float32)
        if held.shape != (A,) or not (np.abs(held) <= 1).all():
            raise UserError("action", f"{held}", f"Give {A} numbers from -1 to 1")
        held = held * _REACH
        held[[JUMP, SPRINT]] = held[[JUMP, SPRINT]] > 0
        frames = FRAMES_PER_LATENT * min(self._given.config.chunk_sizes)
        made = self._journey.go(np.tile(held, (frames, 1)), self.with_truth)
        self._frame = frame = made.dream[-1]
        self._steps += 1
        info = self._told() | {"frames": made.dream}
        if made.truth is not None:
            info |= {"truth": made.truth, "psnr": psnr(made.dream, made.truth)}
        return frame, 0.0, False, self._steps >= self.episode, info

    def render(self) -> UInt8[np.ndarray, "H W 3"] | None:  # pyright: ignore
        """The newest frame with `rgb_array`, else nothing."""
        return None if self.render_mode is None else self._frame

    def close(self) -> None:
        """Lets go of the world."""
        if self._journey is not None:
            self._journey.close()
        self._journey = None

    def _begin(self, world: int | None) -> None:
        self.close()
        journey = Journey(self._given.fresh(), PACES["cpu"])
        if world is None:
            journey.session = self._given.fork()
        else:
            for _ in journey.begin_seed(world, self.memory_frames):
                pass
        self._world, self._journey, self._begun = world, journey, journey.session.length

    def _told(self) -> dict[str, Any]:
        assert self._journey is not None
        conditions = self._journey.session.conditions
        assert conditions is not None
        pose = conditions.world_to_camera[0, -1, -1:].cpu().numpy()
        return {"latents": self._journey.session.length, "pose": np.array(view_of(pose)[0])}


gymnasium.register("decmem/Dream-v0", entry_point=DreamEnv)  # pyright: ignore
