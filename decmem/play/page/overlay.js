// What lies over the dream: the strength of the global memory, and the regions that asked.

import { fit } from "./palette.js";

// Over a picture the theme does not count: the same blue and white in light and dark.
const HEAT = "0, 114, 178";
const DARKEST = 0.8;
const BRIGHT = "rgb(255 255 255 / 0.95)";
const CHIP = "rgb(20 21 23 / 0.75)";

export class Overlay {
  #strength = null;
  #asked = null;
  heat = false;

  constructor(canvas) {
    this.canvas = canvas;
    this.blocks = [2, 3];
    new ResizeObserver(() => this.#draw()).observe(canvas);
  }

  /** The strength in each region at the frame on screen, or null. */
  strength(values) {
    this.#strength = values;
    if (this.heat) this.#draw();
  }

  /** How often each region asked for the block under the pointer, or null. */
  asked(counts) {
    this.#asked = counts;
    this.#draw();
  }

  show(heat) {
    this.heat = heat;
    this.#draw();
  }

  #draw() {
    const { context, width, height } = fit(this.canvas);
    const [rows, columns] = this.blocks;
    const box = (region) => [
      ((region % columns) * width) / columns,
      (Math.floor(region / columns) * height) / rows,
      width / columns,
      height / rows,
    ];
    if (this.#asked) this.#regions(context, box);
    else if (this.heat && this.#strength) this.#heat(context, box);
  }

  #heat(context, box) {
    this.#strength.forEach((value, region) => {
      const [x, y, w, h] = box(region);
      // The root spreads the low strengths, where most of them lie; the number is exact.
      context.fillStyle = `rgba(${HEAT}, ${DARKEST * Math.sqrt(Math.min(1, Math.max(0, value)))})`;
      context.fillRect(x, y, w, h);
      this.#chip(context, `${Math.round(100 * value)} %`, x + 8, y + 8);
    });
  }

  #regions(context, box) {
    const most = Math.max(...this.#asked, 1);
    this.#asked.forEach((count, region) => {
      const [x, y, w, h] = box(region);
      if (count === 0) {
        context.fillStyle = "rgb(0 0 0 / 0.45)";
        context.fillRect(x, y, w, h);
        return;
      }
      context.strokeStyle = BRIGHT;
      context.globalAlpha = 0.45 + (0.55 * count) / most;
      context.lineWidth = 3;
      context.strokeRect(x + 2.5, y + 2.5, w - 5, h - 5);
      context.globalAlpha = 1;
      this.#chip(context, `asked ${count}×`, x + 8, y + h - 28);
    });
  }

  #chip(context, text, x, y) {
    context.font = context.font.replace(/^\d+px/, "12px");
    const width = context.measureText(text).width + 12;
    context.fillStyle = CHIP;
    context.beginPath();
    context.roundRect(x, y, width, 20, 4);
    context.fill();
    context.fillStyle = "white";
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillText(text, x + 6, y + 10.5);
  }
}
