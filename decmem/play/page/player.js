// Plays the frames of the chunks evenly, a little behind their arrival.

const JITTER = 60; // ms a first frame waits, so that a late chunk does not tear the motion
const SLOWEST = 500; // ms a frame may last when the machine is slow
const CATCH_UP = 0.85; // share of its time a frame gets while too many wait

export class Player {
  #waiting = [];
  #due = 0;
  #epoch = 0;
  #order = Promise.resolve();

  /** `paint(frame)` shows a frame; `seen(number)` hears of a chunk whose last frame was shown. */
  constructor(paint, seen) {
    this.paint = paint;
    this.seen = seen;
    this.fps = 10;
    const tick = (now) => {
      this.#tick(now);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  /** `frames` is a promise of the decoded frames: chunks play in the order in which they came. */
  push(header, frames) {
    const epoch = this.#epoch;
    this.#order = this.#order.then(async () => {
      const decoded = await frames;
      if (epoch !== this.#epoch || decoded.length === 0) {
        this.seen(header.chunk);
        return;
      }
      const now = performance.now();
      if (this.#waiting.length === 0 && now > this.#due) this.#due = now + JITTER;
      this.#waiting.push(...decoded);
    });
  }

  /** Forgets what was not shown. It counts as seen, for the server waits until everything is. */
  flush() {
    this.#epoch += 1;
    const last = this.#waiting.at(-1);
    this.#waiting = [];
    if (last) this.seen(last.header.chunk);
  }

  #tick(now) {
    if (this.#waiting.length === 0 || now < this.#due) return;
    const frame = this.#waiting.shift();
    this.#due = Math.max(this.#due, now - 50) + this.#period(frame.header);
    this.paint(frame);
    frame.dream.close();
    frame.truth?.close();
    if (frame.last) this.seen(frame.header.chunk);
  }

  // A machine that needs longer for a chunk than the chunk lasts gets slow motion, not stutter.
  #period({ times, frames }) {
    const even = 1000 / this.fps;
    const needed = Math.min((1000 * (times?.total ?? 0)) / frames, SLOWEST);
    if (this.#waiting.length > frames + 2) return even * CATCH_UP;
    return Math.max(even, needed);
  }
}
