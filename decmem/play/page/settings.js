// The switches: they show what the server says holds, and ask for what the person wants.

const WHOLE = ["k", "steps", "chunk"];

export class Settings {
  values = { global_memory: true, lens: true };

  constructor(send, changed) {
    this.send = send;
    this.changed = changed;
    this.memory = document.getElementById("memory");
    this.memorySays = document.getElementById("memory-says");
    this.fields = Object.fromEntries(
      ["k", "steps", "guidance", "chunk", "layer"].map((id) => [id, document.getElementById(id)]),
    );
    this.lens = document.getElementById("lens-on");
    this.memory.addEventListener("click", () => this.toggleMemory());
    this.lens.addEventListener("change", () => this.#ask({ lens: this.lens.checked }));
    for (const [name, field] of Object.entries(this.fields)) {
      field.addEventListener("change", () => this.#read(name, field));
    }
  }

  begin({ max_k, layers, settings, chunk_sizes: sizes = [1], latent_frames, fps }) {
    this.fields.k.max = max_k;
    const seconds = (size) => `${((size * latent_frames) / fps).toFixed(1)} s`;
    this.fields.chunk.replaceChildren(...sizes.map((size) => new Option(seconds(size), size)));
    const layer = this.fields.layer;
    layer.replaceChildren(new Option("all", ""));
    for (let i = 0; i < layers; i++) layer.append(new Option(String(i + 1), String(i)));
    this.show(settings);
  }

  /** The server records what is read only when asked: it costs time. */
  recordLens() {
    this.#ask({ lens: true });
  }

  toggleMemory() {
    this.#ask({ global_memory: !this.values.global_memory });
  }

  show(values) {
    this.values = { ...this.values, ...values };
    const { global_memory: on, lens } = this.values;
    this.memory.setAttribute("aria-checked", on);
    this.memorySays.textContent = on
      ? "on: it looks back at all it has seen"
      : "off: watch it forget";
    document.documentElement.dataset.memory = on ? "on" : "off";
    this.lens.checked = lens;
    for (const [name, field] of Object.entries(this.fields)) {
      const value = this.values[name];
      if (field !== document.activeElement || field.tagName === "SELECT") field.value = value ?? "";
    }
    this.changed(this.values);
  }

  /** Puts back what holds: the server refused a change. */
  restore() {
    document.activeElement?.closest?.("#knobs")?.querySelector(":focus")?.blur();
    this.show({});
  }

  #read(name, field) {
    if (!field.checkValidity()) {
      field.reportValidity();
      return;
    }
    if (field.value === "" && WHOLE.includes(name)) this.restore();
    else this.#ask({ [name]: field.value === "" ? null : Number(field.value) });
  }

  #ask(wish) {
    this.send({ type: "set", ...wish });
  }
}
