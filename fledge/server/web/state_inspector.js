// The content of the state panel: the half-life of each head, and how much each segment of the conversation changed the
// state.

import { createButton, h } from "./dom.js";
import { formatNumber, truncate } from "./format.js";
import { createHeatmap, createLegend, createTable } from "./heatmap.js";

const MAX_HALF_LIFE = 1e6; // tokens; longer half-lives are not distinguished
const HALF_LIFE_NOTE = "Tokens until a head has lost half of an input. Rows are layers, columns are heads.";
const CHANGE_NOTE =
  "How much each segment changed the state of the heads, relative to its size before, and how many heads still hold " +
  "more than half of it.";

/** Let the server analyze a context, and show the result in `container`. */
export async function inspectState(container, context, client, template) {
  const { state, messages, lostStateTurn } = context;
  const show = (...nodes) => container.replaceChildren(...nodes);
  const showNote = (text) => show(h("p.note", {}, text));
  if (lostStateTurn || (state && !messages.length)) {
    return showNote("Send a message after this state to see what changes it.");
  }
  if (!messages.length) return showNote("The state is empty. Send a message first.");
  showNote("Loading…");
  try {
    const body = { messages, ...(state && { state }), ...(template && { template }) };
    return show(...createReport(await client.requestJson("v1/fledge/view", { method: "POST", body })));
  } catch (error) {
    const retry = createButton("Retry", () => inspectState(container, context, client, template));
    return show(h("div.error", { role: "alert" }, h("p", {}, error.message), retry));
  }
}

/** Create the nodes for the response of POST /v1/fledge/view. */
function createReport({ pieces, half_lives: halfLives }) {
  if (!halfLives) {
    return [h("p", {}, "This model keeps every token and forgets nothing, so there is no state to show.")];
  }
  const segments = pieces.map((piece, index) => ({ ...piece, tokensAfter: countTokens(pieces.slice(index + 1)) }));
  const visible = segments.filter((segment) => segment.text.trim());
  return [
    h("h3", {}, "Half-life of each head"),
    h("p.note", {}, HALF_LIFE_NOTE),
    createHeatmap(halfLives, createLogScale(halfLives), "half-lives"),
    createHalfLifeLegend(halfLives),
    createTable("Half-lives in tokens", halfLives, formatHalfLife),
    h("h3", {}, "Change by segment"),
    h("p.note", {}, CHANGE_NOTE),
    h(
      "ol.segments",
      {},
      visible.map((segment, index) => createSegment(segment, halfLives, index + 1)),
    ),
  ];
}

function countTokens(pieces) {
  return pieces.reduce((sum, piece) => sum + piece.tokens, 0);
}

function createSegment(segment, halfLives, position) {
  const heads = halfLives.flat();
  const holding = heads.filter((halfLife) => halfLife === null || halfLife > segment.tokensAfter).length;
  const change = getMeanChange(segment);
  const name = `Change by segment ${position}`;
  const tokens = formatNumber(segment.tokens);
  const heldBy = `held by ${holding} of ${heads.length} heads`;
  const metrics = `${tokens} tokens · change ${formatNumber(change, 2)} · ${heldBy}`;
  return h(
    "li",
    {},
    h("p.segment-text", { dir: "auto" }, truncate(segment.text, 90)),
    h("meter", { min: 0, max: 1, value: Math.min(change, 1), "aria-label": name }),
    h("p.metrics", {}, metrics),
    segment.change && createChangeByHead(segment.change, name),
  );
}

function getMeanChange(segment) {
  const changes = segment.change?.flat().filter((value) => value !== null) ?? [];
  return changes.length ? changes.reduce((sum, value) => sum + value, 0) / changes.length : 0;
}

function createChangeByHead(change, name) {
  return h(
    "details",
    {},
    h("summary", {}, "Per head"),
    h("p.note", {}, "Amber: unchanged. Green: changed by at least as much as it held."),
    createHeatmap(change, (value) => Math.min(value ?? 0, 1), "change"),
    createTable(name, change, (value) => formatNumber(value ?? 0, 2)),
  );
}

/** Create a logarithmic scale: 0 for the shortest half-life, 1 for the longest. */
function createLogScale(halfLives) {
  const [shortest, longest] = getRange(halfLives);
  const [low, high] = [Math.log(shortest), Math.log(longest)];
  return (halfLife) => (halfLife === null ? 1 : (Math.log(Math.max(halfLife, shortest)) - low) / (high - low || 1));
}

function getRange(halfLives) {
  const finite = halfLives.flat().filter((halfLife) => halfLife > 0);
  const shortest = Math.max(0.1, Math.min(...finite));
  return [shortest, Math.max(shortest * 1.0001, Math.min(MAX_HALF_LIFE, Math.max(...finite)))];
}

function createHalfLifeLegend(halfLives) {
  const [shortest, longest] = getRange(halfLives);
  const labels = [shortest, Math.sqrt(shortest * longest), longest].map(formatHalfLife);
  return createLegend(labels, "tokens (log scale)");
}

function formatHalfLife(halfLife) {
  return halfLife === null || halfLife >= MAX_HALF_LIFE ? "over a million" : formatNumber(halfLife, 2);
}
