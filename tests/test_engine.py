"""The engine: what CUDA graphs record is the same function as the plain pass, however long the
history, and retrieval is reused and shared where asked."""

import dataclasses
import warnings
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from decmem import flow
from decmem.engine import Engine
from decmem.memory import Bank, KeptLists, Lens, PositionConfig, Reach, Recall, bank_plan
from decmem.memory.quantised import FP8
from decmem.memory.sparse_global import SparseGlobalMemory
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


@torch.no_grad()
def one_by_one(sampler: Sampler, bank: Bank, conditions: Conditions, noise: Tensor) -> Tensor:
    """A chunk whose branches are passes of their own, one after the other: the definition."""
    model, worlds = sampler.model, len(noise)
    plan = bank_plan(model.config.reading.reach, bank.length, T, T)
    nobody = torch.zeros(worlds, dtype=torch.bool, device=noise.device)
    contexts = model.context(conditions, bank), model.context(conditions, bank, nobody)
    steered, free = KeptLists(), KeptLists()
    until = sampler.running.retrieve_until

    def velocity(z: Tensor, t: float) -> Tensor:
        find = until is None or sampler.times.index(t) < until
        second = steered if sampler.running.share_lists else free
        at = torch.full((worlds, T), t, device=noise.device)
        v = []
        for context, kept, finds in (
            (contexts[0], steered, find),
            (contexts[1], second, find and second is free),
        ):
            recall = dataclasses.replace(sampler.recall, kept=kept.start(finds))
            v.append(model(z.to(sampler.dtype), at, context, plan, bank, recall))
        assert sampler.guidance is not None
        return flow.guide(*v, sampler.guidance)

    return flow.solve(velocity, noise, sampler.times)


@pytest.fixture(scope="module")
def model() -> Callable[[str], WorldModel]:
    made = {name: awake(config) for name, config in CONFIGS.items()}
    return made.__getitem__


