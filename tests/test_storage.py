"""Output is whole or absent."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from decmem.errors import UserError
from decmem.storage import (
    atomic_file,
    atomic_folder,
    require_free_space,
    sha256_of,
    write_json,
)


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_file_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "clip.mp4"
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        assert temporary.suffix == ".mp4"
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("opener", [atomic_file, atomic_folder], ids=["file", "folder"])
@pytest.mark.parametrize("error", [disk_full(), KeyboardInterrupt(), ValueError("bug")], ids=type)
def test_nothing_is_left_of_a_failure(opener, error: BaseException, tmp_path: Path) -> None:
    expected = UserError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with opener(tmp_path / "a" / "b" / "out.bin") as temporary:
            (temporary / "x" if temporary.is_dir() else temporary).write_bytes(b"half")
            raise error

    with pytest.raises(expected):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("new")
            raise disk_full()

    with pytest.raises(
        UserError, match=r"^--out: cannot write .*report\.json: the disk is full\. free some space"
    ):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_told_as_text_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"), atomic_file(tmp_path / "w"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_folder_keeps_what_else_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sheets").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    (out / "sheets" / "old.png").write_text("old")
    with atomic_folder(out) as temporary:
        (temporary / "sheets").mkdir()
        (temporary / "sheets" / "new.png").write_text("new")
        (temporary / "report.json").write_text("{}")
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "notes.txt",
        "report.json",
        "sheets/new.png",
        "sheets/old.png",
    ]
    assert list(tmp_path.iterdir()) == [out]


def test_wrong_kind_of_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a folder"), atomic_file(tmp_path):
        pass
    with pytest.raises(UserError, match="in the way"), atomic_folder(tmp_path / "file"):
        pass
    with (
        pytest.raises(UserError, match="file: a file of this"),
        atomic_file(tmp_path / "file" / "x"),
    ):
        pass


def test_json_has_no_nan_and_keeps_order(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    value = {
        "z": float("nan"),
        "a": np.array([1.5, np.inf]),
        "n": np.int64(3),
        "p": Path("x") / "y",
        "t": (True, None),
    }
    write_json(path, value)
    assert list(json.loads(path.read_text())) == ["z", "a", "n", "p", "t"]
    assert json.loads(path.read_text()) == {
        "z": None,
        "a": [1.5, None],
        "n": 3,
        "p": "x/y",
        "t": [True, None],
    }


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == known


def test_free_space_is_asked_of_the_nearest_folder(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(UserError, match=r"^--out: .*needs 1099511627776 MiB"):
        require_free_space(tmp_path / "not" / "yet", 2**60)
