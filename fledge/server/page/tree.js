// A conversation as a tree. A turn is a question and its answer, or a state that was brought along as a file; it names
// the turn that it follows (null: the beginning). Each is stored under a name of its own, so two tabs that write to one
// tree lose nothing of each other's.

import { lasting } from "./storage.js";

const STATUSES = ["open", "done", "stopped", "failed"];

export class Tree {
  constructor() {
    this.turns = new Map();
    this.below = new Map();
    for (const name of lasting.names("turn.")) this.insert(restored(lasting.get(name)));
    for (const turn of this.turns.values()) if (!this.turns.has(turn.parent)) this.reparent(turn, null);
    for (const turn of this.turns.values()) if (this.path(turn.id)[0]?.parent !== null) this.reparent(turn, null);
  }

  /** The turn with this id, or undefined. */
  get(id) {
    return this.turns.get(id);
  }

  /** What follows a turn (or null, the beginning), oldest first. */
  children(id) {
    return (this.below.get(id) ?? []).map((each) => this.turns.get(each)).sort(older);
  }

  /** The turns that follow the same turn as this one, itself among them, oldest first. */
  siblings(turn) {
    return this.children(turn.parent);
  }

  /** The turns from the first one to this. */
  path(id) {
    const found = [];
    const seen = new Set();
    for (let turn = this.turns.get(id); turn && !seen.has(turn.id); turn = this.turns.get(turn.parent)) {
      seen.add(turn.id);
      found.push(turn);
    }
    return found.reverse();
  }

  /** The newest end of what follows a turn. */
  newest(id) {
    let at = id;
    for (let next = this.children(at); next.length; next = this.children(at)) at = next.at(-1).id;
    return at;
  }

  /** How many turns follow it, at any distance. */
  following(id) {
    return this.subtree(id).length - 1;
  }

  /** A turn and all that follows it. */
  subtree(id) {
    const found = [id];
    for (const each of found) found.push(...(this.below.get(each) ?? []));
    return found;
  }

  /** Put a turn there and keep it. */
  add(turn) {
    const made = { id: crypto.randomUUID?.() ?? randomName(), created: Date.now(), kind: "turn", answer: "", ...turn };
    this.insert(made);
    this.save(made);
    return made;
  }

  /** Keep what has become of a turn, unless it has been taken out meanwhile. */
  save(turn) {
    if (this.turns.get(turn.id) === turn) lasting.put(`turn.${turn.id}`, turn);
  }

  /** Take out a turn and all that follows it; these turns. */
  remove(id) {
    const gone = this.subtree(id).map((each) => this.turns.get(each));
    for (const turn of gone) {
      this.turns.delete(turn.id);
      this.below.delete(turn.id);
      lasting.put(`turn.${turn.id}`, null);
    }
    const { parent } = gone[0];
    this.below.set(
      parent,
      (this.below.get(parent) ?? []).filter((each) => each !== id),
    );
    return gone;
  }

  /** The template that the conversation of a turn began with; a state's is that which it was read in. */
  template(id) {
    return this.path(id)[0]?.template ?? "";
  }

  /** What to send so that the server goes on after `parent`: the nearest state, and the messages since. */
  request(parent, system, states) {
    const messages = [];
    const path = this.path(parent);
    let [state, from] = [null, null];
    for (const turn of path.reverse()) {
      if (turn.state && (states || turn.kind === "state")) {
        [state, from] = [turn.state, turn];
        break;
      }
      if (turn.kind === "state") return { lost: turn };
      messages.unshift({ role: "user", content: turn.user }, { role: "assistant", content: turn.answer });
    }
    const opening = path.at(-1)?.system ?? (path.length ? "" : system);
    if (!from && opening) messages.unshift({ role: "system", content: opening });
    return { state, from, messages };
  }

  /** Forget the states of a path which the server has forgotten; a file's is left, nothing else could replace it. */
  forgetStates(id, keepFiles = true) {
    for (const turn of this.path(id)) {
      if (keepFiles && turn.kind === "state") continue;
      turn.state = null;
      this.save(turn);
    }
  }

  /** The whole tree, for a file. */
  toJSON() {
    return { fledge: "conversation", version: 1, turns: [...this.turns.values()].sort(older) };
  }

  /** Take in the turns of such a file that are not here yet; the newest of them. Throws an Error for other files. */
  merge(file) {
    if (file?.fledge !== "conversation" || file.version !== 1 || !Array.isArray(file.turns))
      throw new Error("This is no conversation that this page has saved.");
    const turns = file.turns.map(restored).filter((turn) => turn && !this.turns.has(turn.id));
    const known = new Set([...turns.map((turn) => turn.id), ...this.turns.keys()]);
    for (const turn of turns) this.insert({ ...turn, parent: known.has(turn.parent) ? turn.parent : null });
    for (const turn of turns) {
      if (this.path(turn.id)[0].parent !== null) this.reparent(this.turns.get(turn.id), null);
      this.save(this.turns.get(turn.id));
    }
    return turns.sort(older).at(-1) ?? null;
  }

  /** Put in what another tab has stored, without storing it again. */
  insert(turn) {
    if (!turn) return;
    const old = this.turns.get(turn.id);
    if (old) Object.assign(old, { error: undefined }, turn, { parent: old.parent });
    else {
      this.turns.set(turn.id, turn);
      this.below.set(turn.parent, [...(this.below.get(turn.parent) ?? []), turn.id]);
    }
  }

  reparent(turn, parent) {
    this.below.set(
      turn.parent,
      (this.below.get(turn.parent) ?? []).filter((id) => id !== turn.id),
    );
    turn.parent = parent;
    this.below.set(parent, [...(this.below.get(parent) ?? []), turn.id]);
  }
}

/** A turn as it was stored, in storage or in a file of anybody's; null for what is none. */
export function restored(found) {
  const text = (value) => (typeof value === "string" ? value : null);
  if (!text(found?.id)) return null;
  const kept = {
    id: found.id,
    parent: text(found.parent),
    created: Number.isFinite(found.created) ? found.created : 0,
    kind: found.kind === "state" ? "state" : "turn",
    user: text(found.user) ?? "",
    answer: text(found.answer) ?? "",
    status: STATUSES.includes(found.status) ? found.status : "done",
    state: text(found.state),
  };
  for (const name of ["system", "template", "group", "reason", "error", "name"])
    if (text(found[name]) !== null) kept[name] = found[name];
  for (const name of ["tokens", "number"]) if (Number.isFinite(found[name])) kept[name] = found[name];
  if (found.stats && typeof found.stats === "object") {
    const numbers = Object.entries(found.stats).filter(([, value]) => Number.isFinite(value));
    kept.stats = Object.fromEntries(numbers);
  }
  return kept;
}

/** End turns that were being written when their page went away. */
export function settle(turn) {
  turn.status = turn.answer ? "stopped" : "failed";
  if (!turn.answer) turn.error = "The page was closed before the answer began.";
}

function older(one, other) {
  return one.created - other.created || (one.number ?? 0) - (other.number ?? 0) || (one.id < other.id ? -1 : 1);
}

function randomName() {
  // crypto.randomUUID is for secure contexts only; a server in the local network is none.
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
