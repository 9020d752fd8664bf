// Markdown as DOM nodes. Supported: paragraphs, headings, lists, quotes, code, emphasis and links. Text is never parsed
// as HTML. Images are not supported because they send requests to other hosts. Everything else is shown unchanged.

import { createCopyButton, h } from "./dom.js";
import { MAX_DEPTH, parseBlocks } from "./markdown_blocks.js";

const LINK = /\[([^[\]\n]{1,500})\]\(([^\s()]{1,2000})\)/y;
const SAFE_URL = /^(https?:|mailto:)/i;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;

const renderedBlocks = new WeakMap(); // the source text and the serialized blocks of each container

/** Render `text` in `container`. Unchanged blocks are kept, so that the cost of a growing text is that of its end. */
export function renderMarkdown(container, text) {
  const previous = renderedBlocks.get(container) ?? { text: "", keys: [] };
  if (previous.text === text) return;
  const blocks = parseBlocks(text);
  const keys = blocks.map((block) => JSON.stringify(block));
  let unchanged = 0;
  while (unchanged < Math.min(keys.length, previous.keys.length) && keys[unchanged] === previous.keys[unchanged]) {
    unchanged += 1;
  }
  while (container.childNodes.length > unchanged) container.lastChild.remove();
  container.append(...blocks.slice(unchanged).map(createBlock));
  renderedBlocks.set(container, { text, keys });
}

function createBlock(block) {
  if (block.kind === "code") return createCodeBlock(block);
  if (block.kind === "rule") return h("hr");
  if (block.kind === "heading") return h(`h${block.level}`, { dir: "auto" }, createInline(block.text));
  if (block.kind === "quote") return h("blockquote", { dir: "auto" }, block.blocks.map(createBlock));
  if (block.kind === "paragraph") return h("p", { dir: "auto" }, createInline(block.text));
  const items = block.items.map(createListItem);
  return block.start === null ? h("ul", { dir: "auto" }, items) : h("ol", { start: block.start, dir: "auto" }, items);
}

function createListItem(blocks) {
  const isSingleParagraph = blocks.length === 1 && blocks[0].kind === "paragraph";
  return h("li", { dir: "auto" }, isSingleParagraph ? createInline(blocks[0].text) : blocks.map(createBlock));
}

function createCodeBlock({ language, text }) {
  const label = language ? `Code, ${language}` : "Code";
  const header = h(
    "div.code-header",
    {},
    h("span", {}, language || "code"),
    createCopyButton(() => text),
  );
  const code = h("pre", { tabindex: 0, role: "group", "aria-label": label, dir: "ltr" }, h("code", {}, text));
  return h("div.code-block", {}, header, code);
}

function createInline(text, depth = 0) {
  return new InlineParser(text, depth).parse();
}

/** Creates the nodes of a text without block structure. */
class InlineParser {
  constructor(text, depth) {
    Object.assign(this, { text, depth });
    this.index = 0;
    this.nodes = [];
    this.plain = ""; // text since the last node
    this.unclosed = new Set(); // delimiters without a closing one after the index: they are searched only once
  }

  parse() {
    while (this.index < this.text.length) {
      if (!(this.parseEscape() || this.parseSpan() || this.parseLink())) this.parseText();
    }
    this.flush();
    return this.nodes;
  }

  parseEscape() {
    const next = this.text[this.index + 1] ?? "";
    if (this.text[this.index] !== "\\" || !PUNCTUATION.test(next)) return false;
    this.plain += next;
    this.index += 2;
    return true;
  }

  /** Parse code, strong, emphasized or deleted text. */
  parseSpan() {
    const delimiter = getDelimiter(this.text, this.index);
    if (!delimiter || this.depth >= MAX_DEPTH || this.unclosed.has(delimiter)) return false;
    const start = this.index + delimiter.length;
    const end = findClosing(this.text, delimiter, start);
    if (end < 0) return false;
    this.append(createSpan(delimiter, this.text.slice(start, end), this.depth));
    this.index = end + delimiter.length;
    return true;
  }

  parseLink() {
    if (this.text[this.index] !== "[" || this.depth >= MAX_DEPTH) return false;
    LINK.lastIndex = this.index;
    const match = LINK.exec(this.text);
    if (!match || !SAFE_URL.test(match[2])) return false;
    const attributes = { href: match[2], target: "_blank", rel: "noopener noreferrer nofollow" };
    this.append(h("a", attributes, createInline(match[1], this.depth + 1)));
    this.index += match[0].length;
    return true;
  }

  parseText() {
    const delimiter = getDelimiter(this.text, this.index);
    if (delimiter && canOpen(this.text, delimiter, this.index)) this.unclosed.add(delimiter);
    const text = delimiter || this.text[this.index];
    this.plain += text;
    this.index += text.length;
  }

  append(node) {
    this.flush();
    this.nodes.push(node);
  }

  flush() {
    if (this.plain) this.nodes.push(this.plain);
    this.plain = "";
  }
}

/** Return the delimiter at an index, or "". */
function getDelimiter(text, index) {
  const character = text[index];
  if (character === "`") {
    let end = index;
    while (text[end] === "`") end += 1;
    return text.slice(index, end);
  }
  if (character !== "*" && character !== "_" && character !== "~") return "";
  if (text[index + 1] === character) return character + character;
  return character === "~" ? "" : character;
}

function canOpen(text, delimiter, index) {
  if (delimiter[0] === "`") return true;
  const isInsideWord = delimiter[0] === "_" && index > 0 && WORD.test(text[index - 1]);
  return !isInsideWord && /\S/.test(text[index + delimiter.length] ?? "");
}

/** Return the index of the delimiter that closes the span starting at `start`, or -1. */
function findClosing(text, delimiter, start) {
  if (!canOpen(text, delimiter, start - delimiter.length)) return -1;
  for (let index = text.indexOf(delimiter, start); index >= 0; index = text.indexOf(delimiter, index + 1)) {
    const before = text[index - 1];
    const after = text[index + delimiter.length] ?? "";
    const closes = delimiter[0] === "`" ? before !== "`" && after !== "`" : canClose(delimiter, before, after);
    if (index !== start && closes) return index;
  }
  return -1;
}

function canClose(delimiter, before, after) {
  const isSeparate = delimiter.length > 1 || (before !== delimiter && after !== delimiter);
  return /\S/.test(before) && isSeparate && !(delimiter[0] === "_" && WORD.test(after));
}

function createSpan(delimiter, text, depth) {
  if (delimiter[0] === "`") return h("code", {}, text.replace(/^ (.*\S.*) $/s, "$1"));
  const emphasis = delimiter.length > 1 ? "strong" : "em";
  return h(delimiter[0] === "~" ? "del" : emphasis, {}, createInline(text, depth + 1));
}
