"""One block: spatial attention, spatiotemporal attention with memory, feed-forward (app. A.2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from decmem.memory import MEMORIES, Memory, MemoryConfig, MemoryName, PositionConfig, TokenLayout
from decmem.memory.bank import LayerBank
from decmem.memory.base import Reading, Recall
from decmem.memory.coding import split_heads
from decmem.memory.packing import Packing, spread
from decmem.memory.plan import Plan
from decmem.memory.position import Position, seeing
from decmem.memory.surface import SurfaceDepth
from decmem.model.linear import Projection, ScaledNorm
from decmem.ops import coding
from decmem.ops.fp8 import Fp8Rows, gelu_rows
from decmem.ops.norm import (
    add_norm,
    add_norm_both,
    add_norm_rows,
    scaled_norm,
    scaled_norm_rows,
)
from decmem.ops.rotary import Rotation, rotary_angles, rotate_pairs, rotation
from decmem.ops.untraced import bare_kernels_serve
from decmem.ops.window import attention_inside, hopper_serves_inside


class HeadGain(nn.Module):
    """Gains of the RMS norm of queries or keys, one per head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads))


def _gains(q_norm: HeadGain | None, k_norm: HeadGain | None) -> Float[Tensor, "2 H"] | None:
    return None if q_norm is None or k_norm is None else torch.stack((q_norm.gain, k_norm.gain))


def _turn(places: Int[Tensor, "places 2"], head_dim: int) -> Rotation:
    """2D rotary positions of rows and columns, over all channels of a head."""
    axis = head_dim // 4 * 2
    angles = (
        rotary_angles(c, n, base=100.0)
        for c, n in zip(places.unbind(-1), (axis, head_dim - axis), strict=True)
    )
    return rotation(torch.cat(tuple(angles), dim=-1))


