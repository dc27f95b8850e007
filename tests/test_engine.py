"""The engine: what CUDA graphs record is the same function as the plain pass, however long the
history, and retrieval is reused and shared where asked."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import product

import pytest
import torch
from torch import Tensor

from decmem import engine as engine_module
from decmem import flow
from decmem.engine import Engine
from decmem.memory import Bank, KeptLists, Lens, PositionConfig, bank_plan
from decmem.memory.quantised import FP8
from decmem.memory.sparse_global import SparseGlobalMemory
from decmem.model import Conditions, WorldModel
from decmem.sampler import Sampler

from .dreams import CONFIGS, PAPER, POCKET, RETRIEVALS, T, awake, dreamt, sampler_of, way


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
    plain, known = dreamt(sampler_of(model(name), guidance=guidance, graphs="off"))
    got, bank = dreamt(sampler_of(model(name), guidance=guidance, graphs="eager", room=30))
    assert isinstance(bank.engine, Engine)
    assert bank.engine.writer is not None
    assert plain.std() > 0.1
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    stored, expected = (one.layers[-1].read(slice(6, 12), torch.float32) for one in (bank, known))
    for mine, theirs in zip(stored, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("windows_in_the_bank")
@pytest.mark.parametrize("worlds", [1, 2])
@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_windows_may_be_read_in_the_bank(
    name: str, guidance: float | None, worlds: int, model: Callable[[str], WorldModel]
) -> None:
    options = {"guidance": guidance, "share_lists": True}
    plain, _ = dreamt(sampler_of(model(name), **options, graphs="off"), worlds=worlds)
    got, bank = dreamt(sampler_of(model(name), **options, graphs="eager", room=30), worlds=worlds)
    assert isinstance(bank.engine, Engine)
    for engine in (bank.engine, bank.engine.writer):
        assert engine is not None
        # Where the global memory sees no time, the window's keys are others than the bank's.
        assert (engine.desk.tiles is None) == (name == "pocket")
        padded = model(name).layout.packing is not None
        assert engine.desk.tiles is None or (engine.desk.tiles.rows is not None) == padded
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


def test_latents_may_be_written_in_smaller_chunks_than_they_are_dreamt_in() -> None:
    reach = dataclasses.replace(PAPER.reading.reach, write_chunk=1)
    reading = dataclasses.replace(PAPER.reading, reach=reach)
    singly = awake(dataclasses.replace(PAPER, reading=reading))
    plain, _ = dreamt(sampler_of(singly, graphs="off"))
    got, bank = dreamt(sampler_of(singly, graphs="eager"))
    assert isinstance(bank.engine, Engine)
    assert bank.engine.writer is not None
    assert bank.engine.writer.near > bank.engine.near
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
        if engine.plan.predicted == 0:  # those that write aside
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
@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("name", ["paper", "window"])
def test_a_hopper_gpu_reads_windows_in_the_bank(
    name: str, guidance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    position = PositionConfig(camera=24, space=24, time=24)
    config = dataclasses.replace(CONFIGS[name], size=(352, 640), width=144, position=position)
    model = awake(config, "cuda")
    got, bank = dreamt(sampler_of(model, guidance=guidance, room=30))
    monkeypatch.setattr(engine_module, "hopper_tiles", lambda *asked: None)
    fetched, other = dreamt(sampler_of(model, guidance=guidance, room=30))
    for one, there in ((bank, True), (other, False)):
        assert isinstance(one.engine, Engine)
        tiles = one.engine.desk.tiles
        assert (tiles is not None and tiles.rows is not None) == there
    # Roundings of queries apart, which may choose another block.
    assert got.std() > 0.1
    assert (got - fetched).abs().mean() < 0.1 * fetched.std()


@pytest.mark.gpu
def test_no_step_waits_for_the_device(
    waiting_forbidden: Callable[[], AbstractContextManager[None]],
) -> None:
    model = awake(PAPER, "cuda")
    sampler = sampler_of(model, graphs="eager")
    _, bank = dreamt(sampler, chunks=1)
    engine = bank.engine
    assert isinstance(engine, Engine)
    noise = sampler.noise([1], range(T)).float()
    with waiting_forbidden():
        engine.velocity(bank, noise, 1.0, True)
