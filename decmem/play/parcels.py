"""Files on their way: what visitors hand in, and what is made for them to take home."""

import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from decmem.errors import UserError

# The first bytes of what may be handed in. A playlist that names other files is none of these.
_VIDEO = (
    "an MP4, MOV, Matroska, WebM or AVI video",
    ((4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (0, b"RIFF")),
)
_PICTURE = (
    "a JPEG, PNG, WebP, GIF or BMP picture",
    ((0, b"\xff\xd8\xff"), (0, b"\x89PNG"), (0, b"RIFF"), (0, b"GIF8"), (0, b"BM")),
)
_TRACK = ("a track (.npz)", ((0, b"PK\x03\x04"),))
_WORLD = ("a .world file", ((8, b"{"),))
_LOOKS = {"video": _VIDEO, "picture": _PICTURE, "track": _TRACK, "world": _WORLD}


@dataclass(frozen=True)
class Parcel:
    """A file: its kind, its name for people, where it lies, and whose it is."""

    kind: str
    name: str
    path: Path
    owner: str

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


@dataclass
class Parcels:
    """All files of a server, in a folder of its own that `close` removes.

    Args:
        kept: files of each direction that are kept for one owner; older ones make room.
    """

    kept: int
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="decmem-play-")))
    _held: dict[str, Parcel] = field(default_factory=dict)

    def find(self, key: str, owner: str | None = None) -> Parcel | None:
        """The parcel of this key; with an owner, only if it is theirs."""
        parcel = self._held.get(key)
        return parcel if parcel and owner in (None, parcel.owner) else None

    def newest(self, kind: str, owner: str) -> Parcel | None:
        """The owner's last parcel of a kind."""
        fitting = [p for p in self._held.values() if p.owner == owner and p.kind == kind]
        return fitting[-1] if fitting else None

    def place(self, suffix: str) -> Path:
        """A free path; nothing of it comes from outside."""
        return self.folder / (secrets.token_urlsafe(16) + suffix)

    def keep(self, kind: str, name: str, path: Path, owner: str) -> str:
        """Takes charge of a file; its key."""
        key = secrets.token_urlsafe(16)
        mine = [k for k, p in self._held.items() if p.owner == owner]
        for old in mine[: max(0, len(mine) + 1 - 2 * self.kept)]:
            self._drop(old)
        self._held[key] = Parcel(kind, name, path, owner)
        return key

    async def take_in(self, kind: str, body: AsyncIterator[bytes], limit: int, owner: str) -> str:
        """Writes what is handed in to a file; its key.

        Raises:
            UserError: when it is larger than `limit` bytes, empty, or not of its kind.
        """
        wanted, looks = _LOOKS[kind]
        path = self.place(f".{kind}")
        size, head = 0, b""
        try:
            with path.open("wb") as file:
                async for piece in body:
                    size += len(piece)
                    if size > limit:
                        problem = f"more than {limit / 2**20:.0f} MiB"
                        raise UserError(kind, problem, "Give a smaller file")
                    head = (head + piece)[:16] if len(head) < 16 else head
                    file.write(piece)
            if not any(head[at : at + len(mark)] == mark for at, mark in looks):
                raise UserError(kind, f"this is not {wanted}", f"Give {wanted}")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return self.keep(kind, kind, path, owner)

    def forget(self, owner: str) -> None:
        """Removes everything of one owner."""
        for key in [k for k, p in self._held.items() if p.owner == owner]:
            self._drop(key)

    def close(self) -> None:
        """Removes everything."""
        self._held.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _drop(self, key: str) -> None:
        self._held.pop(key).path.unlink(missing_ok=True)
