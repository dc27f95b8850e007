// What is held down and how far the look has turned, sent when it changes and at most so often.

const GAP = 50; // ms: looking around is sent at most 20 times a second
const SHORTEST = 20; // ms: even hasty keys stay under the server's limit
const UNANSWERED = 200;

export class Steering {
  #held = new Map(); // source -> Set of keys
  #look = [0, 0];
  #sent = "";
  #last = 0;
  #timer = null;
  #times = []; // {sequence, at} of the inputs no frame has answered yet
  sequence = 0;
  active = false;

  constructor(send) {
    this.send = send;
  }

  /** What one device (keyboard, stick, ...) holds down now. */
  hold(source, keys) {
    this.#held.set(source, new Set(keys));
    if (this.#keys().join() !== this.#sent) this.#schedule(SHORTEST);
  }

  turn(yaw, pitch) {
    if (!this.active) return;
    this.#look[0] += yaw;
    this.#look[1] += pitch;
    this.#schedule(GAP);
  }

  release() {
    this.#look = [0, 0];
    for (const source of this.#held.keys()) this.#held.set(source, new Set());
    if (this.#sent !== "") this.#schedule(SHORTEST);
  }

  /** A connection that came back knows nothing of what is held. */
  forget() {
    this.#sent = "";
    this.#times = [];
  }

  /** Milliseconds since the oldest input that this answer covers, or null. */
  answered(sequence) {
    if (sequence === null || sequence === undefined) return null;
    const first = this.#times.find((input) => input.sequence <= sequence);
    this.#times = this.#times.filter((input) => input.sequence > sequence);
    return first ? performance.now() - first.at : null;
  }

  #keys() {
    return [...new Set([...this.#held.values()].flatMap((keys) => [...keys]))].sort();
  }

  #schedule(gap) {
    const wait = Math.max(0, this.#last + gap - performance.now());
    if (wait === 0) this.#flush();
    else this.#timer ??= setTimeout(() => this.#flush(), wait);
  }

  #flush() {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (!this.active) return;
    const keys = this.#keys();
    const look = this.#look.map((degrees) => Math.round(degrees * 100) / 100);
    if (keys.join() === this.#sent && !look[0] && !look[1]) return;
    this.#sent = keys.join();
    this.#look = [0, 0];
    this.#last = performance.now();
    this.sequence += 1;
    this.#times.push({ sequence: this.sequence, at: this.#last });
    if (this.#times.length > UNANSWERED) this.#times.shift();
    this.send({ type: "input", keys, look, sequence: this.sequence });
  }
}
