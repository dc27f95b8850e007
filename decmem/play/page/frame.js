// From a chunk to its frames: pictures, figures, and which latent each belongs to.

import { decode } from "./packet.js";

/** The frames of a chunk, decoded; what all of them share is laid beside each. */
export async function openFrames(header, pictures, latentFrames, shared) {
  const [dreams, truths] = await Promise.all([
    decode(pictures, "dream", "frame"),
    decode(pictures, "truth", "frame"),
  ]);
  const before = header.latents - Math.ceil(dreams.length / latentFrames);
  return dreams.map((dream, i) => ({
    ...shared,
    header,
    i,
    dream,
    truth: truths[i],
    psnr: header.psnr?.[i] ?? null,
    pose: header.poses?.[i] ?? null,
    latent: before + Math.floor(i / latentFrames) + 1,
    last: i === dreams.length - 1,
  }));
}
