// The keyboard: physical keys, so that W A S D lie under the same fingers on every layout.

const KEYS = {
  KeyW: "forward",
  KeyS: "back",
  KeyA: "left",
  KeyD: "right",
  Space: "jump",
  ShiftLeft: "sprint",
  ShiftRight: "sprint",
  ArrowLeft: "look_left",
  ArrowRight: "look_right",
  ArrowUp: "look_up",
  ArrowDown: "look_down",
};

/** Steers with the keyboard; `shortcuts` are functions by key code. */
export function listenToKeys(steering, shortcuts) {
  const down = new Set();
  const hold = () => steering.hold("keyboard", [...down].map((code) => KEYS[code]));

  addEventListener("keydown", (event) => {
    if (!steering.active || event.ctrlKey || event.metaKey || event.altKey) return;
    if (belongsTo(event.target, event.code)) return;
    if (event.code in KEYS) {
      event.preventDefault();
      if (event.repeat) return;
      down.add(event.code);
      hold();
    } else if (event.code in shortcuts && !event.repeat) {
      event.preventDefault();
      shortcuts[event.code]();
    }
  });
  addEventListener("keyup", (event) => {
    if (down.delete(event.code)) hold();
  });
  const release = () => {
    down.clear();
    steering.release();
  };
  addEventListener("blur", release);
  document.addEventListener("visibilitychange", () => document.hidden && release());
}

// A field keeps its keys. A button keeps only those that press it or that move between buttons.
function belongsTo(target, code) {
  if (!(target instanceof Element)) return false;
  if (target.matches("select, textarea, input:not([type=checkbox])")) return true;
  if (!target.matches("button, a, summary, input")) return false;
  return code === "Space" || (code.startsWith("Arrow") && target.closest("ol") !== null);
}
