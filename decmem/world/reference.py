"""What a picture is, by definition: slow, plain NumPy in float64, sharing no code with renderers.

A ray crosses the planes of the lattice in order; between two crossings it is in one cell; the first
cell that holds something decides. Tests hold both backends against this.
"""

import numpy as np
from jaxtyping import Float64

from decmem.world.blocks import BLOCK_TYPES, Shape
from decmem.world.grid import HEIGHT, SIZE, World
from decmem.world.pictures import CLOUD_SIDE, CLOUDS, pictures
from decmem.world.textures import mip_levels, texture_pictures

_REACH = 34.0
_HAZE_START = 4.0
_HAZE_SPAN = 30.0
_HORIZON = np.array([200.0, 221, 236])
_ZENITH = np.array([78.0, 134, 214])
_GLOW = np.array([52.0, 20, -34])
_SUN = np.array([0.64, 0.48, -0.6])
_SUN_COLOUR = np.array([255.0, 250, 226])
_FACE_TINT = {(0, -1): 0.68, (0, 1): 0.68, (1, -1): 0.5, (1, 1): 1.0, (2, -1): 0.82, (2, 1): 0.82}


def _levels() -> dict[str, list[np.ndarray]]:
    return {name: mip_levels(picture) for name, picture in texture_pictures().items()}


