// The entry point of the page: creates the components, connects them and handles navigation in the tree.

import { ApiClient } from "./api_client.js";
import { ChatController } from "./chat_controller.js";
import { Composer } from "./composer.js";
import { ConversationTree, endInterruptedTurn, parseTurn } from "./conversation_tree.js";
import { ConversationView } from "./conversation_view.js";
import { byId, createButton } from "./dom.js";
import { FileActions } from "./file_actions.js";
import { formatBytes } from "./format.js";
import { showNotice } from "./notice.js";
import { Panels } from "./panels.js";
import { Settings } from "./settings.js";
import { inspectState } from "./state_inspector.js";
import { localStore, sessionStore } from "./storage.js";
import { setUpThemeToggle } from "./theme_toggle.js";
import { TreeView } from "./tree_view.js";

const MAX_ANNOUNCED = 2000; // characters of an answer that a screen reader announces
const RECONNECT_DELAY = 5000; // milliseconds
const BUSY_NOTICE = "An answer is being generated. Stop it, or wait until it is complete.";

// `group` identifies several answers to one question, to choose from after the current turn. `inspected` identifies the
// state that the state panel shows.
const current = { turnId: null, group: null, inspected: null };
const changedTurns = new Set(); // to be drawn with the next frame

const tree = new ConversationTree();
const client = new ApiClient();
const settings = new Settings();
const chat = new ChatController(tree, client, settings, {
  onChange: scheduleUpdate,
  onEnd: handleEnd,
  onNotice: showNotice,
});
const conversationView = new ConversationView(tree, {
  edit: (turn, text) => askQuestion(turn.parent, text, turn),
  retry: (turn) => askQuestion(turn.parent, turn.user, turn) && composer.focus(),
  resume: resumeTurn,
  choose: (turn) => {
    goTo(turn.id);
    composer.focus();
  },
  showSibling: (turn) => goTo(tree.findNewestLeaf(turn.id)),
});
const treeView = new TreeView(tree, openTurn);
const composer = new Composer({ send: sendMessage, stop: () => chat.stop() });
const panels = new Panels((name) => {
  if (name === "state") inspectCurrentState();
  if (name === "tree") treeView.render();
});

/**
 * Go to a turn (null: the root) and store the position. Nothing is sent. The next question continues from the state of
 * that turn.
 */
function goTo(turnId, group = null) {
  Object.assign(current, { turnId, group });
  for (const store of [sessionStore, localStore]) store.set("place", { at: turnId, group });
  render();
  conversationView.scrollToEnd();
}

/** Go to a turn that was selected in a panel. On a small screen, the panel closes. */
function openTurn(turnId) {
  panels.closeDrawer();
  goTo(turnId);
}

function render() {
  const { turnId, group } = current;
  const choices = group ? tree.getChildren(turnId).filter((turn) => turn.group === group) : [];
  conversationView.render(turnId, choices);
  treeView.render(turnId, chat.running?.turns ?? new Set());
  composer.setBusy(chat.running !== null);
  renderBranchNote(turnId !== null && !choices.length ? tree.countDescendants(turnId) : 0);
  byId("refresh-state").classList.toggle("primary", current.inspected !== getStateKey());
  byId("remove-branch").disabled = turnId === null;
  byId("save-state").disabled = turnId === null;
}

/** Show that turns follow the current one, so that a new message creates a branch. */
function renderBranchNote(count) {
  const note = byId("branch-note");
  note.hidden = count === 0;
  if (count === 0) return;
  const text = `${count === 1 ? "1 turn follows" : `${count} turns follow`}. A new message starts a branch here. `;
  const button = createButton("Go to the latest turn", () => goTo(tree.findNewestLeaf(current.turnId)));
  note.replaceChildren(text, button);
}

/** Send the text of the message field. Returns false if it is not accepted. */
function sendMessage(text) {
  const { turnId, group } = current;
  if (group && tree.getChildren(turnId).some((choice) => choice.group === group && choice.status !== "failed")) {
    showNotice("Choose one of the answers first.");
    return false;
  }
  // A question without an answer cannot be continued. The new question becomes its sibling.
  const turn = tree.get(turnId);
  return askQuestion(turn?.status === "failed" ? turn.parent : turnId, text);
}

/** Add a question after a turn and generate its answers. Returns false if another answer is being generated. */
function askQuestion(parentId, text, source) {
  if (chat.running) {
    showNotice(BUSY_NOTICE);
    return false;
  }
  showNotice("");
  generate(chat.createTurns(parentId, text, composer.answerCount, source));
  return true;
}

/** Generate an answer that failed or is incomplete. If turns follow it, a new branch is created. */
function resumeTurn(turn) {
  if (tree.getChildren(turn.id).length) {
    askQuestion(turn.parent, turn.user, turn);
    return;
  }
  if (chat.running) {
    showNotice(BUSY_NOTICE);
    return;
  }
  showNotice("");
  const isFailedChoice = (sibling) => sibling.group === turn.group && sibling.status === "failed";
  generate(current.group && turn.group ? tree.getSiblings(turn).filter(isFailedChoice) : [turn]);
}