class SpatialAttention(nn.Module):
    """Self-attention inside one latent, 2D rotary positions over all channels of a head."""

    def __init__(self, width: int, head_dim: int, layout: TokenLayout, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.layout = layout
        self.qkv = Projection(width, 3 * width)
        self.out = Projection(width, width)
        heads = width // head_dim
        self.q_norm = HeadGain(heads) if qk_norm else None
        self.k_norm = HeadGain(heads) if qk_norm else None
        turn, of_slots = (
            _turn(places, head_dim) for places in (layout.token_coordinates, layout.coordinates)
        )
        self.register_buffer("cos", turn.cos, persistent=False)
        self.register_buffer("sin", turn.sin, persistent=False)
        self.register_buffer("back", -turn.sin, persistent=False)
        self.register_buffer("slot_cos", of_slots.cos, persistent=False)
        self.register_buffer("slot_back", -of_slots.sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor
        self.back: Tensor
        self.slot_cos: Tensor
        self.slot_back: Tensor
        self.counts: Tensor | None
        self.register_buffer("counts", layout.counts, persistent=False)

    def forward(
        self, x: Float[Tensor, "B T tokens width"] | Fp8Rows
    ) -> Float[Tensor, "B T tokens width"]:
        qkv = self.qkv(x)
        if coding.kernels_serve(qkv) and self._kernels_serve(qkv):
            packing = self.layout.packing_on(qkv.device)
            coded = self._coded(qkv, Rotation(self.slot_cos, self.slot_back), packing)
            rows = self.layout.rows_inside_on(qkv.device, qkv.shape[1])
            o = attention_inside(*coded, self.counts, rows, qkv.shape[2])
            return self.out(o.flatten(-2))
        q, k, v = self._heads(qkv)
        o = F.scaled_dot_product_attention(q, k, v)
        return self.out(o.transpose(1, 2).flatten(-2).unflatten(0, qkv.shape[:2]))

    def _kernels_serve(self, qkv: Float[Tensor, "B T tokens three_width"]) -> bool:
        """Whether kernels made for attention across latents serve inside them too."""
        B, T, _, channels = qkv.shape
        H, S = channels // (3 * self.head_dim), self.layout.S
        queries = qkv.new_empty(B, H, T, S, self.head_dim)
        learning = torch.is_grad_enabled() and qkv.requires_grad
        return not learning and hopper_serves_inside(queries, self.counts)

    def _coded(
        self,
        qkv: Float[Tensor, "B T tokens three_width"],
        back: Rotation,
        packing: Packing | None = None,
        heads_last: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by the kernel that norms and turns them, `back` as it does with
        keys; in slots with a `packing`."""
        groups, places = coding.Groups(0, self.head_dim, 0, 0), coding.Places(space=back)
        gains = _gains(self.q_norm, self.k_norm)
        source, slots = (None, None) if packing is None else packing
        return coding.encode_heads(
            qkv, gains, groups, places, values=False, heads_last=heads_last, source=source,
            kept=slots,
        )[:3]  # fmt: skip

    def _heads(
        self, qkv: Float[Tensor, "B T tokens three_width"]
    ) -> list[Float[Tensor, "BT H tokens D"]]:
        """Queries, keys and values, latents as a batch: fused attention takes four dimensions."""
        gains = _gains(self.q_norm, self.k_norm)
        turn = Rotation(self.cos, self.sin)
        if coding.kernels_serve(qkv):
            # Fused attention leaves its output laid out like the queries: heads last, no copy.
            coded = self._coded(qkv, Rotation(self.cos, self.back), heads_last=True)
            return [part.flatten(0, 1).transpose(1, 2) for part in coded]
        q, k, v = split_heads(qkv, gains, self.head_dim)
        q, k = (rotate_pairs(part, turn).to(qkv.dtype) for part in (q, k))
        return [part.movedim(1, 2).flatten(0, 1) for part in (q, k, v)]


class SpatiotemporalAttention(nn.Module):
    """Self-attention across latents; the memory lives here."""

    def __init__(
        self,
        width: int,
        memory: MemoryName,
        config: MemoryConfig,
        position: PositionConfig,
        layout: TokenLayout,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.head_dim = position.head_dim
        heads = width // self.head_dim
        self.qkv = Projection(width, 3 * width)
        self.out = Projection(width, width)
        self.q_norm = HeadGain(heads) if qk_norm else None
        self.k_norm = HeadGain(heads) if qk_norm else None
        self.position = position
        self.surface = SurfaceDepth(width) if position.surface else None
        self.memory: Memory = MEMORIES[memory](config, position, layout, width)

    def forward(
        self,
        x: Float[Tensor, "B T tokens width"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank | None,
        recall: Recall,
        rows: Fp8Rows | None = None,
    ) -> tuple[Float[Tensor, "B T tokens width"], Float[Tensor, "B T tokens 2"] | None]:
        """What was read; `rows` are `x` in 8 bits, where products are made of those."""
        reading, estimate = self._reading(x, position, plan, key_time, bank, recall, rows)
        return self.out(self.memory(reading)), estimate

    def remember(
        self,
        x: Float[Tensor, "B T tokens width"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank,
        recall: Recall,
    ) -> None:
        """Keys and values into the bank, and nothing read."""
        self.memory.remember(self._reading(x, position, plan, key_time, bank, recall)[0])

    def _reading(
        self,
        x: Float[Tensor, "B T tokens width"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank | None,
        recall: Recall,
        rows: Fp8Rows | None = None,
    ) -> tuple[Reading, Float[Tensor, "B T tokens 2"] | None]:
        estimate = None
        if self.surface is not None:
            estimate = self.surface(x)
            packing = self.memory.layout.packing_on(estimate.device)
            position = seeing(self.position, position, spread(estimate, packing, 2))
        gains = _gains(self.q_norm, self.k_norm)
        qkv, rounds = self.qkv(x if rows is None else rows), self.out.rounds
        reading = Reading(x, qkv, gains, position, plan, key_time, bank, recall, rounds)
        return reading, estimate


class FeedForward(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, width: int, multiple: int) -> None:
        super().__init__()
        self.up = Projection(width, multiple * width)
        self.down = Projection(multiple * width, width)

    def forward(
        self, x: Float[Tensor, "B T tokens width"] | Fp8Rows
    ) -> Float[Tensor, "B T tokens width"]:
        return self.down(gelu_rows(self.up(x)) if self.down.rounds else self.up.activated(x))


class Block(nn.Module):
    """Three residual branches, each behind an RMSNorm and a scale from the diffusion time."""

    def __init__(
        self,
        width: int,
        time_width: int,
        ffn_multiple: int,
        memory: MemoryName,
        config: MemoryConfig,
        position: PositionConfig,
        layout: TokenLayout,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.spatial_norm = ScaledNorm(width, time_width)
        self.spatial = SpatialAttention(width, position.head_dim, layout, qk_norm)
        self.memory_norm = ScaledNorm(width, time_width)
        self.spatiotemporal = SpatiotemporalAttention(
            width, memory, config, position, layout, qk_norm
        )
        self.ffn_norm = ScaledNorm(width, time_width)
        self.ffn = FeedForward(width, ffn_multiple)

    def projections(self) -> list[nn.Linear]:
        """The linear maps of activations, whose weights follow their dtype."""
        far, near, ffn = self.spatiotemporal, self.spatial, self.ffn
        found: list[nn.Linear] = [near.qkv, near.out, far.qkv, far.out, ffn.up, ffn.down]
        gate = getattr(far.memory, "gate", None)
        return found if gate is None else [*found, gate]

    def norms(self) -> list[ScaledNorm]:
        """In the order in which a pass meets them."""
        return [self.spatial_norm, self.memory_norm, self.ffn_norm]

    def forward(
        self,
        x: Float[Tensor, "B T tokens width"],
        time: Float[Tensor, "B T time"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank | None,
        recall: Recall,
        scales: Float[Tensor, "3 B T width"] | None = None,
        more: Float[Tensor, "B T tokens width"] | None = None,
    ) -> tuple[
        Float[Tensor, "B T tokens width"],
        Float[Tensor, "B T tokens width"] | None,
        Float[Tensor, "B T tokens 2"] | None,
    ]:
        """The tokens one block on, what is still to be added to them, and the depths it saw them at
        where it has a surface group.

        `scales` of the norms at this `time`, where they are known; `more` is what the block before
        left to be added.
        """
        near, far, ffn = self._scales(time) if scales is None else scales.unbind()
        x, normed, rows = self._inside(x, more, near, far)
        read, estimate = self.spatiotemporal(normed, position, plan, key_time, bank, recall, rows)
        # Where products are made of 8-bit numbers, a norm that only they read is rounded at once.
        x, rows = (add_norm_rows if self.ffn.up.rounds else add_norm)(x, read, ffn)
        if bare_kernels_serve(x):
            return x, self.ffn(rows), estimate  # the kernel of the next norm adds them up
        return x + self.ffn(rows), None, estimate

    def remember(
        self,
        x: Float[Tensor, "B T tokens width"],
        time: Float[Tensor, "B T time"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank,
        recall: Recall,
        scales: Float[Tensor, "3 B T width"] | None = None,
        more: Float[Tensor, "B T tokens width"] | None = None,
    ) -> None:
        """As `forward`, for a pass that only writes: the last block's tokens lead nowhere."""
        near, far, _ = self._scales(time) if scales is None else scales.unbind()
        _, normed, _ = self._inside(x, more, near, far)
        self.spatiotemporal.remember(normed, position, plan, key_time, bank, recall)

    def _scales(self, time: Float[Tensor, "B T time"]) -> list[Float[Tensor, "B T width"]]:
        return [norm.scale_at(time) for norm in self.norms()]

    def _inside(
        self,
        x: Float[Tensor, "B T tokens width"],
        more: Float[Tensor, "B T tokens width"] | None,
        near: Float[Tensor, "B T width"],
        far: Float[Tensor, "B T width"],
    ) -> tuple[
        Float[Tensor, "B T tokens width"], Float[Tensor, "B T tokens width"], Fp8Rows | None
    ]:
        """The tokens after spatial attention, and what spatiotemporal attention reads of them; in
        8 bits too where it makes products of those."""
        rounds = self.spatial.qkv.rounds
        if more is None:
            normed = (scaled_norm_rows if rounds else scaled_norm)(x, near)
        else:
            x, normed = (add_norm_rows if rounds else add_norm)(x, more, near)
        read = self.spatial(normed)
        if self.spatiotemporal.qkv.rounds:
            return add_norm_both(x, read, far)
        return *add_norm(x, read, far), None
