"""The PSNR curve that grows under the film."""

import math

import numpy as np
from jaxtyping import Float64
from PIL import Image, ImageDraw

from decmem.evaluation.lettering import COLOURS, INK, MUTED, PAPER, RULE, TITLES, write
from decmem.evaluation.take import CURVES

_SMOOTH = 3
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 34, 34


class CurveStrip:
    """PSNR over the dreamt frames, drawn once and uncovered from left to right.

    ``size`` is (width, height) in pixels; ``psnr`` holds one curve per name in ``CURVES``.
    """

    def __init__(
        self, size: tuple[int, int], psnr: dict[str, Float64[np.ndarray, "F"]], fps: float
    ) -> None:
        self.size = size
        self.psnr = psnr
        self.seconds = np.arange(1, len(psnr["full"]) + 1) / fps
        values = np.concatenate([psnr[name] for name in CURVES])
        self.low = 5.0 * math.floor(min(values.min(), 10.0) / 5.0)
        self.high = 5.0 * math.ceil(max(values.max(), 30.0) / 5.0)
        self.empty = self._axes()
        self.full = self._curves()

    def picture(self, index: int | None) -> Image.Image:
        """The strip with the curves up to dreamt frame ``index`` (from 0); None: axes only."""
        canvas = self.empty.copy()
        if index is None:
            return canvas
        edge = round(self._x(self.seconds[index])) + 1
        canvas.paste(self.full.crop((0, 0, edge, self.size[1])), (0, 0))
        draw = ImageDraw.Draw(canvas)
        for name in reversed(CURVES):
            x, y = self._x(self.seconds[index]), self._y(self.psnr[name][index])
            radius = 3 if name == "codec" else 5
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[name])
        return canvas

    def _x(self, seconds: float) -> float:
        width = self.size[0] - _LEFT - _RIGHT
        return _LEFT + width * seconds / float(self.seconds[-1])

    def _y(self, decibels: float) -> float:
        height = self.size[1] - _TOP - _BOTTOM
        return _TOP + height * (self.high - decibels) / (self.high - self.low)

    def _axes(self) -> Image.Image:
        canvas = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(canvas)
        right = self.size[0] - _RIGHT
        step = 10 if self.high - self.low > 25 else 5
        for level in range(step * math.ceil(self.low / step), int(self.high) + 1, step):
            y = round(self._y(level))
            draw.line((_LEFT, y, right, y), fill=RULE, width=1)
            write(draw, (_LEFT - 12, y), str(level), 16, MUTED, "rm")
        total = float(self.seconds[-1])
        every = next(s for s in (1, 2, 5, 10, 30, 60, 300, math.inf) if total / s <= 13)
        ticks = np.arange(0, total + 1e-9, every) if every < math.inf else np.array([0.0, total])
        for tick in ticks:
            label, anchor = (f"{tick:g} s", "rt") if tick == ticks[-1] else (f"{tick:g}", "mt")
            write(draw, (self._x(tick), self.size[1] - _BOTTOM + 10), label, 16, MUTED, anchor)
        write(draw, (_LEFT, 4), "PSNR in dB: how close to the truth", 17, INK, "lt")
        x = float(right)
        for name in reversed(CURVES):
            label = "codec alone, the ceiling" if name == "codec" else TITLES[name].lower()
            x -= write(draw, (x, 4), label, 17, COLOURS[name], "rt") + 24
        return canvas

    def _curves(self) -> Image.Image:
        scale = _SMOOTH
        canvas = self.empty.resize((self.size[0] * scale, self.size[1] * scale))
        draw = ImageDraw.Draw(canvas)
        for name in reversed(CURVES):
            points = [
                (scale * self._x(s), scale * self._y(p))
                for s, p in zip(self.seconds, self.psnr[name], strict=True)
            ]
            width = (2 if name == "codec" else 3) * scale
            draw.line(points, fill=COLOURS[name], width=width, joint="curve")
        lines = canvas.resize(self.size, Image.Resampling.LANCZOS)
        # Text keeps its crisp edges: only the plotting area comes from the enlarged drawing.
        box = (_LEFT, _TOP - 4, self.size[0], self.size[1] - _BOTTOM + 4)
        merged = self.empty.copy()
        merged.paste(lines.crop(box), box[:2])
        return merged
