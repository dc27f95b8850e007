"""The law of motion, on worlds built for the purpose."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decmem.errors import UserError
from decmem.world.actions import A
from decmem.world.angles import CIRCLE, COSINE, SINE, SINE_BITS
from decmem.world.blocks import SHAPES, Shape, block_id
from decmem.world.camera import centres, look
from decmem.world.generation import build_world
from decmem.world.grid import BUFFER, World
from decmem.world.kinematics import check_rigid, integrate
from decmem.world.motion import UNIT, PlayerState, blocked, simulate, step
from decmem.world.script import parse_script
from decmem.world.spawn import choose_spawn

FLOOR = 10


def plain(**blocks: tuple[slice | int, ...]) -> World:
    """A stone plain up to y 9, with boxes of named blocks set into it."""
    world = World(0, np.zeros(BUFFER, np.uint8))
    world.cells[:, :, :FLOOR] = block_id("stone")
    for name, box in blocks.items():
        world.cells[box] = block_id(name)
    return world


def standing(x: float = 8.5, z: float = 8.5, yaw: float = 0) -> PlayerState:
    return PlayerState(int(x * UNIT), FLOOR * UNIT, int(z * UNIT), int(yaw * 8), 0)


def walk(world: World, script: str, start: PlayerState | None = None) -> np.ndarray:
    """Eye positions (F, 3) in blocks."""
    actions = parse_script(f"wait 1, {script}")
    return centres(simulate(world, start or standing(), actions).world_to_camera)


def test_sines_are_exact_to_their_last_bit() -> None:
    angles = np.arange(CIRCLE) * np.pi / (CIRCLE // 2)
    assert abs(SINE - np.sin(angles) * 2.0**SINE_BITS).max() < 0.51
    assert abs(COSINE - np.cos(angles) * 2.0**SINE_BITS).max() < 0.51


def test_speeds() -> None:
    world = plain()
    assert walk(world, "forward 10")[-1, 2] == pytest.approx(8.5 - 10 * 307 / UNIT)
    assert walk(world, "sprint-forward 10")[-1, 2] == pytest.approx(8.5 - 10 * 460 / UNIT)
    assert walk(world, "right 10")[-1, 0] == pytest.approx(8.5 + 10 * 307 / UNIT)


def test_axes_and_signs() -> None:
    world = plain()
    turned = simulate(world, standing(), parse_script("wait 1, turn-right 9x10, look-up 5x4"))
    np.testing.assert_allclose(
        turned.world_to_camera[-1], look((8.5, FLOOR + 1659 / UNIT, 8.5), 90, 20), atol=1e-12
    )
    east = walk(world, "turn-right 9x10, forward 1")
    assert east[-1, 0] > east[0, 0]


def test_pitch_stops_at_sixty_degrees() -> None:
    track = simulate(plain(), standing(), parse_script("wait 1, look-up 15x9"))
    assert track.states[-1, 4] == 60 * 8


def test_a_jump_clears_one_block_and_lands() -> None:
    eyes = walk(plain(), "jump 1, wait 20")
    rise = eyes[:, 1] - eyes[0, 1]
    assert 1.05 < rise.max() < 1.5
    assert rise[-1] == 0


def test_steps_are_climbed_smoothly_and_walls_stop() -> None:
    stairs = plain(stone=(slice(None), slice(0, 7), slice(0, FLOOR + 1)))
    eyes = walk(stairs, "forward 20")
    assert eyes[-1, 1] - eyes[0, 1] == pytest.approx(1)
    assert abs(np.diff(eyes[:, 1])).max() <= 0.3
    back = walk(stairs, "forward 20, back 20")
    assert back[-1, 1] == pytest.approx(back[0, 1])
    assert abs(np.diff(back[:, 1])).max() <= 0.3
    wall = plain(stone=(slice(None), slice(0, 7), slice(0, FLOOR + 2)))
    assert walk(wall, "forward 20")[-1, 2] == pytest.approx(7.3, abs=0.01)


def test_a_wader_keeps_the_eye_above_the_water_and_climbs_out() -> None:
    world = plain()
    world.cells[:, 0:8, FLOOR - 3 : FLOOR] = block_id("water")
    eyes = walk(world, "forward 12")
    assert FLOOR + 0.5 < eyes[-1, 1] < eyes[0, 1]
    assert walk(world, "forward 12, back 14")[-1, 1] == pytest.approx(eyes[0, 1])


def test_plants_are_no_obstacle() -> None:
    world = plain(poppy=(slice(None), 7, FLOOR))
    assert walk(world, "forward 10")[-1, 2] == pytest.approx(8.5 - 10 * 307 / UNIT)


def test_the_world_repeats() -> None:
    world = build_world(2)
    start = choose_spawn(world, 2)
    far = start._replace(x=start.x + 256 * UNIT * 1000, z=start.z - 256 * UNIT)
    actions = parse_script("wait 1, forward 30, turn-left 6x10, sprint-forward 30, jump 1, left 9")
    near_track, far_track = simulate(world, start, actions), simulate(world, far, actions)
    np.testing.assert_array_equal(near_track.states[:, 1], far_track.states[:, 1])
    moved = far_track.states[:, 0] - near_track.states[:, 0]
    assert (moved == 256 * UNIT * 1000).all()


@pytest.fixture(scope="module")
def hills() -> World:
    return build_world(4)


@given(seed=st.integers(0, 2**32))
def test_nobody_enters_anything_solid(hills: World, seed: int) -> None:
    world = hills
    rng = np.random.default_rng(seed)
    actions = np.zeros((60, A), np.float32)
    actions[:, :2] = rng.uniform(-1, 1, (60, 2))
    actions[:, 2:4] = rng.uniform(-15, 15, (60, 2))
    actions[:, 4:] = rng.integers(0, 2, (60, 2))
    track = simulate(world, choose_spawn(world, seed), actions)
    eyes = np.floor(centres(track.world_to_camera)).astype(int)
    for state, eye in zip(track.states, eyes, strict=True):
        assert not blocked(world.cells, state[0], state[1], state[2])
        shape = SHAPES[world.cells[eye[0] % 256, eye[2] % 256, eye[1]] & 63]
        assert shape in (Shape.EMPTY, Shape.PLANT)


def test_step_is_one_frame_of_simulate() -> None:
    world = plain()
    actions = parse_script("wait 1, forward 3, jump 1, turn-left 7x3")
    state = standing()
    for row, action in enumerate(actions[1:], 1):
        state = step(world, state, action)
        np.testing.assert_array_equal(state, simulate(world, standing(), actions).states[row])


def test_integrate_agrees_with_a_walk_on_a_plain() -> None:
    rng = np.random.default_rng(1)
    actions = rng.uniform(-1, 1, (200, A)).astype(np.float32)
    actions[:, 2:4] *= 15
    actions[:, 4] = 0
    actions[:, 5] = actions[:, 5] > 0
    walked = simulate(plain(), standing(yaw=33), actions).world_to_camera
    moved = integrate(walked[0], actions)
    np.testing.assert_allclose(moved[:, :3, :3], walked[:, :3, :3], atol=1e-9)
    np.testing.assert_allclose(centres(moved), centres(walked), atol=0.02)
    check_rigid(moved)


def test_integrate_keeps_the_roll_of_a_foreign_camera() -> None:
    roll = np.radians(10)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]]
    start = tilt @ look((1, 2, 3), 40, 10)
    moved = integrate(start, parse_script("wait 1, turn-left 5x8, turn-right 5x8"))
    np.testing.assert_allclose(moved[-1], start, atol=1e-12)
    assert centres(integrate(start, parse_script("wait 1, forward 9")))[-1, 1] == pytest.approx(2)


@pytest.mark.parametrize("spoil", ["scale", "mirror", "row", "nan"])
def test_poses_that_are_not_rigid_are_refused(spoil: str) -> None:
    poses = np.tile(look((1, 2, 3), 40, 10), (3, 1, 1))
    if spoil == "scale":
        poses[1, :3, :3] *= 1.01
    elif spoil == "mirror":
        poses[1, 0] *= -1
    elif spoil == "row":
        poses[1, 3] = (0, 0, 1, 1)
    else:
        poses[1, 0, 3] = np.nan
    with pytest.raises(UserError, match="pose 2 is not rigid"):
        check_rigid(poses)
