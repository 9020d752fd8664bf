// Applies the stored theme before the first paint. This is not a module because modules run after the first paint.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("fledge.theme");
  } catch {
    // Storage is blocked: the system theme applies.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
