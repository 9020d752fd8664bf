// Before the first paint, so that a chosen theme does not flash as the other one. Not a module for the same reason.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("fledge.theme");
  } catch {
    // Storage may be forbidden; the system's theme is right then.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
