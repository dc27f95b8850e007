// The branches of the world, each with the walk that the page knows of it.

import { Walk } from "./walk.js";

export class Branches {
  #walks = new Map([[null, new Walk()]]);
  #current = null;

  constructor(select, fork, send) {
    this.select = select;
    fork.addEventListener("click", () => send({ type: "fork" }));
    select.addEventListener("change", () => send({ type: "branch", id: Number(select.value) }));
  }

  get walk() {
    return this.#walks.get(this.#current);
  }

  /** A new world: `first` latents were watched, whatever follows was dreamt. */
  begin(trail, latents, first) {
    const walk = new Walk();
    walk.memory = trail.slice(0, first);
    walk.follow(trail, latents);
    this.#walks = new Map([[null, walk]]);
    this.#current = null;
    this.select.replaceChildren(new Option("main", ""));
    this.select.disabled = true;
  }

  rewind(latents) {
    this.#walks.set(this.#current, this.walk.until(latents));
  }

  /** Takes the server's list; true if the walk goes on in another branch. */
  receive({ branches, current }) {
    const before = this.#current;
    const walk = this.walk;
    if (before === null) this.#walks.delete(null);
    for (const { id, latents } of branches) {
      if (!this.#walks.has(id)) this.#walks.set(id, walk.until(latents));
    }
    this.#current = current;
    this.select.replaceChildren(...branches.map(({ id, name }) => new Option(name, String(id))));
    this.select.value = String(current);
    this.select.disabled = branches.length < 2;
    return before !== current;
  }
}
