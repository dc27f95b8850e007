"""One block: spatial attention, spatiotemporal attention with memory, feed-forward (app. A.2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from decmem.memory import MEMORIES, Memory, MemoryConfig, MemoryName, PositionConfig, TokenLayout
from decmem.memory.bank import LayerBank
from decmem.memory.base import Reading, Recall, heads_first, heads_last
from decmem.memory.plan import Plan
from decmem.memory.position import Position, seeing
from decmem.memory.surface import SurfaceDepth
from decmem.model.linear import Linear, ScaledNorm, gelu, rms_norm
from decmem.ops.rotary import Rotation, rotary_angles, rotate_pairs, rotation


class HeadNorm(nn.Module):
    """RMS norm of queries or keys with a learned gain per head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads))

    def forward(self, x: Float[Tensor, "B H T S D"]) -> Float[Tensor, "B H T S D"]:
        return rms_norm(x, self.gain.float()[:, None, None, None]).to(x.dtype)


class SpatialAttention(nn.Module):
    """Self-attention inside one latent, 2D rotary positions over all channels of a head."""

    def __init__(self, width: int, head_dim: int, layout: TokenLayout, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.layout = layout
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        heads = width // head_dim
        self.q_norm = HeadNorm(heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(heads) if qk_norm else nn.Identity()
        axis = head_dim // 4 * 2
        row, column = (
            rotary_angles(c, n, base=100.0)
            for c, n in zip(layout.coordinates.unbind(-1), (axis, head_dim - axis), strict=True)
        )
        turn = rotation(torch.cat((row, column), dim=-1))
        self.register_buffer("cos", turn.cos, persistent=False)
        self.register_buffer("sin", turn.sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, x: Float[Tensor, "B T S width"]) -> Float[Tensor, "B T S width"]:
        q, k, v = (heads_first(part, self.head_dim) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = (
            rotate_pairs(norm(part), Rotation(self.cos, self.sin)).to(x.dtype)
            for part, norm in ((q, self.q_norm), (k, self.k_norm))
        )
        mask = None if self.layout.valid is None else self.layout.valid.flatten().to(x.device)
        # Latents are a batch: fused attention takes four dimensions.
        q, k, v = (part.movedim(1, 2).flatten(0, 1) for part in (q, k, v))  # (B T, H, S, D)
        o = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[None])
        return self.out(o.transpose(1, 2).flatten(-2).unflatten(0, x.shape[:2]))


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
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.q_norm = HeadNorm(heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(heads) if qk_norm else nn.Identity()
        self.position = position
        self.surface = SurfaceDepth(width) if position.surface else None
        self.memory: Memory = MEMORIES[memory](config, position, layout, width)

    def forward(
        self,
        x: Float[Tensor, "B T S width"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank | None,
        recall: Recall,
    ) -> tuple[Float[Tensor, "B T S width"], Float[Tensor, "B T S 2"] | None]:
        reading, estimate = self._reading(x, position, plan, key_time, bank, recall)
        return self.out(heads_last(self.memory(reading))), estimate

    def remember(
        self,
        x: Float[Tensor, "B T S width"],
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
        x: Float[Tensor, "B T S width"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank | None,
        recall: Recall,
    ) -> tuple[Reading, Float[Tensor, "B T S 2"] | None]:
        q, k, v = (heads_first(part, self.head_dim) for part in self.qkv(x).chunk(3, dim=-1))
        estimate = None
        if self.surface is not None:
            estimate = self.surface(x)
            position = seeing(self.position, position, estimate)
        q, k = self.q_norm(q), self.k_norm(k)
        return Reading(x, q, k, v, position, plan, key_time, bank, recall), estimate


class FeedForward(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, width: int, multiple: int) -> None:
        super().__init__()
        self.up = Linear(width, multiple * width, bias=False)
        self.down = Linear(multiple * width, width, bias=False)

    def forward(self, x: Float[Tensor, "B T S width"]) -> Float[Tensor, "B T S width"]:
        return self.down(gelu(self.up(x)))


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

    def forward(
        self,
        x: Float[Tensor, "B T S width"],
        time: Float[Tensor, "B T time"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank | None,
        recall: Recall,
    ) -> tuple[Float[Tensor, "B T S width"], Float[Tensor, "B T S 2"] | None]:
        """The tokens one block on, and the depths it saw them at where it has a surface group."""
        x = x + self.spatial(self.spatial_norm(x, time))
        read, estimate = self.spatiotemporal(
            self.memory_norm(x, time), position, plan, key_time, bank, recall
        )
        x = x + read
        return x + self.ffn(self.ffn_norm(x, time)), estimate

    def remember(
        self,
        x: Float[Tensor, "B T S width"],
        time: Float[Tensor, "B T time"],
        position: Position,
        plan: Plan,
        key_time: Tensor,
        bank: LayerBank,
        recall: Recall,
    ) -> None:
        """As `forward`, for a pass that only writes: the last block's tokens lead nowhere."""
        x = x + self.spatial(self.spatial_norm(x, time))
        self.spatiotemporal.remember(
            self.memory_norm(x, time), position, plan, key_time, bank, recall
        )
