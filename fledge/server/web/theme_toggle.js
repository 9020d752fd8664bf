// The button that switches between the light and the dark theme.

import { byId } from "./dom.js";

/** Set up the button. The system theme applies until the button is used. */
export function setUpThemeToggle() {
  const root = document.documentElement;
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const updateButton = () => byId("theme-toggle").setAttribute("aria-pressed", String(isDark()));
  byId("theme-toggle").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("fledge.theme", root.dataset.theme); // not JSON: theme.js reads the plain value
    } catch {
      // Storage is blocked: the theme applies until the page is closed.
    }
    updateButton();
  });
  systemDark.addEventListener("change", updateButton);
  updateButton();
}