class Retrievals:
    """Counts the latents that layers retrieved for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        plain = SparseGlobalMemory.retrieve

        def counted(memory: SparseGlobalMemory, q: Tensor, *args: object) -> Tensor:
            self.count += q.shape[2]
            return plain(memory, q, *args)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(SparseGlobalMemory, "retrieve", counted)


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_is_the_plain_pass(
    name: str, guidance: float | None, model: Callable[[str], WorldModel]
) -> None:
    plain, _ = dreamt(sampler_of(model(name), guidance=guidance, graphs="off"))
    got, bank = dreamt(sampler_of(model(name), guidance=guidance, graphs="eager", room=30))
    assert isinstance(bank.engine, Engine)
    assert plain.std() > 0.1
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("worlds", [1, 2])
@pytest.mark.parametrize("options", RETRIEVALS, ids=str)
@pytest.mark.parametrize("graphs", ["off", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_branches_in_one_pass_are_one_pass_each(
    name: str, graphs: str, options: dict, worlds: int, model: Callable[[str], WorldModel]
) -> None:
    sampler = sampler_of(model(name), **options, graphs=graphs)
    got, bank = dreamt(sampler, chunks=2, worlds=worlds)
    conditions = way(model(name).config, 10, sampler.device, worlds)
    bank.truncate(8)
    noise = sampler.noise(range(1, 1 + worlds), [8, 9])
    expected = one_by_one(sampler, bank, conditions[8:], noise)
    torch.testing.assert_close(got[:, T:], expected, atol=1e-5, rtol=1e-5)


def test_the_lens_watches_the_branch_with_actions(model: Callable[[str], WorldModel]) -> None:
    for name, graphs in product(("pocket", "paper"), ("off", "eager")):
        alone, both = Lens(), Lens()
        for guidance, lens in ((None, alone), (2.0, both)):
            dreamt(sampler_of(model(name), 1, guidance, graphs=graphs), chunks=1, lens=lens)
        assert all(torch.equal(*lists) for lists in zip(alone.lists, both.lists, strict=True))
        torch.testing.assert_close(both.strengths(), alone.strengths(), atol=1e-5, rtol=1e-5)


def test_one_engine_serves_every_length_until_the_arena_moves(
    model: Callable[[str], WorldModel],
) -> None:
    sampler = sampler_of(model("paper"), graphs="eager", room=8)
    engines: list[object] = []
    plain, _ = dreamt(sampler_of(model("paper"), graphs="off"), chunks=5)
    made = Engine.begin

    def begun(engine: Engine, *args: object) -> None:
        engines.append(engine)
        made(engine, *args)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "begin", begun)
        got, _ = dreamt(sampler, chunks=5)
    assert engines[0] is engines[1]
    assert engines[1] is not engines[2]  # 10 latents and two chunks do not fit 8 + 4
    assert engines[2] is engines[3] is engines[4]
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


def test_what_lies_behind_the_history_is_never_read(model: Callable[[str], WorldModel]) -> None:
    sampler = sampler_of(model("pocket"), graphs="eager", room=20)
    conditions, noise = way(POCKET, 8, sampler.device), sampler.noise([1], [6, 7])
    got = []
    for rubbish in (0.0, float("nan")):
        bank = sampler.new_bank(torch.zeros(1, 3))
        for layer in bank.layers:
            for _, stored in layer.arenas():
                stored.fill_(rubbish)
        with torch.no_grad():
            sampler.write(bank, sampler.noise([7], range(6)), conditions[:6])
            got.append(sampler.generate(bank, conditions[6:], noise))
    assert torch.equal(*got)


def test_too_short_a_history_takes_the_plain_pass(model: Callable[[str], WorldModel]) -> None:
    plain, _ = dreamt(sampler_of(model("paper"), graphs="off"), known=2, chunks=2)
    got, bank = dreamt(sampler_of(model("paper"), graphs="eager"), known=2, chunks=1)
    assert bank.engine is None
    assert torch.equal(got, plain[:, :T])
    got, bank = dreamt(sampler_of(model("paper"), graphs="eager"), known=2, chunks=2)
    assert bank.engine is not None
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", RETRIEVALS, ids=str)
def test_passes_that_write_and_lenses_change_nothing(
    options: dict, model: Callable[[str], WorldModel]
) -> None:
    plain, _ = dreamt(sampler_of(model("pocket"), **options, graphs="off"), defer=True)
    lens = Lens()
    engine = sampler_of(model("pocket"), **options, graphs="eager")
    got, _ = dreamt(engine, lens=lens, defer=True)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    assert len(lens.lists) == 3 * POCKET.layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_a_bank_in_fewer_bits_reads_alike_both_ways(
    dtype: torch.dtype, model: Callable[[str], WorldModel]
) -> None:
    exact, _ = dreamt(sampler_of(model("paper"), graphs="off"), chunks=1)
    plain, bank = dreamt(sampler_of(model("paper"), graphs="off", bank_dtype=dtype), chunks=1)
    got, _ = dreamt(sampler_of(model("paper"), graphs="eager", bank_dtype=dtype), chunks=1)
    assert bank.dtype == dtype
    torch.testing.assert_close(got, plain, atol=1e-4, rtol=1e-4)
    assert 0 < (plain - exact).abs().max() < 0.5 * exact.std()


@pytest.mark.parametrize("graphs", ["off", "eager"])
@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 6),
        ({"retrieve_until": 1}, 2),
        ({"retrieve_until": 2}, 4),
        ({"retrieve_until": 9}, 6),
        ({"share_lists": True}, 3),
        ({"retrieve_until": 1, "share_lists": True}, 1),
    ],
)
def test_layers_retrieve_as_often_as_asked(
    graphs: str,
    options: dict,
    passes: int,
    model: Callable[[str], WorldModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = Retrievals(monkeypatch)
    dreamt(sampler_of(model("paper"), **options, graphs=graphs), chunks=2)
    writes = (PAPER.layers - 1) * (6 + 2 * T)  # the last layer only remembers
    assert counter.count - writes == 2 * T * passes * PAPER.layers


@pytest.mark.parametrize("graphs", ["off", "eager"])
def test_reuse_in_one_step_is_no_reuse_and_in_more_it_is(
    graphs: str, model: Callable[[str], WorldModel]
) -> None:
    for steps, same in ((1, True), (3, False)):
        every, _ = dreamt(sampler_of(model("paper"), steps, graphs=graphs))
        reused, _ = dreamt(sampler_of(model("paper"), steps, graphs=graphs, retrieve_until=1))
        assert torch.equal(every, reused) == same
    own, _ = dreamt(sampler_of(model("paper"), graphs=graphs))
    shared, _ = dreamt(sampler_of(model("paper"), graphs=graphs, share_lists=True))
    assert not torch.equal(own, shared)
    alone = [
        dreamt(sampler_of(model("paper"), guidance=None, graphs=graphs, share_lists=share))[0]
        for share in (False, True)
    ]
    assert torch.equal(*alone)


def test_kept_lists_stay_where_they_are() -> None:
    kept = KeptLists()
    first, second = torch.tensor([[[[1, 2]]]]), torch.tensor([[[[3, -1]]]])
    a = kept.start(True)(lambda: first)
    b = kept.start(True)(lambda: second)
    assert a is b
    assert torch.equal(b, second)
    assert kept.start(False)(lambda: first) is b


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, FP8], ids=str)
@pytest.mark.parametrize("options", [{}, {"retrieve_until": 1, "share_lists": True}])
@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_replay_the_plain_pass(name: str, options: dict, dtype: torch.dtype | None) -> None:
    model = awake(CONFIGS[name], "cuda")
    options = options | {"bank_dtype": dtype, "room": 30}
    for guidance in (None, 2.0):
        plain, _ = dreamt(sampler_of(model, guidance=guidance, **options, graphs="off"))
        eager, _ = dreamt(sampler_of(model, guidance=guidance, **options, graphs="eager"))
        got, bank = dreamt(sampler_of(model, guidance=guidance, **options))
        engine = bank.engine
        assert isinstance(engine, Engine)
        assert len(engine.graphs) >= 1
        # The same kernels in the same order: nothing may differ between run and replay.
        assert torch.equal(got, eager)
        # In 16 bits a rounding may choose another block.
        assert (got - plain).abs().mean() < 0.2 * plain.std()


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    model = awake(PAPER, "cuda")
    sampler = sampler_of(model, graphs="eager")
    _, bank = dreamt(sampler, chunks=1)
    engine = bank.engine
    assert isinstance(engine, Engine)
    noise = sampler.noise([1], range(T)).float()
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            # PyTorch says of the mode itself that it is a prototype.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        engine.velocity(bank, noise, 1.0, True)
    finally:
        torch.cuda.set_sync_debug_mode(before)
