// Messages to the person: what went wrong and what helps, or a file that is ready.

const STAY = { error: 15_000, done: 8_000 };
const MOST = 3;

export class Notices {
  constructor(place) {
    this.place = place;
  }

  error({ argument, problem, cure }) {
    const named = argument ? `${argument}: ${problem}` : problem;
    return this.#add("error", sentence(named), cure && sentence(cure));
  }

  done(text, more) {
    return this.#add("done", text, more);
  }

  #add(kind, text, more) {
    // The same words again replace the first ones instead of filling the page.
    for (const old of [...this.place.children]) if (old.dataset.text === text) old.remove();
    const notice = document.createElement("div");
    notice.className = `notice ${kind}`;
    notice.dataset.text = text;
    notice.setAttribute("role", kind === "error" ? "alert" : "status");
    const words = document.createElement("p");
    const first = document.createElement("b");
    first.textContent = text;
    words.append(first);
    if (more) words.append(" ", more);
    const close = document.createElement("button");
    close.type = "button";
    close.className = "quiet icon";
    close.setAttribute("aria-label", "Dismiss");
    close.textContent = "×";
    close.addEventListener("click", () => notice.remove());
    notice.append(words, close);
    this.place.append(notice);
    while (this.place.children.length > MOST) this.place.firstChild.remove();
    setTimeout(() => notice.remove(), STAY[kind]);
    return notice;
  }
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
