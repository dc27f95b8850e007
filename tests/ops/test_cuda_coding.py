"""The coding of heads in CUDA C++: assembled, and on a GPU; by a CPU: `test_cuda_on_cpu`."""

import re
from importlib.util import find_spec

import pytest
import torch

from decmem.ops import coding, coding_inference
from decmem.ops.fp8 import fp8_rows
from decmem.ops.rotary import rotation

if find_spec("cuda") is None:
    pytest.skip("needs cuda-bindings", allow_module_level=True)

from decmem.ops import coding_cuda_kernels, cuda_module


@pytest.mark.parametrize("groups", [[24, 24, 0, 24], [16, 16, 24, 8], [0, 72, 0, 0]], ids=str)
def test_the_coding_of_heads_is_assembled(groups: list[int]) -> None:
    there = {"turned": True, "normed": True, "local": True, "values": True}
    others = (
        ("heads_last", "timed"),
        ("slotted", "values", "timed"),
        ("gated", "per_head"),
        ("gated", "rounded"),
        ("rounded",),
    )
    for kinds in (there, *(dict.fromkeys(other, True) for other in others)):
        text = coding_cuda_kernels.source(groups, heads=24, tokens=2, half=False, **kinds)
        code, remarks = cuda_module.compiled(text, "sm_90" if "rounded" in kinds else "sm_80")
        assert code
        # Two kernels, neither of which keeps more in slow memory than a few words.
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", remarks)]
        assert len(spilled) == 2
        assert max(spilled) <= 16


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [True, False])
def test_keys_and_values_are_encoded_where_they_belong(normed: bool) -> None:
    B, H, T, S, near = 2, 3, 4, 30, 5
    qkv = torch.randn(B, T, S, 3 * H * 72, device="cuda").bfloat16()
    gains = torch.rand(2, H, device="cuda") if normed else None
    angles = [torch.randn(S, 12), torch.randn(T, 12)]
    matrices = (torch.randn(B, T, 4, 4, device="cuda") for _ in "qk")
    space, time = (rotation(x.cuda()) for x in angles)
    places = coding.Places(*matrices, space=space, time=time)
    groups = coding.Groups(24, 24, 0, 24)
    rooms = [torch.full((B, H, near + T, S, 72), 7.0, device="cuda").bfloat16() for _ in "kv"]
    k, v = (room[:, :, near:] for room in rooms)
    with torch.no_grad():
        q = coding_inference.encode_heads_into(qkv, gains, groups, places, k, v)
        expected = coding.encode_heads(qkv, gains, groups, places)
    assert q is not None
    assert all(torch.equal(*pair) for pair in zip((k, v), expected[1:3], strict=True))
    # Scores need no factor.
    factor = 72**-0.5 / coding_inference.EXPONENT_SCALE
    assert torch.allclose(q.float(), expected[0].float() * factor, rtol=2.0**-7, atol=1e-6)
    assert all((room[:, :, :near] == 7).all() for room in rooms)
    # The same at slots that the device tells.
    slots = torch.tensor([6, 0, 3, 8], device="cuda")
    with torch.no_grad():
        again = coding_inference.encode_heads_into(qkv, gains, groups, places, *rooms, slots)
    assert again is not None
    assert torch.equal(again, q)
    for room, wanted in zip(rooms, expected[1:3], strict=True):
        assert torch.equal(room[:, :, slots], wanted)
        assert (room[:, :, [1, 2, 4]] == 7).all()
    # Gradients are not theirs.
    assert coding_inference.encode_heads_into(qkv, gains, groups, places, k, v) is None


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("gates", [0, 3, 216])
@torch.no_grad()
def test_what_is_decoded_is_rounded_on_the_way(gates: int) -> None:
    B, H, T, S = 2, 3, 2, 31  # tokens that fill no program
    o, far = (torch.randn(B, H, T, S, 72, device="cuda").bfloat16() for _ in "of")
    gate = torch.randn(B, T, S, gates, device="cuda").bfloat16() if gates else None
    places = coding.Places(
        torch.randn(B, T, 4, 4, device="cuda"), None, rotation(torch.randn(S, 12).cuda())
    )
    given = (o, far if gates else None, gate, coding.Groups(24, 24, 0, 24), places)
    rows = coding_inference.decode_head_rows(*given)
    expected = fp8_rows(coding.decode_heads(*given))
    assert rows is not None
    assert rows.dtype == expected.dtype
    torch.testing.assert_close(rows.scale, expected.scale)
    # They may differ where two numbers of 8 bits are equally near.
    assert (rows.values.float() != expected.values.float()).float().mean() < 0.01
