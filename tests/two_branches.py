"""Run as one of two processes that share out the branches of guidance.

`python -m tests.two_branches OUT DEVICE`, with RANK and WORLD_SIZE set as torchrun sets them. Each
process writes what it dreamt and what it retrieved to OUT, and then runs the benchmark's command.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from decmem.cli import main as decmem
from decmem.distributed import join, leave
from decmem.engine import Engine
from decmem.guidance_pair import GuidancePair
from decmem.memory import KeptLists, Lens, Recall
from decmem.model import Conditions, WorldModel
from decmem.sampler import Chunk, Sampler

from .dreams import CONFIGS, T, awake, dreamt, sampler_of, way

NAMES = ("pocket", "paper")
BENCH = ["bench", "rollout", "--preset", "tiny", "--steps", "2", "--repeats", "1"]
BENCH += ["--memory", "decoupled", "--history", "9", "--guidance", "2", "--graphs", "eager"]


@dataclass(eq=False)
class Recorded(KeptLists):
    """Retrieves as ever and takes the lists down."""

    taken: list[Tensor] = field(default_factory=list)

    def __call__(self, retrieve: Callable[[], Tensor]) -> Int[Tensor, "B G Nq K"]:
        lists = retrieve()
        self.taken.append(lists.clone())
        return lists


def dreams(
    pair: GuidancePair | None, device: str, *ways: Literal["off", "eager", "auto"]
) -> Iterator[tuple[str, Tensor]]:
    """Several chunks for each of these `graphs`, with the banks they leave, by name."""
    for name in NAMES:
        model = awake(CONFIGS[name], device)
        for graphs in ways:
            sampler = sampler_of(model, graphs=graphs, pair=pair, room=8)
            recorded = Recorded()
            watched = dataclasses.replace(sampler, recall=Recall(kept=recorded))
            made, bank = dreamt(watched, worlds=2)
            assert isinstance(bank.engine, Engine) == (graphs != "off")
            yield f"{name}/{graphs}/latents", made
            stored = bank.layers[-1].read(slice(6, 12), torch.float32)
            yield f"{name}/{graphs}/bank", torch.stack(stored)
            for i, lists in enumerate(recorded.taken):
                yield f"{name}/{graphs}/lists/{i:03}", lists
            once = dataclasses.replace(sampler.running, retrieve_until=1)
            reusing = dataclasses.replace(sampler, running=once)
            made, _ = dreamt(reusing, lens=Lens(), defer=True)
            yield f"{name}/{graphs}/owed", made
            yield f"{name}/{graphs}/together", together(sampler)


@torch.no_grad()
def together(sampler: Sampler) -> Tensor:
    """Two chunks of two worlds each, the worlds in one pass."""
    lengths, room = (6, 7), 11
    stable = sampler.new_stable(2 * (room + sampler.model.config.chunk))
    banks = [stable.new_bank(torch.zeros(1, 3), room) for _ in lengths]
    ways = [steering(sampler.model, room, i) for i in range(2)]
    for i, length in enumerate(lengths):
        sampler.write(banks[i], sampler.noise([7 + i], range(length)), ways[i][:length])
    made = []
    for _ in range(2):
        chunks = []
        for i, bank in enumerate(banks):
            part = slice(bank.length, bank.length + T)
            noise = sampler.noise([i], range(part.start, part.stop))
            chunks.append(Chunk(bank, ways[i][part], noise))
        made.append(sampler.generate_together(stable, chunks))
        clean = [one._replace(latents=x) for one, x in zip(chunks, made[-1], strict=True)]
        sampler.write_together(stable, clean)
    assert bool(stable.engines) == (sampler.running.graphs != "off")
    return torch.cat([x for chunk in made for x in chunk])


def steering(model: WorldModel, latents: int, world: int) -> Conditions:
    both = way(model.config, latents, model.head.weight.device, worlds=2)
    actions = both.actions[world : world + 1]
    return Conditions(actions, both.world_to_camera[:1], both.lens[:1], both.time)


def main(out: Path, device: str) -> None:
    place = join(torch.device(device))
    try:
        ways = ("off", "eager") if device == "cpu" else ("eager", "auto")
        held = dict(dreams(GuidancePair(place), str(place.device), *ways))
        save_file({k: x.contiguous() for k, x in held.items()}, out / f"{place.rank}.safetensors")
        folder = out / f"bench{place.rank}"
        assert decmem([*BENCH, "--device", device, "--out", str(folder)]) == 0
    finally:
        leave(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
