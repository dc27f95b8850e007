// The slider of past chunks: it follows the present until a hand takes it.

import { clock } from "./number.js";

export class Timeline {
  #taken = false;
  #first = 1;
  #latents = 1;

  /** `preview(latents)` shows a past moment, null the present; `rewind(latents)` goes there. */
  constructor({ slider, moment, button }, { preview, rewind }) {
    Object.assign(this, { slider, moment, button, preview });
    this.secondsPerLatent = 0.4;
    slider.addEventListener("input", () => this.#take());
    slider.addEventListener("keydown", ({ key }) => {
      if (key === "Enter" && this.#taken) button.click();
      if (key === "Escape") this.release();
    });
    button.addEventListener("click", () => {
      const latents = Number(slider.value);
      rewind(latents);
      this.release();
    });
  }

  /** The first latents a rewind can go back to, and how many are known now. */
  update(first, latents) {
    this.#first = first;
    this.#latents = latents;
    this.slider.min = first;
    this.slider.max = latents;
    if (!this.#taken) this.slider.value = latents;
    this.#draw();
  }

  release() {
    if (this.#taken) this.preview(null);
    this.#taken = false;
    this.update(this.#first, this.#latents);
  }

  #take() {
    this.#taken = Number(this.slider.value) < this.#latents;
    this.preview(this.#taken ? Number(this.slider.value) : null);
    this.#draw();
  }

  #draw() {
    const value = Number(this.slider.value);
    const span = Math.max(1, this.#latents - this.#first);
    this.slider.style.setProperty("--share", (value - this.#first) / span);
    const walked = (this.#latents - this.#first) * this.secondsPerLatent;
    const ago = (this.#latents - value) * this.secondsPerLatent;
    const text = this.#taken ? `${ago.toFixed(1)} s ago` : `now, ${clock(walked)}`;
    this.moment.textContent = text;
    this.slider.setAttribute("aria-valuetext", text);
    this.button.disabled = !this.#taken;
  }
}
