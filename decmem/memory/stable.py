"""The stable: histories of several worlds in one bank, so that one pass may read them all.

Every world has a stall, a run of slots that is a bank to it like any other. A pass of several
worlds (`decmem.engine`) reads the whole bank; its lists name blocks of the stalls.
"""

from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor

from decmem.errors import UserError
from decmem.memory.bank import Bank


class Stable:
    """Hands out stalls of a bank. A stall is free again once nobody holds its bank.

    Args:
        whole: an empty bank of one world; its room is what there is to hand out.
        passing: latents that only pass through a stall, behind its last: a chunk under guidance.
    """

    def __init__(self, whole: Bank, passing: int) -> None:
        self.whole = whole
        self.passing = passing
        # What was made for these arenas, by the number of rows of its pass.
        self.engines: dict[int, object] = {}
        self._stalls: WeakKeyDictionary[Bank, range] = WeakKeyDictionary()

    @property
    def widest(self) -> int:
        """Slots of the largest stall."""
        return max((len(slots) for slots in self._stalls.values()), default=0)

    def new_bank(self, anchor: Float[Tensor, "1 3"], latents: int) -> Bank:
        """An empty bank for one world, of at most so many latents.

        Raises:
            UserError: where no run of slots is free that is long enough.
        """
        room = latents + self.passing
        first = 0
        for taken in self._taken():
            if taken.start - first >= room:
                break
            first = taken.stop
        if first + room > self.whole.layers[0].room:
            raise UserError(
                "history",
                f"{latents} latents more find no room in the stable",
                "Wait until a world leaves, or ask for fewer",
            )
        bank = self.whole.run(first, room, latents, anchor)
        self._stalls[bank] = range(first, first + room)
        return bank

    def take_in(self, bank: Bank, latents: int) -> Bank:
        """What a bank holds in a stall of so many latents: a world moves in with its history. It
        may outgrow the stall, and then has a bank of its own again.

        Raises:
            UserError: as `new_bank`.
        """
        stalled = self.new_bank(bank.anchor, latents)
        for old, new in zip(bank.layers, stalled.layers, strict=True):
            for (name, stored), (_, place) in zip(old.arenas(), new.arenas(), strict=True):
                kept = bank.length * (bank.layout.M if name == "pooled" else 1)
                place[:, :, :kept] = stored[:, :, :kept]
            new.limit = old.limit
        stalled.commit(bank.world_to_camera, bank.lens, bank.time)
        return stalled

    @property
    def empty(self) -> bool:
        """Whether all stalls are free."""
        return not self._taken()

    def _taken(self) -> list[range]:
        """Stalls that are not free, in their order."""
        found = [self.stall(bank) for bank in list(self._stalls)]
        return sorted((slots for slots in found if slots), key=lambda slots: slots.start)

    def stall(self, bank: Bank) -> range | None:
        """The slots of a bank; None for one that is not from here (a fork is not), or has outgrown
        its stall."""
        if bank in self._stalls and _memory_of(bank) != _memory_of(self.whole):
            del self._stalls[bank]
        return self._stalls.get(bank)


def _memory_of(bank: Bank) -> int:
    return bank.layers[0].keys.untyped_storage().data_ptr()
