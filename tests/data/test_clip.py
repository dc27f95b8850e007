"""A user's own clip: brought to size and rate, with its poses, lenses and actions kept in step."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decmem.data import clip
from decmem.data.clip import load_actions, load_clip, whole_latents
from decmem.data.video import write_video
from decmem.errors import UserError
from decmem.world.actions import ACTION_SCHEMA, FORWARD, JUMP, PITCH, SPRINT, YAW, A
from decmem.world.camera import centres, intrinsics
from decmem.world.episode import Episode
from decmem.world.kinematics import integrate
from decmem.world.track_file import TRACK_SCHEMA, save_track
from decmem.world.version import FPS

SIZE = (32, 48)


def walked(count: int) -> np.ndarray:
    """Actions of a walk that goes ahead and turns by its frame's number, in eighths."""
    actions = np.zeros((count, A), np.float32)
    actions[1:, FORWARD] = 0.5
    actions[1:, YAW] = np.arange(1, count) / 8
    return actions


def tracked(count: int, shape: tuple[int, int] = SIZE, /, **changed: Any) -> dict[str, Any]:
    """The arrays of a sound track."""
    actions = walked(count)
    start = np.eye(4)
    start[1, 1] = start[2, 2] = -1.0
    return {
        "schema": TRACK_SCHEMA,
        "fps": float(FPS),
        "size": np.array(shape),
        "world_to_camera": integrate(start, actions),
        "intrinsics": np.tile(intrinsics(shape), (count, 1, 1)),
        "actions": actions,
        "action_schema": ACTION_SCHEMA,
        "provenance": json.dumps({"world_seed": 5}),
    } | changed


def levels(frames: np.ndarray) -> list[int]:
    """Frame t of our videos is grey of level 10 t."""
    return np.rint(frames.mean((1, 2, 3)) / 10).astype(int).tolist()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a video of `frames` frames and a track of `rows` rows, with some arrays changed."""

    def made(
        frames: int,
        rows: int | None = None,
        shape: tuple[int, int] = SIZE,
        rate: float = FPS,
        **changed: Any,
    ) -> tuple[Path, Path]:
        shown = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 10
        video, track = tmp_path / "video.mkv", tmp_path / "track.npz"
        write_video(video, np.broadcast_to(shown, (frames, *shape, 3)), rate, lossless=True)
        arrays = tracked(frames if rows is None else rows, shape, **{"fps": rate} | changed)
        np.savez(track, **{name: x for name, x in arrays.items() if x is not None})
        return video, track

    return made


def test_a_clip_that_fits_comes_as_it_is(write, caplog: pytest.LogCaptureFixture) -> None:
    video, track = write(5)
    episode, future = load_clip(video, track, SIZE, FPS)
    truth = tracked(5)
    assert levels(episode.frames) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(episode.world_to_camera, truth["world_to_camera"])
    np.testing.assert_array_equal(episode.intrinsics, truth["intrinsics"])
    np.testing.assert_array_equal(episode.actions, truth["actions"])
    assert episode.fps == FPS
    assert episode.provenance == {
        "video": "video.mkv", "track": "track.npz", "world_seed": 5
    }  # fmt: skip
    assert future is None
    assert caplog.messages == []


def test_what_the_track_holds_beyond_the_video_is_the_future(write) -> None:
    episode, future = load_clip(*write(5, rows=9), SIZE, FPS)
    truth = tracked(9)
    assert len(episode) == 5
    assert future is not None
    np.testing.assert_array_equal(future.actions, truth["actions"][5:])
    np.testing.assert_array_equal(future.world_to_camera, truth["world_to_camera"][5:])


def test_another_size_is_resized_with_its_lens(write, caplog: pytest.LogCaptureFixture) -> None:
    video, track = write(5, shape=(64, 72))
    episode, _ = load_clip(video, track, SIZE, FPS)
    assert episode.frames.shape == (5, *SIZE, 3)
    assert levels(episode.frames) == [0, 1, 2, 3, 4]
    before, after = intrinsics((64, 72)), episode.intrinsics[0]
    # A point at the right edge stays at the right edge, one at the bottom at the bottom.
    for row, (old, new) in enumerate(((72, 48), (64, 32))):
        assert after[row, row] / new == pytest.approx(before[row, row] / old)
        assert after[row, 2] / new == pytest.approx(before[row, 2] / old)
    (message,) = caplog.messages
    assert "is 64 x 72 pixels (height x width), resized to 32 x 48" in message
    assert "proportions" in message


@pytest.mark.parametrize(
    ("rate", "kept"), [(20, [0, 2, 4, 6, 8]), (5, [0, 1, 1, 2, 2, 3, 3, 4, 4])]
)
def test_another_rate_is_resampled(
    rate: int, kept: list[int], write, caplog: pytest.LogCaptureFixture
) -> None:
    episode, future = load_clip(*write(9 if rate == 20 else 5, rate=rate), SIZE, FPS)
    assert levels(episode.frames) == kept
    assert episode.fps == FPS
    assert future is None
    truth = tracked(9)["world_to_camera"]
    np.testing.assert_array_equal(episode.world_to_camera, truth[kept])
    assert f"runs at {rate} frames per second, resampled to 10" in caplog.text
    assert len(caplog.messages) == 1


def test_resampled_actions_lead_as_far(write) -> None:
    actions = walked(9)
    actions[3, JUMP] = actions[6, SPRINT] = 1
    actions[1, FORWARD] = -1.0
    actions[:, PITCH] = [0, 3, 3, 12, 12, -1, 2, 0, 0]
    episode, _ = load_clip(*write(9, rate=20, actions=actions), SIZE, FPS)
    merged = episode.actions
    assert not merged[0].any()
    np.testing.assert_allclose(merged[:, YAW], [0, 3 / 8, 7 / 8, 11 / 8, 15 / 8], rtol=1e-6)
    np.testing.assert_allclose(merged[:, PITCH], [0, 6, 15, 1, 0])  # 24 is beyond the limit
    np.testing.assert_allclose(merged[:, FORWARD], [0, -0.25, 0.5, 0.5, 0.5])
    assert merged[:, JUMP].tolist() == [0, 0, 1, 0, 0]
    assert merged[:, SPRINT].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("frames", [5, 6, 7, 8])
def test_past_and_future_keep_one_beat(frames: int, write) -> None:
    """Wherever the video ends, its frames and the future's rows are every third of the track."""
    episode, future = load_clip(*write(frames, rows=19, rate=30), SIZE, FPS)
    assert future is not None
    rows = [*range(0, 19, 3)]
    past = [r for r in rows if r < frames]
    assert levels(episode.frames) == past
    truth = tracked(19)["world_to_camera"]
    np.testing.assert_array_equal(episode.world_to_camera, truth[past])
    np.testing.assert_array_equal(future.world_to_camera, truth[rows[len(past) :]])


