"""The seam between a block of the model and its memory."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor, nn

from decmem.memory.anchored_local import AnchoredLocalMemory
from decmem.memory.bank import LayerBank
from decmem.memory.coding import Coded, decode, decode_rows, encode
from decmem.memory.kept_lists import KeptLists
from decmem.memory.layout import TokenLayout
from decmem.memory.lens import Lens
from decmem.memory.plan import Plan, Reach
from decmem.memory.position import Position, PositionConfig, encode_time, time_rotation
from decmem.ops.fp8 import Fp8Rows
from decmem.ops.rotary import Rotation


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
        kept: lists kept from pass to pass; None retrieves anew.
        shared: guidance's unsteered latents read the lists of the steered ones.
    """

    global_memory: bool = True
    retrieved: int | None = None
    lens: Lens | None = None
    kept: KeptLists | None = None
    shared: bool = False


@dataclass
class Reading:
    """One pass of one layer: what is asked, of what, and who may see whom.

    Attributes:
        features: normed input of the block, (B, T, S, width); the gate looks at it.
        qkv: projections of the pass's own latents, side by side, before norm and position.
        gains: of the norms of queries and keys; None: there are no norms.
        position: rotations of those latents. plan: the pass's tables.
        key_time: index of every pool latent, for the windows.
        bank: the layer's bank, or None in training, where the pool is the pass itself.
        recall: how to read.
        rounds: what was read may come in 8 bits, for products of those.
    """

    features: Float[Tensor, "B T tokens width"]
    qkv: Float[Tensor, "B T tokens three_width"]
    gains: Float[Tensor, "2 H"] | None
    position: Position
    plan: Plan
    key_time: Int[Tensor, "pool"]
    bank: LayerBank | None
    recall: Recall
    rounds: bool = False


class Memory(nn.Module):
    """Reads a pool of latents for the latents of one pass.

    Subclasses give `read`; positions and the pool are settled here, once for all memories.
    """

    def __init__(self, config: MemoryConfig, position: PositionConfig, layout: TokenLayout) -> None:
        super().__init__()
        self.config = config
        self.position = position
        self.layout = layout

    def forward(self, reading: Reading) -> Float[Tensor, "B T tokens width"] | Fp8Rows:
        """What was read, in the frame of the reading latents (after R_cs, eq. 13)."""
        coded = self._code(reading)
        return self.read(reading, coded, *self._pool(reading, coded))

    def remember(self, reading: Reading) -> None:
        """Stages the pass's keys and values: all that it leaves behind in this layer."""
        self._pool(reading, self._code(reading))

    def _code(self, reading: Reading) -> Coded:
        local_time = None
        if reading.bank is None and not self.position.global_time:
            local_time = self._window_time(reading, reading.key_time)
        room = None if reading.bank is None else reading.bank.place_of_own()
        packing = self.layout.packing_on(reading.qkv.device)
        return encode(
            self.position, reading.position, reading.qkv, reading.gains, local_time, room, packing
        )

    def _pool(self, reading: Reading, coded: Coded) -> tuple[Tensor, Tensor]:
        """Keys and values that may be read, the pass's own among them."""
        if reading.bank is None:
            return coded.k, coded.v
        reading.bank.stage(coded.k, coded.v, self.layout, reading.plan.unsteered)
        pool = reading.plan.history + coded.k.shape[2]
        return reading.bank.pool(pool, coded.k.dtype)

    def read(
        self, reading: Reading, coded: Coded, k: Tensor, v: Tensor
    ) -> Float[Tensor, "B T tokens width"] | Fp8Rows:
        """Attention of coded queries over the coded pool (B, H, pool, S, D), decoded."""
        raise NotImplementedError

    def near(
        self, local: AnchoredLocalMemory, reading: Reading, coded: Coded, k: Tensor, v: Tensor
    ) -> Float[Tensor, "B H T S D"]:
        """o_alm, not decoded: fetched first, or read in the bank."""
        desk = None if reading.bank is None else reading.bank.desk
        if desk is not None and desk.tiles is not None:
            return local.where_it_lies(coded.q, k, v, desk.tiles, coded.scale)
        return local(*self.window(reading, coded, k, v), reading.plan.windows, coded.scale)

    def window(
        self, reading: Reading, coded: Coded, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the local branch sees them, of the latents it reaches."""
        plan, desk = reading.plan, None if reading.bank is None else reading.bank.desk
        seen = slice(plan.window_first, plan.window_first + plan.windows.table.shape[1])
        v = v[:, :, seen] if desk is None else desk.values
        if coded.local_q is not None and coded.local_k is not None:
            return coded.local_q, coded.local_k[:, :, seen], v
        q, k = coded.q, k[:, :, seen] if desk is None else desk.keys
        if not self.position.global_time:
            own = self._window_time(reading, reading.key_time[plan.history :])
            q = encode_time(self.position, q, own)
            k = encode_time(self.position, k, self._window_time(reading, reading.key_time[seen]))
        return q, k, v

    def _window_time(self, reading: Reading, time: Int[Tensor, "T"]) -> Rotation:
        """Only differences matter: counted from the window's start they stay small."""
        start = reading.key_time[reading.plan.window_first]
        return time_rotation(self.position, time - start)

    def decode(
        self,
        reading: Reading,
        local: Float[Tensor, "B H T S D"],
        far: Float[Tensor, "B H T S D"] | None = None,
        gate: Float[Tensor, "B T tokens gates"] | None = None,
    ) -> Float[Tensor, "B T tokens width"]:
        """Both branches together, in the frame of the reading latents."""
        packing = self.layout.packing_on(local.device)
        return decode(self.position, reading.position, local, far, gate, packing)

    def result(
        self,
        reading: Reading,
        local: Float[Tensor, "B H T S D"],
        far: Float[Tensor, "B H T S D"] | None = None,
        gate: Float[Tensor, "B T tokens gates"] | None = None,
    ) -> Float[Tensor, "B T tokens width"] | Fp8Rows:
        """`decode`, in 8 bits where these are asked for and one launch does both."""
        rows = None
        if reading.rounds:
            packing = self.layout.packing_on(local.device)
            rows = decode_rows(self.position, reading.position, local, far, gate, packing)
        return self.decode(reading, local, far, gate) if rows is None else rows
