"""Kernels in CUDA C++ but those of Hopper, run by a CPU, against the definition."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from decmem.memory import PositionConfig, decoupled, layout
from decmem.memory import coding as definition
from decmem.memory.packing import Packing, spread
from decmem.memory.position import Position, make_position, seeing
from decmem.model import block
from decmem.ops import coding, coding_inference, selection
from decmem.ops.fp8 import fp8_rows
from decmem.ops.rotary import Rotation, rotate_pairs, rotation

pytest.importorskip("cuda.bindings", reason="cuda-bindings is for Linux and Windows")

from decmem.ops import coding_cuda_kernels, readers_cuda_kernels, selection_cuda_kernels
from decmem.ops.cuda_module import texts

from ..dreams import PAPER, awake, dreamt, sampler_of
from .cuda_on_cpu import KernelOnCpu
from .test_readers import SHAPES, assert_turned_round, lists_of

# Five slots of three tokens.
PACKING = Packing(torch.tensor([0, 1, 0, 2, 2]), torch.tensor([0, 1, 3]))


@pytest.fixture
def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_selection(device: torch.device, source: str, name: str) -> KernelOnCpu:
        return KernelOnCpu(source, name, tmp_path)

    def of_coding(
        name: str,
        device: torch.device,
        groups: tuple[int, ...],
        heads: int,
        tokens: int,
        **kinds: bool,
    ) -> KernelOnCpu:
        source = coding_cuda_kernels.source(list(groups), heads=heads, tokens=tokens, **kinds)
        return KernelOnCpu(source, name, tmp_path)

    def of_readers(device: torch.device) -> KernelOnCpu:
        return KernelOnCpu(texts("readers"), "turn_round", tmp_path)

    monkeypatch.setattr(readers_cuda_kernels, "_kernel", of_readers)
    monkeypatch.setattr(selection_cuda_kernels, "_kernel", of_selection)
    monkeypatch.setattr(coding_cuda_kernels, "_kernel", of_coding)
    for kernels in (selection_cuda_kernels._choosing, selection_cuda_kernels._scoring):
        kernels.cache_clear()
    monkeypatch.setattr(coding_cuda_kernels, "suits", lambda *asked: True)
    monkeypatch.setattr(coding_inference, "bare_kernels_serve", lambda x: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("worlds", "served", "H", "Nq", "Nk", "D", "rounds"),
    [
        (1, 1, 1, 9, 140, 72, 1),
        (1, 1, 1, 9, 140, 72, 2),
        (2, 2, 1, 3, 40, 16, 1),
        (1, 1, 3, 1, 1, 8, 1),
    ],
)
def test_scores(
    worlds: int, served: int, H: int, Nq: int, Nk: int, D: int, rounds: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    one_processor = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: one_processor)
    monkeypatch.setattr(selection_cuda_kernels, "_rounds", lambda parts, programs: rounds)
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


@pytest.mark.usefixtures("on_cpu")
def test_readers() -> None:
    for B, G, Nq, K, Nk in SHAPES:
        lists = lists_of(B, G, Nq, min(K, Nk), Nk)
        assert_turned_round(readers_cuda_kernels.run_inverse(lists, Nk), lists, Nk)


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
        (3, True, False, PositionConfig(camera=20, space=16, surface=12, time=24)),
    ],
)
def test_encoding(H: int, slotted: bool, packed: bool, config: PositionConfig) -> None:
    """15 heads of 72 are enough for programs of two tokens; 3 are not."""
    B, T, S, D = 2, 3, 5, config.head_dim
    position = position_of(config, B, T, S)
    packing = PACKING if packed else None
    N = 3 if packed else S
    qkv, gains = torch.randn(B, T, N, 3 * H * D).bfloat16(), torch.rand(2, H) + 0.5
    rooms = [torch.full((B, H, 6, S, D), 7.0).bfloat16() for _ in "kv"]
    slots = torch.tensor([4, 0, 3]) if slotted else None
    k, v = rooms if slotted else (room[:, :, :T] for room in rooms)
    told = definition._places(position, position.time)
    groups = coding.Groups(config.camera, config.space, config.surface, config.time)
    source = None if packing is None else packing.spread
    with torch.no_grad():
        q = coding_inference.encode_heads_into(qkv, gains, groups, told, k, v, slots, source)
    assert q is not None
    factor = D**-0.5 / coding_inference.EXPONENT_SCALE
    exact = definition.encode(config, position, qkv.float(), gains, packing=packing)
    where = torch.arange(T) if slots is None else slots
    for got, wanted in (
        (q, exact.q * factor), (k[:, :, where], exact.k), (v[:, :, where], exact.v),
    ):  # fmt: skip
        torch.testing.assert_close(got.float(), wanted, atol=1e-2, rtol=2.0**-7)
    others = [n for n in range(6) if n not in where.tolist()]
    assert all((room[:, :, others] == 7).all() for room in rooms)


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
    groups = coding.Groups(config.camera, config.space, config.surface, config.time)
    kept = torch.arange(S) if packing is None else packing.kept
    with torch.no_grad():
        out = coding.decode_heads(o, far, gate, groups, told, kept)
        rows = coding_inference.decode_head_rows(o, far, gate, groups, told, kept)
    assert rows is not None
    rounded = fp8_rows(out)
    torch.testing.assert_close(rows.scale, rounded.scale)
    # They may differ where two numbers of 8 bits are equally near.
    assert (rows.values.float() != rounded.values.float()).float().mean() < 0.01
    exact = definition.decode(config, position, o.float(), far.float(), gate.float(), packing)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2.0**-7)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("heads_last", [True, False])
def test_encoding_of_packed_tokens(heads_last: bool) -> None:
    """As inside latents: turned in space alone, values left as they are."""
    B, T, H, D, slots = 2, 3, 3, 24, len(PACKING.spread)
    qkv, gains = torch.randn(B, T, 3, 3 * H * D).bfloat16(), torch.rand(2, H) + 0.5
    turn = rotation(torch.randn(slots, D // 2))
    groups, places = coding.Groups(0, D, 0, 0), coding.Places(space=turn)
    with torch.no_grad():
        coded = coding.encode_heads(
            qkv, gains, groups, places, values=False, heads_last=heads_last,
            source=PACKING.spread, kept=PACKING.kept,
        )[:3]  # fmt: skip
    exact = definition.split_heads(qkv.float(), gains, D)
    back = Rotation(turn.cos, -turn.sin)
    for got, wanted, way in zip(coded, exact, (back, back, None), strict=True):
        assert got.shape == ((B, T, slots, H, D) if heads_last else (B, H, T, slots, D))
        wanted = spread(wanted, PACKING, 3)
        wanted = wanted if way is None else rotate_pairs(wanted, way)
        heads_first = got.movedim(3, 1) if heads_last else got
        torch.testing.assert_close(heads_first.float(), wanted, atol=1e-2, rtol=2.0**-7)


@pytest.mark.usefixtures("windows_in_the_bank", "on_cpu")
def test_a_roll_out_by_kernels_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, whose attention is stood in for: what the model hands to kernels, and
    what it does with what they return. In 16 bits a rounding may choose another block."""
    position = PositionConfig(camera=8, space=8, surface=12, time=4)
    config = dataclasses.replace(PAPER, width=64, position=position)
    model = awake(config)

    def dream(graphs: str) -> Tensor:
        sampler = sampler_of(model, 1, graphs=graphs, room=30)
        return dreamt(dataclasses.replace(sampler, dtype=torch.bfloat16), chunks=1)[0]

    with monkeypatch.context() as without:
        without.setattr(coding_inference, "coding_cuda_kernels", None)
        plain = dream("off")
    monkeypatch.setattr(coding, "kernels_serve", lambda x: True)
    monkeypatch.setattr(block, "hopper_serves_inside", lambda *asked: True)
    monkeypatch.setattr(layout, "tile_rows", lambda slots: 8)
    served = Counter()

    def count(owner: ModuleType, name: str) -> None:
        work = getattr(owner, name)

        def counted(*given: object, **more: object) -> object:
            served[name] += 1
            return work(*given, **more)

        monkeypatch.setattr(owner, name, counted)

    kernels = coding_cuda_kernels, coding_cuda_kernels, block, decoupled
    names = "run_encode", "run_decode", "attention_inside", "tiled_near_and_far"
    for owner, name in zip(kernels, names, strict=True):
        count(owner, name)
    got = dream("eager")
    assert set(served) == set(names)
    assert plain.std() > 0.1
    assert (got - plain).abs().mean() < 0.05 * plain.std()
