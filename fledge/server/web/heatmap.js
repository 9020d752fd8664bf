// Heat maps of one value per head, each with a table of the same values.

import { h } from "./dom.js";

const LOW_COLOR = "#d9a441";
const HIGH_COLOR = "#2f6b4f";
const MAP_WIDTH = 300; // pixels
const MAX_CELL_SIZE = 22;
const MIN_CELL_SIZE = 3;
const PIXEL_RATIO = 2;

/**
 * Draw one cell per layer (rows) and head (columns). `normalize` maps a value to a color between 0 and 1. A canvas is
 * used because a large model has thousands of cells.
 */
export function createHeatmap(rows, normalize, name) {
  const [height, width] = [rows.length, rows[0].length];
  const cell = Math.max(MIN_CELL_SIZE, Math.min(MAX_CELL_SIZE, Math.floor(MAP_WIDTH / width)));
  const gap = cell > 5 ? 1 : 0;
  const canvas = h("canvas.heatmap", {
    width: width * cell * PIXEL_RATIO,
    height: height * cell * PIXEL_RATIO,
    role: "img",
    "aria-label": `Heat map of ${name}: ${height} layers with ${width} heads each. The table below has the values.`,
  });
  canvas.style.width = `${width * cell}px`;
  const context = canvas.getContext("2d");
  context.scale(PIXEL_RATIO, PIXEL_RATIO);
  for (const [y, row] of rows.entries()) {
    for (const [x, value] of row.entries()) {
      context.fillStyle = getColor(normalize(value));
      context.fillRect(x * cell, y * cell, cell - gap, cell - gap);
    }
  }
  return h("div.scroll-frame", {}, canvas);
}

/** Create the legend of a heat map: evenly spaced labels from the lowest to the highest value. */
export function createLegend(labels, unit) {
  const entries = labels.map((label, index) => {
    const swatch = h("i", { "aria-hidden": "true" });
    swatch.style.background = getColor(index / (labels.length - 1));
    return h("span", {}, swatch, label);
  });
  return h("p.legend", {}, entries, h("span.note", {}, unit));
}

/** Create a table that is filled when it is opened for the first time. */
export function createTable(caption, rows, format) {
  const details = h("details", {}, h("summary", {}, "Show as table"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const attributes = { tabindex: 0, role: "group", "aria-label": caption };
    details.append(h("div.scroll-frame", attributes, fillTable(caption, rows, format)));
  });
  return details;
}

function fillTable(caption, rows, format) {
  const columnHeaders = rows[0].map((_, index) => h("th", { scope: "col" }, `Head ${index + 1}`));
  const body = rows.map((row, index) => {
    const cells = row.map((value) => h("td", {}, format(value)));
    return h("tr", {}, h("th", { scope: "row" }, `Layer ${index + 1}`), cells);
  });
  const header = h("thead", {}, h("tr", {}, h("td"), columnHeaders));
  return h("table", {}, h("caption", {}, caption), header, h("tbody", {}, body));
}

function getColor(share) {
  const clamped = Math.max(0, Math.min(1, share));
  const [low, high] = [parseColor(LOW_COLOR), parseColor(HIGH_COLOR)];
  const mixed = low.map((value, index) => Math.round(value + (high[index] - value) * clamped));
  return `rgb(${mixed.join(" ")})`;
}

function parseColor(color) {
  return [1, 3, 5].map((index) => Number.parseInt(color.slice(index, index + 2), 16));
}
