// A small picture of every known latent.

export class Thumbnails {
  #pictures;

  constructor(pictures = []) {
    this.#pictures = new Map(pictures); // latent (from 0) -> bitmap
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
}
