// The mouse: a click on the dream takes it, Escape gives it back.

const DEGREES_PER_PIXEL = 0.12;

export function listenToMouse(stage, steering, changed) {
  const held = () => document.pointerLockElement === stage;
  stage.addEventListener("click", async (event) => {
    if (!steering.active || held() || event.pointerType === "touch") return;
    stage.focus({ preventScroll: true });
    try {
      await stage.requestPointerLock();
    } catch {
      // browsers refuse for a second after Escape; the next click works
    }
  });
  document.addEventListener("mousemove", (event) => {
    if (!held()) return;
    steering.turn(event.movementX * DEGREES_PER_PIXEL, -event.movementY * DEGREES_PER_PIXEL);
  });
  document.addEventListener("pointerlockchange", () => changed(held()));
}
