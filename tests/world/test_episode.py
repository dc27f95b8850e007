"""Episodes and their track files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from decmem.errors import UserError
from decmem.world.actions import ACTION_SCHEMA
from decmem.world.episode import Episode, render_episode
from decmem.world.track_file import TRACK_SCHEMA, load_track, save_track
from decmem.world.version import WORLD_VERSION


@pytest.fixture(scope="module")
def episode() -> Episode:
    return render_episode(3, "free", frames=6, size=(16, 24), supersample=1)


def test_an_episode_names_its_origin(episode: Episode) -> None:
    assert len(episode) == 6
    assert episode.frames.shape == (6, 16, 24, 3)
    assert episode.provenance["world_version"] == WORLD_VERSION
    assert episode.provenance["world_seed"] == 3
    assert not episode.actions[0].any()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"world_to_camera": np.zeros((6, 4, 4))}, "world_to_camera"),
        ({"world_to_camera": np.tile(np.eye(4), (5, 1, 1))}, "world_to_camera"),
        ({"intrinsics": np.tile(np.eye(3), (7, 1, 1))}, "intrinsics"),
        ({"actions": np.zeros((5, 6), np.float32)}, "actions"),
        ({"actions": np.full((6, 6), 20, np.float32)}, "actions"),
        ({"depth": np.zeros((6, 16, 25), np.float32)}, "depth"),
        ({"fps": 0.0}, "fps"),
    ],
)
def test_disagreement_is_named(episode: Episode, change: dict, argument: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(episode, **change)
    assert caught.value.argument == argument


@pytest.mark.parametrize("with_depth", [False, True])
def test_a_track_survives_the_disk(tmp_path: Path, episode: Episode, with_depth: bool) -> None:
    path = tmp_path / "new" / "track.npz"
    save_track(path, episode, with_depth)
    track = load_track(path)
    np.testing.assert_array_equal(track.world_to_camera, episode.world_to_camera)
    np.testing.assert_array_equal(track.intrinsics, episode.intrinsics)
    np.testing.assert_array_equal(track.actions, episode.actions)
    assert (track.fps, track.size, len(track)) == (10, (16, 24), 6)
    assert track.provenance == episode.provenance
    assert (track.depth is not None) == with_depth
    with np.load(path, allow_pickle=False) as archive:
        assert str(archive["schema"]) == TRACK_SCHEMA
        assert str(archive["action_schema"]) == ACTION_SCHEMA
    assert [file.name for file in path.parent.iterdir()] == ["track.npz"]


def spoiled(path: Path, **changes: np.ndarray | None) -> Path:
    with np.load(path) as archive:
        arrays = {**{name: archive[name] for name in archive.files}, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": np.array("decmem-track/9")},
        {"action_schema": np.array("other/1")},
        {"world_to_camera": None},
        {"intrinsics": np.zeros((2, 3, 3))},
        {"actions": np.full((6, 6), 99, np.float32)},
        {"world_to_camera": np.zeros((6, 4, 4))},
        {"provenance": np.array([{"a": 1}], dtype=object)},
    ],
)
def test_a_wrong_track_is_refused(tmp_path: Path, episode: Episode, changes: dict) -> None:
    path = tmp_path / "track.npz"
    save_track(path, episode)
    with pytest.raises(UserError) as caught:
        load_track(spoiled(path, **changes), "--track")
    assert caught.value.argument == "--track"


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        load_track(tmp_path / "none.npz")
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match="not a readable npz"):
        load_track(damaged)


def test_nothing_half_written_is_left(tmp_path: Path, episode: Episode) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        save_track(blocked / "track.npz", episode)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
