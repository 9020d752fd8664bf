// A small part of Markdown as DOM nodes: paragraphs, headings, lists, quotes, code, emphasis, links. Text is never
// taken for markup; no pictures (they would call other hosts), and whatever is not understood stays as it was written.

import { copier, h } from "./element.js";

const DEEPEST = 6;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^( {0,8})([-*+]|\d{1,9}[.)])\s+(?=\S)/;
const LINK = /\[([^[\]\n]{1,500})\]\(([^\s()]{1,2000})\)/y;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;

/** Show `text` in `place`. Blocks that are there already stay as they are, so that a growing text costs its end only. */
export function show(place, text) {
  if (place.source === text) return;
  place.source = text;
  const wanted = blocks(text);
  const shown = place.shown ?? [];
  let same = 0;
  const sources = wanted.map((block) => JSON.stringify(block));
  while (same < shown.length && same < sources.length && shown[same] === sources[same]) same += 1;
  while (place.childNodes.length > same) place.lastChild.remove();
  place.append(...wanted.slice(same).map((block) => drawn(block)));
  place.shown = sources;
}

/** The blocks of a text. */
export function blocks(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const found = [];
  let level = 2; // of the heading before, so that no level is left out
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) at += 1;
    else if (fence) {
      const end = lines.findIndex((each, place) => place > at && closes(each, fence[1]));
      const last = end < 0 ? lines.length : end;
      found.push({ kind: "code", language: fence[2], text: lines.slice(at + 1, last).join("\n") });
      at = last + 1;
    } else if (heading) {
      level = Math.min(2 + heading[1].length, level + 1, 6);
      found.push({ kind: "heading", level, text: heading[2] });
      at += 1;
    } else if (RULE.test(line)) {
      found.push({ kind: "rule" });
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const end = endOf(lines, at, (each) => QUOTE.test(each));
      const inner = lines.slice(at, end).map((each) => each.replace(QUOTE, ""));
      found.push({ kind: "quote", blocks: blocks(inner.join("\n"), depth + 1) });
      at = end;
    } else if (ITEM.test(line) && depth < DEEPEST) at = list(lines, at, depth, found);
    else {
      const end = endOf(lines, at + 1, (each) => each.trim() && !begins(each));
      found.push({ kind: "paragraph", text: lines.slice(at, end).join("\n").trim() });
      at = end;
    }
  }
  return found;
}

function endOf(lines, start, belongs) {
  let at = start;
  while (at < lines.length && belongs(lines[at])) at += 1;
  return at;
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

/** Whether a line ends the paragraph before it. A number other than 1 does not: it may be a year. */
function begins(line) {
  const item = ITEM.exec(line);
  const starts = item && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return starts || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line);
}

