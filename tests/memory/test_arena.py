"""Storage: in fewer bits, within a limit, and staged at a place that only the device knows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.memory import Bank, PositionConfig, TokenLayout
from decmem.memory import arena as arena_module
from decmem.memory.arena import Desk
from decmem.memory.quantised import FP8, quantise, restore
from decmem.model import ModelConfig, WorldModel
from decmem.ops.selection import pool_blocks
from decmem.ops.window import Tiles

POSITION = PositionConfig(camera=8, space=8, time=4, surface=6)
LAYOUT = TokenLayout((3, 5))
LENS = torch.tensor([1.4, 2.1, 0.05, -0.1])
FORMATS = [torch.float32, torch.bfloat16, torch.float16, FP8]


def bank_of(dtype: torch.dtype, room: int = 4, limit: int | None = None) -> Bank:
    return Bank(2, 2, POSITION, LAYOUT, 2, torch.zeros(2, 3), dtype, room=room, limit=limit)


def tokens(latents: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, latents, LAYOUT.S, POSITION.head_dim, generator=generator)


def fill(bank: Bank, k: Tensor, v: Tensor, cameras: Tensor) -> None:
    for layer in bank.layers:
        layer.stage(k, v, LAYOUT)
    start, T = bank.length, k.shape[2]
    bank.commit(cameras, LENS.expand(2, T, 4), torch.arange(start, start + T))


def rounding(dtype: torch.dtype) -> float:
    return 2**-4 if dtype == FP8 else torch.finfo(dtype).eps


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_SEGMENT", 4)


def test_eight_bits_keep_every_token_to_a_sixteenth() -> None:
    sizes = torch.tensor([1e-6, 1e-2, 1.0, 3e4])
    x = tokens(1).flatten(0, 3)[:4] * sizes[:, None]
    got = restore(*quantise(x), torch.float32)
    largest = x.abs().amax(-1, keepdim=True)
    assert ((got - x).abs() <= x.abs() * 2**-4 + largest * 2**-9).all()
    assert not torch.equal(got, x)
    assert not restore(*quantise(torch.zeros(2, 8)), torch.float32).any()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_format_reads_what_was_written(dtype: torch.dtype, walk: Callable) -> None:
    bank, k = bank_of(dtype), tokens(7)
    for start, end in ((0, 2), (2, 7)):  # the arena grows on the way
        fill(bank, k[:, :, start:end], -k[:, :, start:end], walk(7)[:, start:end])
    for layer in bank.layers:
        for read, true in zip(layer.pool(7, torch.float32), (k, -k), strict=True):
            error = (read[:, :, :7] - true).abs().max() / true.abs().max()
            assert error <= rounding(dtype)
        pooled = pool_blocks(k.unflatten(3, (LAYOUT.M, LAYOUT.P)).flatten(2, 3), LAYOUT.valid)
        assert torch.equal(layer.pooled[:, :, : 7 * LAYOUT.M], pooled)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_rebasing_there_and_back_is_no_change(dtype: torch.dtype, walk: Callable) -> None:
    bank, k = bank_of(dtype), tokens(5)
    fill(bank, k, k, walk(5))
    bank.rebase(torch.full((2, 3), 0.5))
    moved = bank.layers[0].pool(5, torch.float32)[0][:, :, :5].clone()
    assert (moved - k).abs().max() > 0.05
    bank.rebase(torch.zeros(2, 3))
    for read in bank.layers[0].pool(5, torch.float32):
        error = (read[:, :, :5] - k).abs().max() / moved.abs().max()
        assert error <= max(4 * rounding(dtype), 1e-5)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_model_tells_the_bytes_that_are_allocated(dtype: torch.dtype) -> None:
    for size in ((64, 96), (48, 80)):  # exact and ragged
        config = ModelConfig(
            size=size, latent_channels=4, width=52, layers=2, time_width=16, position=POSITION
        )
        model = WorldModel(config)
        bank = model.new_bank(torch.zeros(3, 3), dtype, room=5)
        stored = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for layer in bank.layers
            for _, x in layer.arenas()
        }
        assert model.bytes_per_latent(dtype) == bank.bytes_per_latent
        assert bank.bytes_per_latent * 5 * 3 == bank.allocated_bytes == sum(stored.values())


def test_a_limit_stops_with_one_error_and_leaves_the_history(walk: Callable) -> None:
    bank, k = bank_of(torch.float32, room=2, limit=6), tokens(6)
    fill(bank, k[:, :, :3], k[:, :, :3], walk(6)[:, :3])
    fill(bank, k[:, :, 3:], k[:, :, 3:], walk(6)[:, 3:])
    assert bank.layers[0].room == 6
    with pytest.raises(UserError, match="7 latents, the bank was made for 6"):
        bank.layers[0].stage(k[:, :, :1], k[:, :, :1], LAYOUT)
    assert torch.equal(bank.layers[0].keys[:, :, :6], k)
    assert bank.fork().layers[0].limit == 6


def test_what_only_passes_through_does_not_count_against_the_limit(walk: Callable) -> None:
    bank, k = bank_of(torch.float32, room=8, limit=6), tokens(9)
    fill(bank, k[:, :, :4], k[:, :, :4], walk(9)[:, :4])
    layer = bank.layers[0]
    layer.stage(k[:, :, 4:], k[:, :, 4:], LAYOUT, passing=3)
    assert layer.room == 9
    assert torch.equal(layer.keys, k)
    # There is room for 8, but not for so much history.
    for refused in (
        lambda: layer.stage(k[:, :, :3], k[:, :, :3], LAYOUT),
        lambda: bank.reserve(9, passing=2),
    ):
        with pytest.raises(UserError, match="7 latents, the bank was made for 6"):
            refused()


def test_no_room_on_the_device_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("an allocator's page of figures")

    bank = bank_of(torch.float32)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match="no room on the device"):
        bank.reserve(1000)


def test_what_stores_no_keys_is_refused() -> None:
    with pytest.raises(UserError, match=r"torch\.int8 stores no keys"):
        bank_of(torch.int8)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_staging_at_a_desk_equals_staging_behind_the_length(
    dtype: torch.dtype, walk: Callable
) -> None:
    plain, other = bank_of(dtype, room=9), bank_of(dtype, room=9)
    past, k = tokens(5), tokens(2, 1)
    for bank in (plain, other):
        fill(bank, past, past, walk(5))
    M, shape = LAYOUT.M, (2, 2, 4, LAYOUT.S, POSITION.head_dim)
    layer = other.layers[0]
    layer.desk = Desk(
        torch.tensor([3, 4]),
        torch.tensor([5, 6]),
        torch.arange(5 * M, 7 * M),
        torch.zeros(shape),
        torch.zeros(shape),
    )
    for one in (plain.layers[0], layer):
        one.stage(k, -k, LAYOUT)
    for (name, a), (_, b) in zip(plain.layers[0].arenas(), layer.arenas(), strict=True):
        known = 7 * (M if name == "pooled" else 1)
        assert torch.equal(a[:, :, :known].float(), b[:, :, :known].float()), name
    read = plain.layers[0].pool(7, torch.float32)
    for desk, arena in zip((layer.desk.keys, layer.desk.values), read, strict=True):
        assert torch.equal(desk, arena[:, :, 3:7])


def test_what_was_computed_in_the_arena_stays_there(walk: Callable) -> None:
    plain, other = bank_of(torch.float32, room=9), bank_of(torch.float32, room=9)
    past, k = tokens(5), tokens(2, 1)
    for bank in (plain, other):
        fill(bank, past, past, walk(5))
    M, layer = LAYOUT.M, other.layers[0]
    nothing, slots = torch.zeros(2, 2, 0, LAYOUT.S, POSITION.head_dim), torch.tensor([5, 6])
    blocks, lists = torch.arange(5 * M, 7 * M), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    layer.desk = Desk(torch.tensor([3, 4]), slots, blocks, nothing, nothing, Tiles(lists, None))
    keys, values, where = layer.place_of_own() or (None, None, None)
    assert keys is layer.keys
    assert values is layer.values
    assert where is slots
    layer.keys[:, :, 5:7], layer.values[:, :, 5:7] = k, -k
    layer.stage(layer.keys, layer.values, LAYOUT)
    plain.layers[0].stage(k, -k, LAYOUT)
    for (name, a), (_, b) in zip(plain.layers[0].arenas(), layer.arenas(), strict=True):
        known = 7 * (M if name == "pooled" else 1)
        torch.testing.assert_close(a[:, :, :known], b[:, :, :known], msg=name)


def test_what_nobody_retrieves_stays_at_the_desk(walk: Callable) -> None:
    bank, k = bank_of(torch.float32, room=5), tokens(2, 1)
    past = tokens(5)
    fill(bank, past, past, walk(5))
    layer, shape = bank.layers[0], (2, 2, 4, LAYOUT.S, POSITION.head_dim)
    near = torch.tensor([3, 4])
    desk = layer.desk = Desk(near, None, None, torch.zeros(shape), torch.zeros(shape))
    layer.stage(k, -k, LAYOUT)
    assert torch.equal(layer.keys, past)
    assert torch.equal(desk.keys[:, :, 2:], k)
    assert torch.equal(desk.values[:, :, 2:], -k)
