"""Walks: the same on every machine, and each kind what its name says."""

import hashlib

import numpy as np
import pytest

from decmem.errors import UserError
from decmem.world.actions import action_values, validate_actions
from decmem.world.camera import centres, intrinsics
from decmem.world.generation import build_world
from decmem.world.grid import World
from decmem.world.kinematics import check_rigid
from decmem.world.motion import PlayerState, simulate, state_cameras
from decmem.world.probe import PROBE_SIZE, probe_depth
from decmem.world.retrace import BANK, DISTINCT, GAP, SEEN, distinct_from
from decmem.world.training_walk import MOST_STILLS, train_walks
from decmem.world.version import HELD_OUT_SEED_BASE
from decmem.world.visibility import seen_fraction
from decmem.world.walks import WALK_KINDS, WalkKind, make_walk

SEED = HELD_OUT_SEED_BASE
FRAMES = 260

# If these change, walks have changed: raise WORLD_VERSION.
HASHES: dict[WalkKind, str] = {
    "free": "010cbd8f3f451a00c4f15551030ca1b22257b65f8d2b6509ee51c9e866389176",
    "there_and_back": "8280e5a508ffa86b27c36a7dd6224b186fdcd1114bec7e00b9e85540c237c330",
    "loop": "93aa527e077765de8f2510b38265a6d6df0ccc799fc11ec43f9aa63d830e27c1",
    "pan": "5a592f59e0b1315ec4dff102cad405c77870a354131507e752f6dbbc96e4129f",
    "retrace": "30600be4002eccfe12a53e7a5159b27881b0e1f65e1ac3f126cfd7fbdc01c63d",
    "train": "12f2f445cd56dbc6780faf1322a93bd477aea4dac61bb8aedc19bff80033b0ee",
    "still": "790134402bad1abac80f2e9b910843741851e8e63aed55473f4252f1c0a71ffb",
}


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(SEED)


@pytest.mark.parametrize("kind", WALK_KINDS)
def test_a_walk_is_legal_and_the_same_everywhere(world: World, kind: WalkKind) -> None:
    walk = make_walk(world, kind, SEED, FRAMES)
    validate_actions(walk.actions)
    assert len(walk.actions) == len(walk.track.states) == FRAMES
    assert not walk.actions[0].any()
    again = simulate(world, PlayerState(*walk.track.states[0].tolist()), walk.actions)
    np.testing.assert_array_equal(again.states, walk.track.states)
    check_rigid(walk.track.world_to_camera)
    assert walk.provenance["walk"] == kind
    assert hashlib.sha256(walk.track.states.tobytes()).hexdigest() == HASHES[kind]


def test_free_walks_see_something_of_the_world() -> None:
    places = []
    for seed in range(6):
        walk = make_walk(build_world(seed), "free", seed, FRAMES)
        eyes = centres(walk.track.world_to_camera)
        places.append(np.ptp(eyes[:, [0, 2]], axis=0).max())
        assert abs(np.diff(eyes[:, 1])).max() < 1
    assert np.median(places) > 10


def test_there_and_back_returns(world: World) -> None:
    eyes = centres(make_walk(world, "there_and_back", SEED, FRAMES).track.world_to_camera)
    assert np.linalg.norm(eyes[-1] - eyes[0]) < 0.5
    assert np.linalg.norm(eyes - eyes[0], axis=1).max() > 5


def test_a_loop_comes_round_and_turns_once(world: World) -> None:
    track = make_walk(world, "loop", SEED, FRAMES).track
    turned = abs(track.states[:, 3] - track.states[0, 3])
    once = int(np.argmax(turned >= 360 * 8))
    assert once > 0
    eyes = centres(track.world_to_camera)
    assert np.linalg.norm(eyes[once] - eyes[0]) < 0.5


def test_a_pan_stands_and_looks_both_ways(world: World) -> None:
    states = make_walk(world, "pan", SEED, FRAMES).track.states
    assert (states[:, :3] == states[0, :3]).all()
    yaw = (states[:, 3] - states[0, 3]) / 8
    assert yaw.max() > 40
    assert yaw.min() < -40


