"""What the tests of sampler and engine share: small models of every kind, and dreams of theirs."""

import dataclasses

import torch
from torch import Tensor

from decmem import flow
from decmem.memory import Bank, Lens, PositionConfig, Reach, Recall
from decmem.model import Conditions, ModelConfig, WorldModel, initialise
from decmem.sampler import Running, Sampler

POCKET = ModelConfig(
    size=(48, 80),  # blocks of different sizes
    latent_channels=4,
    width=52,
    layers=2,
    ffn_multiple=2,
    time_width=16,
    position=PositionConfig(
        camera=8, space=8, time=4, surface=6, space_base=100.0, time_base=100.0, global_time=False
    ),
)
POCKET = dataclasses.replace(
    POCKET,
    reading=dataclasses.replace(POCKET.reading, reach=Reach(2, write_chunk=1), retrieved=5),
)
PAPER = dataclasses.replace(
    POCKET,
    reading=dataclasses.replace(
        POCKET.reading,
        reach=Reach(6, window_includes_chunk=True, own_candidates=True),
        per_head=True,
    ),
    position=dataclasses.replace(POCKET.position, global_time=True),
    rays=False,
    patch_position=False,
)
WINDOW = dataclasses.replace(PAPER, memory="window")
CONFIGS = {"pocket": POCKET, "paper": PAPER, "window": WINDOW}
RETRIEVALS = [
    {"retrieve_until": until, "share_lists": share}
    for until in (None, 1)
    for share in (False, True)
]
T = 2


def awake(config: ModelConfig, device: str = "cpu") -> WorldModel:
    """Random parameters everywhere: fresh branches are silent."""
    model = WorldModel(config)
    initialise(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False).to(device)


def way(config: ModelConfig, latents: int, device: torch.device, worlds: int = 1) -> Conditions:
    """Actions and cameras of a turn on the spot that drifts; worlds differ in actions."""
    frames = torch.arange(latents * 4, dtype=torch.float64)
    cos, sin, zero = (0.1 * frames).cos(), (0.1 * frames).sin(), torch.zeros_like(frames)
    rotation = torch.stack((cos, zero, sin, zero, zero + 1, zero, -sin, zero, cos), -1)
    cameras = torch.eye(4, dtype=torch.float64).repeat(len(frames), 1, 1)
    cameras[:, :3, :3] = rotation.unflatten(-1, (3, 3))
    cameras[:, :3, 3] = torch.stack((0.2 * frames, zero, -0.1 * frames), -1)
    generator = torch.Generator().manual_seed(2)
    return Conditions(
        torch.randn(worlds, latents, 4, config.actions, generator=generator),
        cameras.view(1, latents, 4, 4, 4).repeat(worlds, 1, 1, 1, 1),
        torch.tensor([1.4, 2.1, 0.0, 0.1]).expand(worlds, latents, 4),
        torch.arange(latents),
    ).to(device)


def sampler_of(
    model: WorldModel, steps: int = 3, guidance: float | None = 2.0, **running: object
) -> Sampler:
    times = flow.sampling_times(flow.FlowConfig(), steps)
    dtype = torch.float32 if model.head.weight.device.type == "cpu" else torch.bfloat16
    return Sampler(model, times, guidance, dtype, Recall(), Running(**running))  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def dreamt(
    sampler: Sampler,
    known: int = 6,
    chunks: int = 3,
    lens: Lens | None = None,
    defer: bool = False,
    worlds: int = 1,
) -> tuple[Tensor, Bank]:
    """Chunk after chunk behind random latents, the write passes included."""
    model = sampler.model
    conditions = way(model.config, known + T * chunks, sampler.device, worlds)
    bank = sampler.new_bank(torch.zeros(worlds, 3))
    past = sampler.noise(range(7, 7 + worlds), range(known))
    sampler.write(bank, past, conditions[:known])
    made, owed = [], None
    for i in range(chunks):
        part = slice(known + i * T, known + (i + 1) * T)
        noise = sampler.noise(range(1, 1 + worlds), range(part.start, part.stop))
        made.append(sampler.generate(bank, conditions[part], noise, lens, owed))
        if defer:
            owed = (made[-1], conditions[part])
        else:
            sampler.write(bank, made[-1], conditions[part])
    return torch.cat(made, 1), bank
