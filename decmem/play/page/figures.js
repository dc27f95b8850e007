// The live numbers and the curves.

import { Curve } from "./curve.js";
import { bytes, whole } from "./number.js";

const at = (id) => document.getElementById(id);

export class Figures {
  constructor() {
    const colour = ({ remembered }) => (remembered ? "dream" : "off");
    this.curves = [
      new Curve(at("psnr-curve"), {
        value: ({ psnr }) => psnr, colour, low: 10, high: 30, step: 5, unit: "dB",
      }),
      new Curve(at("fps-curve"), {
        value: ({ fps }) => fps, low: 0, high: 12, step: 4, goal: 10, unit: "frames a second",
      }),
      new Curve(at("latency-curve"), {
        value: ({ latency }) => latency, low: 0, high: 1000, step: 250, unit: "milliseconds",
      }),
    ];
  }

  frame(psnr) {
    at("psnr").textContent = psnr === null ? "" : `${psnr.toFixed(1)} dB`;
  }

  chunk({ fps, realtime, latents, memory_bytes }, latency) {
    at("fps").textContent = fps === null ? "–" : fps.toFixed(1);
    at("latency").textContent = latency === null ? "–" : `${whole(latency)} ms`;
    at("realtime").textContent = realtime ? "yes" : "no";
    at("realtime").dataset.good = realtime;
    at("known").textContent = whole(latents);
    at("bytes").textContent = bytes(memory_bytes);
  }

  draw(walk) {
    for (const curve of this.curves) curve.draw(walk.frames);
  }
}
