// Functions that create DOM nodes. Strings become text nodes, never markup.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

/**
 * Create an element: `h("p.note", {title: "x", onclick: f}, "text", node)`. Properties and children that are null,
 * undefined or false are omitted.
 */
export function h(selector, properties = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  const node = document.createElement(tag);
  node.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (isPresent(value)) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter(isPresent));
  return node;
}

function isPresent(value) {
  return value !== null && value !== undefined && value !== false;
}

/** Create an SVG element. */
export function svg(tag, properties = {}, ...children) {
  const node = document.createElementNS(SVG_NAMESPACE, tag);
  for (const [key, value] of Object.entries(properties)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Return the element with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Create a button with a text label. */
export function createButton(label, onclick, style = "secondary") {
  return h(`button.${style}`, { type: "button", onclick }, label);
}

/** Create a button that copies a text. Returns null if the page may not copy, which requires a secure context. */
export function createCopyButton(getText) {
  if (!navigator.clipboard) return null;
  const button = createButton("Copy", async () => {
    button.textContent = await navigator.clipboard.writeText(getText()).then(
      () => "Copied",
      () => "Copy failed",
    );
    setTimeout(() => {
      button.textContent = "Copy";
    }, 2000);
  });
  return button;
}
