// The conversation tree as an ARIA tree. Consecutive turns are drawn below each other. Only the children of a fork move
// one lane to the right, so that a long conversation stays narrow.

import { byId, h, svg } from "./dom.js";
import { truncate } from "./format.js";

const LANE_WIDTH = 14; // pixels
const ROW_HEIGHT = 32;
const MIDDLE = ROW_HEIGHT / 2;
const ROOT = ""; // the id of the root in the view; it is null in the tree

export class TreeView {
  /** `onSelect(id)` is called with the id of the selected turn; null is the root. */
  constructor(tree, onSelect) {
    Object.assign(this, { tree, onSelect });
    this.rows = [];
    this.collapsed = new Set();
    this.currentId = null;
    this.focusedId = ROOT;
    this.running = new Set();
    this.container = byId("tree-view");
    this.container.addEventListener("keydown", (event) => this.handleKey(event));
    this.container.addEventListener("click", (event) => {
      const item = event.target.closest("[role=treeitem]");
      if (!item) return;
      if (event.target.closest(".fold-toggle")) this.toggleFold(item.dataset.id);
      else this.select(item.dataset.id);
    });
  }

  /** Draw the tree. `currentId` is the current turn, `running` the set of turns that are being generated. */
  render(currentId = this.currentId, running = this.running) {
    if (currentId !== this.currentId) this.focusedId = currentId ?? ROOT;
    Object.assign(this, { currentId, running });
    const pathIds = new Set(this.tree.getPath(currentId).map((turn) => turn.id));
    const hadFocus = this.container.contains(document.activeElement);
    this.rows = this.layOutRows(pathIds);
    if (!this.rows.some((row) => row.id === this.focusedId)) this.focusedId = currentId ?? ROOT;
    this.container.replaceChildren(...this.rows.map((row) => this.createItem(row, pathIds)));
    if (hadFocus) this.getItem(this.focusedId)?.focus();
    else this.getItem(currentId ?? ROOT)?.scrollIntoView({ block: "nearest" });
  }

  /**
   * Return the rows from top to bottom. A row has its level, its lane, the lanes of other branches that pass it, and
   * its position among its siblings.
   */
  layOutRows(pathIds) {
    const rows = [];
    const pending = [{ id: ROOT, level: 1, lane: 0, passingLanes: [], position: 1, setSize: 1, startsBranch: false }];
    while (pending.length) {
      const row = pending.pop();
      const children = this.tree.getChildren(row.id || null);
      row.isFork = children.length > 1;
      row.isCollapsed = row.isFork && this.collapsed.has(row.id);
      row.hasChildRows = children.length > 0 && !row.isCollapsed;
      const pathIndex = children.findIndex((turn) => pathIds.has(turn.id));
      row.continuesPath = pathIndex >= 0;
      rows.push(row);
      if (row.isCollapsed) continue;
      const childRows = children.map((turn, index) => {
        const hasBranchBelow = row.isFork && index < children.length - 1;
        const branchLane = { lane: row.lane, isOnPath: pathIndex > index };
        return {
          id: turn.id,
          level: row.level + 1,
          lane: row.lane + (row.isFork ? 1 : 0),
          startsBranch: row.isFork,
          passingLanes: hasBranchBelow ? [...row.passingLanes, branchLane] : row.passingLanes,
          position: index + 1,
          setSize: children.length,
        };
      });
      pending.push(...childRows.reverse());
    }
    return rows;
  }

  createItem(row, pathIds) {
    const turn = this.tree.get(row.id);
    const isCurrent = row.id === (this.currentId ?? ROOT);
    const isOnPath = pathIds.has(row.id) || row.id === ROOT;
    const label = this.getLabel(turn);
    const classes = `${isCurrent ? ".current" : ""}${isOnPath ? ".on-path" : ""}`;
    const attributes = {
      role: "treeitem",
      "data-id": row.id,
      "aria-level": row.level,
      "aria-posinset": row.position,
      "aria-setsize": row.setSize,
      "aria-selected": String(isCurrent),
      "aria-expanded": row.isFork ? String(!row.isCollapsed) : null,
      "aria-label": label + (this.running.has(turn) ? ", in progress" : ""),
      tabindex: row.id === this.focusedId ? 0 : -1,
      title: turn ? truncate(turn.user || label, 300) : null,
    };
    return h(
      `div.tree-item${classes}`,
      attributes,
      this.createLines(row, turn, isOnPath),
      h("span.label", { dir: "auto" }, label),
      row.isFork && this.createFoldToggle(row),
    );
  }

