// A curve of the last half minute.

import { fit, palette } from "./palette.js";

const FRAMES = 300;
const LEFT = 30;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 8;

export class Curve {
  /**
   * `value(frame)` is a number or null, `colour(frame)` a name of the palette; the axis spans at
   * least `low` to `high`; a `goal` is a dashed rule.
   */
  constructor(canvas, { value, colour = () => "dream", low, high, step, goal = null, unit }) {
    Object.assign(this, { canvas, value, colour, low, high, step, goal, unit });
    this.frames = [];
    const draw = () => this.draw(this.frames);
    new ResizeObserver(draw).observe(canvas);
    addEventListener("palettechange", draw);
  }

  draw(frames) {
    this.frames = frames;
    const shown = frames.slice(-FRAMES);
    const { context, width, height } = fit(this.canvas);
    if (width === 0) return;
    const values = shown.map(this.value);
    const known = values.filter((value) => value !== null);
    const step = this.#step(Math.max(this.high, ...known) - this.low);
    const low = Math.min(this.low, step * Math.floor(Math.min(this.low, ...known) / step));
    const high = Math.max(step * Math.ceil(Math.max(this.high, ...known) / step), low + step);
    const y = (value) => TOP + ((height - TOP - BOTTOM) * (high - value)) / (high - low);
    const x = (i) => LEFT + ((width - LEFT - RIGHT) * i) / (FRAMES - 1);
    this.#axis(context, { low, high, step, y, width });
    this.#line(context, shown, values, x, y);
    const last = known.at(-1);
    const label = this.canvas.getAttribute("aria-label").split(":")[0];
    const words = last === undefined ? "no values yet" : `now ${last.toFixed(1)} ${this.unit}`;
    this.canvas.setAttribute("aria-label", `${label}: ${words}`);
  }

  #step(span) {
    let step = this.step;
    while (span / step > 4) step *= 2;
    return step;
  }

  #axis(context, { low, high, step, y, width }) {
    context.lineWidth = 1;
    context.strokeStyle = palette.rule;
    context.fillStyle = palette.muted;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let level = low; level <= high; level += step) {
      const line = Math.round(y(level)) + 0.5;
      context.beginPath();
      context.moveTo(LEFT, line);
      context.lineTo(width - RIGHT, line);
      context.stroke();
      context.fillText(String(level), LEFT - 6, line);
    }
    if (this.goal === null) return;
    context.strokeStyle = palette.muted;
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(LEFT, Math.round(y(this.goal)) + 0.5);
    context.lineTo(width - RIGHT, Math.round(y(this.goal)) + 0.5);
    context.stroke();
    context.setLineDash([]);
  }

  #line(context, frames, values, x, y) {
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    let last = null; // a gap where a value is missing, a new stroke where the colour changes
    frames.forEach((frame, i) => {
      const value = values[i];
      if (value === null) {
        last = null;
        return;
      }
      const point = [x(i), y(value)];
      if (last) {
        context.strokeStyle = palette[this.colour(frame)];
        context.beginPath();
        context.moveTo(...last);
        context.lineTo(...point);
        context.stroke();
      }
      last = point;
    });
    if (!last) return;
    context.fillStyle = palette[this.colour(frames.at(-1))];
    context.beginPath();
    context.arc(...last, 3, 0, 2 * Math.PI);
    context.fill();
  }
}
