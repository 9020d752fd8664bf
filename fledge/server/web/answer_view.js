// An answer: its text, its error, its metrics and its buttons.

import { createButton, createCopyButton, h } from "./dom.js";
import { formatNumber } from "./format.js";
import { renderMarkdown } from "./markdown.js";

export class AnswerView {
  /** `isChoice`: the answer is one of several to choose from. */
  constructor(conversation, turn, isChoice = false) {
    Object.assign(this, { conversation, turn, isChoice });
    this.text = h("div.text");
    this.pending = h("p.pending", {}, h("span.pending-dot", { "aria-hidden": "true" }), "Processing the prompt");
    this.error = h("div.error", { role: "alert" });
    this.metrics = h("p.metrics");
    this.buttons = h("div.actions");
    const footer = h("div.answer-footer", {}, this.buttons, this.metrics);
    this.node = h("div.answer", {}, this.text, this.pending, this.error, footer);
  }

  update() {
    const { turn } = this;
    const isOpen = turn.status === "open";
    renderMarkdown(this.text, turn.answer);
    this.node.dataset.status = turn.status;
    this.text.hidden = !turn.answer;
    this.pending.hidden = !isOpen || turn.answer !== "";
    this.error.hidden = !turn.error;
    this.updateFooter(isOpen);
  }

  /** Update everything except the text, but only if it changed: new buttons would lose the focus. */
  updateFooter(isOpen) {
    const { turn } = this;
    const { actions, tree } = this.conversation;
    const siblingIds = tree.getSiblings(turn).map((sibling) => sibling.id);
    const content = [turn.status, turn.error, siblingIds].join();
    if (content === this.footerContent) return;
    this.footerContent = content;
    const retry = () => createButton("Retry", () => actions.resume(turn));
    this.error.replaceChildren(...(turn.error ? [h("p", {}, turn.error), retry()] : []));
    this.metrics.textContent = isOpen ? "" : formatMetrics(turn);
    this.buttons.replaceChildren(...(isOpen ? [] : this.createButtons()));
  }

  createButtons() {
    const { turn } = this;
    const { actions } = this.conversation;
    if (this.isChoice) {
      const choose = createButton("Continue with this answer", () => actions.choose(turn), "choose");
      choose.disabled = turn.status === "failed";
      return [choose];
    }
    const buttons = [
      this.createBranchSwitcher(),
      turn.status !== "failed" && createButton("Retry", () => actions.retry(turn)),
      turn.answer && createCopyButton(() => turn.answer),
    ];
    return buttons.filter(Boolean);
  }

  /** Create the buttons that switch between the branches at this turn. Returns null if there is only one. */
  createBranchSwitcher() {
    const { actions, tree } = this.conversation;
    const siblings = tree.getSiblings(this.turn).filter((sibling) => sibling.kind === "turn");
    if (siblings.length < 2) return null;
    const index = siblings.indexOf(this.turn);
    const createSwitch = (sibling, symbol, label) => {
      const button = createButton(symbol, () => actions.showSibling(sibling));
      button.disabled = !sibling;
      button.setAttribute("aria-label", label);
      return button;
    };
    return h(
      "span.branch-switcher",
      { role: "group", "aria-label": "Branches" },
      createSwitch(siblings[index - 1], "‹", "Previous branch"),
      h("span", {}, `${index + 1}/${siblings.length}`),
      createSwitch(siblings[index + 1], "›", "Next branch"),
    );
  }
}

function formatMetrics(turn) {
  const { stats } = turn;
  const parts = [];
  if (turn.status === "stopped") parts.push("stopped");
  if (turn.reason === "length") parts.push("cut off at the token limit");
  if (!stats) return parts.join(" · ");
  const scope = stats.answers > 1 ? ` in ${stats.answers} answers` : "";
  parts.push(`${formatNumber(stats.written)} tokens${scope}`);
  const decodeSeconds = stats.seconds - stats.first;
  if (decodeSeconds > 0 && stats.written > 1) {
    parts.push(`${formatNumber((stats.written - 1) / decodeSeconds)} tokens/s`);
  }
  if (stats.first) parts.push(`first token after ${formatNumber(stats.first, 2)} s`);
  const cached = stats.cached ? ` (${formatNumber(stats.cached)} cached)` : "";
  parts.push(`${formatNumber(stats.read)} prompt tokens${cached}`);
  return parts.join(" · ");
}