def test_a_still_walk_is_a_free_one_that_stops(world: World) -> None:
    walk, free = (make_walk(world, kind, SEED, BANK + 60) for kind in ("still", "free"))
    np.testing.assert_array_equal(walk.track.states[:BANK], free.track.states[:BANK])
    np.testing.assert_array_equal(walk.actions[:BANK], free.actions[:BANK])
    assert walk.actions[1:BANK].any()
    assert not walk.actions[BANK:].any()
    poses = walk.track.world_to_camera[BANK - 1 :]
    assert (poses == poses[0]).all(), "on its feet when it stopped"
    short = make_walk(world, "still", SEED, 30)
    np.testing.assert_array_equal(short.track.states, free.track.states[:30])


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_a_retrace_shows_what_was_seen_but_from_elsewhere(seed: int) -> None:
    world = build_world(seed)
    walk = make_walk(world, "retrace", seed, BANK + 120)
    poses = walk.track.world_to_camera
    depth = probe_depth(world, poses)
    camera = intrinsics(PROBE_SIZE)
    for frame in range(BANK, len(poses)):
        bank = slice(0, min(BANK, frame - GAP + 1))
        share = seen_fraction(depth[frame], poses[frame], depth[bank], poses[bank], camera)
        assert share >= SEEN
    assert distinct_from(poses[BANK:], poses[:BANK]).mean() >= DISTINCT
    steps = np.linalg.norm(np.diff(centres(poses)[BANK:], axis=0), axis=1)
    assert steps.mean() > 0.05


def test_training_walks_revisit_often_and_never_stop() -> None:
    worlds = [build_world(seed) for seed in range(8)]
    states, actions = train_walks(worlds, list(range(8)), 240)
    assert actions.shape == (8, 240, 6)
    poses = state_cameras(states)
    shares, speeds = [], []
    for walk in poses:
        eyes, ahead = centres(walk), walk[:, 2, :3]
        near = np.linalg.norm(eyes[:, None] - eyes[None], axis=-1) < 2.5
        near &= ahead @ ahead.T > np.cos(np.radians(20))
        older = np.tri(240, k=-48, dtype=bool)
        shares.append((near & older).any(1)[48:].mean())
        speeds.append(np.linalg.norm(np.diff(eyes, axis=0), axis=1).mean())
    assert np.mean(shares) > 0.35
    assert min(speeds) > 0.05


def test_training_walks_stand_still_where_asked() -> None:
    worlds = [build_world(seed) for seed in range(6)]
    seeds, frames = list(range(6)), 300
    plain, _ = train_walks(worlds, seeds, frames)
    same, _ = train_walks(worlds, seeds, frames, stills=0)
    np.testing.assert_array_equal(same, plain)
    states, actions = train_walks(worlds, seeds, frames, stills=12)
    again, _ = train_walks(worlds[2], [2], frames, stills=12)
    np.testing.assert_array_equal(again[0], states[2])
    for world, walked, given in zip(worlds, states, actions, strict=True):
        values = action_values(given)
        lived = simulate(world, PlayerState(*walked[0].tolist()), values)
        np.testing.assert_array_equal(lived.states, walked)

    def still(states: np.ndarray) -> np.ndarray:
        poses = state_cameras(states)
        return (poses[:, 1:] == poses[:, :-1]).all((2, 3))

    assert still(plain).mean() < 0.02, "without them a walk hardly ever stops"
    assert 0.1 < still(states).mean() < 0.6
    longest = max(len(run) for row in still(states) for run in _runs(row))
    assert longest > 60


def _runs(row: np.ndarray) -> list[np.ndarray]:
    """Stretches of a row that are true."""
    parts = np.split(row, np.flatnonzero(np.diff(row)) + 1)
    return [part for part in parts if part[0]]


@pytest.mark.parametrize("stills", [-1, MOST_STILLS + 1])
def test_more_stills_than_explorations_are_refused(world: World, stills: int) -> None:
    with pytest.raises(UserError, match="stills"):
        train_walks(world, [1], 30, stills)


def test_a_training_walk_does_not_depend_on_its_company() -> None:
    world, other = build_world(1), build_world(2)
    together, _ = train_walks([other, world], [8, 9], 80)
    alone, _ = train_walks(world, [9], 80)
    np.testing.assert_array_equal(together[1], alone[0])


@pytest.mark.parametrize(
    ("kind", "frames", "argument"),
    [("fly", 10, "walk"), ("free", 0, "frames"), ("retrace", BANK, "frames")],
)
def test_bad_walks_are_named(world: World, kind: str, frames: int, argument: str) -> None:
    with pytest.raises(UserError) as caught:
        make_walk.__wrapped__(world, kind, 1, frames)  # past the run-time type check
    assert caught.value.argument == argument
