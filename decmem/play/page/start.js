// The panel that begins a world: its choices, the upload, and the progress bar.

import { bytes, whole } from "./number.js";

const SEEDS = 2 ** 31;
const STAGES = {
  render: "Walking through the true world",
  encode: "Encoding what was seen",
  remember: "Remembering it",
};

export class Start {
  #limits = {};
  #ready = false;

  constructor({ connection, notices, sketched }) {
    Object.assign(this, { connection, notices, sketched });
    for (const id of ["choices", "seed", "die", "enter", "back", "queue", "loading"]) {
      this[id] = document.getElementById(id);
    }
    this.choices.addEventListener("change", () => this.#choose());
    this.choices.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#begin();
    });
    this.die.addEventListener("click", () => this.#roll());
    this.seed.addEventListener("input", () => sketched(Number(this.seed.value)));
    this.#roll();
    this.#choose();
  }

  ready(hello) {
    this.#limits = hello.limits?.upload_bytes ?? {};
    this.#ready = true;
    this.enter.disabled = false;
    this.queue.hidden = true;
    const frame = hello.size.toReversed().join(" × ");
    const machine = { Model: hello.preset, Frame: frame, Runs: hello.machine };
    const list = document.getElementById("machine");
    list.replaceChildren();
    for (const [term, value] of Object.entries(machine)) {
      if (!value) continue;
      const pair = document.createElement("div");
      pair.append(document.createElement("dt"), document.createElement("dd"));
      pair.firstChild.textContent = term;
      pair.lastChild.textContent = value;
      list.append(pair);
    }
  }

  wait({ position, message }) {
    this.queue.hidden = position <= 0;
    const place = position === 1 ? "You are next." : `You are number ${position} in the queue.`;
    this.queue.textContent = `${place} ${message ?? ""}`;
  }

  progress({ stage, done, total }) {
    this.queue.hidden = true;
    const name = document.getElementById("stage-name");
    const text = STAGES[stage] ?? stage;
    if (name.textContent !== text) name.textContent = text;
    document.getElementById("progress").value = total ? done / total : 0;
    document.getElementById("progress-count").textContent = `${whole(done)} of ${whole(total)}`;
  }

  /** Shows the choices (false) or the progress (true). */
  load(loading) {
    this.choices.hidden = loading;
    this.loading.hidden = !loading;
    this.enter.disabled = loading || !this.#ready;
  }

  #choose() {
    const from = this.choices.elements.from.value;
    for (const choice of this.choices.querySelectorAll(".choice")) {
      choice.hidden = choice.dataset.from !== from;
      for (const input of choice.querySelectorAll("input")) {
        input.disabled = choice.hidden;
        input.required = !choice.hidden;
      }
    }
  }

  #roll() {
    this.seed.value = Math.floor(Math.random() * SEEDS);
    this.sketched(Number(this.seed.value));
  }

  async #begin() {
    const from = this.choices.elements.from.value;
    this.enter.disabled = true;
    try {
      if (from === "seed") {
        this.connection.send({ type: "start", from, seed: Number(this.seed.value) });
      } else {
        // A video is looked at together with the track that came before it.
        if (from === "video") await this.#upload("track");
        const id = await this.#upload(from);
        this.connection.send({ type: "start", from: "upload", upload: id });
      }
    } catch (error) {
      this.notices.error(error.notice ?? offline());
      this.enter.disabled = false;
    }
  }

  async #upload(kind) {
    const [file] = document.getElementById(kind).files;
    const limit = this.#limits[kind];
    if (limit && file.size > limit) {
      const problem = `${file.name} has ${bytes(file.size)}, more than ${bytes(limit)}`;
      throw refusal({ argument: kind, problem, cure: "choose a smaller file" });
    }
    this.enter.textContent = "Sending…";
    try {
      const query = new URLSearchParams({ kind, session: this.connection.token });
      const answer = await fetch(`/upload?${query}`, { method: "POST", body: file });
      const { id, error } = await answer.json();
      if (error) throw refusal(error);
      return id;
    } finally {
      this.enter.textContent = "Enter the world";
    }
  }
}

const refusal = (notice) => Object.assign(new Error(notice.problem), { notice });
const offline = () => ({
  argument: "upload",
  problem: "the file did not reach the server",
  cure: "check the connection and try again",
});
