"""Worlds dreamt together: company changes nothing, whatever the lengths of their histories."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.engine import Engine
from decmem.errors import UserError
from decmem.memory import Bank
from decmem.memory.quantised import FP8
from decmem.memory.stable import Stable
from decmem.model import Conditions, WorldModel
from decmem.sampler import Chunk, Sampler

from .dreams import CONFIGS, RETRIEVALS, T, awake, sampler_of, way

LENGTHS = (6, 9, 7)
ROOM = 14


@pytest.fixture(scope="module")
def model() -> Callable[[str], WorldModel]:
    made = {name: awake(config) for name, config in CONFIGS.items()}
    return made.__getitem__


def steering(sampler: Sampler, world: int) -> Conditions:
    """A way of its own for every world."""
    worlds = way(sampler.model.config, ROOM, sampler.device, worlds=8)
    one = Conditions(
        worlds.actions[world : world + 1],
        worlds.world_to_camera[:1].clone(),
        worlds.lens[:1],
        worlds.time,
    )
    one.world_to_camera[..., 0, 3] += world
    return one


@torch.no_grad()
def remembering(sampler: Sampler, bank: Bank, world: int, length: int) -> Bank:
    """The bank of a world after so many random latents."""
    known = sampler.noise([50 + world], range(length))
    sampler.write(bank, known, steering(sampler, world)[:length])
    return bank


def anchor_of(world: int) -> Tensor:
    return torch.tensor([[0.5 * world, 0.0, -1.0]])


def chunk_behind(sampler: Sampler, bank: Bank, world: int, latents: int = T) -> Chunk:
    part = slice(bank.length, bank.length + latents)
    noise = sampler.noise([world], range(part.start, part.stop))
    return Chunk(bank, steering(sampler, world)[part], noise)


def stalled(sampler: Sampler, stable: Stable, lengths: tuple[int, ...] = LENGTHS) -> list[Bank]:
    return [
        remembering(sampler, stable.new_bank(anchor_of(i), ROOM), i, length)
        for i, length in enumerate(lengths)
    ]


@torch.no_grad()
def alone(sampler: Sampler, lengths: tuple[int, ...] = LENGTHS, chunks: int = 1) -> list[Tensor]:
    """The last of so many chunks of every world, each computed the plain way in a bank of its
    own."""
    plain = dataclasses.replace(sampler, running=dataclasses.replace(sampler.running, graphs="off"))
    made = []
    for i, length in enumerate(lengths):
        bank = remembering(plain, plain.new_bank(anchor_of(i)), i, length)
        for _ in range(chunks):
            chunk = chunk_behind(plain, bank, i)
            last = plain.generate(*chunk)
            plain.write(bank, last, chunk.conditions)
        made.append(last)
    return made


def two_together(
    sampler: Sampler, passes: list[int] | None = None
) -> tuple[Stable, list[Tensor], list[list[int]]]:
    """Two chunks of every world, generated and written together: the stable, the second chunks, and
    of `passes` those of each writing."""
    stable = sampler.new_stable(3 * (ROOM + sampler.model.config.chunk))
    banks, passes, writing = stalled(sampler, stable), [] if passes is None else passes, []
    for _ in range(2):
        chunks = [chunk_behind(sampler, bank, i) for i, bank in enumerate(banks)]
        got = sampler.generate_together(stable, chunks)
        clean = [one._replace(latents=latents) for one, latents in zip(chunks, got, strict=True)]
        passes.clear()
        sampler.write_together(stable, clean)
        writing.append(list(passes))
    return stable, got, writing


def assert_alike(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.std() > 0.1
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Latents of every pass of a model."""
    seen: list[int] = []
    forward = WorldModel.forward

    def counted(model: WorldModel, latents: Tensor, *rest: object) -> Tensor:
        seen.append(latents.shape[1])
        return forward(model, latents, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(WorldModel, "forward", counted)
    return seen


@pytest.mark.parametrize("options", RETRIEVALS, ids=str)
@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_company_changes_nothing(
    name: str,
    guidance: float | None,
    options: dict,
    model: Callable[[str], WorldModel],
    passes: list[int],
) -> None:
    sampler = sampler_of(model(name), guidance=guidance, graphs="eager", **options)
    stable, got, writing = two_together(sampler, passes)
    assert writing == [[4 * T]] * 2
    assert list(stable.engines) == [4]
    assert_alike(got, alone(sampler, chunks=2))


@pytest.mark.usefixtures("windows_in_the_bank")
@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("name", ["paper", "window"])
def test_windows_of_company_may_be_read_in_the_bank(
    name: str, guidance: float | None, model: Callable[[str], WorldModel]
) -> None:
    sampler = sampler_of(model(name), guidance=guidance, graphs="eager")
    stable, got, _ = two_together(sampler)
    (engine,) = stable.engines.values()
    assert isinstance(engine, Engine)
    assert engine.desk.tiles is not None
    assert_alike(got, alone(sampler, chunks=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_company_in_a_bank_of_fewer_bits(
    dtype: torch.dtype, model: Callable[[str], WorldModel]
) -> None:
    sampler = sampler_of(model("paper"), graphs="eager", bank_dtype=dtype)
    stable = sampler.new_stable(60)
    banks = stalled(sampler, stable)
    got = sampler.generate_together(
        stable, [chunk_behind(sampler, bank, i) for i, bank in enumerate(banks)]
    )
    assert stable.whole.dtype == dtype
    for mine, theirs in zip(got, alone(sampler), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("worlds", [1, 2, 5])
def test_one_pass_a_step_serves_all(
    worlds: int, model: Callable[[str], WorldModel], passes: list[int]
) -> None:
    sampler = sampler_of(model("pocket"), graphs="eager")
    stable = sampler.new_stable(5 * (ROOM + 4))
    banks = stalled(sampler, stable, (6, 8, 7, 9, 6)[:worlds])
    passes.clear()
    sampler.generate_together(
        stable, [chunk_behind(sampler, bank, i) for i, bank in enumerate(banks)]
    )
    rows = {1: 1, 2: 2, 5: 8}[worlds]
    assert passes == [rows * 2 * T] * 3


def test_one_engine_serves_whoever_comes(model: Callable[[str], WorldModel]) -> None:
    sampler = sampler_of(model("paper"), graphs="eager")
    stable = sampler.new_stable(60)
    banks = stalled(sampler, stable)
    expected = alone(sampler)
    engines = []
    for pair in ((0, 1), (2, 0), (1, 2)):
        got = sampler.generate_together(stable, [chunk_behind(sampler, banks[i], i) for i in pair])
        assert_alike(got, [expected[i] for i in pair])
        engines.append(stable.engines[2])
    assert engines[0] is engines[1] is engines[2]


def test_who_cannot_join_goes_alone(model: Callable[[str], WorldModel], passes: list[int]) -> None:
    sampler = sampler_of(model("paper"), graphs="eager")
    stable = sampler.new_stable(100)
    lengths = (6, 2, 7, 6, 9)
    banks = stalled(sampler, stable, lengths)
    banks[3] = banks[3].fork()
    chunks = [chunk_behind(sampler, bank, i) for i, bank in enumerate(banks)]
    chunks[2] = chunk_behind(sampler, banks[2], 2, latents=1)
    passes.clear()
    got = sampler.generate_together(stable, chunks)
    # A history too short, a chunk of another size, a fork; and the two that are left.
    assert passes == [2 * T] * 3 + [2] * 3 + [2 * T] * 3 + [4 * T] * 3
    assert got[2].shape[1] == 1
    expected = alone(sampler, lengths)
    del got[2], expected[2]
    assert_alike(got, expected)


def test_a_full_history_is_told_before_anything_is_computed(
    model: Callable[[str], WorldModel], passes: list[int]
) -> None:
    sampler = sampler_of(model("paper"), graphs="eager")
    stable = sampler.new_stable(100)
    banks = stalled(sampler, stable, (6, ROOM, 8))
    known = way(sampler.model.config, ROOM + T, sampler.device)[ROOM:]
    chunks = [chunk_behind(sampler, banks[i], i) for i in (0, 2)]
    chunks.append(Chunk(banks[1], known, sampler.noise([1], range(T))))
    passes.clear()
    for together in (sampler.generate_together, sampler.write_together):
        with pytest.raises(UserError, match=f"the bank was made for {ROOM}"):
            together(stable, chunks)
    assert not passes


def test_without_an_engine_worlds_take_turns(
    model: Callable[[str], WorldModel], passes: list[int]
) -> None:
    sampler = sampler_of(model("pocket"), graphs="off")
    stable = sampler.new_stable(60)
    banks = stalled(sampler, stable)
    passes.clear()
    got = sampler.generate_together(
        stable, [chunk_behind(sampler, bank, i) for i, bank in enumerate(banks)]
    )
    assert passes == [2 * T] * 9
    assert_alike(got, alone(sampler))
    passes.clear()
    for bank, i in zip(banks, range(3), strict=True):
        bank.truncate(LENGTHS[i])
    chunks = [chunk_behind(sampler, bank, i) for i, bank in enumerate(banks)]
    sampler.write_together(stable, chunks)
    assert passes == [T] * 3
    assert [bank.length for bank in banks] == [length + T for length in LENGTHS]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"retrieve_until": 1, "share_lists": True}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_company_replays_graphs(name: str, options: dict) -> None:
    sampler = sampler_of(awake(CONFIGS[name], "cuda"), **options)
    eager = dataclasses.replace(
        sampler, running=dataclasses.replace(sampler.running, graphs="eager")
    )
    made = []
    for one in (sampler, eager):
        stable = one.new_stable(60)
        banks = stalled(one, stable)
        chunks = [chunk_behind(one, bank, i) for i, bank in enumerate(banks)]
        # Three rows and two, by turns: their graphs share memory.
        dreams = [one.generate_together(stable, part) for part in (chunks, chunks[1:], chunks)]
        clean = [one._replace(latents=x) for one, x in zip(chunks, dreams[0], strict=True)]
        one.write_together(stable, clean)
        chunks = [chunk_behind(one, bank, i) for i, bank in enumerate(banks)]
        made.append([*dreams, one.generate_together(stable, chunks)])
    for got, expected in zip(*made, strict=True):
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)
    for mine, theirs in zip(made[0][0], alone(sampler), strict=True):
        # In 16 bits a rounding may choose another block.
        assert (mine - theirs).abs().mean() < 0.2 * theirs.std()
