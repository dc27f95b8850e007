// Binary messages: a little-endian length, a JSON header, then the pictures one after the other.

const utf8 = new TextDecoder();

/** Header and pictures of a binary message; each picture is {kind, ..., blob}. */
export function openPacket(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(utf8.decode(new Uint8Array(buffer, 4, length)));
  let offset = 4 + length;
  const pictures = header.parts.map((part) => {
    const bytes = new Uint8Array(buffer, offset, part.bytes);
    offset += part.bytes;
    return { ...part, blob: new Blob([bytes], { type: "image/jpeg" }) };
  });
  return { header, pictures };
}

/** The pictures of one kind, decoded, in the order of `by`. */
export function decode(pictures, kind, by) {
  const chosen = pictures.filter((picture) => picture.kind === kind);
  chosen.sort((a, b) => a[by] - b[by]);
  return Promise.all(chosen.map((picture) => createImageBitmap(picture.blob)));
}
