"""Coding of a pass: from the fused projection to queries, keys and values in the world, and back.

Plain PyTorch here is the definition; on a GPU one kernel does each way (`decmem.ops.coding`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from decmem.memory.packing import Packing, kept, spread
from decmem.memory.position import (
    Position,
    PositionConfig,
    decode_output,
    encode_key,
    encode_query,
    encode_time,
)
from decmem.ops import coding, coding_inference
from decmem.ops.fp8 import Fp8Rows
from decmem.ops.norm import rms_norm
from decmem.ops.rotary import Rotation


class Coded(NamedTuple):
    """Queries, keys and values of a pass, coded by position (eq. 5, 12).

    Where the global memory sees no time, `local_q` and `local_k` are what the local one reads.
    `scale`: of scores; None: D^-1/2.
    """

    q: Float[Tensor, "B H T S D"]
    k: Float[Tensor, "B H T S D"]
    v: Float[Tensor, "B H T S D"]
    local_q: Float[Tensor, "B H T S D"] | None = None
    local_k: Float[Tensor, "B H T S D"] | None = None
    scale: float | None = None


def heads_first(x: Float[Tensor, "B T S width"], head_dim: int) -> Float[Tensor, "B H T S D"]:
    """Splits channels into heads and brings the heads forward."""
    return x.unflatten(-1, (-1, head_dim)).movedim(-2, 1)


def heads_last(x: Float[Tensor, "B H T S D"]) -> Float[Tensor, "B T S width"]:
    """Inverse of `heads_first`."""
    return x.movedim(1, -2).flatten(-2)


def split_heads(
    qkv: Float[Tensor, "B T S three_width"], gains: Float[Tensor, "2 H"] | None, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, heads first; queries and keys at unit RMS times a head's gain."""
    q, k, v = (heads_first(part, head_dim) for part in qkv.chunk(3, dim=-1))
    if gains is not None:
        q, k = (
            rms_norm(x, gain.float()[:, None, None, None]).to(x.dtype)
            for x, gain in zip((q, k), gains, strict=True)
        )
    return q, k, v


def encode(
    config: PositionConfig,
    position: Position,
    qkv: Float[Tensor, "B T tokens three_width"],
    gains: Float[Tensor, "2 H"] | None,
    local_time: Rotation | None = None,
    room: tuple[Tensor, Tensor, Tensor | None] | None = None,
    packing: Packing | None = None,
) -> Coded:
    """Norms and codes the projections of a pass: of tokens side by side, into slots.

    With `config.global_time` queries and keys carry the time of `position`; without, and with a
    `local_time`, they come twice, bare and with that time. Keys and values may lie in the `room`
    given for them (B, H, T, S, D), or for more latents than these and then with their slots in it.
    """
    if coding.kernels_serve(qkv):
        time = position.time if config.global_time else local_time
        twice = time is not None and not config.global_time
        places = _places(position, time)
        if room is not None and not twice:
            source = None if packing is None else packing.spread
            q = coding_inference.encode_heads_into(
                qkv, gains, _groups(config), places, *room, source=source
            )
            if q is not None:
                return Coded(q, *room[:2], scale=coding_inference.EXPONENT_SCALE)
        source, slots = (None, None) if packing is None else packing
        coded = coding.encode_heads(
            qkv, gains, _groups(config), places, local=twice, source=source, kept=slots
        )
        return Coded(*coded) if twice else Coded(*coded[:3])
    q, k, v = (spread(x, packing, 3) for x in split_heads(qkv, gains, config.head_dim))
    q, k = encode_query(config, position, q), encode_key(config, position, k)
    v = encode_key(config, position, v)
    if config.global_time:
        q, k = (encode_time(config, x, position.time) for x in (q, k))
        return Coded(q, k, v)
    if local_time is None:
        return Coded(q, k, v)
    local_q, local_k = (encode_time(config, x, local_time) for x in (q, k))
    return Coded(q, k, v, local_q, local_k)


def decode(
    config: PositionConfig,
    position: Position,
    local: Float[Tensor, "B H T S D"],
    far: Float[Tensor, "B H T S D"] | None = None,
    gate: Float[Tensor, "B T tokens gates"] | None = None,
    packing: Packing | None = None,
) -> Float[Tensor, "B T tokens width"]:
    """R_cs o_alm + sigmoid(gate) R_cs o_sgm (eq. 3 and 13): the gate sees both branches in the
    frame of the present. Without `far` the local branch alone. Tokens come out side by side."""
    if coding.kernels_serve(local):
        places, slots = _places(position, None), None if packing is None else packing.kept
        return coding.decode_heads(local, far, gate, _groups(config), places, slots)
    out = kept(decode_output(config, position, local), packing, 3)
    if far is not None and gate is not None:
        read = kept(decode_output(config, position, far), packing, 3)
        out = out + opened(gate, local.shape[1]) * read
    return heads_last(out)


def decode_rows(
    config: PositionConfig,
    position: Position,
    local: Float[Tensor, "B H T S D"],
    far: Float[Tensor, "B H T S D"] | None = None,
    gate: Float[Tensor, "B T tokens gates"] | None = None,
    packing: Packing | None = None,
) -> Fp8Rows | None:
    """`decode`, rounded to 8 bits in the same launch; None where that is not to be had."""
    return coding_inference.decode_head_rows(
        local, far, gate, _groups(config), _places(position, None),
        None if packing is None else packing.kept,
    )  # fmt: skip


def opened(gate: Float[Tensor, "B T S gates"], heads: int) -> Float[Tensor, "B H T S _"]:
    """G, by channel or by head."""
    return heads_first(torch.sigmoid(gate), gate.shape[-1] // heads)


def _groups(config: PositionConfig) -> coding.Groups:
    return coding.Groups(config.camera, config.space, config.surface, config.time)


def _places(position: Position, time: Rotation | None) -> coding.Places:
    """The rotations of a pass without the dimensions that only broadcast."""
    surface = position.surface
    return coding.Places(
        position.projection[:, 0, :, 0],
        position.unprojection[:, 0, :, 0],
        position.space,
        None if surface is None else Rotation(surface.cos[:, 0], surface.sin[:, 0]),
        None if time is None else Rotation(time.cos[:, 0], time.sin[:, 0]),
    )