  createFoldToggle(row) {
    const text = row.isCollapsed ? `+${this.tree.countDescendants(row.id || null)}` : "–";
    return h("span.fold-toggle", { "aria-hidden": "true" }, text);
  }

  getLabel(turn) {
    if (!turn) return "Start";
    if (turn.kind === "state") return `State: ${turn.name || "from a file"}`;
    const hasRetries = this.tree.getSiblings(turn).filter((sibling) => sibling.user === turn.user).length > 1;
    if (hasRetries && turn.answer) return `↻ ${truncate(turn.answer.slice(0, 500).replace(/[*_`#>]+/g, ""), 60)}`;
    return truncate(turn.user, 60) + (turn.status === "failed" ? " (no answer)" : "");
  }

  /** Draw the lines to the left of a row. */
  createLines(row, turn, isOnPath) {
    const getX = (lane) => LANE_WIDTH * lane + 9;
    const x = getX(row.lane);
    const parentX = getX(row.lane - 1);
    const lines = row.passingLanes.map((passing) => [`M${getX(passing.lane)} 0V${ROW_HEIGHT}`, passing.isOnPath]);
    if (row.startsBranch) {
      lines.push([`M${parentX} 0C${parentX} ${MIDDLE} ${x - 6} ${MIDDLE} ${x} ${MIDDLE}`, isOnPath]);
    } else if (row.id) lines.push([`M${x} 0V${MIDDLE}`, isOnPath]);
    if (row.hasChildRows) lines.push([`M${x} ${MIDDLE}V${ROW_HEIGHT}`, row.continuesPath]);
    lines.sort((one, other) => one[1] - other[1]); // the lines of the current path are drawn last, on top
    const width = x + 9;
    return svg(
      "svg",
      { class: "tree-lines", width, height: ROW_HEIGHT, viewBox: `0 0 ${width} ${ROW_HEIGHT}`, "aria-hidden": "true" },
      ...lines.map(([d, isHighlighted]) => svg("path", isHighlighted ? { d, class: "on-path" } : { d })),
      this.createMarker(turn, x),
    );
  }

  /** Draw a circle for a turn, or a square for a state and the root. */
  createMarker(turn, x) {
    const marker =
      turn?.kind === "turn"
        ? svg("circle", { cx: x, cy: MIDDLE, r: 4.5 })
        : svg("rect", { x: x - 4, y: MIDDLE - 4, width: 8, height: 8, rx: 1.5 });
    if (this.running.has(turn)) marker.classList.add("running");
    return marker;
  }

  getItem(id) {
    return [...this.container.children].find((item) => item.dataset.id === id);
  }

  select(id) {
    this.focusedId = id;
    this.onSelect(id || null);
    this.getItem(id)?.focus();
  }

  toggleFold(id, isCollapsed = !this.collapsed.has(id)) {
    if (isCollapsed) this.collapsed.add(id);
    else this.collapsed.delete(id);
    this.focusedId = id;
    this.render();
    this.getItem(id)?.focus();
  }

  handleKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const index = this.rows.findIndex((candidate) => candidate.id === this.focusedId);
    const row = this.rows[index];
    const actions = {
      ArrowDown: () => this.focusRow(index + 1),
      ArrowUp: () => this.focusRow(index - 1),
      Home: () => this.focusRow(0),
      End: () => this.focusRow(this.rows.length - 1),
      ArrowRight: () =>
        row.isCollapsed ? this.toggleFold(row.id, false) : row.hasChildRows && this.focusRow(index + 1),
      ArrowLeft: () =>
        row.isFork && !row.isCollapsed ? this.toggleFold(row.id, true) : this.focusRow(this.findParentRow(row)),
      Enter: () => this.select(row.id),
      " ": () => this.select(row.id),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
  }

  findParentRow(row) {
    const parentId = row.id ? (this.tree.get(row.id).parent ?? ROOT) : null;
    return this.rows.findIndex((candidate) => candidate.id === parentId);
  }

  focusRow(index) {
    if (!this.rows[index]) return;
    this.focusedId = this.rows[index].id;
    for (const item of this.container.children) item.tabIndex = item.dataset.id === this.focusedId ? 0 : -1;
    this.getItem(this.focusedId).focus();
  }
}