/** Read the list that begins at a line; the line after it. */
function list(lines, start, depth, found) {
  const first = ITEM.exec(lines[start]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let at = start;
  for (let width = 0; at < lines.length; at += 1) {
    const line = lines[at];
    const item = ITEM.exec(line);
    const indent = line.length - line.trimStart().length;
    const belongs = items.length > 0 && indent >= Math.min(width, first[1].length + 2);
    if (item && !belongs && /\d/.test(item[2]) === ordered && !RULE.test(line)) {
      width = item[0].length;
      items.push([line.slice(width)]);
    } else if (belongs && line.trim()) items.at(-1).push(line.slice(Math.min(indent, width)));
    else if (!line.trim()) {
      const next = lines.slice(at + 1, at + 3).find((each) => each.trim()) ?? "";
      const goesOn = next.length - next.trimStart().length > first[1].length || ITEM.test(next);
      if (!goesOn) break;
      items.at(-1).push("");
    } else if (item || begins(line) || lines[at - 1].trim() === "") break;
    else items.at(-1).push(line);
  }
  const inner = items.map((item) => blocks(item.join("\n"), depth + 1));
  found.push({ kind: "list", start: ordered ? parseInt(first[2], 10) : null, items: inner });
  return at;
}

function drawn(block) {
  if (block.kind === "code") return code(block);
  if (block.kind === "rule") return h("hr");
  if (block.kind === "heading") return h(`h${block.level}`, { dir: "auto" }, inline(block.text));
  if (block.kind === "quote") return h("blockquote", { dir: "auto" }, block.blocks.map(drawn));
  if (block.kind === "paragraph") return h("p", { dir: "auto" }, inline(block.text));
  const items = block.items.map((item) =>
    h(
      "li",
      { dir: "auto" },
      item.length === 1 && item[0].kind === "paragraph" ? inline(item[0].text) : item.map(drawn),
    ),
  );
  return block.start === null ? h("ul", { dir: "auto" }, items) : h("ol", { start: block.start, dir: "auto" }, items);
}

function code(block) {
  const name = block.language ? `Code, ${block.language}` : "Code";
  const text = h("pre", { tabindex: 0, role: "group", "aria-label": name, dir: "ltr" }, h("code", {}, block.text));
  return h(
    "div.code",
    {},
    h(
      "div.bar",
      {},
      h("span", {}, block.language || "code"),
      copier(() => block.text),
    ),
    text,
  );
}

/** The nodes of one stretch of text. */
export function inline(text, depth = 0) {
  const found = [];
  const dead = new Set(); // marks that nothing closes from here on, so that no text takes quadratic time
  let plain = "";
  const put = (node) => {
    if (plain) found.push(plain);
    plain = "";
    found.push(node);
  };
  for (let at = 0; at < text.length; ) {
    const mark = markAt(text, at);
    const end = mark && depth < DEEPEST && !dead.has(mark) ? closing(text, mark, at + mark.length) : -1;
    LINK.lastIndex = at;
    const link = text[at] === "[" && depth < DEEPEST ? LINK.exec(text) : null;
    if (text[at] === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (end >= 0) {
      put(marked(mark, text.slice(at + mark.length, end), depth));
      at = end + mark.length;
    } else if (link && /^(https?:|mailto:)/i.test(link[2])) {
      const safe = { href: link[2], target: "_blank", rel: "noopener noreferrer nofollow" };
      put(h("a", safe, inline(link[1], depth + 1)));
      at += link[0].length;
    } else {
      if (mark && opens(text, mark, at)) dead.add(mark);
      plain += mark || text[at];
      at += mark ? mark.length : 1;
    }
  }
  if (plain) found.push(plain);
  return found;
}

/** The mark that begins here, or "". */
function markAt(text, at) {
  const sign = text[at];
  if (sign === "`") {
    let end = at;
    while (text[end] === "`") end += 1;
    return text.slice(at, end);
  }
  if (sign !== "*" && sign !== "_" && sign !== "~") return "";
  if (text[at + 1] === sign) return sign + sign;
  return sign === "~" ? "" : sign;
}

function opens(text, mark, at) {
  if (mark[0] === "`") return true;
  const inWord = mark[0] === "_" && at > 0 && WORD.test(text[at - 1]);
  return !inWord && /\S/.test(text[at + mark.length] ?? "");
}

/** Where what a mark has opened is closed, or -1. */
function closing(text, mark, start) {
  if (!opens(text, mark, start - mark.length)) return -1;
  for (let at = text.indexOf(mark, start); at >= 0; at = text.indexOf(mark, at + 1)) {
    const [before, after] = [text[at - 1], text[at + mark.length] ?? ""];
    if (at === start) continue;
    if (mark[0] === "`" ? before !== "`" && after !== "`" : fits(mark, before, after)) return at;
  }
  return -1;
}

function fits(mark, before, after) {
  const alone = mark.length > 1 || (before !== mark && after !== mark);
  return /\S/.test(before) && alone && !(mark[0] === "_" && WORD.test(after));
}

function marked(mark, text, depth) {
  if (mark[0] === "`") return h("code", {}, text.replace(/^ (.*\S.*) $/s, "$1"));
  const name = mark[0] === "~" ? "del" : mark.length > 1 ? "strong" : "em";
  return h(name, {}, inline(text, depth + 1));
}
