"""The environment keeps Gymnasium's contract, and is the dream it wraps."""

from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from decmem.errors import UserError
from decmem.play.environment import DreamEnv
from decmem.rollout import Session


def test_gymnasium_finds_no_fault(session: Callable[..., Session]) -> None:
    asked = {"session": session(), "world": 3, "memory_frames": 5, "render_mode": "rgb_array"}
    env = gymnasium.make("decmem/Dream-v0", **asked)
    check_env(env.unwrapped)


def test_same_seed_and_actions_lead_to_the_same_frames(session: Callable[..., Session]) -> None:
    env = DreamEnv(session(), 3, memory_frames=5, truth=True, episode=3)
    action = np.array([1, 0, 0.3, 0, -0.2, 0.9], np.float32)
    made = []
    for seed in (1, 1, 2):
        start, info = env.reset(seed=seed)
        assert info["latents"] == 2
        steps = [env.step(action) for _ in range(3)]
        assert [s[3] for s in steps] == [False, False, True]
        made.append(np.stack([start, *(s[0] for s in steps)]))
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[1], made[2])
    info = steps[-1][4]
    assert info["frames"].shape == info["truth"].shape == (4, 64, 96, 3)
    assert len(info["psnr"]) == 4
    assert env.render() is None
    assert env.action_space.contains(action)


def test_actions_move_the_player(session: Callable[..., Session]) -> None:
    env = DreamEnv(session(), 3, memory_frames=5)
    _, before = env.reset(seed=0)
    turn = np.array([0, 0, 0.6, 0, 0, 0], np.float32)
    _, _, _, _, after = env.step(turn)
    change = (after["pose"][3] - before["pose"][3]) % 360
    assert change == pytest.approx(36, abs=0.01)
    _, elsewhere = env.reset(options={"world": 4})
    assert not np.allclose(elsewhere["pose"], before["pose"])


def test_a_session_brings_its_own_past(session: Callable[..., Session]) -> None:
    one = session()
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    one.observe_picture(picture)
    env = DreamEnv(one)
    frame, info = env.reset(seed=0)
    assert info["latents"] == 1
    assert env.observation_space.contains(frame)
    env.step(np.zeros(6, np.float32))
    assert one.length == 1  # the user's own session is left alone


def test_bad_requests_are_told(session: Callable[..., Session]) -> None:
    with pytest.raises(UserError, match="knows nothing"):
        DreamEnv(session())
    with pytest.raises(UserError, match="2 worlds"):
        DreamEnv(session(batch=2), 3)
    with pytest.raises(UserError, match="render_mode"):
        DreamEnv(session(), 3, render_mode="human")
    env = DreamEnv(session(), 3, memory_frames=5)
    with pytest.raises(UserError, match="Call reset"):
        env.step(np.zeros(6, np.float32))
    with pytest.raises(UserError, match="options"):
        env.reset(options={"wrold": 3})
    env.reset()
    with pytest.raises(UserError, match="action"):
        env.step(np.array([0, 0, 9, 0, 0, 0], np.float32))
