// The message field. It grows with its text, keeps the text as a draft and sends it on Enter.

import { byId } from "./dom.js";
import { sessionStore } from "./storage.js";

/**
 * Let a text area grow with its text, and call `submit` on Enter, except while an input method composes a word.
 * Returns the function that adjusts the height.
 */
export function setUpTextArea(area, submit) {
  const fitHeight = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
  };
  area.addEventListener("input", fitHeight);
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    submit();
  });
  return fitHeight;
}

export class Composer {
  /** `send(text)` returns true if it accepts the text. Otherwise the text stays in the field. */
  constructor({ send, stop }) {
    this.area = byId("message");
    this.countSelect = byId("answer-count");
    this.send = send;
    this.area.value = sessionStore.get("draft") ?? "";
    this.countSelect.value = sessionStore.get("count") ?? "1";
    this.fitHeight = setUpTextArea(this.area, () => this.submit());
    this.area.addEventListener("input", () => sessionStore.set("draft", this.area.value || null));
    this.countSelect.addEventListener("change", () => sessionStore.set("count", this.countSelect.value));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    byId("stop").addEventListener("click", stop);
    this.fitHeight();
  }

  /** The number of answers to request. */
  get answerCount() {
    return Number(this.countSelect.value);
  }

  submit() {
    const text = this.area.value.trim();
    if (!text || !this.send(text)) return;
    this.area.value = "";
    sessionStore.set("draft", null);
    this.fitHeight();
  }

  /** Show Stop instead of Send while an answer is generated. */
  setBusy(isBusy) {
    const hadFocus = document.activeElement === byId(isBusy ? "send" : "stop");
    byId("stop").hidden = !isBusy;
    byId("send").hidden = isBusy;
    if (hadFocus) byId(isBusy ? "stop" : "send").focus();
  }

  /** Focus the field. Touch devices are excluded because focus would open the on-screen keyboard. */
  focus() {
    if (window.matchMedia("(pointer: fine)").matches) this.area.focus({ preventScroll: true });
  }
}
