"""The look of every picture the demo draws: colours, type, panels and key caps."""

from functools import cache

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

PAPER: Colour = (250, 250, 247)
INK: Colour = (28, 30, 33)
MUTED: Colour = (108, 112, 118)
RULE: Colour = (214, 214, 208)
EMPTY: Colour = (238, 238, 233)

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS: dict[str, Colour] = {
    "truth": INK,
    "full": (0, 114, 178),
    "without_global_memory": (213, 94, 0),
    "codec": (128, 130, 134),
}

TITLES = {
    "truth": "Truth",
    "full": "Dream",
    "without_global_memory": "Global memory off",
    "codec": "Codec alone",
}

SUBTITLES = {
    "truth": "the rendered world",
    "full": "from actions and memory",
    "without_global_memory": "same weights",
    "codec": "the truth, encoded and decoded",
}

KEY_SIDE = 46
_SMOOTH = 4  # shapes are drawn this much larger and shrunk: Pillow's own edges are jagged


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in typeface; no font file is needed."""
    return ImageFont.load_default(size)


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    fill: Colour = INK,
    anchor: str = "ls",
) -> float:
    """Set ``text`` with its anchor (Pillow's two letters; "ls" = left, baseline) ``at`` x, y.
    Returns its width in pixels."""
    draw.text(at, text, font=font(size), fill=fill, anchor=anchor)
    return draw.textlength(text, font=font(size))


def enlarge(frame: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> Image.Image:
    """The frame at ``size`` (width, height): whole factors keep crisp pixels, others are smooth."""
    picture = Image.fromarray(frame)
    whole = size[0] % picture.width == 0 and size[1] % picture.height == 0
    filtering = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    return picture.resize(size, filtering)


def chip(canvas: Image.Image, corner: tuple[int, int], text: str, size: int) -> None:
    """A dark label whose lower right corner lies at ``corner``."""
    draw = ImageDraw.Draw(canvas, "RGBA")
    width = int(draw.textlength(text, font=font(size))) + size
    height = round(size * 1.6)
    box = (corner[0] - width, corner[1] - height, corner[0], corner[1])
    draw.rectangle(box, fill=(*INK, 190))
    middle = (corner[0] - width / 2, corner[1] - height / 2)
    write(draw, middle, text, size, PAPER, "mm")


@cache
def key_cap(label: str, lit: bool, width: int = KEY_SIDE) -> Image.Image:
    """A key, ``lit`` while it is held. Labels "left", "right", "up", "down" draw an arrow."""
    scale, side = _SMOOTH, KEY_SIDE
    cap = Image.new("RGB", (width * scale, side * scale), PAPER)
    draw = ImageDraw.Draw(cap)
    fill, line, ink = (INK, INK, PAPER) if lit else (PAPER, RULE, MUTED)
    box = (scale, scale, (width - 1) * scale - 1, (side - 1) * scale - 1)
    draw.rounded_rectangle(box, radius=9 * scale, fill=fill, outline=line, width=2 * scale)
    middle = (width * scale / 2, side * scale / 2)
    if label in ("left", "right", "up", "down"):
        draw.polygon(_arrow(label, middle, side * scale * 0.2), fill=ink)
    else:
        size = 20 if len(label) == 1 else 16
        write(draw, middle, label, size * scale, ink, "mm")
    return cap.resize((width, side), Image.Resampling.LANCZOS)


def _arrow(direction: str, middle: tuple[float, float], reach: float) -> list[tuple[float, float]]:
    x, y = middle
    triangle = [(-reach, 0.0), (0.6 * reach, -reach), (0.6 * reach, reach)]  # points left
    turned = {
        "left": triangle,
        "right": [(-a, b) for a, b in triangle],
        "up": [(b, a) for a, b in triangle],
        "down": [(b, -a) for a, b in triangle],
    }[direction]
    return [(x + a, y + b) for a, b in turned]


def draw_keys(canvas: Image.Image, at: tuple[int, int], action: Float32[np.ndarray, "A"]) -> None:
    """The keyboard of one action (forward, right, yaw, pitch, jump, sprint), keys in use lit, with
    its upper left corner ``at`` x, y. About 440 x 100 pixels."""
    forward, right, yaw, pitch, jump, sprint = (float(value) for value in action)
    step = KEY_SIDE + 6
    x, y = at
    caps = [
        ("W", forward > 0, step, 0),
        ("A", right < 0, 0, step),
        ("S", forward < 0, step, step),
        ("D", right > 0, 2 * step, step),
        ("up", pitch > 0, 5 * step, 0),
        ("left", yaw < 0, 4 * step, step),
        ("down", pitch < 0, 5 * step, step),
        ("right", yaw > 0, 6 * step, step),
    ]
    for label, lit, dx, dy in caps:
        canvas.paste(key_cap(label, lit), (x + dx, y + dy))
    wide = 2 * KEY_SIDE
    canvas.paste(key_cap("jump", jump > 0, wide), (x + 15 * step // 2, y))
    canvas.paste(key_cap("sprint", sprint > 0, wide), (x + 15 * step // 2, y + step))
