"""One process or several under torchrun, told apart in one place."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank, world: index and number of processes. device: the one this process computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """The first process's value, on all of them."""
        if self.world == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(held, 0)
        return float(held)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def join(device: torch.device) -> Place:
    """Joins the processes torchrun started, or stands alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Place(0, 1, device)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return Place(rank, world, device)


def leave(place: Place) -> None:
    """Ends what `join` began."""
    if place.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
