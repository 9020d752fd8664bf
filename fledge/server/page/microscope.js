// What the state looks like: how long each head remembers, and how much each piece of the conversation changed it. Each
// picture has its numbers beside it as a table.

import { excerpt, h, number } from "./element.js";

const FORGOTTEN = "#d9a441";
const KEPT = "#2f6b4f";

/** Have the server look at what has been said up to here, and show it in `place`. */
export async function inspect(place, { state, messages, lost }, connection, template) {
  const show = (...nodes) => place.replaceChildren(...nodes);
  if (lost || (state && !messages.length))
    return show(h("p.aside", {}, "Say something after this state to see what changes it."));
  if (!messages.length) return show(h("p.aside", {}, "Nothing has been read here yet."));
  show(h("p.aside", {}, "Looking…"));
  try {
    const body = { messages, ...(state && { state }), ...(template && { template }) };
    return show(...picture(await connection.json("v1/fledge/view", { method: "POST", body })));
  } catch (error) {
    const again = () => inspect(place, { state, messages }, connection, template);
    const retry = h("button.quiet", { type: "button", onclick: again }, "Retry");
    return show(h("div.error", { role: "alert" }, h("p", {}, error.message), retry));
  }
}

/** Draw what POST /v1/fledge/view has found. */
function picture(view) {
  const pieces = view.pieces.filter((piece) => piece.text.trim());
  const lives = view.half_lives;
  if (!lives)
    return [h("p", {}, "This model keeps the text itself and forgets nothing, so there is no picture of it.")];
  return [
    h("h3", {}, "How long each head remembers"),
    h("p.aside", {}, "Tokens until half of what a head was told is forgotten. Layers go down, heads across."),
    heatmap(lives, scale(lives), "half-lives"),
    legend(lives),
    table("Half-lives in tokens", lives, lived),
    h("h3", {}, "What changed it"),
    h(
      "p.aside",
      {},
      "How much each piece moved what the heads hold, relative to what was there; and how many heads still " +
        "hold more than half of it.",
    ),
    h(
      "ol.pieces",
      {},
      pieces.map((piece, n) => changed(piece, since(view.pieces, piece), lives, n)),
    ),
  ];
}

/** The tokens read after a piece. */
function since(pieces, piece) {
  return pieces.slice(pieces.indexOf(piece) + 1).reduce((sum, each) => sum + each.tokens, 0);
}

function changed(piece, after, lives, n) {
  const heads = lives.flat();
  const holding = heads.filter((life) => life === null || life > after).length;
  const moved = piece.change?.flat().filter((value) => value !== null) ?? [];
  const mean = moved.length ? moved.reduce((sum, value) => sum + value, 0) / moved.length : 0;
  const bar = h("meter", { min: 0, max: 1, value: Math.min(mean, 1), "aria-label": `Change by piece ${n + 1}` });
  const figures = `${number(piece.tokens)} tokens · change ${number(mean, 2)} · ${holding} of ${heads.length} heads hold it`;
  return h(
    "li",
    {},
    h("p.said", { dir: "auto" }, excerpt(piece.text, 90)),
    bar,
    h("p.figures", {}, figures),
    piece.change &&
      h(
        "details",
        {},
        h("summary", {}, "By head"),
        h("p.aside", {}, "Amber: left as it was. Green: changed by as much as it held."),
        heatmap(piece.change, (value) => Math.min(value ?? 0, 1), "change"),
        table(`Change by piece ${n + 1}`, piece.change, (value) => number(value ?? 0, 2)),
      ),
  );
}

/** A logarithmic scale over half-lives: 0 for the shortest, 1 for the longest. */
function scale(lives) {
  const [low, high] = range(lives);
  const [from, to] = [Math.log(low), Math.log(high)];
  return (life) => (life === null ? 1 : (Math.log(Math.max(life, low)) - from) / (to - from || 1));
}

function range(lives) {
  const finite = lives.flat().filter((life) => life > 0);
  const low = Math.max(0.1, Math.min(...finite));
  return [low, Math.max(low * 1.0001, Math.min(1e6, Math.max(...finite)))];
}

/** Cells on a canvas: a large model has thousands. */
function heatmap(rows, share, kind) {
  const [height, width] = [rows.length, rows[0].length];
  const cell = Math.max(3, Math.min(22, Math.floor(300 / width)));
  const gap = cell > 5 ? 1 : 0;
  const canvas = h("canvas.map", {
    width: width * cell * 2,
    height: height * cell * 2,
    role: "img",
    "aria-label": `Heat map of ${kind}: ${height} layers with ${width} heads each. The table below has the numbers.`,
  });
  canvas.style.width = `${width * cell}px`;
  const pen = canvas.getContext("2d");
  pen.scale(2, 2);
  rows.forEach((row, y) =>
    row.forEach((value, x) => {
      pen.fillStyle = mixed(share(value));
      pen.fillRect(x * cell, y * cell, cell - gap, cell - gap);
    }),
  );
  return h("div.frame", {}, canvas);
}

function mixed(share) {
  const parts = [FORGOTTEN, KEPT].map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
  const mix = parts[0].map((from, n) => Math.round(from + (parts[1][n] - from) * Math.max(0, Math.min(1, share))));
  return `rgb(${mix.join(" ")})`;
}

function legend(lives) {
  const [low, high] = range(lives);
  const middle = Math.sqrt(low * high);
  const steps = [low, middle, high].map((life, n) => {
    const key = h("i", { "aria-hidden": "true" });
    key.style.background = mixed(n / 2);
    return h("span", {}, key, lived(life));
  });
  return h("p.legend", {}, steps, h("span.aside", {}, "tokens, logarithmic"));
}

function lived(life) {
  return life === null || life >= 1e6 ? "over a million" : number(life, 2);
}

function table(caption, rows, text) {
  const heads = rows[0].map((_, n) => h("th", { scope: "col" }, `Head ${n + 1}`));
  const body = rows.map((row, n) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, `Layer ${n + 1}`),
      row.map((value) => h("td", {}, text(value))),
    ),
  );
  const made = h("details.numbers", {}, h("summary", {}, "As a table"));
  made.addEventListener("toggle", () => {
    if (made.open && made.children.length === 1)
      made.append(
        h(
          "div.frame",
          { tabindex: 0, role: "group", "aria-label": caption },
          h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, h("td"), heads)), h("tbody", {}, body)),
        ),
      );
  });
  return made;
}
