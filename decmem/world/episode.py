"""Episodes: frames with their exact poses, intrinsics and actions."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from decmem.errors import UserError
from decmem.world.actions import validate_actions
from decmem.world.camera import DEFAULT_SIZE
from decmem.world.generation import build_world
from decmem.world.kinematics import check_rigid
from decmem.world.render import Device, Renderer
from decmem.world.version import FPS
from decmem.world.walks import WalkKind, make_walk


@dataclass(frozen=True)
class Episode:
    """A recorded walk.

    frames: RGB; world_to_camera: OpenCV axes, metres; intrinsics: pixels; actions[t] is what
    produced frame t, actions[0] a no-op; depth and block_id (F, H, W): along the camera's z,
    infinite for sky, and 0 for sky; provenance: what made it. Raises `UserError` if a count or
    shape disagrees with `frames`, a pose is not rigid or an action is out of range.
    """

    # All count F frames; where a user's do not, the error below says so.
    frames: UInt8[np.ndarray, "F H W 3"]
    world_to_camera: Float64[np.ndarray, "_ 4 4"]
    intrinsics: Float64[np.ndarray, "_ 3 3"]
    actions: Float32[np.ndarray, "_ A"]
    fps: float = FPS
    depth: Float32[np.ndarray, "_ _ _"] | None = None
    block_id: UInt8[np.ndarray, "_ _ _"] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise UserError(
                "frames",
                f"got {self.frames.dtype} {self.frames.shape}",
                "give uint8 RGB frames (F, H, W, 3)",
            )
        count, height, width, _ = self.frames.shape
        expected = {"world_to_camera": (count, 4, 4), "intrinsics": (count, 3, 3)}
        for name in ("depth", "block_id"):
            if getattr(self, name) is not None:
                expected[name] = (count, height, width)
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise UserError(
                    name,
                    f"shape {getattr(self, name).shape}, expected {shape} for {count} frames",
                    "give one entry per frame",
                )
        check_rigid(self.world_to_camera)
        if len(validate_actions(self.actions)) != count:
            raise UserError(
                "actions", f"{len(self.actions)} rows for {count} frames", "give one row per frame"
            )
        if not self.fps > 0:
            raise UserError("fps", f"got {self.fps}", "give frames per second, above zero")

    def __len__(self) -> int:
        return len(self.frames)


def render_episode(
    seed: int,
    walk: WalkKind = "retrace",
    frames: int = 341,
    size: tuple[int, int] = DEFAULT_SIZE,
    supersample: int = 2,
    device: Device = "cpu",
    threads: int = 1,
) -> Episode:
    """The walk of a kind through the world of a seed, rendered; the seed chooses both.

    Raises `UserError` as `make_walk` and `Renderer` do.
    """
    renderer = Renderer(size, supersample=supersample, device=device, threads=threads)
    world = build_world(seed)
    path = make_walk(world, walk, seed, frames)
    poses = path.track.world_to_camera
    rendered = renderer.render(world, poses)
    return Episode(
        frames=rendered.rgb,
        world_to_camera=poses,
        intrinsics=np.tile(renderer.intrinsics, (frames, 1, 1)),
        actions=path.actions,
        depth=rendered.depth,
        block_id=rendered.block,
        provenance={**path.provenance, "supersample": supersample},
    )
