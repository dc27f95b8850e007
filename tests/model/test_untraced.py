"""The short cuts of the CPU, taken where nothing is traced, give what the plain forms give."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.memory import Lens, Reach, Recall, bank_plan, joint_plan
from decmem.model import ModelConfig, WorldModel
from decmem.model.conditioning import camera_centres

SHORT = Reach(window=2, write_chunk=1)
CASES: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "pocket": lambda small: small,
    "ragged": lambda small: dataclasses.replace(small, size=(48, 80)),
    "no-surface": lambda small: dataclasses.replace(
        small, width=40, position=dataclasses.replace(small.position, surface=0)
    ),
    "time-is-seen": lambda small: dataclasses.replace(
        small, position=dataclasses.replace(small.position, global_time=True)
    ),
    "lists-per-head": lambda small: dataclasses.replace(
        small,
        qk_norm=False,
        reading=dataclasses.replace(small.reading, per_head=True, gate_per_head=True),
    ),
    "dense": lambda small: dataclasses.replace(
        small,
        memory="dense",
        reading=dataclasses.replace(small.reading, reach=Reach(window=None)),
    ),
}


def roll_out(model: WorldModel, data: tuple, dtype: torch.dtype) -> list[Tensor]:
    """A write pass, a chunk, and a chunk behind one that is written in passing: velocities, and
    all that is in the bank."""
    clean, noisy, t, conditions = data
    reach = model.config.reading.reach
    bank = model.new_bank(camera_centres(conditions.cameras[:, 3]), dtype, room=2)
    clean, noisy, still = clean.to(dtype), noisy.to(dtype), torch.zeros_like(t)

    def run(x: Tensor, at: Tensor, part: slice, plan, recall: Recall | None = None) -> Tensor:
        context = model.context(conditions[part], bank)
        return model(x[:, part], at[:, part], context, plan, bank, recall)

    def commit(part: slice) -> None:
        known = conditions[part]
        bank.commit(known.cameras, known.lens, known.time)

    written, later = slice(0, 5), slice(5, 7)
    run(clean, still, written, bank_plan(reach, 0, 5, reach.write_chunk or 1))
    commit(written)
    alone = run(noisy, t, later, bank_plan(reach, 5, 2, 2), Recall(lens=Lens()))
    both = torch.cat((clean[:, :7], noisy[:, 7:]), 1)
    at = torch.cat((still[:, :7], t[:, 7:]), 1)
    joint = run(both, at, slice(5, 8), joint_plan(reach, 5, 2, reach.write_chunk or 1, 1))
    commit(later)
    arenas = [
        x[:, :, : 7 * n].clone()
        for layer in bank.layers
        for x, n in ((layer.keys, 1), (layer.values, 1), (layer.pooled, model.layout.M))
    ]
    return [alone, joint, *arenas]


@pytest.mark.parametrize("name", CASES)
def test_a_roll_out_is_the_same(name: str, small: ModelConfig, awake, clip) -> None:
    config = CASES[name](small)
    model, data = awake(config).requires_grad_(False), clip(config, 8)
    with torch.enable_grad():
        plain = roll_out(model, data, torch.float32)
    with torch.no_grad():
        short = roll_out(model, data, torch.float32)
    assert plain[0].std() > 0.1
    for one, other in zip(short, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_in_half_precision_it_is_near(name: str, small: ModelConfig, awake, clip) -> None:
    config = CASES[name](small)
    model, data = awake(config).requires_grad_(False), clip(config, 8)
    exact, rough = (roll_out(model, data, dtype) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(rough[:2], exact[:2], strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).square().mean().sqrt() < 0.1 * other.std()


def test_company_changes_nothing(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small).requires_grad_(False), clip(small, 8, batch=3)
    alone = data._replace(
        **{name: getattr(data, name)[1:2] for name in ("clean", "noisy", "t")},
        conditions=dataclasses.replace(
            data.conditions,
            **{n: getattr(data.conditions, n)[1:2] for n in ("actions", "world_to_camera", "lens")},
        ),
    )
    with torch.no_grad():
        for one, all_ in zip(
            roll_out(model, alone, torch.float32), roll_out(model, data, torch.float32), strict=True
        ):
            torch.testing.assert_close(one, all_[1:2], atol=1e-5, rtol=1e-5)
