// The two pictures: the dream with what it shows instead while a past moment is looked at, and
// the truth.

export class Screen {
  #last = document.createElement("canvas");
  #previewing = false;

  constructor(dream, truth) {
    this.dream = dream;
    this.truth = truth;
  }

  resize([height, width]) {
    for (const canvas of [this.dream, this.truth, this.#last]) {
      if (canvas.width !== width || canvas.height !== height) {
        [canvas.width, canvas.height] = [width, height];
      }
    }
    document.documentElement.style.setProperty("--aspect", width / height);
  }

  paint(dream, truth) {
    draw(this.#last, dream);
    if (!this.#previewing) draw(this.dream, dream);
    if (truth) draw(this.truth, truth);
  }

  /** Shows a past picture instead of the present one, undefined whatever is there; null goes back. */
  preview(picture) {
    this.#previewing = picture !== null;
    if (picture !== undefined) draw(this.dream, picture ?? this.#last);
  }
}

const draw = (canvas, picture) => {
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
};
