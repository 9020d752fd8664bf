// The conversations as a tree of turns. A turn is a question with its answer, or a state uploaded as a file. It has the
// id of the turn before it (null at the root). Each turn is stored under its own key, so that tabs which write to the
// same tree do not overwrite each other.

import { localStore } from "./storage.js";

const STATUSES = ["open", "done", "stopped", "failed"]; // "open": the answer is being generated
const FORMAT = { fledge: "conversation", version: 1 };

export class ConversationTree {
  constructor() {
    this.turns = new Map();
    this.childIds = new Map(); // by the id of the parent
    for (const name of localStore.listNames("turn.")) this.insert(parseTurn(localStore.get(name)));
    for (const turn of this.turns.values()) if (!this.turns.has(turn.parent)) this.reparent(turn, null);
    for (const turn of this.turns.values()) if (this.getPath(turn.id)[0]?.parent !== null) this.reparent(turn, null);
  }

  /** Return the turn with this id, or undefined. */
  get(id) {
    return this.turns.get(id);
  }

  /** Return the turns directly after a turn, oldest first. null is the root. */
  getChildren(id) {
    return (this.childIds.get(id) ?? []).map((childId) => this.turns.get(childId)).sort(compareAge);
  }

  /** Return all turns with the same parent, including this one, oldest first. */
  getSiblings(turn) {
    return this.getChildren(turn.parent);
  }

  /** Return the turns from the root to this one. */
  getPath(id) {
    const path = [];
    const seen = new Set();
    for (let turn = this.turns.get(id); turn && !seen.has(turn.id); turn = this.turns.get(turn.parent)) {
      seen.add(turn.id);
      path.push(turn);
    }
    return path.reverse();
  }

  /** Follow the newest child of each turn and return the id of the last one. */
  findNewestLeaf(id) {
    let leafId = id;
    for (let children = this.getChildren(id); children.length; children = this.getChildren(leafId)) {
      leafId = children.at(-1).id;
    }
    return leafId;
  }

  countDescendants(id) {
    return this.listSubtree(id).length - 1;
  }

  /** Return the ids of a turn and all its descendants. */
  listSubtree(id) {
    const ids = [id];
    for (const parentId of ids) ids.push(...(this.childIds.get(parentId) ?? []));
    return ids;
  }

  /** Create a turn, store it and return it. */
  add(fields) {
    const id = crypto.randomUUID?.() ?? generateId();
    const turn = { id, created: Date.now(), kind: "turn", answer: "", ...fields };
    this.insert(turn);
    this.save(turn);
    return turn;
  }

  /** Store a changed turn, unless it was removed in the meantime. */
  save(turn) {
    if (this.turns.get(turn.id) === turn) localStore.set(`turn.${turn.id}`, turn);
  }

  /** Remove a turn and all its descendants, and return them. */
  remove(id) {
    const removed = this.listSubtree(id).map((removedId) => this.turns.get(removedId));
    this.unlink(removed[0]);
    for (const turn of removed) {
      this.turns.delete(turn.id);
      this.childIds.delete(turn.id);
      localStore.set(`turn.${turn.id}`, null);
    }
    return removed;
  }

  /** Return the chat template of a turn's conversation. That of an uploaded state is recorded in its file. */
  getTemplate(id) {
    return this.getPath(id)[0]?.template ?? "";
  }

  /**
   * Build the context of the next turn after `parentId`: the nearest saved state, the turn it belongs to, and the
   * messages after it. Without `usesStates`, only uploaded states are used. If the server deleted an uploaded state,
   * the result contains only its turn, as `lostStateTurn`: its messages are unknown.
   */
  buildContext(parentId, systemPrompt, usesStates) {
    const path = this.getPath(parentId);
    const messages = [];
    for (const turn of [...path].reverse()) {
      if (turn.state && (usesStates || turn.kind === "state")) return { state: turn.state, stateTurn: turn, messages };
      if (turn.kind === "state") return { lostStateTurn: turn };
      messages.unshift({ role: "user", content: turn.user }, { role: "assistant", content: turn.answer });
    }
    const content = path.length ? path[0].system : systemPrompt;
    if (content) messages.unshift({ role: "system", content });
    return { state: null, stateTurn: null, messages };
  }

