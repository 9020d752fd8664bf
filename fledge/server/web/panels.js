// The panels beside the conversation. On a small screen a panel is a drawer that covers the conversation.

import { byId } from "./dom.js";
import { localStore } from "./storage.js";

const PANELS = ["tree", "state", "settings"];
const NARROW = window.matchMedia("(max-width: 880px)");

export class Panels {
  /** `onOpen(name)` is called after a panel was opened. */
  constructor(onOpen) {
    this.onOpen = onOpen;
    for (const name of PANELS) {
      getToggle(name).addEventListener("click", () => this.show(name, byId(name).hidden));
      byId(name)
        .querySelector(".close")
        .addEventListener("click", () => this.show(name, false));
    }
    byId("layout").addEventListener("pointerdown", (event) => !event.target.closest(".panel") && this.closeDrawer());
    NARROW.addEventListener("change", () => this.updateLayout());
    const stored = localStore.get("panels") ?? ["tree"];
    if (NARROW.matches) return;
    for (const name of PANELS) if (stored.includes(name)) this.show(name, true, false);
  }

  /**
   * Open or close a panel. Only one of the panels on the right can be open, and on a small screen only one of all
   * panels. `isUserAction`: the user opened or closed it, so the choice is stored and the focus moves.
   */
  show(name, isOpen, isUserAction = true) {
    for (const other of PANELS) {
      const isExclusive = NARROW.matches || (other !== "tree" && name !== "tree");
      if (isOpen && other !== name && isExclusive) setOpen(other, false);
    }
    setOpen(name, isOpen);
    this.updateLayout();
    if (isUserAction && !NARROW.matches) localStore.set("panels", listOpenPanels());
    if (isOpen) this.onOpen(name);
    if (isUserAction && isOpen && NARROW.matches) byId(name).focus();
    if (isUserAction && !isOpen) getToggle(name).focus();
  }

  /** Close the open drawer. Returns false if there is none. */
  closeDrawer() {
    const drawer = NARROW.matches ? listOpenPanels()[0] : undefined;
    if (drawer) this.show(drawer, false);
    return drawer !== undefined;
  }

  /** Keep at most one drawer open, and make the conversation behind it inert. */
  updateLayout() {
    const openPanels = listOpenPanels();
    if (NARROW.matches) for (const name of openPanels.slice(1)) setOpen(name, false);
    const hasDrawer = NARROW.matches && openPanels.length > 0;
    byId("main").inert = hasDrawer;
    document.body.classList.toggle("has-drawer", hasDrawer);
  }
}

function getToggle(name) {
  return document.querySelector(`[data-panel=${name}]`);
}

function listOpenPanels() {
  return PANELS.filter((name) => !byId(name).hidden);
}

function setOpen(name, isOpen) {
  byId(name).hidden = !isOpen;
  getToggle(name).setAttribute("aria-expanded", String(isOpen));
}
