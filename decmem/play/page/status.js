// How the world stands: a few words at the top, and a veil over the dream when nothing goes on.

const WORDS = { running: "walking", waiting: "ready", loading: "preparing" };

const at = (id) => document.getElementById(id);

export class Status {
  state = "waiting";
  #reason = "";

  /** Words that stand until something else is said. */
  say(text, state) {
    const status = at("status");
    if (status.textContent !== text) status.textContent = text;
    status.title = text; // it is cut where there is no room
    status.dataset.state = state;
  }

  /** The server's state, told again when what was said in between is over. */
  tell(state = this.state, reason = this.#reason) {
    this.state = state;
    this.#reason = reason;
    const words = WORDS[state] ?? state;
    this.say(reason && reason !== state ? `${words}: ${reason}` : words, state);
    at("pause").setAttribute("aria-pressed", state === "paused");
    at("pause").setAttribute("aria-label", state === "paused" ? "Go on" : "Pause");
  }

  /** Covers the dream with words and the button that helps; null uncovers it. */
  veil(text, action, act) {
    at("veil").hidden = text === null;
    at("veil-says").textContent = text ?? "";
    at("veil-act").textContent = action ?? "";
    at("veil-act").onclick = act;
  }
}
