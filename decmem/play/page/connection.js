// The WebSocket: says hello, hands out messages by type, and comes back with its token.

import { openPacket } from "./packet.js";

const NORMAL = 1000;
const FIRST_DELAY = 400;
const LONGEST_DELAY = 8000;

export class Connection {
  #listeners = new Map();
  #socket = null;
  #attempt = 0;
  #timer = null;
  #finished = false;

  constructor(url) {
    this.url = url;
    this.token = this.recall("session");
    // A browser notices a dead network late; the system tells at once.
    addEventListener("offline", () => this.#socket?.close());
    addEventListener("online", () => this.retry());
  }

  on(type, listener) {
    this.#listeners.set(type, [...(this.#listeners.get(type) ?? []), listener]);
    return this;
  }

  get open() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  connect() {
    clearTimeout(this.#timer);
    this.#finished = false;
    const socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.addEventListener("open", () => {
      this.send({ type: "hello", version: 1, session: this.token });
    });
    socket.addEventListener("message", ({ data }) => {
      if (socket === this.#socket) this.#receive(data);
    });
    socket.addEventListener("close", ({ code }) => {
      if (socket !== this.#socket) return;
      this.#socket = null;
      if (this.#finished) return;
      // A normal close is the server's wish; coming back at once would fight with another tab.
      if (code === NORMAL) this.#emit("closed");
      else this.#wait();
    });
  }

  /** Tries again now instead of at the end of the pause. */
  retry() {
    if (!this.#socket && !this.#finished) this.connect();
  }

  send(message) {
    if (this.open) this.#socket.send(JSON.stringify(message));
  }

  #receive(data) {
    if (data instanceof ArrayBuffer) {
      const { header, pictures } = openPacket(data);
      this.#emit(header.type, header, pictures);
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "hello") {
      this.#attempt = 0;
      message.resumed = this.token !== null && this.token === message.session;
      message.lost = this.token !== null && !message.resumed;
      this.#remember(message.session);
    }
    if (message.type === "bye") {
      this.#finished = true;
      this.#remember(null);
    }
    this.#emit(message.type, message);
  }

  #emit(type, ...values) {
    for (const listener of this.#listeners.get(type) ?? []) listener(...values);
  }

  #wait() {
    const delay = Math.min(FIRST_DELAY * 2 ** this.#attempt, LONGEST_DELAY);
    this.#attempt += 1;
    this.#emit("lost", { attempt: this.#attempt, delay });
    this.#timer = setTimeout(() => this.connect(), delay);
  }

  // What is noted lives as long as the tab: a reload takes up the same world.

  recall(name) {
    try {
      return JSON.parse(sessionStorage.getItem(`decmem.${name}`));
    } catch {
      return null;
    }
  }

  note(name, value) {
    try {
      sessionStorage.setItem(`decmem.${name}`, JSON.stringify(value));
    } catch {
      // without storage only a reload loses the world
    }
  }

  #remember(token) {
    this.token = token;
    this.note("session", token);
  }
}
