// The turns from the beginning to where one is, as one reads them.

import { writable } from "./composer.js";
import { by, copier, h, number } from "./element.js";
import { show } from "./markdown.js";
import { passing } from "./storage.js";

const NEAR = 60; // pixels from the end within which a reader counts as being there

export class Conversation {
  /** actions: what buttons do; each takes a turn. */
  constructor(tree, actions) {
    Object.assign(this, { tree, actions, views: new Map(), follows: true, top: 0 });
    this.log = by("log");
    this.place = by("turns");
    this.log.addEventListener(
      "scroll",
      () => {
        // Only going up lets go of the end: text that grows faster than it is scrolled to is no wish of the reader's.
        const { scrollTop, scrollHeight, clientHeight } = this.log;
        if (scrollHeight - scrollTop - clientHeight < NEAR) this.follows = true;
        else if (scrollTop < this.top - 1) this.follows = false;
        this.top = scrollTop;
        by("down").hidden = this.follows;
      },
      { passive: true },
    );
    by("down").addEventListener("click", () => this.end());
    new ResizeObserver(() => this.keepUp()).observe(this.place);
  }

  /** Show the turns up to `at`, and below it the answers among which to choose, if any. */
  draw(at, choices) {
    const path = this.tree.path(at);
    const shown = path.map((turn, place) => this.view(turn, place + 1));
    if (choices.length) shown.push(this.choices(choices, path.length + 1));
    const nodes = shown.map((view) => view.node);
    const same =
      nodes.length === this.place.children.length && nodes.every((node, n) => node === this.place.children[n]);
    if (!same) this.place.replaceChildren(...nodes);
    for (const view of shown) view.update();
    for (const id of this.views.keys()) if (!this.tree.get(id)) this.views.delete(id);
    by("empty").hidden = shown.length > 0;
  }

  /** Show what has become of a turn. */
  update(turn) {
    this.views.get(turn.id)?.update();
    this.group?.update(turn);
  }

  /** Go to the end, and stay there while it grows. */
  end() {
    this.follows = true;
    by("down").hidden = true;
    this.keepUp();
  }

  keepUp() {
    if (this.follows) this.log.scrollTop = this.log.scrollHeight;
  }

  view(turn, place) {
    if (!this.views.has(turn.id)) {
      const made = turn.kind === "state" ? loaded(turn) : new Turn(this, turn);
      this.views.set(turn.id, made);
    }
    const view = this.views.get(turn.id);
    view.title.textContent = turn.kind === "state" ? "A state from a file" : `Turn ${place}`;
    return view;
  }

  choices(turns, place) {
    if (this.group?.id !== turns[0].group) this.group = new Choices(this, turns);
    this.group.title.textContent = `Turn ${place}: ${turns.length} answers`;
    return this.group;
  }
}

/** One question and its answer. */
class Turn {
  constructor(conversation, turn) {
    Object.assign(this, { conversation, turn });
    this.title = h("h2.hidden");
    this.question = h("div.question", { dir: "auto" });
    this.answer = new Answer(conversation, turn);
    this.asked = h(
      "div.asked",
      {},
      this.question,
      h("div.actions", {}, h("button.quiet", { type: "button", onclick: () => this.edit() }, "Edit")),
    );
    this.node = h("article.turn", {}, this.title, this.asked, this.answer.node);
    this.update();
    if (passing.get(`edit.${turn.id}`) !== null) this.edit(false);
  }

  update() {
    if (this.question.textContent !== this.turn.user) this.question.textContent = this.turn.user;
    this.answer.update();
  }

  /** Make the question one that can be changed; sending it begins a branch. */
  edit(focus = true) {
    const draft = `edit.${this.turn.id}`;
    const area = h("textarea", { rows: 1, dir: "auto", "aria-label": "Your message, changed" });
    const close = () => {
      passing.put(draft, null);
      form.replaceWith(this.asked);
      this.asked.querySelector("button").focus();
    };
    const send = () => {
      if (area.value.trim() && this.conversation.actions.edit(this.turn, area.value.trim())) close();
    };
    const form = h(
      "form.editing",
      { "aria-label": "Change the message" },
      area,
      h(
        "div.row.end",
        {},
        h("span.aside", {}, "The old one stays in the tree"),
        h("button.quiet", { type: "button", onclick: close }, "Cancel"),
        h("button.primary", { type: "submit" }, "Send as a branch"),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    area.addEventListener("input", () => passing.put(draft, area.value));
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      close();
    });
    area.value = passing.get(draft) ?? this.turn.user;
    passing.put(draft, area.value);
    this.asked.replaceWith(form);
    const fit = writable(area, send);
    requestAnimationFrame(fit);
    if (focus) area.focus();
  }
}

