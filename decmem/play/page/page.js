// Puts the parts of the page together: what the server says goes to the right part, and what the
// person does goes to the server.

import { Branches } from "./branches.js";
import { Connection } from "./connection.js";
import { Figures } from "./figures.js";
import { openFrames } from "./frame.js";
import { listenToKeys } from "./keyboard.js";
import { Lens } from "./lens.js";
import { Minimap } from "./minimap.js";
import { listenToMouse } from "./mouse.js";
import { Notices } from "./notices.js";
import { bytes, whole } from "./number.js";
import { Overlay } from "./overlay.js";
import { Player } from "./player.js";
import { Screen } from "./screen.js";
import { Settings } from "./settings.js";
import { sketch } from "./sketch.js";
import { download, savePicture } from "./snapshot.js";
import { Start } from "./start.js";
import { Status } from "./status.js";
import { Steering } from "./steering.js";
import { Timeline } from "./timeline.js";
import { listenToTouch } from "./touch.js";

const FRAMES_PER_LATENT = 4;
const root = document.documentElement;
const at = (id) => document.getElementById(id);

const scheme = location.protocol === "https:" ? "wss" : "ws";
const connection = new Connection(`${scheme}://${location.host}/ws`);
const send = (message) => {
  if (message.type === "input") at("hint").hidden = true; // whoever walks has understood
  connection.send(message);
};
const notices = new Notices(at("notices"));
const status = new Status();
const screen = new Screen(at("dream"), at("truth"));
const overlay = new Overlay(at("overlay"));
const figures = new Figures();
const minimap = new Minimap(at("map"));
const branches = new Branches(at("branch"), at("fork"), send);
const lens = new Lens(at("retrieved"), at("lens-says"), (asked) => overlay.asked(asked));
const steering = new Steering(send);
const settings = new Settings(send, () => lensSwitched());
const player = new Player(paint, (chunk) => send({ type: "seen", chunk }));

let seed = null;
let first = 1; // latents the world began with: no rewind goes further back
let truth = true;
let painted = false; // whether a frame of this world was on the screen
let read = null; // the lens of the chunk on screen
let latency = null;
let latentFrames = FRAMES_PER_LATENT;
let resumed = false; // the server took up the world this page already shows

// ---- what is shown ----

function freeButtons() {
  for (const what of ["world", "video"]) at(`save-${what}`).disabled = false;
}

function view(name) {
  root.dataset.view = name;
  steering.active = name === "walk";
  start.load(name === "loading");
  const world = seed === null ? "Your world" : `World ${whole(seed)}`;
  at("place").textContent = name === "walk" ? world : "Walk in a dream";
  document.title = `${at("place").textContent} · decmem`;
}

const drawSketch = (value) => {
  if (root.dataset.view === "start") sketch(at("dream"), value);
};
const start = new Start({ connection, notices, sketched: drawSketch });
addEventListener("palettechange", () => drawSketch(Number(start.seed.value)));

function lensSwitched() {
  const { global_memory: remembers, lens: recorded } = settings.values;
  at("dream-sub").textContent = remembers ? "from actions and memory" : "global memory off";
  lens.draw(read, branches.walk.thumbnails, { remembers, recorded });
}

function paint({ header, i, dream, truth, psnr, pose, latent, remembered }) {
  const { walk } = branches;
  if (!painted) screen.preview(null);
  painted = true;
  screen.paint(dream, truth);
  if (i === 0) {
    latency = steering.answered(header.sequence) ?? latency;
    read = header.lens;
    lensSwitched();
    figures.chunk(header, latency);
  }
  walk.add({ latent, pose, psnr, remembered, fps: header.fps, latency });
  overlay.strength(header.lens?.strength?.[Math.floor(i / latentFrames)] ?? null);
  figures.frame(psnr);
  minimap.draw(walk, read?.retrieved);
  if (i === header.frames - 1) {
    figures.draw(walk);
    timeline.update(first, header.latents);
  }
}

function redraw() {
  const { walk } = branches;
  read = null;
  overlay.strength(null);
  lensSwitched();
  figures.draw(walk);
  minimap.draw(walk, null);
  timeline.update(first, walk.latents);
}

// ---- time ----

let paused = false; // by the slider, which lets go again
const timeline = new Timeline(
  { slider: at("timeline"), moment: at("moment"), button: at("rewind") },
  {
    preview(latents) {
      root.dataset.past = latents === null ? "no" : "yes";
      if (latents === null) {
        screen.preview(null);
        if (paused) send({ type: "resume" });
        paused = false;
        return;
      }
      if (!paused && status.state === "running") {
        paused = true;
        send({ type: "pause" });
      }
      screen.preview(branches.walk.thumbnails.get(latents - 1));
    },
    rewind: (latent) => send({ type: "rewind", latent }),
  },
);

const togglePause = () => send({ type: status.state === "paused" ? "resume" : "pause" });

// ---- the server's messages ----

