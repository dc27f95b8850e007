// What the dream's canvas shows before there is a dream: a skyline of blocks, a new one per seed.

import { palette } from "./palette.js";

const BLOCK = 8;
const HILLS = [
  { base: 0.52, rise: 0.2, alpha: 0.1 },
  { base: 0.66, rise: 0.18, alpha: 0.14 },
  { base: 0.8, rise: 0.14, alpha: 0.2 },
];

// Mulberry32: small, and the same on every machine.
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export function sketch(canvas, seed) {
  const random = generator(seed);
  const { width, height } = canvas;
  const context = canvas.getContext("2d");
  context.fillStyle = palette.empty;
  context.fillRect(0, 0, width, height);
  context.fillStyle = palette.dream;
  for (const { base, rise, alpha } of HILLS) {
    context.globalAlpha = alpha;
    let level = base + rise * (random() - 0.5);
    for (let x = 0; x < width; x += BLOCK) {
      if (random() < 0.55) level += (BLOCK / height) * (random() < 0.5 ? -1 : 1);
      level = Math.min(base + rise / 2, Math.max(base - rise / 2, level));
      const top = Math.round((level * height) / BLOCK) * BLOCK;
      context.fillRect(x, top, BLOCK, height - top);
    }
  }
  context.globalAlpha = 1;
}
