"""The sampler: denoises a chunk behind a bank, and writes clean chunks into it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from decmem import flow
from decmem.memory import Bank, Lens, Recall, bank_plan, joint_plan
from decmem.model import Conditions, WorldModel
from decmem.model.conditioning import camera_centres

_NOISE_STREAM = 0x9E3779B97F4A7C15  # keeps the noise of neighbouring seeds apart


@dataclass
class Sampler:
    """A model with the settings it is sampled with.

    Args:
        times: of the Euler solver, from 1 to 0. guidance: strength of action guidance or None.
        dtype: of activations and bank. recall: how the global memory is read.
    """

    model: WorldModel
    times: list[float]
    guidance: float | None
    dtype: torch.dtype
    recall: Recall

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @property
    def write_chunk(self) -> int:
        """Latents that see each other in the write pass."""
        return self.model.config.reading.reach.write_chunk or self.model.config.chunk

    @property
    def piece(self) -> int:
        """Latents of one parallel write pass: whole chunks, for one that was cut in two would
        see less of itself."""
        chunk = self.write_chunk
        return max(1, (64 if self.device.type == "cuda" else 16) // chunk) * chunk

    def noise(self, seeds: Sequence[int], index: Sequence[int]) -> Float[Tensor, "B T C h w"]:
        """The noise of these latents in these worlds: a function of seed and index alone."""
        config = self.model.config
        shape = (config.latent_channels, *config.latent_size)

        def draw(seed: int, i: int) -> Tensor:
            mixed = (seed * _NOISE_STREAM + i) % 2**63
            return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))

        worlds = [torch.stack([draw(seed, i) for i in index]) for seed in seeds]
        return torch.stack(worlds).to(self.device)

    def generate(
        self,
        bank: Bank,
        conditions: Conditions,
        noise: Float[Tensor, "B T C h w"],
        lens: Lens | None = None,
        owed: tuple[Tensor, Conditions] | None = None,
    ) -> Float[Tensor, "B T C h w"]:
        """Denoises one chunk behind the history; nothing of it is committed.

        A `lens` watches the last step, where the picture is all but there. Clean latents that are
        still `owed` to the bank are written along with the first step: one pass for two.
        """
        self._keep_near(bank, conditions)
        B, T = noise.shape[:2]
        begun = None if owed is None else self._write_and_begin(bank, owed, conditions, noise)
        plan = bank_plan(self.model.config.reading.reach, bank.length, T, T)
        steered = self.model.context(conditions, bank)
        free = None
        if self.guidance is not None:
            nobody = torch.zeros(B, dtype=torch.bool, device=self.device)
            free = self.model.context(conditions, bank, nobody)

        def velocity(z: Tensor, t: float) -> Tensor:
            at = torch.full((B, T), t, device=self.device)
            z = z.to(self.dtype)
            watched = lens is not None and t == self.times[-2]
            recall = replace(self.recall, lens=lens) if watched else self.recall
            if begun is not None and t == self.times[0]:
                v = begun
            else:
                v = self.model(z, at, steered, plan, bank, recall)
            if free is None or self.guidance is None:
                return v
            return flow.guide(v, self.model(z, at, free, plan, bank, self.recall), self.guidance)

        return flow.solve(velocity, noise, self.times)

    def _write_and_begin(
        self,
        bank: Bank,
        owed: tuple[Tensor, Conditions],
        conditions: Conditions,
        noise: Float[Tensor, "B T C h w"],
    ) -> Float[Tensor, "B T C h w"]:
        """Writes what is owed and gives the first velocity of the chunk behind it."""
        latents, known = owed
        clean, T = latents.shape[1], noise.shape[1]
        reach = self.model.config.reading.reach
        plan = joint_plan(reach, bank.length, clean, self.write_chunk, T)
        at = torch.zeros(len(noise), clean + T, device=self.device)
        at[:, clean:] = self.times[0]
        both = torch.cat((latents.float(), noise.float()), 1).to(self.dtype)
        context = self.model.context(known.then(conditions), bank)
        begun = self.model(both, at, context, plan, bank, self.recall)
        bank.commit(known.cameras, known.lens, known.time)
        return begun

    def write(
        self, bank: Bank, latents: Float[Tensor, "B T C h w"], conditions: Conditions
    ) -> None:
        """The write pass: clean latents through the model, their keys and values into the bank.

        Many latents go in pieces, each a parallel pass: the same bank in bounded working memory.
        """
        reach, chunk = self.model.config.reading.reach, self.write_chunk
        for start in range(0, latents.shape[1], self.piece):
            part = slice(start, start + self.piece)
            clean, known = latents[:, part].to(self.dtype), conditions[part]
            B, T = clean.shape[:2]
            plan = bank_plan(reach, bank.length, T, chunk, writes=True)
            still = torch.zeros(B, T, device=self.device)
            context = self.model.context(known, bank)
            self.model(clean, still, context, plan, bank, self.recall)
            bank.commit(known.cameras, known.lens, known.time)

    def _keep_near(self, bank: Bank, conditions: Conditions) -> None:
        """Moves the bank's anchor along once a world has walked half the trusted reach away."""
        reach = self.model.config.position.reach
        here = camera_centres(conditions.cameras[:, 0]).cpu()
        far = (here - bank.anchor).norm(dim=-1) > reach / 2
        if reach and bool(far.any()):
            bank.rebase(torch.where(far[:, None], here, bank.anchor))