def test_a_clip_without_actions_is_unsteered(write, caplog: pytest.LogCaptureFixture) -> None:
    video, track = write(5, rows=7, actions=None, action_schema=None)
    episode, future = load_clip(video, track, SIZE, FPS)
    assert not episode.actions.any()
    assert future is not None
    assert future.actions is None
    assert "has no actions: the clip is taken as unsteered" in caplog.text


def mirrored() -> np.ndarray:
    poses = tracked(5)["world_to_camera"].copy()
    poses[3, 0] *= -1
    return poses


def scaled() -> np.ndarray:
    poses = tracked(5)["world_to_camera"].copy()
    poses[2, :3, :3] *= 1.01
    return poses


def steered(row: int, column: int, value: float) -> np.ndarray:
    actions = walked(5)
    actions[row, column] = value
    return actions


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"world_to_camera": mirrored()}, "pose 4 is not rigid"),
        ({"world_to_camera": scaled()}, "pose 3 is not rigid"),
        ({"world_to_camera": np.full((5, 4, 4), np.nan)}, "pose 1 is not rigid"),
        ({"world_to_camera": np.zeros((5, 3, 4))}, "world_to_camera has shape"),
        ({"world_to_camera": np.array(["x"])}, "world_to_camera"),
        ({"intrinsics": np.tile(np.eye(3), (4, 1, 1))}, "intrinsics has shape"),
        ({"intrinsics": np.zeros((5, 3, 3))}, "intrinsics of frame 1 are not those of a lens"),
        ({"intrinsics": np.array(["x"])}, "intrinsics"),
        ({"actions": walked(4)}, "4 actions for 5 poses"),
        ({"actions": steered(2, FORWARD, 1.5)}, "forward is 1.5 in frame 3, expected -1 to 1"),
        ({"actions": steered(4, YAW, -16)}, "yaw is -16 in frame 5"),
        ({"actions": steered(1, JUMP, 0.5)}, "jump is 0.5 in frame 2"),
        ({"actions": steered(1, PITCH, np.nan)}, "pitch is nan in frame 2"),
        ({"action_schema": "keys/1"}, "action_schema 'keys/1'"),
        ({"schema": "poses/3"}, "schema 'poses/3', expected 'decmem-track/1'"),
        ({"fps": 0.0}, "0 frames per second"),
        ({"fps": np.nan}, "nan frames per second"),
        ({"fps": np.array([10.0, 10.0])}, "fps"),
        ({"fps": "ten"}, "fps"),
        ({"size": np.array([0, 48])}, "frames of 0 x 48 pixels"),
        ({"size": np.array(["a", "b"])}, "size"),
        ({"provenance": "{"}, "provenance"),
        ({"provenance": "[1]"}, "provenance"),
        ({"intrinsics": None}, "lacks intrinsics"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unsound_track_is_named(changed: dict, problem: str, write) -> None:
    video, track = write(5, **changed)
    with pytest.raises(UserError) as told:
        load_clip(video, track, SIZE, FPS)
    assert told.value.argument == "--track"
    assert problem in told.value.problem
    assert told.value.cure


def cut(track: Path) -> None:
    track.write_bytes(track.read_bytes()[:400])


def pickled(track: Path) -> None:
    np.savez(track, **tracked(5, intrinsics=np.array([{}], object)))


def bare(track: Path) -> None:
    with track.open("wb") as stream:
        np.save(stream, np.zeros(3))


@pytest.mark.parametrize(
    "damage",
    [cut, pickled, bare, Path.unlink, lambda track: track.write_text("text")],
    ids=["cut", "pickled", "bare", "missing", "text"],
)
@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
def test_a_damaged_track_is_named(
    damage: Callable[[Path], object], compressed: bool, write
) -> None:
    video, track = write(5)
    if compressed:
        np.savez_compressed(track, **tracked(5))
    damage(track)
    with pytest.raises(UserError) as told:
        load_clip(video, track, SIZE, FPS)
    assert told.value.argument == "--track"
    assert str(track) in told.value.problem


def test_flipped_bits_never_pass_for_a_track(write) -> None:
    video, track = write(5)
    np.savez_compressed(track, **tracked(5))
    data = track.read_bytes()
    refused = 0
    for place in range(0, len(data) - 8, 61):
        track.write_bytes(
            data[:place] + bytes(255 - x for x in data[place : place + 8]) + data[place + 8 :]
        )
        try:
            episode, _ = load_clip(video, track, SIZE, FPS)
        except UserError:
            refused += 1
        else:  # some bytes of an archive mean nothing
            np.testing.assert_array_equal(episode.actions, walked(5))
    assert refused > len(data) / 61 * 0.8


def test_a_video_longer_than_its_track_is_refused(write) -> None:
    with pytest.raises(UserError, match="--track: 4 poses for a video of 5 frames at 10"):
        load_clip(*write(5, rows=4), SIZE, FPS)


def test_a_video_that_is_none_is_named(write) -> None:
    video, track = write(5)
    video.write_text("text")
    with pytest.raises(UserError, match=r"--memory: .*video\.mkv is damaged or not a video"):
        load_clip(video, track, SIZE, FPS)


@pytest.mark.parametrize(("count", "left"), [(1, 1), (4, 1), (5, 5), (6, 5), (8, 5), (9, 9)])
def test_only_whole_latents_are_kept(
    count: int, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    made = tracked(count)
    actions = made["actions"].copy()
    actions[0, YAW] = 3.0  # a track cut out of a longer one: what led to its first frame
    episode = Episode(
        np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((*SIZE, 3), np.uint8),
        made["world_to_camera"],
        made["intrinsics"],
        actions,
        provenance={"a": 1},
    )
    whole = whole_latents(episode)
    spare = count - left
    assert whole.frames[:, 0, 0, 0].tolist() == [*range(spare, count)]
    np.testing.assert_array_equal(whole.world_to_camera, made["world_to_camera"][spare:])
    assert not whole.actions[0].any(), "what led to a first frame is a no-op"
    np.testing.assert_array_equal(whole.actions[1:], actions[spare + 1 :])
    assert (whole.fps, whole.provenance) == (episode.fps, {"a": 1})
    assert episode.actions[0, YAW] == 3.0, "the clip given is left alone"
    warned = [f"the memory has {count} frames and needs 1 + 4n: the oldest {spare} are left out"]
    assert caplog.messages == (warned if spare else [])


def test_a_script_is_read() -> None:
    actions, poses = load_actions("forward 20, turn-left 9x10, back 20", FPS)
    assert actions.shape == (50, A)
    assert poses is None
    assert (actions[:20, FORWARD] == 1).all()
    assert (actions[20:30, YAW] == -9).all()
    assert (actions[30:, FORWARD] == -1).all()
    assert np.count_nonzero(actions) == 50


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("", "'' cannot be read"),
        ("forward", "'forward' cannot be read"),
        ("forward 20 back 20", "cannot be read"),
        ("forward -3", "cannot be read"),
        ("hop 4", "unknown word 'hop'"),
        ("forward 9x10", "takes frames only"),
        ("turn-left 10", "needs degrees x frames"),
        ("turn-left 16x2", "more than 15 degrees"),
        ("missing.txt", "'missing.txt' cannot be read"),
    ],
)
def test_a_script_that_cannot_be_read_is_quoted(script: str, problem: str) -> None:
    with pytest.raises(UserError) as told:
        load_actions(script, FPS)
    assert told.value.argument == "--actions"
    assert problem in told.value.problem


