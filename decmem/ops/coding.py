"""Coding of heads as PyTorch operators, with fake kernels and gradients.

`decmem.memory.coding` says what they compute, in plain PyTorch; `coding_kernels` how. Gradients
flow to the projections, the gains of the norms, the surface's rotation and the gate; cameras,
patches and times are given, not learned.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.ops.rotary import Rotation
from decmem.ops.untraced import kernels_serve

try:
    from decmem.ops import coding_cuda_kernels
except ImportError:  # The driver's Python bindings come with PyTorch for CUDA.
    coding_cuda_kernels = None

__all__ = ["Groups", "Places", "decode_heads", "encode_heads", "kernels_serve"]

_ROWS, _WARPS = 4, 1
_HEADS, _HEAD_WARPS = 8, 4
EPS = 1e-6


class Groups(NamedTuple):
    """Channels of a head by what codes them, in this order."""

    camera: int
    space: int
    surface: int
    time: int


class Places(NamedTuple):
    """What codes the groups; None leaves a group as it is. All fp32.

    `query_matrix` codes queries (transposed) and decodes outputs, `key_matrix` keys and values.
    """

    query_matrix: Float[Tensor, "B T 4 4"] | None = None
    key_matrix: Float[Tensor, "B T 4 4"] | None = None
    space: Rotation | None = None
    surface: Rotation | None = None
    time: Rotation | None = None


def _grid(x: Tensor, groups: list[int]) -> tuple[int, int, dict[str, Any]]:
    """Tokens, programs, and the compile-time constants of the kernels of gradients."""
    tokens = x.shape[0] * x.shape[1] * x.shape[2]
    constants = _constants(groups) | {"ROWS": _ROWS, "num_warps": _WARPS}
    return tokens, -(-tokens // _ROWS), constants


def _heads_grid(tokens: int, H: int, groups: list[int]) -> tuple[tuple[int, int], dict[str, Any]]:
    """Programs by tokens and by heads, and the compile-time constants of the kernels forward."""
    heads = min(_HEADS, 1 << (H - 1).bit_length())
    constants = _constants(groups) | {"ROWS": heads, "num_warps": _HEAD_WARPS}
    return (tokens, -(-H // heads)), constants


def _constants(groups: list[int]) -> dict[str, Any]:
    camera, space, surface, time = groups
    D = sum(groups)
    return {
        "D": D, "WIDTH": _power(D), "E": _power(camera),
        "CAMERA": camera, "SPACE": space, "SURFACE": surface, "TIME": time,
    }  # fmt: skip


def _power(channels: int) -> int:
    """A power of two that holds them."""
    return max(16, 1 << (channels - 1).bit_length())


@torch.library.custom_op("decmem::encode_heads", mutates_args=())
def _encode(
    qkv: Tensor, gains: Tensor | None, query_matrix: Tensor | None, key_matrix: Tensor | None,
    space_cos: Tensor | None, space_sin: Tensor | None,
    surface_cos: Tensor | None, surface_sin: Tensor | None,
    time_cos: Tensor | None, time_sin: Tensor | None, source: Tensor | None, kept: Tensor | None,
    groups: list[int], local: bool, values: bool, heads_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from decmem.ops.coding_kernels import _encode_kernel

    q, k, v, local_q, local_k = out = _encoded(qkv, source, groups, local, heads_last)
    B, T, tokens, channels = qkv.shape
    S, H = tokens if source is None else len(source), channels // (3 * sum(groups))
    if coding_cuda_kernels is not None and coding_cuda_kernels.suits(qkv, H, groups):
        tables = (
            query_matrix, key_matrix, space_cos, space_sin, surface_cos, surface_sin,
            time_cos, time_sin,
        )  # fmt: skip
        coding_cuda_kernels.run_encode(
            qkv, gains, tables, out, groups, EPS, local=local, values=values,
            heads_last=heads_last, source=source,
        )  # fmt: skip
        return q, k, v, local_q, local_k
    grid, constants = _heads_grid(B * T * S, H, groups)
    _encode_kernel[grid](
        qkv, gains, query_matrix, key_matrix, space_cos, space_sin, surface_cos, surface_sin,
        time_cos, time_sin, source, q, k, v, local_q, local_k, grid[0], T, S, tokens, H,
        **constants, TURNED=surface_cos is not None, NORMED=gains is not None,
        TIMED=time_cos is not None and not local, LOCAL=local, VALUES=values,
        HEADS_LAST=heads_last, PACKED=source is not None, EPS=EPS,
    )  # fmt: skip
    return q, k, v, local_q, local_k


def _encoded(
    qkv: Tensor, source: Tensor | None, groups: list[int], local: bool, heads_last: bool
) -> list[Tensor]:
    """Room for what is encoded."""
    B, T, tokens, channels = qkv.shape
    D, S = sum(groups), tokens if source is None else len(source)
    H = channels // (3 * D)
    shape = (B, T, S, H, D) if heads_last else (B, H, T, S, D)
    none = (0,)
    return [qkv.new_empty(x) for x in (shape, shape, shape, *((shape if local else none,) * 2))]


@_encode.register_fake
def _(
    qkv, gains, query_matrix, key_matrix, space_cos, space_sin, surface_cos, surface_sin,
    time_cos, time_sin, source, kept, groups, local, values, heads_last,
):  # fmt: skip
    return tuple(_encoded(qkv, source, groups, local, heads_last))


@torch.library.custom_op("decmem::encode_heads_backward", mutates_args=())
def _encode_backward(
    qkv: Tensor, gains: Tensor | None, query_matrix: Tensor | None, key_matrix: Tensor | None,
    space_cos: Tensor | None, space_sin: Tensor | None,
    surface_cos: Tensor | None, surface_sin: Tensor | None,
    time_cos: Tensor | None, time_sin: Tensor | None, source: Tensor | None, kept: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, local_dq: Tensor, local_dk: Tensor,
    groups: list[int], local: bool, values: bool, heads_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from decmem.ops.coding_kernels import _encode_gradient_kernel

    tokens, programs, constants = _grid(qkv, groups)
    T, N, H = qkv.shape[1], qkv.shape[2], qkv.shape[3] // (3 * sum(groups))
    S = N if source is None else len(source)
    out = torch.empty_like(qkv)
    parts = qkv.new_empty((programs, 2, H) if gains is not None else (0,), dtype=torch.float32)
    cos_grad, sin_grad = _surface_grads(surface_cos, kept, groups, qkv)
    _encode_gradient_kernel[(programs,)](
        qkv, gains, query_matrix, key_matrix, space_cos, space_sin, surface_cos, surface_sin,
        time_cos, time_sin, kept, dq, dk, dv, local_dq, local_dk, out, parts, cos_grad, sin_grad,
        tokens, T, S, N, H, **constants, TURNED=surface_cos is not None, NORMED=gains is not None,
        TIMED=time_cos is not None and not local, LOCAL=local, VALUES=values,
        HEADS_LAST=heads_last, PACKED=kept is not None, EPS=EPS,
    )  # fmt: skip
    return out, parts, cos_grad, sin_grad


def _surface_grads(
    surface: Tensor | None, kept: Tensor | None, groups: list[int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Room for gradients of the surface's rotation, a number for each of a pair's two channels; of
    slots, 0 where no token is."""
    shape = (0,) if surface is None else (*surface.shape[:-1], groups[2])
    make = like.new_empty if kept is None else like.new_zeros
    return make(shape, dtype=torch.float32), make(shape, dtype=torch.float32)


