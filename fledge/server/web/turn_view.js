// A turn of the conversation: the question, which can be edited, and its answer or several answers to choose from.

import { AnswerView } from "./answer_view.js";
import { setUpTextArea } from "./composer.js";
import { createButton, h } from "./dom.js";
import { formatNumber } from "./format.js";
import { sessionStore } from "./storage.js";

export class TurnView {
  constructor(conversation, turn) {
    Object.assign(this, { conversation, turn });
    this.title = h("h2.visually-hidden");
    this.question = h("div.question", { dir: "auto" });
    this.answer = new AnswerView(conversation, turn);
    const actions = h(
      "div.actions",
      {},
      createButton("Edit", () => this.edit()),
    );
    this.questionRow = h("div.question-row", {}, this.question, actions);
    this.node = h("article.turn", {}, this.title, this.questionRow, this.answer.node);
    this.update();
    if (sessionStore.get(this.draftName) !== null) this.edit(false);
  }

  /** The name in the storage of an edited question that was not sent yet. */
  get draftName() {
    return `edit.${this.turn.id}`;
  }

  update() {
    if (this.question.textContent !== this.turn.user) this.question.textContent = this.turn.user;
    this.answer.update();
  }

  /** Replace the question with an editor. Sending the edited question creates a branch. */
  edit(shouldFocus = true) {
    const area = h("textarea", { rows: 1, dir: "auto", "aria-label": "Edited message" });
    const close = () => {
      sessionStore.set(this.draftName, null);
      form.replaceWith(this.questionRow);
      this.questionRow.querySelector("button").focus();
    };
    const send = () => {
      const text = area.value.trim();
      if (text && this.conversation.actions.edit(this.turn, text)) close();
    };
    const form = createEditForm(area, send, close);
    area.addEventListener("input", () => sessionStore.set(this.draftName, area.value));
    area.value = sessionStore.get(this.draftName) ?? this.turn.user;
    sessionStore.set(this.draftName, area.value);
    this.questionRow.replaceWith(form);
    requestAnimationFrame(setUpTextArea(area, send));
    if (shouldFocus) area.focus();
  }
}

function createEditForm(area, send, close) {
  const buttons = h(
    "div.row.end",
    {},
    h("span.note", {}, "The original stays in the tree"),
    createButton("Cancel", close),
    h("button.primary", { type: "submit" }, "Send as new branch"),
  );
  const form = h("form.question-editor", { "aria-label": "Edit the message" }, area, buttons);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    close();
  });
  return form;
}

/** Several answers to one question, side by side. */
export class AnswerChoices {
  constructor(conversation, turns) {
    this.group = turns[0].group;
    this.title = h("h2.visually-hidden");
    this.answers = turns.map((turn) => new AnswerView(conversation, turn, true));
    const columns = this.answers.map((answer, index) => {
      const label = `Answer ${index + 1}`;
      return h("section.answer-choice", { "aria-label": label }, h("h3", {}, label), answer.node);
    });
    const question = h("div.question-row", {}, h("div.question", { dir: "auto" }, turns[0].user));
    this.node = h("article.turn", {}, this.title, question, h("div.answer-choices", {}, columns));
    this.update();
  }

  /** Update the answer of one turn, or all answers. */
  update(turn = null) {
    for (const answer of this.answers) if (!turn || answer.turn === turn) answer.update();
  }
}

/** Create the view of a turn that is an uploaded state. It has the same interface as TurnView. */
export function createLoadedState(turn) {
  const title = h("h2.visually-hidden");
  const tokens = turn.tokens ? ` (${formatNumber(turn.tokens)} tokens)` : "";
  const name = h("b", { dir: "auto" }, turn.name || "of a file");
  const text = h("p.loaded-state", {}, "Continues from the state ", name, tokens);
  return { title, node: h("article.turn", {}, title, text), update: () => {} };
}
