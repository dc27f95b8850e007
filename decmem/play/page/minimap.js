// The trail of memory, the walk since, where the camera looks, and where it remembers from.

import { fit, palette } from "./palette.js";

const MARGIN = 24; // room for the sight of a camera at the edge
const SMALLEST = 16; // metres the map shows at least
const SIGHT = 22; // pixels
const HALF_VIEW = Math.PI / 5;

export class Minimap {
  #walk = null;
  #read = [];

  constructor(canvas) {
    this.canvas = canvas;
    const draw = () => this.#walk && this.#draw();
    new ResizeObserver(draw).observe(canvas);
    addEventListener("palettechange", draw);
  }

  /** `read` are the blocks in the lens: their latents are marked where they were seen. */
  draw(walk, read) {
    this.#walk = walk;
    this.#read = read ?? [];
    this.#draw();
  }

  #draw() {
    const { context, width, height } = fit(this.canvas);
    if (width === 0) return;
    const walked = this.#walk.path.map(({ x, z }) => [x, z]);
    const points = [...this.#walk.memory, ...walked];
    if (points.length === 0) return;
    const view = this.#view(points, width, height);
    const place = ([x, z]) => [view.x + x * view.scale, view.y + z * view.scale];
    const seam = this.#walk.memory.at(-1);
    this.#trail(context, this.#walk.memory.map(place), palette.muted, 1.5);
    this.#trail(context, [...(seam ? [seam] : []), ...walked].map(place), palette.dream, 2.25);
    this.#marks(context, place);
    if (this.#walk.camera) this.#camera(context, place, this.#walk.camera);
    this.#scale(context, view.scale, height);
  }

  // North (-z) is up, so x and z are the picture's own axes.
  #view(points, width, height) {
    const bounds = [0, 1].map((axis) => {
      const values = points.map((point) => point[axis]);
      return [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    });
    const spans = bounds.map(([low, high]) => Math.max(high - low, SMALLEST));
    const room = [width - 2 * MARGIN, height - 2 * MARGIN - 14];
    const scale = Math.min(room[0] / spans[0], room[1] / spans[1]);
    const middle = bounds.map(([low, high]) => (low + high) / 2);
    return {
      scale,
      x: width / 2 - middle[0] * scale,
      y: (height - 14) / 2 - middle[1] * scale,
    };
  }

  #trail(context, points, colour, width) {
    if (points.length < 2) return;
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.lineJoin = context.lineCap = "round";
    context.beginPath();
    points.forEach((point) => context.lineTo(...point));
    context.stroke();
  }

  #marks(context, place) {
    const counts = new Map();
    for (const { latent, count } of this.#read) {
      counts.set(latent, (counts.get(latent) ?? 0) + count);
    }
    const most = Math.max(...counts.values(), 1);
    context.fillStyle = palette.dream;
    context.globalAlpha = 0.4;
    for (const [latent, count] of counts) {
      const at = this.#walk.at(latent);
      if (!at) continue;
      context.beginPath();
      context.arc(...place(at), 2 + 4 * Math.sqrt(count / most), 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  #camera(context, place, [x, , z, yaw]) {
    const at = place([x, z]);
    const heading = (yaw * Math.PI) / 180 - Math.PI / 2; // a compass: 0 looks up the map
    context.fillStyle = palette.ink;
    context.globalAlpha = 0.18;
    context.beginPath();
    context.moveTo(...at);
    context.arc(...at, SIGHT, heading - HALF_VIEW, heading + HALF_VIEW);
    context.fill();
    context.globalAlpha = 1;
    context.beginPath();
    context.arc(...at, 4, 0, 2 * Math.PI);
    context.fill();
    context.lineWidth = 1.5;
    context.strokeStyle = palette.paper;
    context.stroke();
  }

  #scale(context, scale, height) {
    const metres = [1, 2, 5, 10, 20, 50, 100, 200, 500].findLast((m) => m * scale <= 64) ?? 1;
    const y = height - 10.5;
    context.strokeStyle = context.fillStyle = palette.muted;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(10, y);
    context.lineTo(10 + metres * scale, y);
    context.stroke();
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillText(`${metres} m`, 16 + metres * scale, y);
  }
}
