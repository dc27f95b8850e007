"""The truth beside the dream: a block world's player follows the same actions."""

from collections.abc import Iterator
from weakref import WeakValueDictionary

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from decmem.play.defaults import Pace
from decmem.world.actions import quantise_actions
from decmem.world.generation import build_world
from decmem.world.grid import World
from decmem.world.motion import run, state_cameras
from decmem.world.render import Renderer
from decmem.world.walks import make_walk

# Worlds are never changed: visitors of one seed share it, and the last one takes it along.
_worlds: WeakValueDictionary[int, World] = WeakValueDictionary()


class Truth:
    """A block world and a player in it.

    Args:
        seed: of the world. size: of pictures. pace: rays and threads of the renderer.

    Attributes:
        states: (F, 8) the player in every frame so far, units of `decmem.world.motion`.
    """

    def __init__(self, seed: int, size: tuple[int, int], pace: Pace) -> None:
        self.seed = seed
        shared = _worlds.get(seed)
        self.world = build_world(seed) if shared is None else shared
        _worlds[seed] = self.world
        self.fine = Renderer(size, supersample=2, threads=2)
        self.quick = Renderer(size, supersample=pace.supersample, threads=pace.threads)
        self.states: Int64[np.ndarray, "F 8"] = np.zeros((0, 8), np.int64)

    @property
    def start(self) -> list[int]:
        """The first frame's player: with the actions since, all that the states follow from."""
        return [int(value) for value in self.states[0]]

    @property
    def intrinsics(self) -> Float64[np.ndarray, "3 3"]:
        """Of every frame, in pixels."""
        return self.fine.intrinsics

    def explore(self, frames: int) -> Float32[np.ndarray, "F A"]:
        """Begins with a free walk; its actions."""
        walk = make_walk(self.world, "free", self.seed, frames)
        self.states = walk.track.states
        return walk.actions

    def follow(self, start: list[int], actions: Float32[np.ndarray, "F A"]) -> None:
        """Begins anew at `start` and does what `actions` say, the first of them a no-op."""
        self.states = run(self.world.cells, np.array(start, np.int64), quantise_actions(actions))

    def advance(self, actions: Float32[np.ndarray, "F A"]) -> Float64[np.ndarray, "F 4 4"]:
        """Goes on, collisions and all; the poses of the new frames."""
        led = np.concatenate((np.zeros_like(actions[:1]), actions))
        states = run(self.world.cells, self.states[-1], quantise_actions(led))[1:]
        self.states = np.concatenate((self.states, states))
        return state_cameras(states)

    def rewind(self, frames: int) -> None:
        """The player as it was after this many frames."""
        self.states = self.states[:frames]

    def poses(self) -> Float64[np.ndarray, "F 4 4"]:
        """World-to-camera matrices of all frames so far."""
        return state_cameras(self.states)

    def remembered(self, piece: int) -> Iterator[UInt8[np.ndarray, "F H W 3"]]:
        """All frames so far as the model was trained to see them, some at a time."""
        poses = self.poses()
        for first in range(0, len(poses), piece):
            yield self.fine.render(self.world, poses[first : first + piece]).rgb

    def frames(self, world_to_camera: Float64[np.ndarray, "F 4 4"]) -> UInt8[np.ndarray, "F H W 3"]:
        """Frames to show beside the dream."""
        return self.quick.render(self.world, world_to_camera).rgb
