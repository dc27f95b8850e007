// A small picture of every known latent: the server's, or one kept from the frame on screen.

const WIDTH = 96;

export class Thumbnails {
  #pictures;

  constructor(pictures = []) {
    this.#pictures = new Map(pictures); // latent (from 0) -> canvas or bitmap
  }

  get(latent) {
    return this.#pictures.get(latent);
  }

  /** A copy without the later latents, which belong to another future. */
  until(latents) {
    return new Thumbnails([...this.#pictures].filter(([latent]) => latent < latents));
  }

  async receive(pictures) {
    const arrived = pictures.map(async ({ latent, blob }) => {
      this.#pictures.set(latent, await createImageBitmap(blob));
    });
    await Promise.all(arrived);
  }

  keep(latent, frame) {
    if (this.#pictures.get(latent) instanceof ImageBitmap) return;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [WIDTH, Math.round((WIDTH * frame.height) / frame.width)];
    canvas.getContext("2d").drawImage(frame, 0, 0, canvas.width, canvas.height);
    this.#pictures.set(latent, canvas);
  }
}
