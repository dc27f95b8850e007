"""Named experiments, each with the number or the use it stands for."""

from decmem.codec import CodecConfig
from decmem.errors import UserError
from decmem.experiment import CodecTraining, Experiment, MemoryTraining, SamplerConfig
from decmem.flow import FlowConfig
from decmem.memory import MemoryConfig, PositionConfig, Reach
from decmem.model import ModelConfig

TINY = Experiment(
    name="tiny",
    reproduces="nothing: the whole system in seconds on a CPU, for tests",
    codec=CodecConfig(
        channels=16, widths=(16, 24, 32), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1)
    ),
    model=ModelConfig(
        size=(64, 96),
        latent_channels=16,
        width=64,
        layers=2,
        time_width=32,
        reading=MemoryConfig(reach=Reach(window=2, write_chunk=1), retrieved=4),
        position=PositionConfig(
            camera=12,
            space=12,
            time=8,
            space_base=100.0,
            time_base=100.0,
            reach=64.0,
            global_time=False,
        ),
        chunk_sizes=(1, 2, 4),
    ),
    codec_training=CodecTraining(steps=200, batch=4, latents=3, walks=8, frames=33),
    memory_training=MemoryTraining(
        steps=200, batch=4, latents=12, short_latents=8, walks=16, warmup=20
    ),
)

POCKET = Experiment(
    name="pocket",
    reproduces="the shipped world: 128x192, docs/results.md",
    model=ModelConfig(
        reading=MemoryConfig(reach=Reach(window=8, write_chunk=1), retrieved=16),
        position=PositionConfig(
            camera=16,
            space=16,
            surface=24,
            time=8,
            space_base=100.0,
            time_base=100.0,
            reach=64.0,
            global_time=False,
        ),
        chunk_sizes=(1, 2, 4),
    ),
    flow=FlowConfig(sampling_shift=16.0),
    sampler=SamplerConfig(retrieved=24),
    memory_training=MemoryTraining(
        stills=5,
        history_dreamt=0.4,
        history_generations=4,
        history_shift=16.0,
        depth_weight=0.05,
        compile=True,
    ),
)

PAPER = Experiment(
    name="paper",
    reproduces="Table 1 of the paper: 1 B parameters, 352x640, 30.08 / 25.23 dB",
    codec=CodecConfig(channels=16),
    model=ModelConfig(
        size=(352, 640),
        latent_channels=16,
        width=1728,
        layers=20,
        time_width=256,
        reading=MemoryConfig(
            reach=Reach(window=8, window_includes_chunk=True, own_candidates=True),
            retrieved=80,
            per_head=True,
        ),
        position=PositionConfig(camera=24, space=24, time=24),
        rays=False,
        patch_position=False,
    ),
    flow=FlowConfig(shift=1.0),
    sampler=SamplerConfig(steps=20, guidance=7.5),
    memory_training=MemoryTraining(
        steps=25_000,
        batch=64,
        latents=60,
        noisy_streams=1,
        history_noised=0.0,
        compile=True,
        recompute=True,
    ),
)

PRESETS: dict[str, Experiment] = {e.name: e for e in (TINY, POCKET, PAPER)}


def preset(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        UserError: when there is none.
    """
    if name not in PRESETS:
        known = ", ".join(f"{n} ({e.reproduces})" for n, e in PRESETS.items())
        raise UserError("preset", f"{name!r} is unknown", f"Choose one of: {known}")
    return PRESETS[name]
