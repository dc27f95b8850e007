"""The bank: keys and values of every latent so far, one arena per layer, with pooled keys beside.

A pass *stages* its keys and values in the slots behind the history and reads history and itself
from one pool, without concatenation. The explicit write pass stages the clean chunk last; commit
makes it history. Cameras are held relative to an anchor (a point of the world), and `rebase`
moves the anchor along on long walks, so that numbers stay small wherever the walk leads.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.errors import UserError
from decmem.memory.arena import LayerBank, Scratch
from decmem.memory.layout import TokenLayout
from decmem.memory.position import (
    PositionConfig,
    camera_matrices,
    surface_shift,
    transform_quads,
)
from decmem.memory.quantised import FP8, STORED
from decmem.ops.rotary import Rotation, rotate_pairs

__all__ = ["Bank", "LayerBank", "bytes_per_latent"]

_PIECE = 64
"""Latents carried to another anchor at a time, so that it needs little memory."""


def bytes_per_latent(
    layers: int, heads: int, head_dim: int, layout: TokenLayout, dtype: torch.dtype
) -> int:
    """Bytes that a latent of one world takes in all layers: keys, values, their scales where they
    are stored in 8 bits, and pooled keys."""
    token = head_dim * dtype.itemsize + (torch.bfloat16.itemsize if dtype == FP8 else 0)
    pooled = layout.M * head_dim * torch.float32.itemsize
    return layers * heads * (2 * layout.S * token + pooled)


class Bank:
    """History of all layers, with the cameras and indices of its latents.

    Args:
        layers: number of layers. heads: attention heads of a layer.
        position: channel groups of a head. layout: token layout of a latent.
        batch: worlds side by side, all of one length.
        anchor: (B, 3) point of the world that cameras are held relative to, float64.
        dtype: of stored keys and values; fp8 keeps a scale per token, and reading dequantises.
        room: latents to reserve, those at work behind the history included; the arena grows by
            segments beyond it.
        limit: latents of history it will ever hold; None grows as far as the device has room.

    Raises:
        UserError: for a dtype that nothing is stored in, and where the device has no room.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        position: PositionConfig,
        layout: TokenLayout,
        batch: int,
        anchor: Float[Tensor, "B 3"],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        room: int = 64,
        limit: int | None = None,
    ) -> None:
        if dtype not in STORED:
            known = ", ".join(str(one).removeprefix("torch.") for one in STORED)
            raise UserError("bank", f"{dtype} stores no keys", f"Choose one of: {known}")
        self.position = position
        self.layout = layout
        self.anchor = anchor.double().cpu()
        place = torch.device(device)
        shape = (batch, heads, room, layout.S)
        scratch = Scratch()
        self.layers = [
            LayerBank.empty((*shape, position.head_dim), layout.M, dtype, place, limit, scratch)
            for _ in range(layers)
        ]
        # What was made for these very arenas and goes with them (`decmem.engine`).
        self.engine: object | None = None
        self.world_to_camera = torch.empty(batch, 0, 4, 4, dtype=torch.float64)
        self.lens = torch.empty(batch, 0, 4)
        self.time = torch.empty(0, dtype=torch.long)

    @property
    def length(self) -> int:
        """Latents of history."""
        return self.layers[0].length

    @property
    def bytes_per_latent(self) -> int:
        """Bytes a latent takes in all layers: keys, values and pooled keys of one world."""
        _, H, _, _, D = self.layers[0].keys.shape
        return bytes_per_latent(len(self.layers), H, D, self.layout, self.dtype)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all arenas, spare room included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of stored keys and values."""
        return self.layers[0].keys.dtype

    def reserve(self, latents: int, passing: int = 0) -> None:
        """Room for so many latents in all layers, the last `passing` of which only pass through.

        Raises:
            UserError: beyond the limit, and where the device has no room.
        """
        for layer in self.layers:
            layer.reserve(latents, self.layout.M, passing)

    def commit(
        self,
        world_to_camera: Float[Tensor, "B T 4 4"],
        lens: Float[Tensor, "B T 4"],
        time: Int[Tensor, "T"],
    ) -> None:
        """Makes the staged latents history. Cameras are absolute, float64."""
        self.world_to_camera = torch.cat((self.world_to_camera, world_to_camera.double().cpu()), 1)
        self.lens = torch.cat((self.lens, lens.float().cpu()), 1)
        self.time = torch.cat((self.time, time.cpu()))
        for layer in self.layers:
            layer.length = len(self.time)

    def truncate(self, latents: int) -> None:
        """Forgets everything after the first `latents` latents."""
        self.world_to_camera = self.world_to_camera[:, :latents]
        self.lens = self.lens[:, :latents]
        self.time = self.time[:latents]
        for layer in self.layers:
            layer.length = latents

    def relative(self, world_to_camera: Float[Tensor, "B T 4 4"]) -> Float[Tensor, "B T 4 4"]:
        """Absolute cameras as cameras relative to the anchor, fp32 on the bank's device."""
        moved = world_to_camera.double().cpu().clone()
        offset = moved[..., :3, :3] @ self.anchor[:, None, :, None]
        moved[..., :3, 3:] += offset
        return moved.float().to(self.layers[0].keys.device)

    @torch.no_grad()
    def rebase(self, anchor: Float[Tensor, "B 3"]) -> None:
        """Moves the anchor: every stored camera group is carried over to the new frame.

        A stored key is P_old^-1 k; P_new^-1 P_old turns it into P_new^-1 k. Surfaces lie where
        they did, seen from the new anchor.
        """
        device = self.layers[0].keys.device
        lens = self.lens.to(device)
        old, _ = camera_matrices(self.position, self.relative(self.world_to_camera), lens)
        shift = (anchor.double().cpu() - self.anchor).to(device)
        self.anchor = anchor.double().cpu()
        _, new = camera_matrices(self.position, self.relative(self.world_to_camera), lens)
        carry = (new @ old)[:, None, :, None]  # (B, 1, T, 1, 4, 4)
        M = self.layout.M
        for layer in self.layers:
            for first in range(0, layer.length, _PIECE):
                past = slice(first, min(first + _PIECE, layer.length))
                read = layer.read(past, torch.float32)
                for part in read:
                    self._carry(part, carry[:, :, past], shift)
                layer.rewrite(past, *read)
            pooled = layer.pooled[:, :, : layer.length * M]
            self._carry(pooled, carry[:, :, :, 0].repeat_interleave(M, dim=2), shift)

    def _carry(
        self, part: Tensor, carry: Float[Tensor, "B 1 ... 4 4"], shift: Float[Tensor, "B 3"]
    ) -> None:
        """Keys, values or pooled keys as they read behind an anchor that moved by `shift`."""
        camera, space, surface = (
            getattr(self.position, name) for name in ("camera", "space", "surface")
        )
        part[..., :camera] = transform_quads(part[..., :camera], carry)
        if surface:
            turn = surface_shift(self.position, shift)
            if part.dim() == 4:  # pooled keys have no tokens
                turn = Rotation(*(x[:, :, 0] for x in turn))
            group = slice(camera + space, camera + space + surface)
            part[..., group] = rotate_pairs(part[..., group], turn)

    def swap_history(self, order: Int[Tensor, "B"], keep_last: int) -> None:
        """Gives each world another's history (`order`), except the last `keep_last` latents.

        The foreign cameras keep their place relative to their own anchor, so distances stay
        plausible. For the control that reads another world's memory.
        """
        swapped = self.length - keep_last
        for layer in self.layers:
            for name, stored in layer.arenas():
                per_latent = self.layout.M if name == "pooled" else 1
                part = stored[:, :, : swapped * per_latent]
                part.copy_(part[order.to(part.device)])

    def run(self, first: int, room: int, limit: int, anchor: Float[Tensor, "B 3"]) -> "Bank":
        """`room` of its slots from `first` on as an empty bank of at most `limit` latents."""
        part = object.__new__(Bank)
        part.__dict__.update(self.__dict__)
        part.anchor = anchor.double().cpu()
        part.layers = [layer.run(first, room, limit, self.layout.M) for layer in self.layers]
        part.engine = None
        part.truncate(0)
        return part

    def fork(self) -> "Bank":
        """An independent copy."""
        twin = object.__new__(Bank)
        twin.__dict__.update(self.__dict__)
        twin.anchor = self.anchor.clone()
        scratch = Scratch()
        twin.layers = [one.fork(scratch) for one in self.layers]
        twin.engine = None
        return twin
