"""What the tests of training share: the smallest codec and model, and walks to train them on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from decmem.codec import Autoencoder, CodecConfig
from decmem.distributed import Place
from decmem.experiment import CodecTraining, MemoryTraining
from decmem.flow import FlowConfig
from decmem.memory import MemoryConfig, PositionConfig, Reach
from decmem.model import ModelConfig, WorldModel, initialise
from decmem.training import codec_task
from decmem.training.average import WeightAverage
from decmem.training.codec_task import CodecTask
from decmem.training.latent_cache import LatentCache
from decmem.training.memory_task import MemoryTask
from decmem.training.optimiser import Optimisers
from decmem.training.trainer import Budget, Task, Trainer
from decmem.training.walk_cache import WalkBatch, rendered_walks

CPU = torch.device("cpu")
SIZE = (32, 48)
CODEC = CodecConfig(
    channels=4, widths=(8, 8, 8), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1)
)
MODEL = ModelConfig(
    size=SIZE,
    latent_channels=4,
    width=40,
    layers=2,
    ffn_multiple=2,
    time_width=16,
    reading=MemoryConfig(Reach(window=2, write_chunk=1), retrieved=5),
    position=PositionConfig(
        camera=8, space=8, time=4, space_base=100.0, time_base=100.0, reach=64.0, global_time=False
    ),
    chunk_sizes=(1, 2),
)
CODEC_TRAINING = CodecTraining(batch=2, latents=2, walks=2, frames=13)
MEMORY_TRAINING = MemoryTraining(batch=2, latents=6, short_latents=4, short_until=0.5, walks=3)


@pytest.fixture(scope="session")
def codec() -> Autoencoder:
    """Random weights, frozen."""
    torch.manual_seed(0)
    made = Autoencoder(CODEC)
    made.mean += 0.25  # so that whoever forgets to normalise is caught
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def cache(codec: Autoencoder) -> LatentCache:
    """Three walks of six latents."""
    return LatentCache(codec, MEMORY_TRAINING.walks, MEMORY_TRAINING.latents, SIZE, CPU, rank=0)


@pytest.fixture(scope="session")
def awake() -> Callable[[], WorldModel]:
    """Makes models with random parameters everywhere: a fresh one is silent."""

    def made() -> WorldModel:
        model = WorldModel(MODEL)
        initialise(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    return made


@pytest.fixture(scope="session")
def training() -> MemoryTraining:
    return MEMORY_TRAINING


class Line(Task):
    """Fits y = 3 x - 1; as cheap as a task can be. `factor` spoils the loss of some steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(1, 1)
        self.factor: dict[int, float] = {}
        self.seen: list[tuple[int, float]] = []

    def forward(self, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append((step, progress))
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))
        loss = (self.network(x) - (3 * x - 1)).square().mean()
        return loss * self.factor.get(step, 1.0), {"bias": self.network.bias.detach().mean()}


@pytest.fixture(scope="session")
def clips() -> list[WalkBatch]:
    """The walks of the codec's training, rendered once."""
    count, frames = CODEC_TRAINING.walks, CODEC_TRAINING.frames
    return list(rendered_walks(0, count, frames, SIZE, CPU))


@pytest.fixture
def task(
    cache: LatentCache, clips: list[WalkBatch], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Task]:
    """Makes fresh tasks, always from the same weights: line, codec, memory, or memory behind pasts
    of several generations."""
    monkeypatch.setattr(codec_task, "rendered_walks", lambda *asked: clips)

    def made(kind: str) -> Task:
        if kind == "line":
            return Line()
        if kind == "codec":
            torch.manual_seed(0)
            return CodecTask(
                Autoencoder(CODEC).to(memory_format=torch.channels_last),
                CODEC_TRAINING,
                SIZE,
                CPU,
                seed=0,
                rank=0,
            )
        model = WorldModel(MODEL)
        initialise(model)
        how = MEMORY_TRAINING
        if kind == "dreaming memory":
            how = replace(how, short_until=0.0, history_dreamt=0.7, history_generations=3)
        return MemoryTask(model, cache, how, FlowConfig(), seed=0, rank=0)

    return made


@pytest.fixture
def trainer(task: Callable[[str], Task]) -> Callable[..., Trainer]:
    """Makes trainers of fresh tasks, as a new process would."""

    def made(kind: str, run: Path, budget: Budget, config: dict | None = None) -> Trainer:
        learnt = task(kind)
        optimisers = Optimisers(learnt.network, 1e-2, 0.02 if "memory" in kind else None)
        average = WeightAverage(learnt.network, 0.9)
        place = Place(0, 1, CPU)
        return Trainer(
            learnt, optimisers, average, budget, place, run, config or {"stage": kind}, kind
        )

    return made
