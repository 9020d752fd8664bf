// Asking and being answered: from which state, what to send, what a stream's pieces do to the turns, and what to do
// when the server has forgotten a state.

import { Failure } from "./connection.js";

const SAVED_EVERY = 1000; // milliseconds between saves of an answer that grows

export class Dialogue {
  /** changed(turn) is called when a turn has, ended(turns) after an answer, said(text) with something to tell quietly. */
  constructor(tree, connection, settings, { changed, ended, said }) {
    Object.assign(this, { tree, connection, settings, changed, ended, said });
    this.server = null; // GET /v1/fledge/server, once it is known
    this.running = null; // {turns, controller}
    this.failed = null; // what the last answer came to instead
  }

  /** Whether states are kept there, so that nothing is read twice. */
  get keeps() {
    return this.server?.keeps_states ?? false;
  }

  /** Turns that follow `parent`, all with this question; `run` has them answered. like: another turn at that place. */
  begin(parent, user, count, like = null) {
    const group = count > 1 ? `${Date.now()}-${Math.floor(Math.random() * 1e9)}` : undefined;
    const { system, template } = like ?? { system: this.settings.system, template: this.template(null) };
    const first = parent === null ? { system, template } : {};
    return Array.from({ length: count }, (_, number) =>
      this.tree.add({ parent, user, status: "open", state: null, group, number, ...first }),
    );
  }

  /** The template of the conversation that a turn is in; of one that begins now, that of the settings. */
  template(id) {
    return this.tree.template(id) || this.settings.values.template || this.server?.template || "";
  }

  /** Have turns answered that ask the same at the same place. */
  async run(turns) {
    const controller = new AbortController();
    this.running = { turns: new Set(turns), controller };
    for (const turn of turns) Object.assign(turn, { status: "open", answer: "", error: undefined, stats: undefined });
    turns.forEach(this.changed);
    try {
      await this.answered(turns, controller.signal);
    } catch (error) {
      for (const turn of turns) if (turn.status === "open") end(turn, error);
      this.failed = error;
    } finally {
      this.running = null;
      for (const turn of turns) this.tree.save(turn);
      this.ended(turns);
    }
  }

  /** End what is being written; what was shown stays. */
  stop() {
    this.running?.controller.abort();
  }

  /** Have the server make a state of a turn that has none: its answer was stopped, or the state is forgotten. */
  async read(turn) {
    const before = this.tree.request(turn.id, "", this.keeps);
    if (before.lost) throw lost(before.lost);
    const body = { messages: before.messages, ...(before.state && { state: before.state }) };
    const template = this.template(turn.id);
    if (template) body.template = template;
    turn.state = (await this.connection.json("v1/fledge/states", { method: "POST", body })).id;
    this.tree.save(turn);
  }

  async answered(turns, signal) {
    const { parent } = turns[0];
    for (let patience = 2; ; patience -= 1) {
      try {
        return await this.stream(turns, this.body(turns), signal);
      } catch (error) {
        if (error.keepsNone && this.keeps) this.server.keeps_states = false;
        const { from } = this.tree.request(parent, "", this.keeps);
        if (error.keepsNone && patience) continue;
        if (!error.uselessState || !from || !patience) throw error;
        this.tree.forgetStates(parent, from.kind !== "state");
        this.said("The server no longer has this conversation's state, so it reads the messages again.");
      }
    }
  }

  /** The request. Throws Failure where the state of a file is needed and gone. */
  body(turns) {
    const [turn] = turns;
    const again = this.tree
      .siblings(turn)
      .filter((each) => each.user === turn.user)
      .indexOf(turn);
    const { body, own } = this.settings.request(again, this.template(turn.id));
    const before = this.tree.request(turn.parent, turn.system, this.keeps);
    if (before.lost) throw lost(before.lost);
    const fledge = { ...own };
    if (before.state) fledge.state = before.state;
    if (this.keeps) fledge.return_state = "handle";
    const messages = [...before.messages, { role: "user", content: turn.user }];
    return { ...body, messages, n: turns.length, stream: true, stream_options: { include_usage: true }, fledge };
  }

  async stream(turns, body, signal) {
    let saved = Date.now();
    for await (const event of this.connection.events("v1/chat/completions", body, signal)) {
      for (const { index, delta, finish_reason: reason } of event.choices) {
        const turn = turns[index];
        turn.answer += delta.content ?? "";
        if (reason) turn.reason = reason;
        if (delta.content) this.changed(turn);
      }
      if (event.fledge) finish(turns, event);
      if (Date.now() - saved > SAVED_EVERY) {
        saved = Date.now();
        turns.forEach((turn) => this.tree.save(turn));
      }
    }
    for (const turn of turns) turn.status = "done";
  }
}

function lost(turn) {
  return new Failure(`The server no longer has the state ${turn.name ?? ""}. Open its file again.`);
}

function finish(turns, { fledge, usage }) {
  turns.forEach((turn, n) => {
    turn.state = fledge.states?.[n] ?? null;
    turn.stats = {
      answers: turns.length,
      written: usage.completion_tokens,
      read: usage.prompt_tokens,
      cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
      first: fledge.seconds_to_first_token ?? 0,
      seconds: fledge.seconds,
    };
  });
}

function end(turn, error) {
  const stopped = error.name === "AbortError";
  turn.status = stopped && turn.answer ? "stopped" : "failed";
  if (stopped && !turn.answer) turn.error = "Stopped before the answer began.";
  if (!stopped) turn.error = error.message;
  if (!stopped && turn.answer) turn.status = "stopped";
}
