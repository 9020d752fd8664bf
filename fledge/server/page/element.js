// DOM nodes in one expression. Text given to them is text, never markup.

/** h("p.note", {title: "x", onclick: f}, "text", node): properties that are null or false are left out. */
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  node.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** A node of a drawing. */
export function s(tag, properties = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(properties)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** One of the symbols in index.html. Icons say nothing by themselves: whatever has one has a name, too. */
export function icon(name) {
  return s("svg", { class: "icon", "aria-hidden": "true" }, s("use", { href: `#icon-${name}` }));
}

/** A button that copies a text; null where the browser does not let pages copy (outside of secure contexts). */
export function copier(text) {
  if (!navigator.clipboard) return null;
  const button = h("button.quiet", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = await navigator.clipboard.writeText(text()).then(
      () => "Copied",
      () => "Not copied",
    );
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}

/** The element with this id. */
export const by = (id) => document.getElementById(id);

/** Text cut to a length that fits a label, without cutting a character in two. */
export function excerpt(text, length) {
  const line = text
    .slice(0, 8 * length)
    .replace(/\s+/g, " ")
    .trim();
  const characters = [...line];
  return characters.length > length ? `${characters.slice(0, length - 1).join("")}…` : line;
}

/** A number as people read it: 4 → "4", 0.3333 → "0.333", 12345.6 → "12,346". */
export function number(value, digits = 3) {
  return new Intl.NumberFormat(
    "en",
    value >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: digits },
  ).format(value);
}

/** Bytes as people read them. */
export function bytes(value) {
  if (value < 1000) return `${value} bytes`;
  if (value < 1e6) return `${number(value / 1e3, 2)} kB`;
  return value < 1e9 ? `${number(value / 1e6, 3)} MB` : `${number(value / 1e9, 3)} GB`;
}
