// The tree as a drawing one walks in (ARIA's tree pattern). Turns that follow each other stand below each other; only
// where several follow one turn do they move to the right, so a long conversation stays narrow.

import { by, excerpt, h, s } from "./element.js";

const STEP = 14; // pixels from one lane to the next
const ROW = 32;
const MIDDLE = ROW / 2;
const ROOT = "";

export class Branches {
  /** go(id) is called with the turn to go to; null is the beginning. */
  constructor(tree, go) {
    Object.assign(this, { tree, go, folded: new Set(), at: null, focus: ROOT, running: new Set() });
    this.place = by("branches");
    this.place.addEventListener("keydown", (event) => this.key(event));
    this.place.addEventListener("click", (event) => {
      const row = event.target.closest("[role=treeitem]");
      if (!row) return;
      if (event.target.closest(".fold")) this.fold(row.dataset.id);
      else this.choose(row.dataset.id);
    });
  }

  /** Draw the tree; `at` is where one is, `running` the turns being written. */
  draw(at = this.at, running = this.running) {
    if (at !== this.at) this.focus = at ?? ROOT;
    Object.assign(this, { at, running });
    const onPath = new Set(this.tree.path(at).map((turn) => turn.id));
    const hadFocus = this.place.contains(document.activeElement);
    this.rows = this.order(onPath);
    if (!this.rows.some((row) => row.id === this.focus)) this.focus = at ?? ROOT;
    this.place.replaceChildren(...this.rows.map((row) => this.row(row, onPath)));
    const current = this.item(at ?? ROOT);
    if (hadFocus) this.item(this.focus)?.focus();
    else current?.scrollIntoView({ block: "nearest" });
  }

  /** The rows from top to bottom: id, level, lane, the lanes that pass by, place among the siblings. */
  order(onPath) {
    const rows = [];
    const waiting = [{ id: ROOT, level: 1, lane: 0, through: [], position: 1, size: 1, joins: false }];
    while (waiting.length) {
      const row = waiting.pop();
      const children = this.tree.children(row.id || null);
      row.forks = children.length > 1;
      row.folded = row.forks && this.folded.has(row.id);
      row.goesOn = children.length > 0 && !row.folded;
      const ahead = children.findIndex((turn) => onPath.has(turn.id));
      row.leads = ahead >= 0;
      rows.push(row);
      if (row.folded) continue;
      const below = children.map((turn, n) => ({
        id: turn.id,
        level: row.level + 1,
        lane: row.lane + (row.forks ? 1 : 0),
        joins: row.forks,
        through:
          row.forks && n < children.length - 1 ? [...row.through, { lane: row.lane, on: ahead > n }] : row.through,
        position: n + 1,
        size: children.length,
      }));
      waiting.push(...below.reverse());
    }
    return rows;
  }

  row(row, onPath) {
    const turn = this.tree.get(row.id);
    const isHere = row.id === (this.at ?? ROOT);
    const on = onPath.has(row.id) || row.id === ROOT;
    const label = this.label(turn);
    const fold =
      row.forks &&
      h("span.fold", { "aria-hidden": "true" }, row.folded ? `+${this.tree.following(row.id || null)}` : "–");
    return h(
      `div.branch${isHere ? ".here" : ""}${on ? ".on" : ""}`,
      {
        role: "treeitem",
        "data-id": row.id,
        "aria-level": row.level,
        "aria-posinset": row.position,
        "aria-setsize": row.size,
        "aria-selected": isHere ? "true" : "false",
        "aria-expanded": row.forks ? String(!row.folded) : null,
        "aria-label": label + (this.running.has(turn) ? ", being written" : ""),
        tabindex: row.id === this.focus ? 0 : -1,
        title: turn ? excerpt(turn.user || label, 300) : null,
      },
      this.twig(row, turn, on),
      h("span.label", { dir: "auto" }, label),
      fold,
    );
  }

  label(turn) {
    if (!turn) return "Beginning";
    if (turn.kind === "state") return `State: ${turn.name || "from a file"}`;
    const alike = this.tree.siblings(turn).filter((each) => each.user === turn.user);
    if (alike.length > 1 && turn.answer) return `↻ ${excerpt(turn.answer.slice(0, 500).replace(/[*_`#>]+/g, ""), 60)}`;
    return excerpt(turn.user, 60) + (turn.status === "failed" ? " (no answer)" : "");
  }

  /** The lines left of a row. */
  twig(row, turn, on) {
    const x = (lane) => STEP * lane + 9;
    const here = x(row.lane);
    const lines = row.through.map(({ lane, on }) => [`M${x(lane)} 0V${ROW}`, on]);
    const from = x(row.lane - 1);
    if (row.joins) lines.push([`M${from} 0C${from} ${MIDDLE} ${here - 6} ${MIDDLE} ${here} ${MIDDLE}`, on]);
    else if (row.id) lines.push([`M${here} 0V${MIDDLE}`, on]);
    if (row.goesOn) lines.push([`M${here} ${MIDDLE}V${ROW}`, row.leads]);
    lines.sort((one, other) => one[1] - other[1]);
    const width = here + 9;
    const dot =
      turn?.kind === "state" || !turn
        ? s("rect", { x: here - 4, y: MIDDLE - 4, width: 8, height: 8, rx: 1.5 })
        : s("circle", { cx: here, cy: MIDDLE, r: 4.5 });
    if (this.running.has(turn)) dot.classList.add("running");
    return s(
      "svg",
      { class: "twig", width, height: ROW, viewBox: `0 0 ${width} ${ROW}`, "aria-hidden": "true" },
      ...lines.map(([d, led]) => s("path", led ? { d, class: "led" } : { d })),
      dot,
    );
  }

  item(id) {
    return [...this.place.children].find((row) => row.dataset.id === id);
  }

  choose(id) {
    this.focus = id;
    this.go(id || null);
    this.item(id)?.focus();
  }

  fold(id, folded = !this.folded.has(id)) {
    if (folded) this.folded.add(id);
    else this.folded.delete(id);
    this.focus = id;
    this.draw();
    this.item(id)?.focus();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.rows.findIndex((row) => row.id === this.focus);
    const row = this.rows[at];
    const moves = {
      ArrowDown: () => this.move(at + 1),
      ArrowUp: () => this.move(at - 1),
      Home: () => this.move(0),
      End: () => this.move(this.rows.length - 1),
      ArrowRight: () => (row.folded ? this.fold(row.id, false) : row.goesOn && this.move(at + 1)),
      ArrowLeft: () => (row.forks && !row.folded ? this.fold(row.id, true) : this.move(this.above(row))),
      Enter: () => this.choose(row.id),
      " ": () => this.choose(row.id),
    };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    moves[event.key]();
  }

  above(row) {
    const parent = row.id ? (this.tree.get(row.id).parent ?? ROOT) : null;
    return this.rows.findIndex((each) => each.id === parent);
  }

  move(to) {
    if (!this.rows[to]) return;
    this.focus = this.rows[to].id;
    for (const item of this.place.children) item.tabIndex = item.dataset.id === this.focus ? 0 : -1;
    this.item(this.focus).focus();
  }
}
