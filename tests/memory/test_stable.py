"""Stalls of a bank: banks like any other, that do not know of each other."""

import pytest
import torch

from decmem.errors import UserError
from decmem.memory import Bank, PositionConfig, TokenLayout
from decmem.memory.quantised import FP8
from decmem.memory.stable import Stable

LAYOUT = TokenLayout((3, 5))
POSITION = PositionConfig(camera=8, space=8, time=4)
NOWHERE = torch.zeros(1, 3)


def stable_of(latents: int, passing: int = 2, dtype: torch.dtype = torch.float32) -> Stable:
    return Stable(Bank(2, 2, POSITION, LAYOUT, 1, NOWHERE, dtype, room=latents), passing)


def fill(bank: Bank, latents: int, value: float) -> None:
    k = torch.full((1, 2, latents, LAYOUT.S, POSITION.head_dim), value)
    for layer in bank.layers:
        layer.stage(k, -k, LAYOUT)
    cameras = torch.eye(4).expand(1, latents, 4, 4)
    bank.commit(cameras, torch.ones(1, latents, 4), torch.arange(latents))


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_a_stall_is_a_bank_in_a_run_of_slots(dtype: torch.dtype) -> None:
    stable = stable_of(12, dtype=dtype)
    one, two = stable.new_bank(NOWHERE, 3), stable.new_bank(NOWHERE + 1, 5)
    assert stable.stall(one) == range(5)
    assert stable.stall(two) == range(5, 12)
    assert stable.widest == 7
    fill(two, 5, 2.0)
    fill(one, 3, 1.0)
    assert (one.length, two.length, stable.whole.length) == (3, 5, 0)
    for layer in stable.whole.layers:
        keys, values = layer.read(slice(0, 10), torch.float32)
        for slots, value in ((slice(0, 3), 1.0), (slice(5, 10), 2.0)):
            # Scales of 8 bits are rounded to bfloat16.
            assert (keys[:, :, slots] - value).abs().max() < value * 2**-8
            assert (values[:, :, slots] + value).abs().max() < value * 2**-8
        M = LAYOUT.M
        assert (layer.pooled[:, :, 5 * M : 10 * M] - 2.0).abs().max() < 1e-5
    with pytest.raises(UserError, match="the bank was made for 3"):
        one.reserve(4)


def test_stalls_are_free_again_once_nobody_holds_their_bank() -> None:
    stable = stable_of(15)
    one, two, three = (stable.new_bank(NOWHERE, 3) for _ in range(3))
    with pytest.raises(UserError, match="no room in the stable"):
        stable.new_bank(NOWHERE, 1)
    del two
    with pytest.raises(UserError, match="no room in the stable"):
        stable.new_bank(NOWHERE, 4)
    again = stable.new_bank(NOWHERE, 2)
    assert stable.stall(again) == range(5, 9)
    assert (stable.stall(one), stable.stall(three)) == (range(5), range(10, 15))


def test_who_moves_out_has_no_stall() -> None:
    stable = stable_of(15)
    one, two = (stable.new_bank(NOWHERE, 3) for _ in range(2))
    fill(one, 3, 1.0)
    fill(two, 3, 2.0)
    twin = one.fork()
    assert stable.stall(twin) is None
    twin.truncate(0)
    fill(twin, 3, 5.0)
    # More passes through than a stall was made for: the bank takes arenas of its own.
    one.reserve(6, passing=3)
    assert stable.stall(one) is None
    assert one.layers[0].room == 6
    assert (one.layers[0].keys[:, :, :3] == 1.0).all()
    assert (two.layers[0].keys[:, :, :3] == 2.0).all()
    assert stable.stall(stable.new_bank(NOWHERE, 3)) == range(5)
