// The page: what belongs together is put together here.

import { Branches } from "./branches.js";
import { Composer, notice } from "./composer.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { Dialogue } from "./dialogue.js";
import { by, bytes, excerpt, h, number } from "./element.js";
import { asks, give, take, today } from "./files.js";
import { picture } from "./microscope.js";
import { Panels, themes } from "./panels.js";
import { Settings } from "./settings.js";
import { lasting, passing } from "./storage.js";
import { restored, settle, Tree } from "./tree.js";

const SPOKEN = 2000; // characters of an answer that are read out

const tree = new Tree();
const connection = new Connection();
const settings = new Settings();
const place = { at: null, group: null }; // the turn one is at, and the answers after it among which to choose

const dialogue = new Dialogue(tree, connection, settings, { changed, ended, said: notice });
const conversation = new Conversation(tree, {
  edit: (turn, text) => ask(turn.parent, text),
  retry: (turn) => ask(turn.parent, turn.user),
  again,
  choose: (turn) => {
    go(turn.id);
    composer.focus();
  },
  sibling: (turn) => go(tree.newest(turn.id)),
});
const branches = new Branches(tree, (id) => go(id));
const composer = new Composer({ send: (text) => send(text), stop: () => dialogue.stop() });
const panels = new Panels((name) => {
  if (name === "state") look();
  if (name === "tree") branches.draw();
});

/** Go to a turn (null: the beginning). Nothing is sent: the next question starts from that turn's state. */
function go(at, group = null) {
  Object.assign(place, { at, group });
  passing.put("place", place);
  lasting.put("place", place);
  draw();
  conversation.end();
}

function draw() {
  const choices = place.group ? tree.children(place.at).filter((turn) => turn.group === place.group) : [];
  conversation.draw(place.at, choices);
  branches.draw(place.at, dialogue.running?.turns ?? new Set());
  composer.busy(dialogue.running !== null);
  const after = choices.length ? 0 : tree.children(place.at).length && place.at !== null;
  by("onward").hidden = !after;
  if (after) {
    const count = tree.following(place.at);
    const jump = h("button.quiet", { type: "button", onclick: () => go(tree.newest(place.at)) }, "Go to the newest");
    by("onward").replaceChildren(`${count === 1 ? "One turn follows" : `${count} turns follow`} here. What you write now begins a branch. `, jump);
  }
  by("remove").disabled = by("save-state").disabled = place.at === null;
}

/** Send what was written; false leaves it in the field. */
function send(text) {
  if (place.group && tree.children(place.at).some((turn) => turn.group === place.group && turn.status !== "failed")) {
    notice("Choose the answer to go on with first.");
    return false;
  }
  // A question that got no answer is no place to go on from; the next one stands beside it.
  const here = tree.get(place.at);
  return ask(here?.status === "failed" ? here.parent : place.at, text);
}

function ask(parent, text) {
  if (dialogue.running) {
    notice("An answer is being written. Stop it first, or wait.");
    return false;
  }
  notice("");
  const turns = dialogue.begin(parent, text, composer.answers);
  answer(turns);
  return true;
}

/** Have a question answered that got no answer. */
function again(turn) {
  if (dialogue.running) return notice("An answer is being written. Stop it first, or wait.");
  notice("");
  const others = turn.group ? tree.siblings(turn).filter((each) => each.group === turn.group && each.status === "failed") : [];
  return answer(place.group ? others : [turn]);
}

function answer(turns) {
  const running = dialogue.run(turns);
  if (turns.length > 1 || place.group) go(turns[0].parent, turns[0].group);
  else go(turns[0].id);
  return running;
}

const drawn = new Set();

/** Show changes with the next frame: pieces come faster than screens are drawn. */
function changed(turn) {
  if (!drawn.size) {
    requestAnimationFrame(() => {
      for (const each of drawn) conversation.update(each);
      drawn.clear();
    });
  }
  drawn.add(turn);
}

function ended(turns) {
  draw();
  const done = turns.filter((turn) => turn.answer).map((turn) => turn.answer.slice(0, SPOKEN));
  by("spoken").textContent = done.length ? `Answer: ${done.join(". Next answer: ")}` : "";
  const error = dialogue.failed;
  dialogue.failed = null;
  if (error?.status === 401) askForKey();
}

function askForKey() {
  by("key-form").hidden = false;
  by("key").focus();
}

by("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  connection.key = by("key").value.trim();
  if (!(await meet())) return;
  by("key").value = "";
  by("key-form").hidden = true;
  const here = tree.get(place.at);
  if (here?.status === "failed" && !dialogue.running) again(here);
  composer.focus();
});

