"""The bank: keys and values of every latent so far, one arena per layer, with pooled keys beside.

A pass *stages* its keys and values in the slots behind the history and reads history and itself
from one pool, without concatenation. The explicit write pass stages the clean chunk last; commit
makes it history. Cameras are held relative to an anchor (a point of the world), and `rebase`
moves the anchor along on long walks, so that numbers stay small wherever the walk leads.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.memory.layout import TokenLayout
from decmem.memory.position import (
    PositionConfig,
    camera_matrices,
    surface_shift,
    transform_quads,
)
from decmem.ops.rotary import Rotation, rotate_pairs
from decmem.ops.selection import pool_blocks

_SEGMENT = 64


def _arena(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for (B, H, ..., D), uninitialised.

    On a CPU all heads of a token lie side by side, as projections leave them: nothing is turned
    round on its way in, and a block of all heads is gathered in one piece.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    B, H, *tokens, D = shape
    return torch.empty(B, *tokens, H, D, dtype=dtype).movedim(-2, 1)


@dataclass
class LayerBank:
    """One layer's arena. `length` latents are history."""

    keys: Float[Tensor, "B H room S D"]
    values: Float[Tensor, "B H room S D"]
    pooled: Float[Tensor, "B H blocks D"]
    length: int = 0

    @property
    def room(self) -> int:
        return self.keys.shape[2]

    def stage(
        self, k: Float[Tensor, "B H T S D"], v: Float[Tensor, "B H T S D"], layout: TokenLayout
    ) -> None:
        """Puts a chunk behind the history; a later stage overwrites it unless committed."""
        end = self.length + k.shape[2]
        if end > self.room:
            self._grow(end, layout)
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        valid = layout.valid if layout.valid is None else layout.valid.to(k.device)
        blocks = k.reshape(*k.shape[:2], -1, layout.P, k.shape[-1])
        self.pooled[:, :, self.length * layout.M : end * layout.M] = pool_blocks(blocks, valid)

    def _grow(self, latents: int, layout: TokenLayout) -> None:
        room = -(-latents // _SEGMENT) * _SEGMENT
        for name, per_latent in (("keys", 1), ("values", 1), ("pooled", layout.M)):
            old = getattr(self, name)
            shape = (*old.shape[:2], room * per_latent, *old.shape[3:])
            new = _arena(shape, old.dtype, old.device)
            new[:, :, : self.length * per_latent] = old[:, :, : self.length * per_latent]
            setattr(self, name, new)


class Bank:
    """History of all layers, with the cameras and indices of its latents.

    Args:
        layers: number of layers. heads: attention heads of a layer.
        position: channel groups of a head. layout: token layout of a latent.
        batch: worlds side by side, all of one length.
        anchor: (B, 3) point of the world that cameras are held relative to, float64.
        room: latents to reserve; the arena grows by segments beyond it.
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
        room: int = _SEGMENT,
    ) -> None:
        D, M, S = position.head_dim, layout.M, layout.S
        self.position = position
        self.layout = layout
        self.anchor = anchor.double().cpu()
        place = torch.device(device)
        self.layers = [
            LayerBank(
                _arena((batch, heads, room, S, D), dtype, place),
                _arena((batch, heads, room, S, D), dtype, place),
                _arena((batch, heads, room * M, D), torch.float32, place),
            )
            for _ in range(layers)
        ]
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
        one = self.layers[0]
        B, H, _, S, D = one.keys.shape
        stored = 2 * H * S * D * one.keys.element_size()
        return len(self.layers) * (stored + H * self.layout.M * D * one.pooled.element_size())

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all arenas, spare room included."""
        arenas = (t for one in self.layers for t in (one.keys, one.values, one.pooled))
        return sum(t.numel() * t.element_size() for t in arenas)

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
        M, camera = self.layout.M, self.position.camera
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                part = stored[:, :, : layer.length, :, :camera]
                part.copy_(transform_quads(part, carry))
            part = layer.pooled[:, :, : layer.length * M, :camera]
            part.copy_(transform_quads(part, carry[:, :, :, 0].repeat_interleave(M, dim=2)))
            if self.position.surface:
                self._carry_surfaces(layer, shift)

    def _carry_surfaces(self, layer: LayerBank, shift: Float[Tensor, "B 3"]) -> None:
        """R_srf of the points as they lie behind an anchor that moved by `shift`."""
        turn = surface_shift(self.position, shift)
        first = self.position.camera + self.position.space
        group = slice(first, first + self.position.surface)
        for stored in (layer.keys, layer.values):
            part = stored[:, :, : layer.length, :, group]
            part.copy_(rotate_pairs(part, turn))
        part = layer.pooled[:, :, : layer.length * self.layout.M, group]
        part.copy_(rotate_pairs(part, Rotation(*(x[:, :, 0] for x in turn))))

    def swap_history(self, order: Int[Tensor, "B"], keep_last: int) -> None:
        """Gives each world another's history (`order`), except the last `keep_last` latents.

        The foreign cameras keep their place relative to their own anchor, so distances stay
        plausible. For the control that reads another world's memory.
        """
        swapped = self.length - keep_last
        for layer in self.layers:
            for stored, per_latent in (
                (layer.keys, 1),
                (layer.values, 1),
                (layer.pooled, self.layout.M),
            ):
                part = stored[:, :, : swapped * per_latent]
                part.copy_(part[order.to(part.device)])

    def fork(self) -> "Bank":
        """An independent copy."""
        twin = object.__new__(Bank)
        twin.__dict__.update(self.__dict__)
        twin.anchor = self.anchor.clone()
        twin.layers = [
            LayerBank(one.keys.clone(), one.values.clone(), one.pooled.clone(), one.length)
            for one in self.layers
        ]
        return twin
