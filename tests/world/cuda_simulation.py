"""Run by test_render in numba's CUDA simulator: the kernel must give the CPU's frames."""

import numpy as np

from decmem.world import cuda_renderer
from decmem.world.camera import centres
from decmem.world.generation import build_world
from decmem.world.grid import SIZE
from decmem.world.motion import state_cameras
from decmem.world.pictures import pictures
from decmem.world.render import Renderer
from decmem.world.training_walk import train_walks


def main() -> None:
    """Print "equal" if they agree."""
    world = build_world(3)
    states, _ = train_walks(world, [1], 100)
    poses = state_cameras(states[0, [0, 99]])
    size = (9, 20)
    expected = Renderer(size, supersample=2).render(world, poses)
    position = centres(poses)
    cells = np.floor(position)
    insets = (position - cells).astype(np.float32)
    cells[:, [0, 2]] %= SIZE
    rgb, depth, block = (np.zeros_like(a) for a in (expected.rgb, expected.depth, expected.block))
    focal = Renderer(size).intrinsics[0, 0]
    cuda_renderer.kernel(None)[cuda_renderer.grid(len(poses), size)](
        world.buffer, np.zeros(len(poses), np.int64), pictures(), cells.astype(np.int32), insets,
        poses[:, :3, :3].astype(np.float32), np.float32(1 / focal), 2, rgb, depth, block,
    )  # fmt: skip
    np.testing.assert_array_less(abs(rgb.astype(int) - expected.rgb).max(), 2)
    np.testing.assert_allclose(depth, expected.depth, rtol=1e-5)
    np.testing.assert_array_equal(block, expected.block)
    print("equal")


if __name__ == "__main__":
    main()