/** Learn what the server is; whether it told. */
async function meet() {
  try {
    const server = await connection.json("v1/fledge/server");
    dialogue.server = server;
    settings.draw(server);
    by("model").textContent = server.model;
    document.title = `${server.model} · Fledge`;
    const size = bytes(server.state_bytes);
    by("facts").textContent = server.keeps_states
      ? `Every turn keeps the model's whole memory of the conversation, ${size}, however long it grows. Go back to any turn in the tree and go on from there: nothing is read again.`
      : `The model's whole memory of a conversation is ${size}, however long it grows. This server keeps none between turns.`;
    by("tree-note").textContent = server.keeps_states ? "" : "This server keeps no states, so branches are read again.";
    for (const name of ["save-state", "open-file"]) by(name).hidden = name === "save-state" && !server.keeps_states;
    notice("");
    return true;
  } catch (error) {
    if (error.status === 401) askForKey();
    notice(error.message);
    return false;
  }
}

/** Look at the state here. */
async function look() {
  const { state, messages, from } = path();
  const shown = (...nodes) => by("picture").replaceChildren(...nodes);
  if (!messages.length && !from) return shown(h("p.aside", {}, "Nothing has been read here yet."));
  if (!messages.length) return shown(h("p.aside", {}, "Say something after this state to see what it changes."));
  shown(h("p.aside", {}, "Looking…"));
  try {
    const body = { messages, ...(state && { state }), template: settings.values.template };
    return shown(...picture(await connection.json("v1/fledge/view", { method: "POST", body })));
  } catch (error) {
    return shown(h("div.error", { role: "alert" }, h("p", {}, error.message), h("button.quiet", { type: "button", onclick: look }, "Retry")));
  }
}

/** All messages up to here; a state only where it came as a file. */
function path() {
  return tree.request(place.at, "", false).lost ? { messages: [], from: true } : tree.request(place.at, "", false);
}

async function tried(work) {
  notice("");
  try {
    await work();
  } catch (error) {
    notice(error.message);
    if (error.status === 401) askForKey();
  }
}

by("save-tree").addEventListener("click", () => {
  give(new Blob([JSON.stringify(tree, null, 1)], { type: "application/json" }), `fledge-${today()}.json`);
});
by("save-state").addEventListener("click", () => tried(async () => {
  const turn = tree.get(place.at);
  if (!turn.state) return notice("The server has no state of this turn: its answer was stopped, or the state is forgotten.");
  const response = await connection.call(`v1/fledge/states/${encodeURIComponent(turn.state)}/file`);
  return give(await response.blob(), `${excerpt(turn.user || turn.name, 40).replace(/[^\p{L}\p{N}]+/gu, "-") || "fledge"}.state`);
}));
asks((file) => tried(async () => {
  const turn = await take(file, tree, connection);
  if (!turn) return notice("Everything in this file is here already.");
  return go(turn.id);
}));
by("begin").addEventListener("click", () => {
  go(null);
  composer.focus();
});
by("remove").addEventListener("click", () => {
  const count = tree.following(place.at);
  by("sure-text").textContent = `“${excerpt(tree.get(place.at).user || "This state", 80)}”` +
    (count ? ` and ${number(count)} ${count === 1 ? "turn" : "turns"} after it will be forgotten, here and on the server.` : " will be forgotten, here and on the server.");
  by("sure").showModal();
});
by("keep").addEventListener("click", () => by("sure").close());
by("really").addEventListener("click", () => {
  by("sure").close();
  const { parent } = tree.get(place.at);
  if (dialogue.running) dialogue.stop();
  const gone = tree.remove(place.at);
  go(parent);
  for (const { state } of gone) if (state) connection.call(`v1/fledge/states/${encodeURIComponent(state)}`, { method: "DELETE" }).catch(() => {});
});
by("look").addEventListener("click", look);
by("ask-help").addEventListener("click", () => by("help").showModal());
by("close-help").addEventListener("click", () => by("help").close());

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (!panels.close()) dialogue.stop();
  } else if (event.key === "?" && !typing) by("help").showModal();
  else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    composer.focus();
  }
});
window.addEventListener("pagehide", () => dialogue.running?.turns.forEach((turn) => tree.save(turn)));
window.addEventListener("storage", (event) => {
  if (!event.key?.startsWith("fledge.turn.") || !event.newValue) return;
  tree.insert(restored(JSON.parse(event.newValue)));
  draw();
});

lasting.onfull = () => notice("This browser's storage is full or closed: save the conversation as JSON, or it is gone with this tab.");
for (const turn of tree.turns.values()) if (turn.status === "open") settle(turn);
const remembered = passing.get("place") ?? lasting.get("place") ?? place;
const there = tree.get(remembered.at) ? remembered.at : null;
const groupThere = tree.children(there).some((turn) => turn.group === remembered.group);
themes();
go(there, groupThere ? remembered.group : null);
meet();
composer.focus();
