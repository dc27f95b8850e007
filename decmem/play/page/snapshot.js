// A PNG of the moment: the dream, and the truth beside it.

const SCALE = 4;
const GAP = 16;
const FOOT = 34;

export async function savePicture(dream, truth, caption, name) {
  const pictures = truth ? [dream, truth] : [dream];
  const [width, height] = [dream.width * SCALE, dream.height * SCALE];
  const canvas = document.createElement("canvas");
  canvas.width = pictures.length * width + (pictures.length + 1) * GAP;
  canvas.height = height + GAP + FOOT;
  const context = canvas.getContext("2d");
  context.fillStyle = "#fafaf7";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  context.font = `16px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "middle";
  pictures.forEach((picture, i) => {
    const x = GAP + i * (width + GAP);
    context.drawImage(picture, x, GAP, width, height);
    context.fillStyle = "#1c1e21";
    context.fillText(i === 0 ? caption : "Truth", x, GAP + height + FOOT / 2);
  });
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const url = URL.createObjectURL(blob);
  download(url, name);
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export function download(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
}
