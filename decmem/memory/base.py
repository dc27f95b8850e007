"""The seam between a block of the model and its memory."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor, nn

from decmem.memory.bank import LayerBank
from decmem.memory.layout import TokenLayout
from decmem.memory.lens import Lens
from decmem.memory.plan import Plan, Reach
from decmem.memory.position import (
    Position,
    PositionConfig,
    decode_output,
    encode_key,
    encode_query,
    encode_time,
    time_rotation,
)


@dataclass(frozen=True)
class MemoryConfig:
    """What every memory needs to know.

    Args:
        reach: what a chunk may see.
        retrieved: k, blocks the global memory reads.
        per_head: one list per head instead of one for all.
        gate_per_head: one gate value per token and head instead of per token and channel.
    """

    reach: Reach = field(default_factory=Reach)
    retrieved: int = 16
    per_head: bool = False
    gate_per_head: bool = False


@dataclass(frozen=True)
class Recall:
    """What a reader may ask differently from training.

    Args:
        global_memory: False switches the global branch off (a control).
        retrieved: k for this pass; None takes the trained one.
        lens: watches what is read; None costs nothing.
    """

    global_memory: bool = True
    retrieved: int | None = None
    lens: Lens | None = None


@dataclass
class Reading:
    """One pass of one layer: what is asked, of what, and who may see whom.

    Attributes:
        features: normed input of the block, (B, T, S, width); the gate looks at it.
        q, k, v: projections of the pass's own latents, before position.
        position: rotations of those latents. plan: the pass's tables.
        key_time: index of every pool latent, for the windows.
        bank: the layer's bank, or None in training, where the pool is the pass itself.
        recall: how to read.
    """

    features: Float[Tensor, "B T S width"]
    q: Float[Tensor, "B H T S D"]
    k: Float[Tensor, "B H T S D"]
    v: Float[Tensor, "B H T S D"]
    position: Position
    plan: Plan
    key_time: Int[Tensor, "pool"]
    bank: LayerBank | None
    recall: Recall


class Memory(nn.Module):
    """Reads a pool of latents for the latents of one pass.

    Subclasses give `read`; positions and the pool are settled here, once for all memories.
    """

    def __init__(self, config: MemoryConfig, position: PositionConfig, layout: TokenLayout) -> None:
        super().__init__()
        self.config = config
        self.position = position
        self.layout = layout

    def forward(self, reading: Reading) -> Float[Tensor, "B H T S D"]:
        """What was read, in the frame of the reading latents (after R_cs, eq. 13)."""
        q = encode_query(self.position, reading.position, reading.q)
        if self.position.global_time:
            q = encode_time(self.position, q, reading.position.time)
        return self.read(reading, q, *self.remember(reading))

    def remember(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """Encoded keys and values of the pool, the pass's own among them: staged in the bank
        where there is one. All that a pass leaves behind in this layer."""
        k, v = (encode_key(self.position, reading.position, x) for x in (reading.k, reading.v))
        if self.position.global_time:
            k = encode_time(self.position, k, reading.position.time)
        if reading.bank is None:
            return k, v
        reading.bank.stage(k, v, self.layout)
        return reading.bank.keys, reading.bank.values

    def read(self, reading: Reading, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of encoded queries over the encoded pool, decoded."""
        raise NotImplementedError

    def window(self, reading: Reading, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, slice]:
        """Queries and keys as the local branch sees them, and the pool latents it reaches."""
        plan = reading.plan
        seen = slice(plan.window_first, plan.window_first + plan.windows.table.shape[1])
        k = k[:, :, seen]
        if not self.position.global_time:
            # Only differences matter: counted from the window's start they stay small.
            start = reading.key_time[plan.window_first]
            key_turn = time_rotation(self.position, reading.key_time[seen] - start)
            own = reading.key_time[plan.history :] - start
            q = encode_time(self.position, q, time_rotation(self.position, own))
            k = encode_time(self.position, k, key_turn)
        return q, k, seen

    def decode(self, reading: Reading, o: Tensor) -> Tensor:
        """R_cs on a branch's output."""
        return decode_output(self.position, reading.position, o)


def heads_first(x: Float[Tensor, "B T S width"], head_dim: int) -> Float[Tensor, "B H T S D"]:
    """Splits channels into heads and brings the heads forward."""
    return x.unflatten(-1, (-1, head_dim)).movedim(-2, 1)


def heads_last(x: Float[Tensor, "B H T S D"]) -> Float[Tensor, "B T S width"]:
    """Inverse of `heads_first`."""
    return x.movedim(1, -2).flatten(-2)
