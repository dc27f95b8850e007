"""Run as one of several processes: trains a line on this process's share of every batch.

`python two_processes.py OUT`, with RANK and WORLD_SIZE set as torchrun sets them; alone it trains
on the whole batch. Each process writes what it holds at the end to OUT.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from decmem.distributed import join, leave
from decmem.training.average import WeightAverage
from decmem.training.optimiser import Optimisers
from decmem.training.trainer import Budget, Task, Trainer

SHARES = 2


class Share(Task):
    """A small regression; process r of two learns from half r of the batch, one from both."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        torch.manual_seed(rank)  # different starts: the first process's count
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.shares = [rank] if world > 1 else range(SHARES)

    def forward(self, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(SHARES, 6, 4, generator=draw)[list(self.shares)].flatten(0, 1)
        loss = (self.network(x) - x.square().sum(1, keepdim=True)).square().mean()
        return loss, {}


def main(out: Path) -> None:
    place = join(torch.device("cpu"))
    try:
        task = Share(place.rank, place.world)
        optimisers = Optimisers(task.network, 1e-2)
        average = WeightAverage(task.network, 0.9)
        budget = Budget(steps=12, warmup=2, clip=0.5, report_every=4, checkpoint_every=6)
        run = out / f"run{place.world}"
        trainer = Trainer(task, optimisers, average, budget, place, run, {"kind": "line"}, "line")
        assert trainer.run()
        held = {f"average/{name}": x for name, x in average.state().items()}
        held |= {name: x.detach() for name, x in task.network.named_parameters()}
        held["agreed"] = torch.tensor(place.agree(10.0 + place.rank))
        save_file(held, out / f"{place.world}-{place.rank}.safetensors")
    finally:
        leave(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
