// The field one writes in: grows with its text, keeps it as a draft, sends on Enter.

import { by } from "./element.js";
import { passing } from "./storage.js";

/** Let a text area be as high as its text, and call `send` on Enter; not while an input method composes a word. */
export function writable(area, send) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
  };
  area.addEventListener("input", fit);
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
  return fit;
}

export class Composer {
  /** send(text) says whether it has taken the text; else it stays where it is. */
  constructor({ send, stop }) {
    this.area = by("question");
    this.count = by("count");
    this.send = send;
    this.area.value = passing.get("draft") ?? "";
    this.count.value = passing.get("count") ?? "1";
    this.fit = writable(this.area, () => this.submit());
    this.area.addEventListener("input", () => passing.put("draft", this.area.value || null));
    this.count.addEventListener("change", () => passing.put("count", this.count.value));
    by("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    by("stop").addEventListener("click", stop);
    this.fit();
  }

  /** How many answers are wanted. */
  get answers() {
    return Number(this.count.value);
  }

  submit() {
    const text = this.area.value.trim();
    if (!text || !this.send(text)) return;
    this.area.value = "";
    passing.put("draft", null);
    this.fit();
  }

  /** Stop takes the place of Send while an answer is written. */
  busy(is) {
    const hadFocus = document.activeElement === by(is ? "send" : "stop");
    by("stop").hidden = !is;
    by("send").hidden = is;
    if (hadFocus) by(is ? "stop" : "send").focus();
  }

  /** Not where a finger points: that would bring up a keyboard nobody asked for. */
  focus() {
    if (window.matchMedia("(pointer: fine)").matches) this.area.focus({ preventScroll: true });
  }
}

/** Say something quietly below the conversation; "" takes it back. */
export function notice(text) {
  by("notice").textContent = text;
}
