// A phone's controls: a stick to walk, a field to look around, jump and run.

const DEGREES_PER_PIXEL = 0.3;
const DEAD = 0.3; // share of the stick's radius in which nothing happens
const STEEP = Math.sin(Math.PI / 8); // a direction counts within 67.5 degrees of it

export function listenToTouch(steering, { stick, knob, look, jump, sprint }) {
  let running = false;
  let walking = [];
  const hold = () => {
    const sprinting = running && walking.length > 0;
    steering.hold("stick", sprinting ? [...walking, "sprint"] : walking);
  };

  drag(stick, (event) => {
    const box = stick.getBoundingClientRect();
    const radius = box.width / 2;
    let x = (event.clientX - box.left) / radius - 1;
    let y = (event.clientY - box.top) / radius - 1;
    const length = Math.hypot(x, y);
    if (length > 1) [x, y] = [x / length, y / length];
    knob.style.translate = `${x * radius * 0.55}px ${y * radius * 0.55}px`;
    walking = length < DEAD ? [] : directions(x / length, y / length);
    hold();
  }, () => {
    knob.style.translate = "";
    walking = [];
    hold();
  });

  let from = null;
  drag(look, (event) => {
    if (from) {
      const [dx, dy] = [event.clientX - from[0], event.clientY - from[1]];
      steering.turn(dx * DEGREES_PER_PIXEL, -dy * DEGREES_PER_PIXEL);
    }
    from = [event.clientX, event.clientY];
  }, () => (from = null));

  drag(jump, () => steering.hold("jump", ["jump"]), () => steering.hold("jump", []));
  sprint.addEventListener("click", () => {
    running = !running;
    sprint.setAttribute("aria-pressed", running);
    hold();
  });
}

function directions(x, y) {
  const keys = [];
  if (y < -STEEP) keys.push("forward");
  if (y > STEEP) keys.push("back");
  if (x < -STEEP) keys.push("left");
  if (x > STEEP) keys.push("right");
  return keys;
}

function drag(element, move, end) {
  const fingers = new Set();
  element.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    element.setPointerCapture(event.pointerId);
    fingers.add(event.pointerId);
    move(event);
  });
  element.addEventListener("pointermove", (event) => {
    if (fingers.has(event.pointerId)) move(event);
  });
  for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
    element.addEventListener(type, (event) => {
      if (fingers.delete(event.pointerId) && fingers.size === 0) end();
    });
  }
}
