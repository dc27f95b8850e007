"""The contact sheet of the demo: truth and dreams at a few moments, one under the other."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from decmem.evaluation.lettering import (
    COLOURS,
    MUTED,
    PAPER,
    RULE,
    TITLES,
    chip,
    enlarge,
    write,
)
from decmem.evaluation.take import Take

ROWS = ("truth", "full", "without_global_memory")
MARGIN, GAP, LABEL, HEAD, WORLD = 36, 8, 196, 104, 62
_CELL_WIDTH = 288


def evenly(count: int, columns: int) -> list[int]:
    """At most ``columns`` indices spread evenly over ``count`` frames, first and last included."""
    return np.unique(np.rint(np.linspace(0, count - 1, columns)).astype(int)).tolist()


def contact_sheet(takes: Sequence[Take], columns: int = 7) -> Image.Image:
    """Every take as three rows (truth, dream, global memory off), a column per moment."""
    first = takes[0]
    moments = evenly(len(first.truth), columns)
    height, width = first.truth.shape[1:3]
    cell = (_CELL_WIDTH, round(_CELL_WIDTH * height / width))
    block = WORLD + len(ROWS) * (cell[1] + GAP)
    size = (
        2 * MARGIN + LABEL + len(moments) * (cell[0] + GAP) - GAP,
        HEAD + len(takes) * block + MARGIN - GAP,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, 58), "Does it remember?", 36)
    text = f"{len(first.bank)} frames seen, then {len(first.truth)} dreamt from actions and memory"
    write(draw, (size[0] - MARGIN, 58), text, 24, MUTED, "rs")
    for number, take in enumerate(takes):
        top = HEAD + number * block
        draw.line((MARGIN, top - 8, size[0] - MARGIN, top - 8), fill=RULE, width=2)
        write(draw, (MARGIN, top + 34), f"World {take.seed:,}", 20)
        for column, moment in enumerate(moments):
            left = MARGIN + LABEL + column * (cell[0] + GAP)
            shift = write(draw, (left, top + 34), f"frame {take.first_frame + moment}", 20)
            after = f"+{take.seconds_since_bank(moment):.1f} s"
            write(draw, (left + shift + 12, top + 34), after, 20, MUTED)
        for row, name in enumerate(ROWS):
            y = top + WORLD - 12 + row * (cell[1] + GAP)
            _label(draw, take, name, (MARGIN, y), cell[1])
            for column, moment in enumerate(moments):
                left = MARGIN + LABEL + column * (cell[0] + GAP)
                sheet.paste(enlarge(getattr(take, name)[moment], cell), (left, y))
                if name in take.psnr:
                    corner = (left + cell[0], y + cell[1])
                    chip(sheet, corner, f"{take.psnr[name][moment]:.1f} dB", 18)
    return sheet


def _label(
    draw: ImageDraw.ImageDraw, take: Take, name: str, at: tuple[int, int], height: int
) -> None:
    x, y = at[0], at[1] + height // 2
    lines = TITLES[name].split(" ", 1) if name == "without_global_memory" else [TITLES[name]]
    for i, line in enumerate(lines):
        write(draw, (x, y + 28 * i), line, 24, COLOURS[name])
    if name in take.psnr:
        mean = f"mean {take.psnr[name].mean():.1f} dB"
        write(draw, (x, y + 28 * len(lines)), mean, 18, MUTED)
    elif name == "truth":
        write(draw, (x, y + 28), "rendered", 18, MUTED)
