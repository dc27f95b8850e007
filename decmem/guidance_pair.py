"""The two branches of guidance on two GPUs: a process each, and velocities go across."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from decmem import flow
from decmem.distributed import Place
from decmem.errors import UserError

Velocity = Callable[[Tensor, float], Tensor]
"""Of a state at a time: what a solver integrates."""


@dataclass(frozen=True)
class GuidancePair:
    """Two processes that dream the same world; each has the whole model and a bank of its own, and
    computes one branch of every denoising step: the first with the actions, the second without.

    Both are to make the same calls. They go on from the very same guided velocity, so latents that
    began alike stay alike to the last bit. The write pass has one branch: both compute it. Lists of
    blocks are never shared: they would have to go across in every layer.

    Args:
        place: this process among the two; `torch.distributed` has a process group of them.

    Raises:
        UserError: for another number of processes.
    """

    place: Place

    def __post_init__(self) -> None:
        if self.place.world != 2:
            raise UserError(
                "processes",
                f"{self.place.world} for the two branches of guidance",
                "Start two: torchrun --standalone --nproc-per-node 2 -m decmem ...",
            )

    def require(self, guidance: float | None) -> None:
        """Checks that there is something to share out.

        Raises:
            UserError: for no guidance.
        """
        if guidance is None:
            problem = "none, so there is one branch for two processes"
            raise UserError("guidance", problem, "Give a strength, or start one process")

    @property
    def steered(self) -> bool:
        """Whether this process computes the branch with actions."""
        return self.place.first

    def guided(self, velocity: Velocity, strength: float) -> Velocity:
        """The guided velocity that both processes have, from that of this process's branch."""

        def exchanged(z: Tensor, t: float) -> Tensor:
            steered, free = self.exchange(velocity(z, t))
            return flow.guide(steered, free, strength)

        return exchanged

    def exchange(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "branches *shape"]:
        """Both branches, the one with actions first; waits for the other process."""
        both = own.new_empty(2, *own.shape)
        dist.all_gather(list(both), own.contiguous())
        return both
