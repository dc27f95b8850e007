// The memory lens: which past blocks the chunk on screen read, most read first.

import { plural } from "./number.js";

const HEIGHT = 96; // pixels of a drawn thumbnail; CSS scales it down

export class Lens {
  #items = [];
  #shown = [];
  #held = false;

  /** `highlight(asked)` shows the regions that asked for a block, null for none. */
  constructor(list, says, highlight) {
    Object.assign(this, { list, says, highlight });
    this.blocks = [2, 3];
    this.aspect = 1.5;
    // A list that changes under the pointer cannot be read: it waits until the pointer has left.
    list.addEventListener("pointerleave", () => this.#hold(false));
    list.addEventListener("focusout", () => this.#hold(false));
    list.addEventListener("keydown", (event) => this.#step(event));
  }

  draw(lens, thumbnails, { remembers, recorded }) {
    this.thumbnails = thumbnails;
    this.#shown = lens?.retrieved ?? [];
    this.words = !remembers
      ? "Global memory is off: nothing is read from the past."
      : !recorded
        ? "Not recorded. Switch it on to see what is read."
        : lens
          ? "Nothing was read."
          : "Nothing is read yet.";
    if (!this.#held) this.#draw();
  }

  #draw() {
    const blocks = [...this.#shown].sort((a, b) => b.count - a.count);
    while (this.#items.length < blocks.length) this.#items.push(this.#item());
    this.#items.forEach((item, i) => {
      item.row.hidden = i >= blocks.length;
      if (i < blocks.length) this.#fill(item, blocks[i]);
    });
    this.says.hidden = blocks.length > 0;
    if (this.says.textContent !== this.words) this.says.textContent = this.words;
  }

  #item() {
    const row = document.createElement("li");
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    const label = document.createElement("span");
    button.type = "button";
    button.tabIndex = this.#items.length === 0 ? 0 : -1; // one tab stop, arrows move within
    button.append(canvas, label);
    row.append(button);
    this.list.append(row);
    const item = { row, button, canvas, label, block: null };
    const look = () => {
      this.#hold(true);
      this.highlight(item.block.asked);
    };
    button.addEventListener("pointerenter", look);
    button.addEventListener("focus", look);
    return item;
  }

  #fill(item, block) {
    item.block = block;
    const [rows, columns] = this.blocks;
    const { canvas } = item;
    [canvas.width, canvas.height] = [Math.round(HEIGHT * this.aspect), HEIGHT];
    const context = canvas.getContext("2d");
    const picture = this.thumbnails.get(block.latent);
    context.fillStyle = "#5c6066"; // until its picture has come
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const [w, h] = [canvas.width / columns, canvas.height / rows];
    const [x, y] = [(block.block % columns) * w, Math.floor(block.block / columns) * h];
    // Everything but the cell is dimmed, so that the cell is found at a glance.
    context.fillStyle = "rgb(0 0 0 / 0.45)";
    context.beginPath();
    context.rect(0, 0, canvas.width, canvas.height);
    context.rect(x, y, w, h);
    context.fill("evenodd");
    context.strokeStyle = "white";
    context.lineWidth = 3;
    context.strokeRect(x + 1.5, y + 1.5, w - 3, h - 3);
    item.label.textContent = `${block.count}×`;
    const row = Math.floor(block.block / columns) + 1;
    const column = (block.block % columns) + 1;
    item.button.title = `latent ${block.latent + 1}, row ${row}, column ${column}`;
    item.button.setAttribute(
      "aria-label",
      `${item.button.title}, read ${plural(block.count, "time")}`,
    );
  }

  #hold(held) {
    this.#held = held;
    if (held) return;
    this.highlight(null);
    this.#draw();
  }

  #step(event) {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const shown = this.#items.filter(({ row }) => !row.hidden);
    const at = shown.findIndex(({ button }) => button === document.activeElement);
    shown[at + by]?.button.focus();
  }
}
