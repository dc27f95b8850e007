"""Kernels in CUDA C++ that need no tensor cores, run by a CPU, against the definition."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from decmem.memory import PositionConfig
from decmem.memory import coding as definition
from decmem.memory.packing import Packing
from decmem.memory.position import Position, make_position, seeing
from decmem.ops import selection
from decmem.ops.coding import fp32_table, turn_tables

pytest.importorskip("cuda.bindings", reason="cuda-bindings is for Linux and Windows")

from decmem.ops import coding_cuda_kernels, selection_cuda_kernels

from .cuda_on_cpu import KernelOnCpu

# Five slots of three tokens.
PACKING = Packing(torch.tensor([0, 1, 0, 2, 2]), torch.tensor([0, 1, 3]))


@pytest.fixture
def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_selection(device: torch.device, source: str, name: str) -> KernelOnCpu:
        return KernelOnCpu(source, name, tmp_path)

    def of_coding(
        name: str, device: torch.device, groups: tuple[int, ...], tokens: int, **kinds: bool
    ) -> KernelOnCpu:
        source = coding_cuda_kernels.source(list(groups), tokens=tokens, **kinds)
        return KernelOnCpu(source, name, tmp_path)

    monkeypatch.setattr(selection_cuda_kernels, "_kernel", of_selection)
    monkeypatch.setattr(coding_cuda_kernels, "_kernel", of_coding)
    for kept in (selection_cuda_kernels._choosing, selection_cuda_kernels._scoring):
        kept.cache_clear()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("worlds", "served", "H", "Nq", "Nk", "D"),
    [(1, 1, 2, 24, 300, 72), (2, 2, 1, 5, 129, 64), (1, 1, 3, 1, 1, 8)],
)
def test_scores(worlds: int, served: int, H: int, Nq: int, Nk: int, D: int) -> None:
    q, room = torch.randn(worlds * served, H, Nq, D), torch.randn(worlds, H, Nk + 3, D)
    k = room[:, :, :Nk]
    got = selection_cuda_kernels.run_score(q, k)
    expected = selection.block_scores(q, k.repeat_interleave(served, 0), per_head=True)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def scores_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    scores = torch.randn(shape)
    if kind == "ties":
        return scores.round()
    if kind == "zeros":
        return torch.where(scores < 0, 0.0, -0.0)
    return torch.full(shape, 1.5) if kind == "equal" else scores


@pytest.mark.usefixtures("on_cpu")
def test_choice() -> None:
    for kind, N, count, share in (
        ("all", 5000, 80, 0.7), ("ties", 300, 80, 0.7), ("zeros", 2049, 7, 0.7),
        ("equal", 4096, 33, 0.9), ("few", 2500, 100, 0.02), ("short", 50, 80, 0.7),
    ):  # fmt: skip
        scores, seen = scores_of(kind, (2, 2, 1, N)), torch.rand(2, 1, N) < share
        out = torch.empty(2, 2, 1, min(count, N), dtype=torch.int32)
        selection_cuda_kernels.run_choose(scores, seen.view(torch.uint8), out)
        expected = selection._ranked_choice(scores, seen[:, None].expand_as(scores), count)
        assert torch.equal(out, expected), kind


def position_of(config: PositionConfig, B: int, T: int, S: int) -> Position:
    coordinates = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), -1)
    lens = torch.tensor([1.4, 2.1, 0.0, 0.0]).expand(B, T, 4)
    places = coordinates.flatten(0, 1)[:S]
    cameras = torch.eye(4).repeat(B, T, 1, 1)
    cameras[..., :3, :3] = torch.linalg.qr(torch.randn(B, T, 3, 3)).Q
    cameras[..., :3, 3] = torch.randn(B, T, 3)
    position = make_position(config, cameras, lens, torch.arange(T) + 5, places, (2, 3))
    if config.surface:
        seen = torch.randn(B, T, S, 2) * 0.5 + torch.tensor([1.5, -1.0])
        position = seeing(config, position, seen)
    return position


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("H", "slotted", "packed", "config"),
    [
        (15, True, True, PositionConfig(camera=24, space=24, time=24)),
        (3, False, False, PositionConfig(camera=24, space=24, time=24)),
        (3, True, True, PositionConfig(camera=24, space=16, surface=12, time=20)),
    ],
)
def test_encoding(H: int, slotted: bool, packed: bool, config: PositionConfig) -> None:
    """15 heads of 72 are enough for programs of two tokens; 3 are not."""
    B, T, S, D, factor = 2, 3, 5, config.head_dim, 1.5
    position = position_of(config, B, T, S)
    packing = PACKING if packed else None
    N = 3 if packed else S
    qkv, gains = torch.randn(B, T, N, 3 * H * D).bfloat16(), torch.rand(2, H) + 0.5
    k, v = (torch.full((B, H, 6, S, D), 7.0).bfloat16() for _ in "kv")
    slots = torch.tensor([4, 0, 3]) if slotted else None
    q, unused = torch.empty(B, H, T, S, D).bfloat16(), torch.empty(0)
    told = definition._places(position, position.time)
    tables = (
        fp32_table(told.query_matrix), fp32_table(told.key_matrix), *turn_tables(told.space),
        *turn_tables(told.surface), *turn_tables(told.time),
    )  # fmt: skip
    groups = [config.camera, config.space, config.surface, config.time]
    coding_cuda_kernels.run_encode(
        qkv, gains, tables, [q, k, v, unused, unused], groups, 1e-6, local=False, values=True,
        heads_last=False, latents=6, slots=slots, query_factor=factor,
        source=None if packing is None else packing.spread,
    )  # fmt: skip
    exact = definition.encode(config, position, qkv.float(), gains, packing=packing)
    where = torch.arange(T) if slots is None else slots
    for got, wanted in (
        (q, exact.q * factor), (k[:, :, where], exact.k), (v[:, :, where], exact.v),
    ):  # fmt: skip
        torch.testing.assert_close(got.float(), wanted, atol=1e-2, rtol=2.0**-7)
    others = [n for n in range(6) if n not in where.tolist()]
    assert (k[:, :, others] == 7).all()
    assert (v[:, :, others] == 7).all()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_decoding(per_head: bool, packed: bool) -> None:
    config = PositionConfig(camera=24, space=24, time=24)
    B, H, T, S, D = 1, 3, 3, 5, config.head_dim
    position = position_of(config, B, T, S)
    o, far = (torch.randn(B, H, T, S, D).bfloat16() for _ in "of")
    packing = PACKING if packed else None
    N = 3 if packed else S
    gate = torch.randn(B, T, N, H if per_head else H * D).bfloat16()
    told = definition._places(position, None)
    out = torch.empty(B, T, N, H * D).bfloat16()
    groups = [config.camera, config.space, config.surface, config.time]
    tables = fp32_table(told.query_matrix), *turn_tables(told.space), *turn_tables(told.surface)
    kept = None if packing is None else packing.kept
    coding_cuda_kernels.run_decode(o, far, gate, tables, groups, out, kept=kept)
    exact = definition.decode(config, position, o.float(), far.float(), gate.float(), packing)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2.0**-7)
