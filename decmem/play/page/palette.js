// The theme's colours as a canvas needs them: plain values instead of CSS variables.

const NAMES = ["paper", "ink", "muted", "rule", "empty", "dream", "off"];

function read() {
  const probe = document.createElement("i");
  document.body.append(probe);
  const colours = {};
  for (const name of NAMES) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return colours;
}

export const palette = read();

const refresh = () => {
  Object.assign(palette, read());
  dispatchEvent(new Event("palettechange"));
};
addEventListener("themechange", refresh);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);

/** Fits a canvas to its box and the screen's pixels; its context then counts in CSS pixels. */
export function fit(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = devicePixelRatio;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  return { context, width, height };
}
