// The current conversation: the turns from the root to the current turn, in a log that follows growing text.

import { byId } from "./dom.js";
import { AnswerChoices, createLoadedState, TurnView } from "./turn_view.js";

const END_MARGIN = 60; // pixels; a scroll position this close to the end counts as the end

export class ConversationView {
  /** `actions` are the handlers of the buttons: {edit, retry, resume, choose, showSibling}. Each receives a turn. */
  constructor(tree, actions) {
    Object.assign(this, { tree, actions });
    this.views = new Map(); // by the id of the turn
    this.choices = null;
    this.followsEnd = true;
    this.lastScrollTop = 0;
    this.log = byId("log");
    this.container = byId("turns");
    this.log.addEventListener("scroll", () => this.handleScroll(), { passive: true });
    byId("jump-to-latest").addEventListener("click", () => this.scrollToEnd());
    new ResizeObserver(() => this.keepAtEnd()).observe(this.container);
  }

  /** Show the turns up to `currentId`, followed by the answers to choose from, if any. */
  render(currentId, choices) {
    const path = this.tree.getPath(currentId);
    const views = path.map((turn, index) => this.getTurnView(turn, index + 1));
    if (choices.length) views.push(this.getChoicesView(choices, path.length + 1));
    const nodes = views.map((view) => view.node);
    const { children } = this.container;
    const isUnchanged = nodes.length === children.length && nodes.every((node, index) => node === children[index]);
    if (!isUnchanged) this.container.replaceChildren(...nodes);
    for (const view of views) view.update();
    for (const id of this.views.keys()) if (!this.tree.get(id)) this.views.delete(id);
    byId("empty-state").hidden = views.length > 0;
  }

  /** Show the changes of a turn. */
  update(turn) {
    this.views.get(turn.id)?.update();
    this.choices?.update(turn);
  }

  /** Scroll to the end, and follow it while the text grows. */
  scrollToEnd() {
    this.followsEnd = true;
    byId("jump-to-latest").hidden = true;
    this.keepAtEnd();
  }

  keepAtEnd() {
    if (this.followsEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  handleScroll() {
    // Only scrolling up stops following the end. Text that grows faster than the log scrolls is not a user action.
    const { scrollTop, scrollHeight, clientHeight } = this.log;
    if (scrollHeight - scrollTop - clientHeight < END_MARGIN) this.followsEnd = true;
    else if (scrollTop < this.lastScrollTop - 1) this.followsEnd = false;
    this.lastScrollTop = scrollTop;
    byId("jump-to-latest").hidden = this.followsEnd;
  }

  getTurnView(turn, position) {
    const isState = turn.kind === "state";
    if (!this.views.has(turn.id)) this.views.set(turn.id, isState ? createLoadedState(turn) : new TurnView(this, turn));
    const view = this.views.get(turn.id);
    view.title.textContent = isState ? "State from a file" : `Turn ${position}`;
    return view;
  }

  getChoicesView(turns, position) {
    if (this.choices?.group !== turns[0].group) this.choices = new AnswerChoices(this, turns);
    this.choices.title.textContent = `Turn ${position}: ${turns.length} answers`;
    return this.choices;
  }
}