class Reference:
    """Traces single rays through one world."""

    def __init__(self, world: World) -> None:
        cells = world.cells
        self.blocks = cells & 63
        self.light = cells >> 6
        self.levels = _levels()
        side = CLOUD_SIDE
        self.clouds = pictures()[CLOUDS : CLOUDS + side * side].reshape(side, side).astype(float)

    def colour(
        self, origin: np.ndarray, direction: np.ndarray, spread: float
    ) -> tuple[np.ndarray, float, int]:
        """Colour (0 to 255), depth and block of the ray from `origin`; `direction` has depth one;
        spread is the width of a sample there.
        """
        length = float(np.linalg.norm(direction))
        unit = direction / length
        for t, cell, normal in self._cells(origin, direction, _REACH / length):
            block = BLOCK_TYPES[self.blocks[cell[0] % SIZE, cell[2] % SIZE, cell[1]]]
            if block.shape == Shape.EMPTY:
                continue
            if block.shape == Shape.PLANT:
                met = self._plant(block.side, origin - cell, direction, 16 * spread)
                if met is None or met[0] > _REACH / length:
                    continue
                t, colour = met
                light = float(self.light[cell[0] % SIZE, cell[2] % SIZE, cell[1]])
                colour = colour * 0.96 * (0.34 + 0.22 * light)
            else:
                point = origin + t * direction - cell
                colour = self._face(block, cell, normal, point, t, direction, spread)
            fog = max((t * length - _HAZE_START) / _HAZE_SPAN, 0.0) ** 2
            colour = colour + (self._haze(unit) - colour) * min(fog, 1.0)
            return colour, t, BLOCK_TYPES.index(block)
        return self._sky(unit), np.inf, 0

    def _cells(self, origin, direction, reach):
        """The cells along a ray after the first: entry t, cell, and (axis, side) of the face."""
        crossings = []
        for axis in range(3):
            if direction[axis] == 0:
                continue
            start, stop = sorted((origin[axis], origin[axis] + reach * direction[axis]))
            for plane in range(int(np.ceil(start)), int(np.floor(stop)) + 1):
                t = (plane - origin[axis]) / direction[axis]
                side = -1 if direction[axis] > 0 else 1
                crossings.append((t, axis, side))
        crossings.sort()
        times = [t for t, _, _ in crossings] + [reach + 1e-3]
        for number, (t, axis, side) in enumerate(crossings):
            middle = origin + (t + times[number + 1]) / 2 * direction
            cell = np.floor(middle).astype(int)
            if t > 0 and 0 <= cell[1] < HEIGHT:
                yield t, cell, (axis, side)

    def _plant(self, name, origin, direction, scale):
        """Where the ray meets the nearer of a plant's two crossed pictures, and its colour."""
        found = []
        for normal, offset in ((np.array([1.0, 0, -1]), 0.0), (np.array([1.0, 0, 1]), 1.0)):
            if direction @ normal == 0:
                continue
            t = (offset - origin @ normal) / (direction @ normal)
            u, v, _ = origin + t * direction
            level = self.levels[name][0 if scale * t < 1.5 else 1 if scale * t < 3 else 2]
            if t > 0 and 0 <= u < 1 and 0 <= v < 1:
                texel = level[int((1 - v) * len(level) - 1e-9), int(u * len(level))]
                if texel[3] >= 128:
                    found.append((t, texel[:3].astype(float)))
        return min(found, key=lambda item: item[0], default=None)

    def _face(self, block, cell, normal, point, t, direction, spread):
        axis, side = normal
        across = point[2] if axis == 0 else point[0]
        down = point[2] if axis == 1 else 1 - point[1]
        name = block.side if axis != 1 else block.top if side > 0 else block.bottom
        slant = abs(direction[axis]) / np.linalg.norm(direction)
        colour = self._texture(name, across, down, 16 * t * spread / np.sqrt(slant))
        tint = _FACE_TINT[normal] * (0.34 + 0.22 * self._smooth_light(cell, normal, point))
        colour = colour * tint
        if block.name == "water" and normal == (1, 1):
            mirrored = direction * (1, -1, 1) / np.linalg.norm(direction)
            colour = colour + (self._haze(mirrored) - colour) * (0.7 * tint * (1 - slant) ** 3)
        return colour

    def _texture(self, name, u, v, footprint):
        """Nearest texels of two neighbouring mip levels, blended."""
        octave = min(max(int(np.floor(np.log2(max(footprint, 1.0)))), 0), 3)
        share = min(max(footprint / 2**octave - 1, 0.0), 1.0)
        colours = []
        for level in self.levels[name][octave : octave + 2]:
            row, column = (min(int(max(x, 0) * len(level)), len(level) - 1) for x in (v, u))
            colours.append(level[row, column, :3].astype(float))
        return colours[0] * (1 - share) + colours[1] * share

    def _smooth_light(self, cell, normal, point):
        """Bilinear over the centres of the four cells before the face nearest to the point."""
        axis, side = normal
        front = np.array(cell)
        front[axis] += side
        first, second = (other for other in range(3) if other != axis)
        total = 0.0
        for da in (0, 1):
            for db in (0, 1):
                place = front.copy()
                weight = 1.0
                for other, moved in ((first, da), (second, db)):
                    off = point[other] - 0.5
                    place[other] += moved * (1 if off >= 0 else -1)
                    weight *= abs(off) if moved else 1 - abs(off)
                inside = 0 <= place[1] < HEIGHT
                light = self.light[place[0] % SIZE, place[2] % SIZE, place[1]] if inside else 3
                total += weight * float(light)
        return total

    def _haze(self, unit):
        blue = 1 - (1 - min(max(unit[1], 0.0) * 1.6, 1.0)) ** 2
        glow = max(unit @ _SUN, 0.0) ** 4
        return _HORIZON + (_ZENITH - _HORIZON) * blue + glow * _GLOW

    def _sky(self, unit):
        colour = self._haze(unit)
        if unit[1] > 0:
            u, v = unit[[0, 2]] * 11 / (unit[1] + 0.16)
            row, column = int(np.floor(u)), int(np.floor(v))
            cover = 0.0
            for i, wi in ((0, 1 - (u - row)), (1, u - row)):
                for j, wj in ((0, 1 - (v - column)), (1, v - column)):
                    cover += (
                        wi * wj * self.clouds[(row + i) % CLOUD_SIDE, (column + j) % CLOUD_SIDE]
                    )
            colour = colour + (250 - colour) * cover / 255 * min(unit[1] * 5, 1.0)
        disc = min(max((unit @ _SUN - 0.9965) / 0.0012, 0.0), 1.0)
        return colour + (_SUN_COLOUR - colour) * disc


def render_reference(
    world: World,
    world_to_camera: Float64[np.ndarray, "4 4"],
    intrinsics: Float64[np.ndarray, "3 3"],
    size: tuple[int, int],
    supersample: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One frame: rgb (H, W, 3) float64 before rounding, depth (H, W), block (H, W)."""
    rays = Reference(world)
    rotation = world_to_camera[:3, :3]
    origin = -rotation.T @ world_to_camera[:3, 3]
    focal = intrinsics[0, 0]

    def trace(u: float, v: float) -> tuple[np.ndarray, float, int]:
        camera = np.array([(u - size[1] / 2) / focal, (v - size[0] / 2) / focal, 1.0])
        return rays.colour(origin, rotation.T @ camera, 1 / focal / supersample)

    rgb = np.zeros((*size, 3))
    depth, block = np.zeros(size), np.zeros(size, np.uint8)
    offsets = (np.arange(supersample) + 0.5) / supersample
    for row in range(size[0]):
        for column in range(size[1]):
            samples = [trace(column + du, row + dv)[0] for dv in offsets for du in offsets]
            rgb[row, column] = np.mean(samples, 0)
            _, depth[row, column], block[row, column] = trace(column + 0.5, row + 0.5)
    return rgb, depth, block
