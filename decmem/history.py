"""A session's past: latents, what steered them, and the bank with their keys and values.

Every write pass is taken down, so that the bank can be built again exactly as it was.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from decmem.errors import UserError
from decmem.memory import Bank, Recall
from decmem.model import Conditions
from decmem.model.conditioning import camera_centres
from decmem.sampler import Sampler
from decmem.saved_world import SavedWorld, Written


class History:
    """Latents so far, none at first."""

    def __init__(self) -> None:
        self.bank: Bank | None = None
        self.conditions: Conditions | None = None
        self.latents: Tensor | None = None
        self.written: list[Written] = []
        # The last write pass may still be owed to the bank: the next chunk pays it on the way.
        self._owing = False

    @property
    def length(self) -> int:
        """Latents so far."""
        return 0 if self.latents is None else self.latents.shape[1]

    @property
    def last(self) -> Float[Tensor, "B 1 C h w"] | None:
        """The newest latent: the decoder's context, whether it was seen or dreamed."""
        return None if self.latents is None else self.latents[:, -1:]

    def write(
        self,
        sampler: Sampler,
        latents: Float[Tensor, "B T C h w"],
        conditions: Conditions,
        later: bool = False,
    ) -> None:
        """The write pass over clean latents, now or `later`; the first one also chooses the
        bank's anchor."""
        self.settle(sampler)
        if self.bank is None:
            anchor = camera_centres(conditions.cameras[:, -1]).cpu()
            self.bank = sampler.new_bank(anchor)
        if not later:
            sampler.write(self.bank, latents, conditions)
        recall = sampler.recall
        self.written.append(
            Written(latents.shape[1], recall.global_memory, recall.retrieved, self._anchor())
        )
        self._owing = later
        if self.latents is None or self.conditions is None:
            self.latents, self.conditions = latents, conditions
        else:
            self.latents = torch.cat((self.latents, latents), 1)
            self.conditions = self.conditions.then(conditions)

    @torch.no_grad()
    def settle(self, sampler: Sampler) -> None:
        """Writes what is owed to the bank."""
        if self._owing and self.bank is not None:
            last = self.written[-1]
            recall = Recall(last.global_memory, last.retrieved)
            latents, conditions = self._owed()
            replace(sampler, recall=recall).write(self.bank, latents, conditions)
            self._owing = False

    def pay(self, sampler: Sampler) -> tuple[Tensor, Conditions] | None:
        """What is owed, for a sampler that writes it in passing; None where it was settled."""
        if not self._owing:
            return None
        last = self.written[-1]
        if Recall(last.global_memory, last.retrieved) == sampler.recall:
            return self._owed()
        self.settle(sampler)
        return None

    def paid(self) -> None:
        """What was owed is in the bank, perhaps behind another anchor."""
        if self._owing:
            self.written[-1] = replace(self.written[-1], anchor=self._anchor())
            self._owing = False

    def _owed(self) -> tuple[Tensor, Conditions]:
        assert self.latents is not None
        assert self.conditions is not None
        part = slice(self.length - self.written[-1].latents, self.length)
        return self.latents[:, part], self.conditions[part]

    def _anchor(self) -> tuple[tuple[float, float, float], ...]:
        assert self.bank is not None
        x, y, z = self.bank.anchor.unbind(-1)
        return tuple(zip(x.tolist(), y.tolist(), z.tolist(), strict=True))

    def rewind(self, sampler: Sampler, latents: int) -> None:
        """Back to the first `latents` latents, the bank's anchor included.

        Raises:
            UserError: for a number of latents that never were.
        """
        if not 1 <= latents <= self.length:
            known = f"the world has 1 to {self.length}" if self.length else "nothing is known"
            raise UserError("latents", f"{latents}, {known}", "Choose one that was")
        self.settle(sampler)
        assert self.bank is not None
        assert self.latents is not None
        assert self.conditions is not None
        if latents == self.length:
            return
        kept: list[Written] = []
        start = 0
        for one in self.written:
            if start >= latents:
                break
            kept.append(replace(one, latents=min(one.latents, latents - start)))
            start += one.latents
        # A chunk that is cut in two was written by latents that see each other: what is left of
        # it is written again.
        first = latents - kept[-1].latents
        chunk = sampler.write_chunk
        cut = first + kept[-1].latents // chunk * chunk
        tail_latents, tail = self.latents[:, cut:latents], self.conditions[cut:latents]
        self.bank.truncate(cut)
        anchor = torch.tensor(kept[-1].anchor, dtype=torch.float64)
        if not torch.equal(anchor, self.bank.anchor):
            self.bank.rebase(anchor)
        if cut < latents:
            recall = Recall(kept[-1].global_memory, kept[-1].retrieved)
            replace(sampler, recall=recall).write(self.bank, tail_latents, tail)
        self.written = kept
        self.latents, self.conditions = self.latents[:, :latents], self.conditions[:latents]

    def fork(self, sampler: Sampler) -> "History":
        """An independent copy."""
        self.settle(sampler)
        twin = copy.copy(self)
        twin.bank = None if self.bank is None else self.bank.fork()
        twin.written = list(self.written)
        return twin

    def rebuild(self, sampler: Sampler, saved: SavedWorld) -> Iterator[int]:
        """Becomes the saved world, write pass by write pass; yields the latents known so far.

        What the present past shares with the saved one is kept. Long passes go in pieces of
        whole chunks.
        """
        device = sampler.device
        latents, conditions = saved.latents.to(device), saved.conditions.to(device)
        self.settle(sampler)
        passes = self._keep_common(sampler, saved, latents)
        for one in passes:
            if self.bank is None:
                anchor = torch.tensor(one.anchor, dtype=torch.float64)
                self.bank = sampler.new_bank(anchor)
            reader = replace(sampler, recall=Recall(one.global_memory, one.retrieved))
            anchor = torch.tensor(one.anchor, dtype=torch.float64)
            if not torch.equal(anchor, self.bank.anchor):
                self.bank.rebase(anchor)
            start, end = self.length, self.length + one.latents
            for first in range(start, end, reader.piece):
                part = slice(first, min(first + reader.piece, end))
                reader.write(self.bank, latents[:, part], conditions[part])
                yield part.stop
            self.written.append(one)
            self.latents, self.conditions = latents[:, :end], conditions[:end]

    def _keep_common(
        self, sampler: Sampler, saved: SavedWorld, latents: Tensor
    ) -> tuple[Written, ...]:
        """Rewinds to what both pasts share, in whole write passes; gives back the other passes."""
        common, shared = 0, 0
        if self.latents is not None and self.latents.shape[0] == latents.shape[0]:
            for mine, other in zip(self.written, saved.written, strict=False):
                end = common + mine.latents
                part = slice(common, end)
                if mine != other or not torch.equal(self.latents[:, part], latents[:, part]):
                    break
                common, shared = end, shared + 1
        if common:
            self.rewind(sampler, common)
        else:
            self.__init__()
        return saved.written[shared:]