function generate(turns) {
  chat.run(turns);
  if (turns.length > 1 || current.group) goTo(turns[0].parent, turns[0].group);
  else goTo(turns[0].id);
}

/** Draw a changed turn with the next frame, because tokens arrive faster than frames are drawn. */
function scheduleUpdate(turn) {
  if (!changedTurns.size) {
    requestAnimationFrame(() => {
      for (const changedTurn of changedTurns) conversationView.update(changedTurn);
      changedTurns.clear();
    });
  }
  changedTurns.add(turn);
}

function handleEnd(turns) {
  render();
  const answers = turns.filter((turn) => turn.answer).map((turn) => turn.answer.slice(0, MAX_ANNOUNCED));
  byId("announcement").textContent = answers.length ? `Answer: ${answers.join(". Next answer: ")}` : "";
  const error = chat.lastError;
  chat.lastError = null;
  if (error?.status === 401) showKeyForm();
}

function showKeyForm() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

async function submitKey(event) {
  event.preventDefault();
  client.key = byId("key").value.trim();
  if (!(await connect())) return;
  byId("key").value = "";
  byId("key-form").hidden = true;
  const turn = tree.get(current.turnId);
  if (turn?.status === "failed" && !chat.running) resumeTurn(turn);
  composer.focus();
}

/** Read the server's properties and show them. Returns false if this fails. */
async function connect() {
  try {
    const serverInfo = await client.requestJson("v1/fledge/server");
    chat.serverInfo = serverInfo;
    settings.render(serverInfo);
    showServerInfo(serverInfo);
    showNotice("");
    return true;
  } catch (error) {
    if (error.status === 401) showKeyForm();
    else setTimeout(connect, RECONNECT_DELAY);
    showNotice(error.message);
    return false;
  }
}

function showServerInfo({ model, state_bytes: stateBytes, keeps_states: savesStates }) {
  byId("model-name").textContent = model;
  document.title = `${model} · Fledge`;
  const size = formatBytes(stateBytes);
  const saving = savesStates
    ? "The server saves it after every turn. You can continue from any turn in the tree. No text is processed twice."
    : "This server does not save it between turns.";
  byId("state-info").textContent = `The model's state takes ${size}, however long the conversation is. ${saving}`;
  byId("tree-note").textContent = savesStates
    ? ""
    : "This server does not save states, so the messages of a branch are processed again.";
  byId("save-state").hidden = !savesStates;
}

function inspectCurrentState() {
  current.inspected = getStateKey();
  byId("refresh-state").classList.remove("primary");
  const context = tree.buildContext(current.turnId, "", false);
  inspectState(byId("state-view"), context, client, chat.getTemplate(current.turnId));
}

/** Return a value that changes whenever the state panel would show something else. */
function getStateKey() {
  return `${current.turnId} ${tree.get(current.turnId)?.status}`;
}

/** Run an action and show its error, if any. */
async function withErrors(action) {
  showNotice("");
  try {
    await action();
  } catch (error) {
    showNotice(error.message);
    if (error.status === 401) showKeyForm();
  }
}

function handleKey(event) {
  const isTyping = event.target.closest("input, textarea, select");
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (!panels.closeDrawer()) chat.stop();
  } else if (event.key === "?" && !isTyping) byId("help").showModal();
  else if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    composer.focus();
  }
}

/** Add a turn that another tab stored. */
function syncTurn(event) {
  if (!event.key?.startsWith("fledge.turn.") || !event.newValue) return;
  tree.insert(parseTurn(JSON.parse(event.newValue)));
  render();
}

function saveRunningTurns() {
  for (const turn of chat.running?.turns ?? []) tree.save(turn);
}

function restorePosition() {
  const { at, group } = sessionStore.get("place") ?? localStore.get("place") ?? { at: null, group: null };
  const turnId = tree.get(at) ? at : null;
  const hasGroup = tree.getChildren(turnId).some((turn) => turn.group === group);
  goTo(turnId, hasGroup ? group : null);
}

new FileActions({ tree, client, chat, getCurrentId: () => current.turnId, openTurn, withErrors });
byId("key-form").addEventListener("submit", submitKey);
byId("new-conversation").addEventListener("click", () => {
  openTurn(null);
  composer.focus();
});
byId("refresh-state").addEventListener("click", inspectCurrentState);
byId("open-help").addEventListener("click", () => byId("help").showModal());
byId("close-help").addEventListener("click", () => byId("help").close());
document.addEventListener("keydown", handleKey);
window.addEventListener("pagehide", saveRunningTurns);
window.addEventListener("storage", syncTurn);
localStore.onError = () =>
  showNotice(
    "The browser's storage is full or blocked. Save the conversation as JSON, or it is lost when this tab is closed.",
  );
for (const turn of tree.turns.values()) if (turn.status === "open") endInterruptedTurn(turn);
setUpThemeToggle();
restorePosition();
connect();
if (!byId("state").hidden) inspectCurrentState();
composer.focus();
