"""The decoupled memory and its rivals on one pass of one layer."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.memory import (
    DecoupledMemory,
    Memory,
    MemoryConfig,
    PositionConfig,
    Reach,
    Reading,
    Recall,
    TokenLayout,
    WindowMemory,
    coding,
    training_plan,
)
from decmem.memory.packing import Packing, spread

POSITION = PositionConfig(camera=8, space=8, time=4, space_base=100.0, time_base=100.0)
TIMELESS = dataclasses.replace(POSITION, global_time=False)
EXACT, RAGGED = TokenLayout((4, 6)), TokenLayout((3, 5))
WIDTH = 2 * POSITION.head_dim
T = 8
every_layout = pytest.mark.parametrize("layout", [EXACT, RAGGED], ids=["exact", "ragged"])


def config(reach: Reach, retrieved: int = 3, **settings: bool) -> MemoryConfig:
    return MemoryConfig(reach, retrieved, **settings)


SHORT = Reach(window=2)
ENDLESS = Reach(window=None, own_candidates=True)


def open_gate(memory: Memory, openness: float) -> Memory:
    """Lets the global branch through for +100, shuts it off for -100."""
    assert isinstance(memory, DecoupledMemory)
    with torch.no_grad():
        memory.gate.weight.zero_()
        memory.gate.bias.fill_(openness)
    return memory


@every_layout
@pytest.mark.parametrize("position", [POSITION, TIMELESS], ids=["global-time", "timeless"])
def test_a_closed_gate_is_the_window_alone(
    layout: TokenLayout,
    position: PositionConfig,
    reading: Callable[..., Reading],
    wake: Callable[..., Memory],
) -> None:
    it = reading(position, layout, training_plan(SHORT, 4, 2), T)
    memory = wake(DecoupledMemory(config(SHORT), position, layout, WIDTH))
    window = WindowMemory(config(SHORT), position, layout, WIDTH)(it)
    switched_off = memory(dataclasses.replace(it, recall=Recall(global_memory=False)))
    assert torch.equal(switched_off, window)
    assert (memory(it) - window).abs().max() > 0.1
    assert torch.equal(open_gate(memory, -200.0)(it), window)


@every_layout
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
def test_retrieving_everything_is_dense_attention(
    layout: TokenLayout,
    per_head: bool,
    reading: Callable[..., Reading],
    wake: Callable[..., Memory],
) -> None:
    it = reading(POSITION, layout, training_plan(ENDLESS, 4, 2), T)
    blocks = T * layout.M

    def global_branch(retrieved: int) -> Tensor:
        settings = config(ENDLESS, retrieved, per_head=per_head)
        memory = open_gate(DecoupledMemory(settings, POSITION, layout, WIDTH), 200.0)
        local = memory(dataclasses.replace(it, recall=Recall(global_memory=False)))
        return memory(it) - local

    dense = WindowMemory(config(ENDLESS), POSITION, layout, WIDTH)(it)
    torch.testing.assert_close(global_branch(blocks), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(global_branch(2 * blocks), dense, atol=1e-5, rtol=1e-5)
    assert (global_branch(2) - dense).abs().max() > 0.1


@pytest.mark.parametrize("gate_per_head", [False, True], ids=["per-channel", "per-head"])
def test_fusion_is_equation_3(
    gate_per_head: bool, reading: Callable[..., Reading], wake: Callable[..., Memory]
) -> None:
    it = reading(POSITION, EXACT, training_plan(SHORT, 4, 2), T)
    settings = config(SHORT, gate_per_head=gate_per_head)
    memory = wake(DecoupledMemory(settings, POSITION, EXACT, WIDTH))
    assert isinstance(memory, DecoupledMemory)
    o_alm = memory(dataclasses.replace(it, recall=Recall(global_memory=False)))
    gate = torch.sigmoid(it.features @ memory.gate.weight.T + memory.gate.bias)
    if gate_per_head:
        gate = gate.repeat_interleave(POSITION.head_dim, dim=-1)
    fused = memory(it)
    o_sgm = open_gate(memory, 200.0)(it) - o_alm
    torch.testing.assert_close(fused, o_alm + gate * o_sgm, atol=1e-5, rtol=1e-5)


def test_a_reader_may_ask_for_another_k(reading: Callable[..., Reading]) -> None:
    it = reading(POSITION, EXACT, training_plan(SHORT, 4, 2), T)
    few, many = (
        open_gate(DecoupledMemory(config(SHORT, k), POSITION, EXACT, WIDTH), 0.0) for k in (2, 7)
    )
    asked = few(dataclasses.replace(it, recall=Recall(retrieved=7)))
    assert torch.equal(asked, many(it))
    assert not torch.equal(few(it), many(it))


def test_what_lies_in_padding_changes_nothing(
    reading: Callable[..., Reading],
    wake: Callable[..., Memory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = RAGGED
    it = reading(POSITION, layout, training_plan(SHORT, 4, 2), T)
    memory = wake(DecoupledMemory(config(SHORT), POSITION, layout, WIDTH))
    clean = memory(it)
    assert layout.valid is not None
    padding = ~layout.valid.flatten()[:, None]

    def soiled(x: Tensor, packing: Packing, dim: int) -> Tensor:
        assert dim == x.dim() - 2
        return torch.where(padding, 50.0, spread(x, packing, dim))

    monkeypatch.setattr(coding, "spread", soiled)
    assert torch.equal(memory(it), clean)


MEMORIES = [DecoupledMemory, WindowMemory]


@pytest.mark.parametrize("kind", MEMORIES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("position", [POSITION, TIMELESS], ids=["global-time", "timeless"])
def test_a_common_shift_of_time_changes_nothing(
    kind: type[Memory],
    position: PositionConfig,
    reading: Callable[..., Reading],
    wake: Callable[..., Memory],
) -> None:
    plan = training_plan(SHORT, 4, 2)
    memory = wake(kind(config(SHORT), position, EXACT, WIDTH))
    clip = torch.arange(4).repeat(2)
    now, later = (
        memory(reading(position, EXACT, plan, T, time=clip + shift)) for shift in (0, 1000)
    )
    torch.testing.assert_close(later, now, atol=2e-4, rtol=1e-3)


def test_far_time_counts_only_where_the_retrieval_sees_time(
    reading: Callable[..., Reading], wake: Callable[..., Memory]
) -> None:
    # Latent 0 lies beyond every window of the last chunk; only retrieval reaches it.
    plan = training_plan(SHORT, 8, 2)
    time = torch.arange(8).repeat(2)
    earlier = torch.where(time == 0, -500, time)
    for position, matters in ((POSITION, True), (TIMELESS, False)):
        memory = open_gate(DecoupledMemory(config(SHORT, 48), position, EXACT, WIDTH), 0.0)
        near, far = (
            memory(reading(position, EXACT, plan, 16, time=t))[:, 14:] for t in (time, earlier)
        )
        assert ((near - far).abs().max() > 1e-3) == matters


@pytest.mark.parametrize("kind", MEMORIES, ids=lambda kind: kind.__name__)
def test_activations_keep_their_dtype(kind: type[Memory], reading: Callable[..., Reading]) -> None:
    it = reading(POSITION, EXACT, training_plan(SHORT, 4, 2), T)
    half = {name: getattr(it, name).bfloat16() for name in ("qkv", "features")}
    memory = kind(config(SHORT), POSITION, EXACT, WIDTH)
    out = memory(dataclasses.replace(it, **half))
    assert out.dtype == torch.bfloat16
    # Rounding the logits costs little, choosing another block would cost much.
    assert (out - memory(it)).abs().mean() < 0.05