  /** Forget the states on a path that the server deleted. Uploaded states are kept: they cannot be recomputed. */
  clearStates(id, keepUploaded = true) {
    for (const turn of this.getPath(id)) {
      if (keepUploaded && turn.kind === "state") continue;
      turn.state = null;
      this.save(turn);
    }
  }

  /** Return the content of the file that `importTurns` reads. */
  toJSON() {
    return { ...FORMAT, turns: [...this.turns.values()].sort(compareAge) };
  }

  /** Add the turns of a file that are not in the tree yet. Returns the newest of them, or null. */
  importTurns(file) {
    if (file?.fledge !== FORMAT.fledge || file.version !== FORMAT.version || !Array.isArray(file.turns)) {
      throw new Error("This file is not a conversation saved by this page.");
    }
    const turns = file.turns.map(parseTurn).filter((turn) => turn && !this.turns.has(turn.id));
    const ids = new Set([...turns.map((turn) => turn.id), ...this.turns.keys()]);
    for (const turn of turns) this.insert({ ...turn, parent: ids.has(turn.parent) ? turn.parent : null });
    for (const { id } of turns) {
      if (this.getPath(id)[0].parent !== null) this.reparent(this.turns.get(id), null);
      this.save(this.turns.get(id));
    }
    return turns.sort(compareAge).at(-1) ?? null;
  }

  /** Add or update a turn without storing it. null is ignored. */
  insert(turn) {
    if (!turn) return;
    const existing = this.turns.get(turn.id);
    if (existing) Object.assign(existing, { error: undefined }, turn, { parent: existing.parent });
    else {
      this.turns.set(turn.id, turn);
      this.link(turn);
    }
  }

  reparent(turn, parentId) {
    this.unlink(turn);
    turn.parent = parentId;
    this.link(turn);
  }

  link(turn) {
    this.childIds.set(turn.parent, [...(this.childIds.get(turn.parent) ?? []), turn.id]);
  }

  unlink(turn) {
    const siblingIds = this.childIds.get(turn.parent) ?? [];
    this.childIds.set(
      turn.parent,
      siblingIds.filter((id) => id !== turn.id),
    );
  }
}

/** Validate a turn from storage or from a file of unknown origin. Returns null if it is not a turn. */
export function parseTurn(value) {
  const asString = (field) => (typeof field === "string" ? field : null);
  if (!asString(value?.id)) return null;
  const turn = {
    id: value.id,
    parent: asString(value.parent),
    created: Number.isFinite(value.created) ? value.created : 0,
    kind: value.kind === "state" ? "state" : "turn",
    user: asString(value.user) ?? "",
    answer: asString(value.answer) ?? "",
    status: STATUSES.includes(value.status) ? value.status : "done",
    state: asString(value.state),
  };
  for (const name of ["system", "template", "group", "reason", "error", "name"]) {
    if (asString(value[name]) !== null) turn[name] = value[name];
  }
  for (const name of ["tokens", "number"]) if (Number.isFinite(value[name])) turn[name] = value[name];
  if (value.stats && typeof value.stats === "object") {
    turn.stats = Object.fromEntries(Object.entries(value.stats).filter(([, stat]) => Number.isFinite(stat)));
  }
  return turn;
}

/** End a turn that was still generating when its page was closed. */
export function endInterruptedTurn(turn) {
  turn.status = turn.answer ? "stopped" : "failed";
  if (!turn.answer) turn.error = "The page was closed before the answer started.";
}

function compareAge(one, other) {
  return one.created - other.created || (one.number ?? 0) - (other.number ?? 0) || (one.id < other.id ? -1 : 1);
}

function generateId() {
  // crypto.randomUUID requires a secure context, which a server in the local network does not provide.
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