def test_actions_from_a_table(tmp_path: Path) -> None:
    path = tmp_path / "future.csv"
    path.write_text("# forward, right, yaw, pitch, jump, sprint\n1,0,-9,0,0,1\n0,0.5,0,2,1,0\n")
    actions, poses = load_actions(str(path), FPS)
    assert actions.tolist() == [[1, 0, -9, 0, 0, 1], [0, 0.5, 0, 2, 1, 0]]
    assert poses is None
    path.write_text("# nothing yet\n")
    assert load_actions(str(path), FPS)[0].shape == (0, A)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1,2,3\n", "shape (1, 3), expected (frames, 6)"),
        ("0,0,99,0,0,0\n", "yaw is 99 in frame 1"),
        ("a,b,c,d,e,f\n", "cannot be read"),
        ("0,0,0,0,0,0\n0,0\n", "cannot be read"),
        ("0,0,nan,0,0,0\n", "yaw is nan"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_table_is_named(text: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "future.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as told:
        load_actions(str(path), FPS)
    assert told.value.argument == "--actions"
    assert problem in told.value.problem


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    def made(count: int, **changed: Any) -> str:
        path = tmp_path / "future.npz"
        arrays = tracked(count, **changed)
        np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
        return str(path)

    return made


def test_actions_and_poses_from_a_track(saved, caplog: pytest.LogCaptureFixture) -> None:
    actions, poses = load_actions(saved(6), FPS)
    np.testing.assert_array_equal(actions, walked(6))
    np.testing.assert_array_equal(poses, tracked(6)["world_to_camera"])
    assert caplog.messages == []


def test_actions_of_another_rate_follow_the_memory(saved, caplog: pytest.LogCaptureFixture) -> None:
    """Two rows make one step: the first step from the memory's last frame ends at row 2."""
    actions, poses = load_actions(saved(6, fps=20.0), FPS)
    np.testing.assert_array_equal(poses, tracked(6)["world_to_camera"][[1, 3, 5]])
    np.testing.assert_allclose(actions[:, YAW], [1 / 8, 5 / 8, 9 / 8], rtol=1e-6)
    assert "runs at 20 frames per second, resampled to 10" in caplog.text


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"actions": None, "action_schema": None}, "holds no actions"),
        ({"actions": steered(0, FORWARD, 2)}, "forward is 2 in frame 1"),
        ({"world_to_camera": mirrored()}, "pose 4 is not rigid"),
        ({"fps": -1.0}, "-1 frames per second"),
    ],
    ids=["none", "range", "rigid", "rate"],
)
def test_a_bad_future_names_its_flag(changed: dict, problem: str, saved) -> None:
    with pytest.raises(UserError) as told:
        load_actions(saved(5, **changed), FPS)
    assert told.value.argument == "--actions"
    assert problem in told.value.problem


def test_a_rendered_pair_loads_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, clip.__name__)
    made = tracked(5)
    frames = np.zeros((5, *SIZE, 3), np.uint8)
    truth = Episode(frames, made["world_to_camera"], made["intrinsics"], made["actions"])
    save_track(tmp_path / "t.npz", truth)
    write_video(tmp_path / "v.mp4", frames, FPS)
    episode, _ = load_clip(tmp_path / "v.mp4", tmp_path / "t.npz", SIZE, FPS)
    np.testing.assert_array_equal(
        centres(episode.world_to_camera), centres(made["world_to_camera"])
    )
    assert caplog.messages == []
