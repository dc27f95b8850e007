"""The branches of a world: those that were left, as snapshots; the present one goes on."""

from typing import Any

from decmem.errors import UserError
from decmem.saved_world import SavedWorld


class Branches:
    """Numbered from 0. A snapshot shares its past with the others and holds no keys or values."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.clear()

    def clear(self) -> None:
        """One branch, the present one."""
        self.current = 0
        self._left: dict[int, SavedWorld] = {}
        self._names = {0: "main"}

    def fork(self, now: SavedWorld) -> None:
        """Keeps the present as a branch and goes on in a copy.

        Raises:
            UserError: when there are too many.
        """
        if len(self._names) >= self.most:
            raise UserError("fork", f"there are {self.most} branches", "Start a new world, or save")
        self._left[self.current] = now
        self.current = len(self._names)
        self._names[self.current] = f"branch {self.current}"

    def go_to(self, number: int, now: SavedWorld) -> SavedWorld:
        """Leaves the present branch as it is now; the snapshot of the other.

        Raises:
            UserError: when there is none of this number.
        """
        if number not in self._names:
            raise UserError("id", f"no branch {number}", "Choose one that `branches` names")
        self._left[self.current] = now
        self.current = number
        return self._left.pop(number)

    def told(self, latents: int) -> list[dict[str, Any]]:
        """All branches; the present one has this many latents."""
        return [
            {
                "id": number,
                "name": name,
                "latents": latents if number == self.current else self._left[number].length,
            }
            for number, name in self._names.items()
        ]
