// What the page knows of one branch: where memory was, where the walk went, and its curves.

import { Thumbnails } from "./thumbnails.js";

const LONGEST_CURVE = 36_000; // an hour of frames

export class Walk {
  memory = []; // [x, z] of every latent that was watched
  path = []; // {latent, x, z} of every dreamt latent; latents count from 1
  frames = []; // {latent, psnr, remembered, fps, latency} of every dreamt frame
  thumbnails = new Thumbnails();
  latents = 0;
  camera = null; // [x, y, z, yaw, pitch]

  /** Takes the server's word for where every latent was seen from. */
  follow(trail, latents) {
    const begun = this.memory.length;
    this.path = trail.slice(begun).map(([x, z], i) => ({ latent: begun + i + 1, x, z }));
    this.frames = this.frames.filter((frame) => frame.latent <= latents);
    this.latents = latents;
  }

  /** Where the camera was at `latent` (from 0), or null. */
  at(latent) {
    if (latent < this.memory.length) return this.memory[latent];
    const point = this.path[latent - this.memory.length];
    return point ? [point.x, point.z] : null;
  }

  add({ latent, pose, ...figures }) {
    this.latents = Math.max(this.latents, latent);
    this.frames.push({ latent, ...figures });
    if (this.frames.length > LONGEST_CURVE) this.frames.shift();
    if (!pose) return;
    this.camera = pose;
    const point = { latent, x: pose[0], z: pose[2] };
    if (this.path.at(-1)?.latent === latent) this.path[this.path.length - 1] = point;
    else this.path.push(point);
  }

  /** The walk as it was when `latents` were known. */
  until(latents) {
    const walk = new Walk();
    walk.memory = this.memory.slice(0, latents);
    walk.path = this.path.filter((point) => point.latent <= latents);
    walk.frames = this.frames.filter((frame) => frame.latent <= latents);
    walk.thumbnails = this.thumbnails.until(latents);
    walk.latents = Math.min(this.latents, latents);
    walk.camera = walk.latents === this.latents ? this.camera : null;
    return walk;
  }
}
