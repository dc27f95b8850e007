"""The renderer: worlds and cameras to pictures, depth and block numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, UInt8

from decmem.errors import UserError
from decmem.world import cpu_renderer
from decmem.world.camera import DEFAULT_FOV, DEFAULT_SIZE, intrinsics
from decmem.world.grid import BUFFER, SIZE, World

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Frames:
    """Rendered frames on the host.

    rgb: uint8; depth: blocks along the camera's z axis, infinite for sky; block: number in
    `decmem.world.blocks`, 0 for sky. Depth and block are those of the ray through the pixel's
    centre.
    """

    rgb: UInt8[np.ndarray, "F H W 3"]
    depth: Float32[np.ndarray, "F H W"]
    block: UInt8[np.ndarray, "F H W"]


@dataclass(frozen=True)
class FrameTensors:
    """Rendered frames on the renderer's device; depth and block are None unless asked for."""

    rgb: UInt8[torch.Tensor, "F H W 3"]
    depth: Float32[torch.Tensor, "F H W"] | None
    block: UInt8[torch.Tensor, "F H W"] | None


class Renderer:
    """Renders frames of one size with one camera.

    size: height and width in pixels; fov: horizontal, in degrees; supersample: n for n x n rays
    per pixel, averaged in float32 row by row and rounded half up; threads: of the CPU backend.
    Raises `UserError` for sizes that make no picture and for a device that is not there.
    """

    def __init__(
        self,
        size: tuple[int, int] = DEFAULT_SIZE,
        fov: float = DEFAULT_FOV,
        supersample: int = 2,
        device: Device = "cpu",
        threads: int = 1,
    ) -> None:
        if min(size) < 1:
            raise UserError("size", f"got {size}, expected two positive numbers", "give H W")
        if not 1 <= fov <= 170:
            raise UserError("fov", f"got {fov:g}, expected 1 to 170 degrees", "70 is the default")
        if not 1 <= supersample <= 8:
            raise UserError(
                "supersample", f"got {supersample}, expected 1 to 8", "2 is the default"
            )
        if device not in ("cpu", "cuda"):
            raise UserError("device", f"got '{device}'", "the renderer runs on cpu or cuda")
        self.size = size
        self.intrinsics = intrinsics(size, fov)
        self.supersample = supersample
        self.device: Device = device
        self.threads = threads
        if device == "cuda":
            from decmem.world import cuda_renderer

            cuda_renderer.require_device()

    def stack(self, worlds: Sequence[World]) -> UInt8[torch.Tensor, "worlds bytes"]:
        """The buffers of several worlds as one tensor on the renderer's device."""
        host = torch.empty((len(worlds), BUFFER), dtype=torch.uint8)
        for row, world in zip(host, worlds, strict=True):
            row.copy_(torch.from_numpy(world.buffer))
        return host.to(self.device)

    def render(self, world: World, world_to_camera: Float64[np.ndarray, "F 4 4"]) -> Frames:
        """Frames of one world through the cameras (F, 4, 4), on the host."""
        stack = torch.from_numpy(world.buffer)[None].to(self.device)
        index = torch.zeros(len(world_to_camera), dtype=torch.int64, device=self.device)
        frames = self.render_batch(stack, index, torch.from_numpy(world_to_camera), depth=True)
        assert frames.depth is not None
        assert frames.block is not None
        return Frames(*(t.cpu().numpy() for t in (frames.rgb, frames.depth, frames.block)))

    def render_batch(
        self,
        stack: UInt8[torch.Tensor, "worlds bytes"],
        world_index: Int[torch.Tensor, " F"],
        world_to_camera: Float[torch.Tensor, "F 4 4"],
        depth: bool = False,
    ) -> FrameTensors:
        """Frames of many worlds (`stack`) as tensors on the device, without a trip to the host.

        Frame f is that of world `world_index[f]` through `world_to_camera[f]` (float64 keeps
        far-off positions exact).
        """
        poses = world_to_camera.to(self.device, torch.float64)
        rotations = poses[:, :3, :3]
        position = -(rotations * poses[:, :3, 3:]).sum(1)
        cells = position.floor()
        insets = (position - cells).float()
        cells = cells.long()
        cells[:, 0] %= SIZE
        cells[:, 2] %= SIZE
        cells = cells.int().contiguous()
        rotations = rotations.float().contiguous()
        focal = float(self.intrinsics[0, 0])
        if self.device == "cuda":
            from decmem.world import cuda_renderer

            rgb, far, block = cuda_renderer.render_frames(
                stack.view(-1), world_index.to(self.device, torch.int64), cells, insets, rotations,
                focal, self.size, self.supersample, depth,
            )  # fmt: skip
        else:
            arrays = cpu_renderer.render_frames(
                stack.view(-1).numpy(), world_index.numpy(), cells.numpy(), insets.numpy(),
                rotations.numpy(), focal, self.size, self.supersample, depth, self.threads,
            )  # fmt: skip
            rgb, far, block = (torch.from_numpy(array) for array in arrays)
        return FrameTensors(rgb, far if depth else None, block if depth else None)