def _of_pairs(grad: Tensor) -> Tensor:
    """Both channels of a pair share its cosine and its sine."""
    return grad.unflatten(-1, (2, -1)).sum(-2)


@_encode_backward.register_fake
def _(
    qkv, gains, query_matrix, key_matrix, space_cos, space_sin, surface_cos, surface_sin,
    time_cos, time_sin, source, kept, dq, dk, dv, local_dq, local_dk, groups, local, values,
    heads_last,
):  # fmt: skip
    tokens = qkv.shape[0] * qkv.shape[1] * qkv.shape[2]
    H = qkv.shape[3] // (3 * sum(groups))
    shape = (0,) if gains is None else (-(-tokens // _ROWS), 2, H)
    parts = qkv.new_empty(shape, dtype=torch.float32)
    return torch.empty_like(qkv), parts, *_surface_grads(surface_cos, kept, groups, qkv)


def _encode_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:12])
    ctx.options = inputs[12:]


def _encode_autograd(ctx: Any, *grads: Tensor) -> tuple:
    saved = ctx.saved_tensors
    out, parts, cos_grad, sin_grad = _encode_backward(
        *saved, *(g.contiguous() for g in grads), *ctx.options
    )
    gains = None if saved[1] is None else parts.sum(0)
    turn = (None, None) if saved[6] is None else (_of_pairs(cos_grad), _of_pairs(sin_grad))
    return out, gains, None, None, None, None, *turn, *((None,) * 8)


