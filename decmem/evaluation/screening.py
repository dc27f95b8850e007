"""The film of the demo: the memory being recorded, then truth and dreams side by side."""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from decmem.evaluation.lettering import (
    COLOURS,
    EMPTY,
    INK,
    MUTED,
    PAPER,
    RULE,
    SUBTITLES,
    TITLES,
    draw_keys,
    enlarge,
    write,
)
from decmem.evaluation.strip import CurveStrip
from decmem.evaluation.take import Take

PANELS = ("truth", "full", "without_global_memory")
PRELUDE_SPEED = 4
MARGIN, GAP, HEAD, TITLE, FOOT = 32, 24, 84, 64, 212
_PANEL_WIDTH = 576
_FRAMES_PER_LATENT = 4


class Screening:
    """Draws one take, frame by frame; ``size`` is (height, width) of the film in pixels."""

    def __init__(self, take: Take) -> None:
        self.take = take
        height, width = take.truth.shape[1:3]
        scale = max(2, round(_PANEL_WIDTH / width))
        self.panel = (width * scale, height * scale)
        self.lefts = [MARGIN + i * (self.panel[0] + GAP) for i in range(3)]
        self.foot = HEAD + TITLE + self.panel[1] + 20
        self.width = 2 * MARGIN + 3 * self.panel[0] + 2 * GAP
        self.size = (self.foot + FOOT + 12, self.width)
        strip_size = (2 * self.panel[0] + GAP, FOOT)
        self.strip = CurveStrip(strip_size, take.psnr, take.fps)
        self.thumbs: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return math.ceil(len(self.take.bank) / PRELUDE_SPEED) + len(self.take.truth)

    def frames(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Every frame of the film: the bank at four times its speed, then the dream."""
        count = len(self.take.bank)
        for end in range(PRELUDE_SPEED, count + PRELUDE_SPEED, PRELUDE_SPEED):
            yield np.asarray(self.prelude(min(end, count)))
        for index in range(len(self.take.truth)):
            yield np.asarray(self.dream(index))

    def prelude(self, recorded: int) -> Image.Image:
        """The recording after ``recorded`` frames, and the bank as it fills, a picture a latent."""
        take, total = self.take, len(self.take.bank)
        seconds = total / take.fps
        canvas, draw = self._canvas(f"memory frame {recorded} of {total}")
        self._title(draw, 0, "What the model sees", f"{seconds:.0f} s, at {PRELUDE_SPEED}x speed")
        canvas.paste(enlarge(take.bank[recorded - 1], self.panel), (self.lefts[0], HEAD + TITLE))
        self._title(draw, 1, "Its memory", "one picture for every latent")
        latents = range(0, total, _FRAMES_PER_LATENT)
        columns, cell = self._mosaic(len(latents))
        inner = (cell[0] - 4, cell[1] - 4)
        for i, frame in enumerate(latents):
            row, column = divmod(i, columns)
            x, y = self.lefts[1] + column * cell[0], HEAD + TITLE + row * cell[1]
            if frame < recorded:
                if frame not in self.thumbs:
                    picture = Image.fromarray(take.bank[frame])
                    self.thumbs[frame] = picture.resize(inner, Image.Resampling.LANCZOS)
                canvas.paste(self.thumbs[frame], (x, y))
            else:
                draw.rectangle((x, y, x + inner[0] - 1, y + inner[1] - 1), fill=EMPTY)
        self._progress(draw, recorded / total)
        y = self.foot + 62
        write(draw, (MARGIN, y), f"First the model watches {total} frames.", 28)
        rest = "Then the camera goes on, and the model sees nothing any more:"
        write(draw, (MARGIN, y + 42), rest, 28, MUTED)
        rest = "it dreams every further frame from the actions and what it remembers."
        write(draw, (MARGIN, y + 84), rest, 28, MUTED)
        return canvas

    def dream(self, index: int) -> Image.Image:
        """Dreamt frame ``index`` (from 0): three panels, the keys, and the curves so far."""
        take = self.take
        since = f"frame {take.first_frame + index}, {take.seconds_since_bank(index):.1f} s after"
        canvas, draw = self._canvas(f"{since} the memory ended")
        for i, name in enumerate(PANELS):
            value = f"{take.psnr[name][index]:.1f} dB" if name in take.psnr else ""
            self._title(draw, i, TITLES[name], SUBTITLES[name], COLOURS[name], value)
            picture = enlarge(getattr(take, name)[index], self.panel)
            canvas.paste(picture, (self.lefts[i], HEAD + TITLE))
        write(draw, (MARGIN, self.foot + 4), "Actions", 17, INK, "lt")
        draw_keys(canvas, (MARGIN, self.foot + 44), take.actions[index])
        canvas.paste(self.strip.picture(index), (self.lefts[1], self.foot))
        return canvas

    def _canvas(self, clock: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        canvas = Image.new("RGB", (self.width, self.size[0]), PAPER)
        draw = ImageDraw.Draw(canvas)
        width = write(draw, (MARGIN, 54), "Does it remember?", 34)
        world = f"world {self.take.seed:,}, {self.take.walk} walk"
        write(draw, (MARGIN + width + 18, 54), world, 20, MUTED)
        write(draw, (self.width - MARGIN, 54), clock, 24, INK, "rs")
        draw.line((MARGIN, HEAD - 8, self.width - MARGIN, HEAD - 8), fill=RULE, width=2)
        return canvas, draw

    def _title(
        self,
        draw: ImageDraw.ImageDraw,
        panel: int,
        title: str,
        subtitle: str,
        colour: tuple[int, int, int] = INK,
        value: str = "",
    ) -> None:
        left, base = self.lefts[panel], HEAD + TITLE - 18
        width = write(draw, (left, base), title, 28, colour)
        write(draw, (left + width + 14, base), subtitle, 19, MUTED)
        if value:
            write(draw, (left + self.panel[0], base), value, 26, colour, "rs")

    def _mosaic(self, count: int) -> tuple[int, tuple[int, int]]:
        """Columns and cell size (width, height) that fill two panels with ``count`` pictures."""
        width, height = 2 * self.panel[0] + GAP, self.panel[1]
        aspect = self.panel[1] / self.panel[0]
        columns = 1
        while math.ceil(count / columns) * int(width / columns * aspect) > height:
            columns += 1
        return columns, (width // columns, int(width / columns * aspect))

    def _progress(self, draw: ImageDraw.ImageDraw, share: float) -> None:
        top, right = self.foot, self.lefts[0] + self.panel[0]
        draw.rectangle((MARGIN, top, right, top + 5), fill=RULE)
        end = MARGIN + round(share * self.panel[0])
        draw.rectangle((MARGIN, top, end, top + 5), fill=INK)
