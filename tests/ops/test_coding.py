"""Coding of heads as PyTorch operators: schema, fake kernels, autograd. Numbers: tests/memory."""

import pytest
import torch

from decmem.ops import coding  # registers them
from decmem.ops.rotary import Rotation, rotation

pytestmark = pytest.mark.interpreter
GROUPS = [4, 4, 6, 2]
RAW = ("test_schema", "test_faketensor")
# Three slots of two tokens: the token of each, and the slots.
PACKED = torch.tensor([0, 1, 1]), torch.tensor([0, 2])


def turn(*shape: int) -> Rotation:
    return rotation(torch.randn(shape))


@pytest.mark.parametrize("local", [True, False], ids=["local", "once"])
@pytest.mark.parametrize("heads_last", [True, False], ids=["heads-last", "heads-first"])
def test_encoding_passes_opcheck(local: bool, heads_last: bool) -> None:
    B, T, S, H = 1, 2, 3, 2
    packed = PACKED if local else (None, None)
    given = (
        torch.randn(B, T, 2 if local else S, 3 * H * 16, requires_grad=True),
        torch.rand(2, H, requires_grad=True),
        *(torch.randn(B, T, 4, 4) for _ in range(2)),
        *turn(S, 2), *(x.requires_grad_() for x in turn(B, T, S, 3)), *turn(T, 1), *packed,
    )  # fmt: skip
    options = (GROUPS, local, True, heads_last)
    # Gradients and graphs, which take longest, once for either option.
    tests = {} if local == heads_last else {"test_utils": RAW}
    torch.library.opcheck(torch.ops.decmem.encode_heads, (*given, *options), **tests)
    bare = [None if x is None else x.detach() for x in given]
    out = torch.ops.decmem.encode_heads(*bare, *options)
    torch.library.opcheck(
        torch.ops.decmem.encode_heads_backward, (*bare, *out, *options), test_utils=RAW
    )


@pytest.mark.parametrize(
    ("gates", "tokens"), [(2, 2), (32, 3)], ids=["per-head-packed", "per-channel"]
)
def test_decoding_passes_opcheck(gates: int, tokens: int) -> None:
    B, T, S, H = 1, 2, 3, 2
    given = (
        *(torch.randn(B, H, T, S, 16, requires_grad=True) for _ in range(2)),
        torch.randn(B, T, tokens, gates, requires_grad=True),
        torch.randn(B, T, 4, 4),
        *turn(S, 2), *(x.requires_grad_() for x in turn(B, T, S, 3)),
        PACKED[1] if tokens < S else None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.decmem.decode_heads, (*given, GROUPS))
    bare = [None if x is None else x.detach() for x in given]
    grad = torch.randn(B, T, tokens, H * 16)
    torch.library.opcheck(
        torch.ops.decmem.decode_heads_backward, (*bare, grad, GROUPS), test_utils=RAW
    )


def test_nothing_but_the_projections_is_needed() -> None:
    qkv = torch.randn(1, 1, 3, 48)
    q, k, v, *_ = coding.encode_heads(
        qkv, None, coding.Groups(0, 16, 0, 0), coding.Places(space=rotation(torch.zeros(3, 8)))
    )
    for got, want in zip((q, k, v), qkv.chunk(3, -1), strict=True):
        torch.testing.assert_close(got[:, 0], want)


@pytest.mark.parametrize("heads_last", [True, False], ids=["heads-last", "heads-first"])
def test_heads_that_fill_no_program(heads_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_HEADS", 2)
    B, T, S, H, D = 1, 2, 3, 3, 16
    groups = coding.Groups(*GROUPS)
    matrices = [torch.randn(B, T, 4, 4) for _ in range(2)]
    places = coding.Places(*matrices, turn(S, 2), turn(B, T, S, 3), turn(T, 1))
    qkv, gains = torch.randn(B, T, S, 3, H, D), torch.rand(2, H)

    def encoded(part: slice) -> list[torch.Tensor]:
        """Of these heads alone; heads first."""
        out = coding.encode_heads(
            qkv[..., part, :].flatten(3), gains[:, part], groups, places,
            local=True, heads_last=heads_last,
        )  # fmt: skip
        return [x.movedim(3, 1) if heads_last else x for x in out]

    together = encoded(slice(0, H))
    gate = torch.randn(B, T, S, H)
    read = coding.decode_heads(together[0], together[1], gate, groups, places).unflatten(-1, (H, D))
    for h in range(H):
        one = slice(h, h + 1)
        alone = encoded(one)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[:, one], expected)
        out = coding.decode_heads(*alone[:2], gate[..., one], groups, places)
        torch.testing.assert_close(read[..., h, :], out)