/** An answer: text, what went wrong, figures, buttons. */
class Answer {
  constructor(conversation, turn, choosing = false) {
    Object.assign(this, { conversation, turn, choosing });
    this.text = h("div.text", {});
    this.waiting = h("p.waiting", {}, h("span.dots", { "aria-hidden": "true" }), "Reading");
    this.error = h("div.error", { role: "alert" });
    this.figures = h("p.figures");
    this.buttons = h("div.actions");
    this.node = h("div.answer", {}, this.text, this.waiting, this.error, h("div.foot", {}, this.buttons, this.figures));
  }

  update() {
    const { turn } = this;
    const open = turn.status === "open";
    show(this.text, turn.answer);
    this.node.dataset.status = turn.status;
    this.text.hidden = !turn.answer;
    this.waiting.hidden = !open || turn.answer !== "";
    this.error.hidden = !turn.error;
    const state = [turn.status, turn.error, this.conversation.tree.siblings(turn).map((each) => each.id)].join();
    if (state === this.state) return;
    this.state = state;
    const { actions } = this.conversation;
    this.error.replaceChildren(
      ...(turn.error ? [h("p", {}, turn.error), button("Retry", () => actions.again(turn))] : []),
    );
    this.figures.textContent = open ? "" : figures(turn);
    this.buttons.replaceChildren(...(open ? [] : this.tools()));
  }

  tools() {
    const { turn } = this;
    const { actions, tree } = this.conversation;
    if (this.choosing) {
      const choose = button("Go on with this", () => actions.choose(turn), "choose");
      choose.disabled = turn.status === "failed";
      return [choose];
    }
    const found = [];
    const siblings = tree.siblings(turn).filter((each) => each.kind === "turn");
    const at = siblings.indexOf(turn);
    if (siblings.length > 1) {
      const step = (by, sign, name) => {
        const made = button(sign, () => actions.sibling(siblings[at + by]));
        made.disabled = !siblings[at + by];
        made.setAttribute("aria-label", name);
        return made;
      };
      found.push(
        h(
          "span.siblings",
          { role: "group", "aria-label": "Branches here" },
          step(-1, "‹", "Branch before"),
          h("span", {}, `${at + 1}/${siblings.length}`),
          step(1, "›", "Next branch"),
        ),
      );
    }
    if (turn.status !== "failed") found.push(button("Retry", () => actions.retry(turn)));
    if (turn.answer) found.push(copier(() => turn.answer));
    return found.filter(Boolean);
  }
}

/** Several answers to one question, side by side. */
class Choices {
  constructor(conversation, turns) {
    this.id = turns[0].group;
    this.title = h("h2.hidden");
    this.answers = turns.map((turn) => new Answer(conversation, turn, true));
    const columns = this.answers.map((answer, n) =>
      h("section.choice", { "aria-label": `Answer ${n + 1}` }, h("h3", {}, `Answer ${n + 1}`), answer.node),
    );
    this.node = h(
      "article.turn",
      {},
      this.title,
      h("div.asked", {}, h("div.question", { dir: "auto" }, turns[0].user)),
      h("div.choices", {}, columns),
    );
    this.update();
  }

  update(turn = null) {
    for (const answer of this.answers) if (!turn || answer.turn === turn) answer.update();
  }
}

function loaded(turn) {
  const title = h("h2.hidden");
  const read = turn.tokens ? ` (${number(turn.tokens)} tokens read)` : "";
  const text = h("p.loaded", {}, "Goes on from the state ", h("b", { dir: "auto" }, turn.name || "of a file"), read);
  return { title, node: h("article.turn", {}, title, text), update: () => {} };
}

function button(text, onclick, kind = "quiet") {
  return h(`button.${kind}`, { type: "button", onclick }, text);
}

/** The figures under an answer. */
function figures(turn) {
  const { stats } = turn;
  const found = [];
  if (turn.status === "stopped") found.push("stopped");
  if (turn.reason === "length") found.push("cut off at the longest answer");
  if (!stats) return found.join(" · ");
  const together = stats.answers > 1 ? ` in ${stats.answers} answers` : "";
  found.push(`${number(stats.written)} tokens${together}`);
  const writing = stats.seconds - stats.first;
  if (writing > 0 && stats.written > 1) found.push(`${number((stats.written - 1) / writing)}/s`);
  if (stats.first) found.push(`first after ${number(stats.first, 2)} s`);
  found.push(`${number(stats.read)} read`);
  if (stats.cached) found.push(`${number(stats.cached)} of them cached`);
  return found.join(" · ");
}
