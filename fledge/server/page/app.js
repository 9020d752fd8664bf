// The page: what belongs together is put together here.

import { Branches } from "./branches.js";
import { Composer, notice } from "./composer.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { Dialogue } from "./dialogue.js";
import { by, bytes, h } from "./element.js";
import { files } from "./files.js";
import { inspect } from "./microscope.js";
import { Panels, themes } from "./panels.js";
import { Settings } from "./settings.js";
import { lasting, passing } from "./storage.js";
import { restored, settle, Tree } from "./tree.js";

const SPOKEN = 2000; // characters of an answer that are read out
const AGAIN = 5000; // milliseconds until the server is looked for again

const tree = new Tree();
const connection = new Connection();
const settings = new Settings();
const place = { at: null, group: null, looked: null }; // the turn one is at, and the answers to choose from after it

const dialogue = new Dialogue(tree, connection, settings, { changed, ended, said: notice });
const conversation = new Conversation(tree, {
  edit: (turn, text) => ask(turn.parent, text, turn),
  retry: (turn) => ask(turn.parent, turn.user, turn) && composer.focus(),
  again,
  choose: (turn) => {
    go(turn.id);
    composer.focus();
  },
  sibling: (turn) => go(tree.newest(turn.id)),
});
const branches = new Branches(tree, goOut);
const composer = new Composer({ send: (text) => send(text), stop: () => dialogue.stop() });
const panels = new Panels((name) => {
  if (name === "state") look();
  if (name === "tree") branches.draw();
});

/** Go to a turn (null: the beginning). Nothing is sent: the next question starts from that turn's state. */
function go(at, group = null) {
  Object.assign(place, { at, group });
  passing.put("place", { at, group });
  lasting.put("place", { at, group });
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
    by("onward").replaceChildren(
      `${count === 1 ? "One turn follows" : `${count} turns follow`} here. What you write now begins a branch. `,
      jump,
    );
  }
  by("look").classList.toggle("primary", place.looked !== here());
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

function ask(parent, text, like) {
  if (dialogue.running) {
    notice("An answer is being written. Stop it first, or wait.");
    return false;
  }
  notice("");
  const turns = dialogue.begin(parent, text, composer.answers, like);
  answer(turns);
  return true;
}

/** Have a question answered that got no answer, or part of one; what has been built on that part stays. */
function again(turn) {
  if (tree.children(turn.id).length) return ask(turn.parent, turn.user, turn);
  if (dialogue.running) return notice("An answer is being written. Stop it first, or wait.");
  notice("");
  const others = turn.group
    ? tree.siblings(turn).filter((each) => each.group === turn.group && each.status === "failed")
    : [];
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
    else setTimeout(meet, AGAIN);
    notice(error.message);
    return false;
  }
}

/** Look at the state here. */
function look() {
  place.looked = here();
  by("look").classList.remove("primary");
  inspect(by("picture"), tree.request(place.at, "", false), connection, dialogue.template(place.at));
}

/** What the picture of the state is a picture of. */
function here() {
  return `${place.at} ${tree.get(place.at)?.status}`;
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

/** Go to a turn that was chosen in a drawer, which then has done its work. */
function goOut(at) {
  panels.close();
  go(at);
}

files({ tree, connection, dialogue, tried, go: goOut, at: () => place.at });
by("begin").addEventListener("click", () => {
  goOut(null);
  composer.focus();
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

lasting.onfull = () =>
  notice("This browser's storage is full or closed: save the conversation as JSON, or it is gone with this tab.");
for (const turn of tree.turns.values()) if (turn.status === "open") settle(turn);
const remembered = passing.get("place") ?? lasting.get("place") ?? place;
const there = tree.get(remembered.at) ? remembered.at : null;
const groupThere = tree.children(there).some((turn) => turn.group === remembered.group);
themes();
go(there, groupThere ? remembered.group : null);
meet();
if (!by("state").hidden) look();
composer.focus();