_encode.register_autograd(_encode_autograd, setup_context=_encode_context)


@torch.library.custom_op("decmem::decode_heads", mutates_args=())
def _decode(
    o: Tensor, far: Tensor | None, gate: Tensor | None, matrix: Tensor | None,
    space_cos: Tensor | None, space_sin: Tensor | None,
    surface_cos: Tensor | None, surface_sin: Tensor | None, kept: Tensor | None, groups: list[int],
) -> Tensor:  # fmt: skip
    B, H, T, S, D = o.shape
    out, cuda = _decoded(o, kept), coding_cuda_kernels
    if cuda is not None and cuda.suits(o, H, groups, far, gate):
        tables = matrix, space_cos, space_sin, surface_cos, surface_sin
        cuda.run_decode(o, far, gate, tables, groups, out, kept=kept)
        return out
    from decmem.ops.coding_kernels import _decode_kernel

    grid, constants = _heads_grid(out.shape[0] * T * out.shape[2], H, groups)
    _decode_kernel[grid](
        o, far, gate, matrix, space_cos, space_sin, surface_cos, surface_sin, kept, out,
        grid[0], T, S, out.shape[2], H, **constants, TURNED=surface_cos is not None,
        GATED=far is not None, PER_HEAD=gate is not None and gate.shape[-1] == H,
        PACKED=kept is not None,
    )  # fmt: skip
    return out


def _decoded(o: Tensor, kept: Tensor | None) -> Tensor:
    """Room for what is decoded."""
    B, H, T, S, D = o.shape
    return o.new_empty(B, T, S if kept is None else len(kept), H * D)


@_decode.register_fake
def _(o, far, gate, matrix, space_cos, space_sin, surface_cos, surface_sin, kept, groups):
    return _decoded(o, kept)


