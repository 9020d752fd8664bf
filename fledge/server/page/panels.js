// Panels beside the conversation. Where there is room they stand beside it; on a small screen one at a time is a drawer.

import { by } from "./element.js";
import { lasting } from "./storage.js";

const NAMES = ["tree", "state", "settings"];
const NARROW = window.matchMedia("(max-width: 880px)");

export class Panels {
  /** onopen(name) is called for a panel that has been opened. */
  constructor(onopen) {
    this.onopen = onopen;
    this.opener = null;
    for (const name of NAMES) {
      this.button(name).addEventListener("click", () => this.show(name, by(name).hidden));
      by(name)
        .querySelector(".close")
        .addEventListener("click", () => this.show(name, false));
    }
    by("room").addEventListener("pointerdown", (event) => !event.target.closest(".panel") && this.close());
    NARROW.addEventListener("change", () => this.arrange());
    const open = lasting.get("panels") ?? ["tree"];
    if (!NARROW.matches) for (const name of NAMES) if (open.includes(name)) this.show(name, true, false);
  }

  button(name) {
    return document.querySelector(`[data-panel=${name}]`);
  }

  /** Open or close one. Of the two at the right, and on a small screen of all, one is open at a time. */
  show(name, open, byHand = true) {
    const panel = by(name);
    for (const other of NAMES) {
      const clash = NARROW.matches || (other !== "tree" && name !== "tree");
      if (open && other !== name && clash) this.set(other, false);
    }
    this.set(name, open);
    this.arrange();
    if (byHand && !NARROW.matches)
      lasting.put(
        "panels",
        NAMES.filter((each) => !by(each).hidden),
      );
    if (open) this.onopen(name);
    if (byHand && open && NARROW.matches) panel.focus();
    if (byHand && !open) this.button(name).focus();
  }

  set(name, open) {
    by(name).hidden = !open;
    this.button(name).setAttribute("aria-expanded", String(open));
  }

  /** Close a drawer, if one is open; whether one was. */
  close() {
    const open = NARROW.matches ? NAMES.find((name) => !by(name).hidden) : undefined;
    if (open) this.show(open, false);
    return open !== undefined;
  }

  /** What is behind a drawer cannot be reached. */
  arrange() {
    const open = NAMES.filter((name) => !by(name).hidden);
    if (NARROW.matches) for (const name of open.slice(1)) this.set(name, false);
    by("main").inert = NARROW.matches && open.length > 0;
    document.body.classList.toggle("drawer", by("main").inert);
  }
}

/** The switch between light and dark; until it is used, the system decides. */
export function themes() {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => by("theme").setAttribute("aria-pressed", String(isDark()));
  by("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("fledge.theme", root.dataset.theme); // bare, as theme.js reads it
    } catch {
      return tell(); // storage is forbidden: the theme holds until the page is closed
    }
    return tell();
  });
  system.addEventListener("change", tell);
  tell();
}
