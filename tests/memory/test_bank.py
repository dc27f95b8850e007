"""The bank: what is staged is overwritten, what is committed stays, wherever the anchor lies."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decmem.memory import Bank, PositionConfig, TokenLayout
from decmem.memory import arena as arena_module
from decmem.memory.position import decode_output, encode_key, encode_query, make_position
from decmem.ops.selection import pool_blocks

POSITION = PositionConfig(camera=8, space=8, time=4, space_base=100.0, time_base=100.0)
EXACT, RAGGED = TokenLayout((4, 6)), TokenLayout((3, 5))
LENS = torch.tensor([1.4, 2.1, 0.05, -0.1])


def new_bank(layout: TokenLayout = EXACT, room: int = 2, position: PositionConfig = POSITION):
    return Bank(2, 2, position, layout, 2, torch.zeros(2, 3), room=room)


def tokens(latents: int, seed: int, layout: TokenLayout = EXACT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, latents, layout.S, POSITION.head_dim, generator=generator)


def fill(bank: Bank, k: Tensor, v: Tensor, cameras: Tensor) -> None:
    """The same keys and values into all layers, as history."""
    for layer in bank.layers:
        layer.stage(k, v, bank.layout)
    start, T = bank.length, k.shape[2]
    bank.commit(cameras, LENS.expand(2, T, 4), torch.arange(start, start + T))


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_SEGMENT", 4)


def test_staged_chunks_overwrite_each_other_until_committed(walk: Callable[..., Tensor]) -> None:
    bank, cameras = new_bank(), walk(3)
    first, second = tokens(1, 0), tokens(1, 1)
    bank.layers[0].stage(first, first, EXACT)
    assert bank.length == 0
    fill(bank, second, -second, cameras[:, :1])
    assert bank.length == 1
    assert torch.equal(bank.layers[0].keys[:, :, :1], second)
    fill(bank, first, first, cameras[:, 1:2])
    assert torch.equal(bank.layers[0].keys[:, :, :2], torch.cat((second, first), 2))
    assert torch.equal(bank.layers[1].values[:, :, :1], -second)
    assert torch.equal(bank.world_to_camera, cameras[:, :2])
    assert bank.time.tolist() == [0, 1]


@pytest.mark.parametrize("layout", [EXACT, RAGGED], ids=["exact", "ragged"])
def test_pooled_keys_are_the_means_of_the_keys(
    layout: TokenLayout, walk: Callable[..., Tensor]
) -> None:
    bank, k = new_bank(layout), tokens(3, 0, layout)
    fill(bank, k, k, walk(3))
    pooled = pool_blocks(k.unflatten(3, (layout.M, layout.P)).flatten(2, 3), layout.valid)
    assert torch.equal(bank.layers[0].pooled[:, :, : 3 * layout.M], pooled)


def test_growing_keeps_the_history(walk: Callable[..., Tensor]) -> None:
    small, large = new_bank(room=1), new_bank(room=20)
    cameras = walk(11)
    for start, end in ((0, 1), (1, 3), (3, 4), (4, 11)):
        for bank in (small, large):
            part = tokens(11, 0)[:, :, start:end]
            fill(bank, part, part.neg(), cameras[:, start:end])
    assert small.layers[0].room == 12
    assert large.layers[0].room == 20
    for one, other in zip(small.layers, large.layers, strict=True):
        assert torch.equal(one.keys[:, :, :11], other.keys[:, :, :11])
        assert torch.equal(one.values[:, :, :11], other.values[:, :, :11])
        assert torch.equal(one.pooled[:, :, : 11 * 6], other.pooled[:, :, : 11 * 6])
        assert one.pooled.shape[2] == 12 * 6


def test_on_a_cpu_the_heads_of_a_token_lie_side_by_side(walk: Callable[..., Tensor]) -> None:
    bank, k = new_bank(room=4), tokens(7, 0)
    fill(bank, k, k, walk(7))  # the arena grew
    for one in (bank, bank.fork()):
        for arena in (one.layers[0].keys, one.layers[0].values):
            assert arena.movedim(1, 3).is_contiguous()
        assert one.layers[0].pooled.movedim(1, 2).is_contiguous()


def test_growing_keeps_what_the_chunk_at_work_staged_in_other_layers(
    walk: Callable[..., Tensor],
) -> None:
    bank, k = new_bank(room=4), tokens(4, 0)
    fill(bank, k, k, walk(4))
    later = tokens(2, 1)
    for layer in bank.layers:
        layer.stage(later, later, EXACT)
        assert torch.equal(layer.keys[:, :, 4:6], later)


def test_truncating_forgets_the_end(walk: Callable[..., Tensor]) -> None:
    bank, k, cameras = new_bank(), tokens(5, 0), walk(5)
    fill(bank, k, k, cameras)
    bank.truncate(2)
    assert (bank.length, bank.time.tolist()) == (2, [0, 1])
    fill(bank, tokens(1, 1), k[:, :, :1], cameras[:, 4:])
    assert torch.equal(bank.layers[0].keys[:, :, :3], torch.cat((k[:, :, :2], tokens(1, 1)), 2))
    assert torch.equal(bank.world_to_camera, cameras[:, [0, 1, 4]])
    assert bank.lens.shape == (2, 3, 4)


def test_a_fork_lives_on_its_own(walk: Callable[..., Tensor]) -> None:
    bank, k, cameras = new_bank(), tokens(3, 0), walk(4)
    fill(bank, k, k, cameras[:, :3])
    twin = bank.fork()
    fill(twin, tokens(1, 1), tokens(1, 1), cameras[:, 3:])
    twin.rebase(torch.ones(2, 3))
    assert (bank.length, twin.length) == (3, 4)
    assert torch.equal(bank.layers[0].keys[:, :, :3], k)
    assert not bank.anchor.any()
    bank.truncate(1)
    assert twin.length == 4


def read(bank: Bank, cameras: Tensor, q: Tensor) -> Tensor:
    """Attention of queries seen through these cameras over the whole history, decoded."""
    at = make_position(
        bank.position,
        bank.relative(cameras),
        LENS.expand(2, cameras.shape[1], 4),
        torch.zeros(cameras.shape[1], dtype=torch.long),
        bank.layout.coordinates,
        bank.layout.grid,
    )
    keys, values = (x[:, :, : bank.length] for x in (bank.layers[0].keys, bank.layers[0].values))
    q = encode_query(bank.position, at, q)
    out = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, keys, values)))
    return decode_output(bank.position, at, out.view_as(q))


def encoded(bank: Bank, x: Tensor, cameras: Tensor) -> Tensor:
    T = cameras.shape[1]
    at = make_position(
        bank.position,
        bank.relative(cameras),
        LENS.expand(2, T, 4),
        torch.arange(T),
        bank.layout.coordinates,
        bank.layout.grid,
    )
    return encode_key(bank.position, at, x)


@pytest.mark.parametrize("layout", [EXACT, RAGGED], ids=["exact", "ragged"])
def test_rebasing_moves_numbers_but_no_reading(
    layout: TokenLayout, walk: Callable[..., Tensor]
) -> None:
    bank, cameras = new_bank(layout), walk(7, at=(30.0, 10.0, -20.0))
    bank.anchor = torch.tensor([[28.0, 9.0, -21.0], [31.0, 12.0, -22.0]], dtype=torch.float64)
    k, v = (encoded(bank, tokens(6, seed, layout), cameras[:, :6]) for seed in (0, 1))
    fill(bank, k, v, cameras[:, :6])
    q, here = tokens(1, 2, layout), cameras[:, 6:]
    before, moved = read(bank, here, q), bank.fork()
    moved.rebase(torch.tensor([[33.0, 10.0, -19.0], [29.0, 8.0, -24.0]]))
    torch.testing.assert_close(read(moved, here, q), before, atol=1e-4, rtol=1e-4)
    new, old = moved.layers[1], bank.layers[1]
    for name in ("keys", "values", "pooled"):
        assert (getattr(new, name) - getattr(old, name))[:, :, :6].abs().max() > 0.1
    pooled = pool_blocks(new.keys[:, :, :6].unflatten(3, (6, -1)).flatten(2, 3), layout.valid)
    torch.testing.assert_close(new.pooled[:, :, :36], pooled, atol=1e-5, rtol=1e-5)


def test_rebasing_equals_writing_in_the_new_frame(walk: Callable[..., Tensor]) -> None:
    # Also where the reach draws cameras in, at the old anchor and at the new one.
    position = PositionConfig(camera=8, space=8, time=4, space_base=100.0, reach=1.0)
    cameras, anchor = walk(6), torch.full((2, 3), 1.5)
    old, new = (new_bank(position=position) for _ in range(2))
    new.anchor = anchor.double()
    for bank in (old, new):
        k, v = (encoded(bank, tokens(6, seed), cameras) for seed in (0, 1))
        fill(bank, k, v, cameras)
    old.rebase(anchor)
    for name in ("keys", "values", "pooled"):
        got, want = (getattr(bank.layers[0], name)[:, :, :6] for bank in (old, new))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_rebasing_gives_the_same_with_gradients_on_and_off(walk: Callable[..., Tensor]) -> None:
    position = PositionConfig(camera=12, space=4, time=4)
    one, cameras = new_bank(position=position), walk(6)
    fill(one, tokens(6, 0), tokens(6, 1), cameras)
    other = one.fork()
    for bank, traced in ((one, True), (other, False)):
        with torch.set_grad_enabled(traced):
            bank.rebase(torch.full((2, 3), 1.5))
    for name in ("keys", "values", "pooled"):
        got, want = (getattr(bank.layers[0], name)[:, :, :6] for bank in (one, other))
        assert torch.equal(got, want)


def test_relative_cameras_lie_where_the_anchor_says(walk: Callable[..., Tensor]) -> None:
    bank = new_bank()
    bank.anchor = torch.tensor([[5.0, 6.0, 7.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    moved, plain = bank.relative(walk(3, at=(5.0, 6.0, 7.0))), walk(3).float()
    torch.testing.assert_close(moved[0], plain[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(moved[1], plain[1], atol=0.1)


def test_swapping_gives_each_world_the_others_far_history(walk: Callable[..., Tensor]) -> None:
    bank, k = new_bank(), tokens(5, 0)
    fill(bank, k, 2 * k, walk(5))
    bank.swap_history(torch.tensor([1, 0]), keep_last=2)
    layer = bank.layers[1]
    for stored, factor in ((layer.keys, 1), (layer.values, 2)):
        assert torch.equal(stored[:, :, :3], factor * k[:, :, :3].flip(0))
        assert torch.equal(stored[:, :, 3:5], factor * k[:, :, 3:])
    pooled = pool_blocks(layer.keys[:, :, :5].unflatten(3, (6, -1)).flatten(2, 3))
    assert torch.equal(layer.pooled[:, :, :30], pooled)


def test_swapped_history_follows_the_anchor(walk: Callable[..., Tensor]) -> None:
    # Each world keeps its place relative to the reader's anchor: rebasing both is no change.
    bank, cameras = new_bank(), walk(5)
    bank.anchor = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -2.0]], dtype=torch.float64)
    k, v = (encoded(bank, tokens(5, seed), cameras) for seed in (0, 1))
    fill(bank, k, v, cameras)
    bank.swap_history(torch.tensor([1, 0]), keep_last=1)
    q, here = tokens(1, 2), cameras[:, 4:]
    before = read(bank, here, q)
    bank.rebase(bank.anchor + 3.0)
    torch.testing.assert_close(read(bank, here, q), before, atol=1e-4, rtol=1e-4)


def test_bytes_per_latent_count_the_arena() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        bank = Bank(3, 2, POSITION, EXACT, 2, torch.zeros(2, 3), dtype=dtype, room=8)
        stored = sum(
            x.numel() * x.element_size()
            for layer in bank.layers
            for x in (layer.keys, layer.values, layer.pooled)
        )
        assert bank.bytes_per_latent == stored / 8 / 2