@torch.library.custom_op("decmem::decode_heads_backward", mutates_args=())
def _decode_backward(
    o: Tensor, far: Tensor | None, gate: Tensor | None, matrix: Tensor | None,
    space_cos: Tensor | None, space_sin: Tensor | None,
    surface_cos: Tensor | None, surface_sin: Tensor | None, kept: Tensor | None, grad: Tensor,
    groups: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from decmem.ops.coding_kernels import _decode_gradient_kernel

    B, H, T, S, D = o.shape
    tokens, programs, constants = _grid(grad, groups)
    cos_grad, sin_grad = _surface_grads(surface_cos, kept, groups, grad)
    make = torch.empty_like if kept is None else torch.zeros_like
    do, dfar = make(o), o.new_empty(0) if far is None else make(far)
    dgate = o.new_empty((0,) if gate is None else gate.shape)
    _decode_gradient_kernel[(programs,)](
        o, far, gate, matrix, space_cos, space_sin, surface_cos, surface_sin, kept, grad,
        do, dfar, dgate, cos_grad, sin_grad, tokens, T, S, grad.shape[2], H, **constants,
        TURNED=surface_cos is not None, GATED=far is not None,
        PER_HEAD=gate is not None and gate.shape[-1] == H, PACKED=kept is not None,
    )  # fmt: skip
    return do, dfar, dgate, cos_grad, sin_grad


@_decode_backward.register_fake
def _(o, far, gate, matrix, space_cos, space_sin, surface_cos, surface_sin, kept, grad, groups):
    rest = (o.new_empty((0,) if x is None else x.shape) for x in (far, gate))
    return torch.empty_like(o), *rest, *_surface_grads(surface_cos, kept, groups, grad)


def _decode_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.groups = inputs[9]


def _decode_autograd(ctx: Any, grad: Tensor) -> tuple:
    saved = ctx.saved_tensors
    do, dfar, dgate, cos_grad, sin_grad = _decode_backward(*saved, grad.contiguous(), ctx.groups)
    gated = (None, None) if saved[1] is None else (dfar, dgate)
    turn = (None, None) if saved[6] is None else (_of_pairs(cos_grad), _of_pairs(sin_grad))
    return do, *gated, None, None, None, *turn, None, None


_decode.register_autograd(_decode_autograd, setup_context=_decode_context)


def fp32_table(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def turn_tables(rotation: Rotation | None) -> tuple[Tensor | None, Tensor | None]:
    return (
        (None, None) if rotation is None else (fp32_table(rotation.cos), fp32_table(rotation.sin))
    )


def encoding_tables(places: Places) -> list[Tensor | None]:
    """Both matrices, then cosines and sines of space, surface and time, as kernels take them."""
    return [
        fp32_table(places.query_matrix), fp32_table(places.key_matrix), *turn_tables(places.space),
        *turn_tables(places.surface), *turn_tables(places.time),
    ]  # fmt: skip


def decoding_tables(places: Places) -> list[Tensor | None]:
    """The matrix, then cosines and sines of space and surface."""
    matrix = fp32_table(places.query_matrix)
    return [matrix, *turn_tables(places.space), *turn_tables(places.surface)]


def encode_heads(
    qkv: Float[Tensor, "B T tokens three_width"],
    gains: Float[Tensor, "2 H"] | None,
    groups: Groups,
    places: Places,
    *,
    local: bool = False,
    values: bool = True,
    heads_last: bool = False,
    source: Int[Tensor, "S"] | None = None,
    kept: Int[Tensor, "tokens"] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, normed and coded, heads first.

    Args:
        qkv: projections side by side. gains: of the RMS norms of queries and keys; None: no norm.
        places: shapes (B, T, 4, 4), (S, pairs), (B, T, S, pairs), (T, pairs).
        local: turn time not in queries and keys, but in a second pair of them.
        values: code values as keys are, time apart. heads_last: (B, T, S, H, D).
        source, kept: the token of each slot, the slot of each token; None: there are as many of
            both. Gradients of slots without a token of their own are left out.

    Returns:
        q, k, v, and where asked for q and k with time; (B, H, T, S, D) each.
    """
    return _encode(
        qkv.contiguous(), fp32_table(gains), *encoding_tables(places), source, kept, list(groups),
        local, values, heads_last,
    )  # fmt: skip


def decode_heads(
    o: Float[Tensor, "B H T S D"],
    far: Float[Tensor, "B H T S D"] | None,
    gate: Float[Tensor, "B T tokens gates"] | None,
    groups: Groups,
    places: Places,
    kept: Int[Tensor, "tokens"] | None = None,
) -> Float[Tensor, "B T tokens width"]:
    """R_cs o + sigmoid(gate) R_cs far (equations 3 and 13), heads last.

    `gate`: one number per channel, or per head. `kept`: the slot of each token; None: there are as
    many of both.
    """
    return _decode(
        o.contiguous(), None if far is None else far.contiguous(),
        None if gate is None else gate.contiguous(), *decoding_tables(places), kept, list(groups),
    )  # fmt: skip
