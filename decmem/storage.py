"""Output that is whole or absent: everything that writes a file or a folder goes through here."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decmem.errors import UserError

# Conditions of the place that is written to, which the user can mend: errno -> (problem, cure).
_PLACE_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another place"),
    errno.EACCES: ("no permission to write here", "choose a place you own"),
    errno.EPERM: ("no permission to write here", "choose a place you own"),
    errno.EROFS: ("the disk is read-only", "choose another place"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "choose another path"),
    errno.EEXIST: ("a file of this name is in the way", "remove it or choose another path"),
    errno.EISDIR: ("this is a folder, a file was expected", "give the path of a file"),
    errno.ENAMETOOLONG: ("this name is too long", "choose a shorter one"),
}


def place_error(path: Path, error: BaseException) -> UserError | None:
    """The ``UserError`` for a failed write to ``path``, or None when the place is not to blame."""
    # safetensors reports a full disk as text inside its own exception type.
    full = "No space left on device" in str(error)
    number = errno.ENOSPC if full else error.errno if isinstance(error, OSError) else None
    if number not in _PLACE_ERRORS:
        return None
    problem, cure = _PLACE_ERRORS[number]
    # What is in the way may be a folder above: name the very path.
    in_the_way = isinstance(error, FileExistsError) and error.filename
    return UserError("--out", f"cannot write {in_the_way or path}: {problem}", cure)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of ``path`` to write to; rename it to ``path`` on success.

    The temporary name keeps the suffix, because encoders choose their format by it. On any failure
    (an interrupt included) the temporary file and the folders made for it are removed, and a file
    that already was at ``path`` stays as it was.

    Raises:
        UserError: the disk is full, or ``path`` cannot be written.
    """
    path = Path(path)
    with _temporary_sibling(path) as temporary:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; on success its content appears at ``path``.

    A new folder appears in one rename. Where ``path`` already is a folder, the new files replace
    those of the same name one by one and everything else in it is left alone: an output folder may
    hold a user's other files. On any failure the temporary folder is removed.

    Raises:
        UserError: the disk is full, or ``path`` cannot be written.
    """
    path = Path(path)
    with _temporary_sibling(path) as temporary:
        if path.exists() and not path.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary.mkdir()
        yield temporary
        _merge(temporary, path)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically, keys in the order given.

    NaN and infinities become null (JSON has neither); numpy scalars and arrays, tuples and paths
    are written as plain numbers, lists and strings.
    """
    text = json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_space(path: str | Path, needed: int, argument: str = "--out") -> None:
    """Raise ``UserError`` unless the disk that would hold ``path`` has ``needed`` bytes free."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            argument,
            f"{path} needs {_mebibytes(needed)} and the disk has {_mebibytes(free)} free",
            "free some space or choose another place",
        )


@contextlib.contextmanager
def _temporary_sibling(path: Path) -> Iterator[Path]:
    """A free name beside ``path``; cleans up and explains when the body fails."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except BaseException as error:
        for folder in missing:  # nearest first; one that holds something of others stays
            _remove(temporary)
            with contextlib.suppress(OSError):
                folder.rmdir()
        explained = place_error(path, error)
        if explained is not None:
            raise explained from error
        raise
    finally:
        _remove(temporary)


def _merge(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``, into it where it already is a folder."""
    if source.is_dir() and target.is_dir():
        for child in sorted(source.iterdir()):
            _merge(child, target / child.name)
        source.rmdir()
    else:
        os.replace(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