connection
  .on("hello", (hello) => {
    resumed = hello.resumed;
    latentFrames = hello.latent_frames;
    player.fps = hello.fps;
    player.flush();
    timeline.secondsPerLatent = latentFrames / hello.fps;
    overlay.blocks = lens.blocks = hello.blocks;
    lens.aspect = hello.size[1] / hello.size[0];
    screen.resize(hello.size);
    steering.forget();
    settings.begin(hello);
    start.ready(hello);
    freeButtons();
    status.veil(null);
    status.say("ready", "waiting");
    if (hello.lost && root.dataset.view !== "start") {
      notices.error({
        problem: "The server no longer knows this world.",
        cure: "Begin a new one, or load a memory that you saved.",
      });
    }
    if (!hello.resumed) {
      view("start");
      settings.recordLens();
    }
    if (root.dataset.view === "start") drawSketch(Number(start.seed.value));
  })
  .on("lost", ({ delay }) => {
    status.say("no connection", "stopped");
    const seconds = Math.ceil(delay / 1000);
    const text = `No connection. Trying again in ${seconds} s.`;
    status.veil(text, "Try now", () => connection.connect());
  })
  .on("queue", (queue) => {
    start.wait(queue);
    status.say(queue.position > 0 ? `number ${queue.position} in the queue` : "ready", "waiting");
  })
  .on("progress", (progress) => {
    // Saving and changing branches take a while too, but the walk stays on the screen.
    if (root.dataset.view === "start") view("loading");
    start.progress(progress);
    status.say(`preparing, ${progress.done} of ${progress.total}`, "loading");
  })
  .on("started", (world) => {
    // A connection that came back is told again what this page still knows better.
    const known = resumed && branches.walk.latents > 0;
    seed = world.seed;
    truth = world.truth;
    root.dataset.truth = truth ? "yes" : "no";
    if (known) {
      branches.walk.follow(world.trail, world.latents);
    } else {
      first = (resumed && connection.recall("first")) || world.latents;
      connection.note("first", first);
      branches.begin(world.trail, world.latents, first);
      latency = null;
      painted = false;
    }
    resumed = false;
    player.flush();
    at("back").hidden = false;
    view("walk");
    status.tell("waking", "");
    at("hint").hidden = false;
    redraw();
    at("stage").focus({ preventScroll: true });
  })
  .on("settings", (values) => settings.show(values))
  .on("branches", (message) => {
    status.tell();
    if (branches.receive(message)) {
      player.flush();
      redraw();
    }
  })
  .on("rewound", ({ latents }) => {
    player.flush();
    branches.rewind(latents);
    redraw();
  })
  .on("thumbnails", async (header, pictures) => {
    const { walk } = branches;
    await walk.thumbnails.receive(pictures);
    // Until the first frame comes, the last thing seen is better than nothing.
    if (!painted) screen.preview(walk.thumbnails.get(walk.latents - 1));
  })
  .on("file", ({ what, url, name, bytes: size }) => {
    at(`save-${what}`).disabled = false;
    status.tell();
    download(url, name);
    notices.done(`${name} is saved.`, bytes(size));
  })
  .on("status", ({ state, reason }) => {
    status.tell(state, reason);
    if (state === "stopped") notices.error({ problem: reason });
    if (state === "loading" && root.dataset.view !== "loading") view("loading");
    if (state === "waiting" && root.dataset.view === "loading") view("start");
  })
  .on("error", (error) => {
    notices.error(error);
    settings.restore();
    freeButtons();
    if (root.dataset.view !== "walk") view("start");
  })
  .on("bye", ({ reason }) => {
    const why = reason ? `: ${reason}` : "";
    status.veil(`The server ended this walk${why}.`, "Begin again", () => connection.connect());
    status.say("ended", "stopped");
  })
  .on("closed", () => {
    const text = "The server closed this line: the walk goes on elsewhere, or the line was slow.";
    status.veil(text, "Go on here", () => connection.connect());
    status.say("closed", "stopped");
  })
  .on("chunk", (header, pictures) => {
    const remembered = settings.values.global_memory;
    player.push(header, openFrames(header, pictures, latentFrames, { remembered }));
  });

// ---- the person ----

listenToKeys(steering, {
  KeyP: togglePause,
  KeyM: () => settings.toggleMemory(),
  KeyH: () => at("heat").click(),
});
listenToMouse(at("stage"), steering, (held) => {
  at("hint").hidden = held;
});
listenToTouch(steering, {
  stick: at("stick"),
  knob: at("knob"),
  look: at("look"),
  jump: at("touch-jump"),
  sprint: at("touch-sprint"),
});
at("hint").textContent = "Click to look with the mouse. W A S D walk, arrow keys look.";
at("pause").addEventListener("click", togglePause);
at("heat").addEventListener("change", ({ target }) => overlay.show(target.checked));
for (const what of ["world", "video"]) {
  at(`save-${what}`).addEventListener("click", ({ currentTarget }) => {
    currentTarget.disabled = true;
    send({ type: "save", what });
  });
}
at("snapshot").addEventListener("click", () => {
  const world = seed === null ? "" : `, world ${seed}`;
  const memory = settings.values.global_memory ? "on" : "off";
  const caption = `Dream${world}, global memory ${memory}`;
  const name = `decmem-${seed ?? "dream"}-${branches.walk.latents}.png`;
  savePicture(at("dream"), truth ? at("truth") : null, caption, name);
});
at("leave").addEventListener("click", () => {
  timeline.release();
  send({ type: "pause" });
  view("start");
  screen.preview(undefined); // frames that still come do not paint over the sketch
  drawSketch(Number(start.seed.value));
  start.seed.focus();
});
start.back.addEventListener("click", () => {
  view("walk");
  screen.preview(null);
  send({ type: "resume" });
});
// A mouse that pressed a button goes back to walking; the keyboard's focus stays where it is.
document.addEventListener("click", ({ target, detail }) => {
  const pressed = target instanceof Element && target.closest("button, .check");
  if (pressed && detail > 0 && steering.active) at("stage").focus({ preventScroll: true });
});

view("start");
connection.connect();
