// The block structure of a Markdown text: code, headings, rules, quotes, lists and paragraphs.

export const MAX_DEPTH = 6; // of nested quotes, lists and spans
const MAX_HEADING_LEVEL = 6;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^( {0,8})([-*+]|\d{1,9}[.)])\s+(?=\S)/;

/** Parse a text into blocks: objects with a `kind` and the content of that kind. */
export function parseBlocks(text, depth = 0) {
  return new BlockParser(text, depth).parse();
}

class BlockParser {
  constructor(text, depth) {
    this.lines = text.replace(/\r\n?/g, "\n").split("\n");
    this.depth = depth;
    this.index = 0;
    this.headingLevel = 2; // of the previous heading, so that no level is skipped
    this.blocks = [];
  }

  parse() {
    while (this.index < this.lines.length) this.parseBlock(this.lines[this.index]);
    return this.blocks;
  }

  parseBlock(line) {
    const canNest = this.depth < MAX_DEPTH;
    if (!line.trim()) this.index += 1;
    else if (FENCE.test(line)) this.parseCode(FENCE.exec(line));
    else if (HEADING.test(line)) this.parseHeading(HEADING.exec(line));
    else if (RULE.test(line)) this.parseRule();
    else if (canNest && QUOTE.test(line)) this.parseQuote();
    else if (canNest && ITEM.test(line)) this.parseList(ITEM.exec(line));
    else this.parseParagraph();
  }

  parseCode([, fence, language]) {
    const closing = this.lines.findIndex((line, index) => index > this.index && closesFence(line, fence));
    const end = closing < 0 ? this.lines.length : closing;
    this.blocks.push({ kind: "code", language, text: this.lines.slice(this.index + 1, end).join("\n") });
    this.index = end + 1;
  }

  parseHeading([, marks, text]) {
    this.headingLevel = Math.min(2 + marks.length, this.headingLevel + 1, MAX_HEADING_LEVEL);
    this.blocks.push({ kind: "heading", level: this.headingLevel, text });
    this.index += 1;
  }

  parseRule() {
    this.blocks.push({ kind: "rule" });
    this.index += 1;
  }

  parseQuote() {
    const lines = this.takeWhile((line) => QUOTE.test(line)).map((line) => line.replace(QUOTE, ""));
    this.blocks.push({ kind: "quote", blocks: parseBlocks(lines.join("\n"), this.depth + 1) });
  }

  parseParagraph() {
    const start = this.index;
    const lines = this.takeWhile((line, index) => index === start || (line.trim() && !startsBlock(line)));
    this.blocks.push({ kind: "paragraph", text: lines.join("\n").trim() });
  }

  parseList([, marginText, marker]) {
    const list = { isOrdered: isOrderedMarker(marker), margin: marginText.length, contentIndent: 0, items: [] };
    while (this.index < this.lines.length && this.parseListLine(list)) this.index += 1;
    const items = list.items.map((lines) => parseBlocks(lines.join("\n"), this.depth + 1));
    this.blocks.push({ kind: "list", start: list.isOrdered ? Number.parseInt(marker, 10) : null, items });
  }

  /** Add the current line to a list. Returns false if the list ends before it. */
  parseListLine(list) {
    const line = this.lines[this.index];
    const indent = getIndent(line);
    const isInsideItem = list.items.length > 0 && indent >= Math.min(list.contentIndent, list.margin + 2);
    const item = isInsideItem || RULE.test(line) ? null : ITEM.exec(line);
    if (item && isOrderedMarker(item[2]) === list.isOrdered) {
      list.contentIndent = item[0].length;
      list.items.push([line.slice(list.contentIndent)]);
      return true;
    }
    const isBlank = !line.trim();
    if (isBlank && !this.continuesList(list.margin)) return false;
    if (!isBlank && !isInsideItem && this.endsParagraph(line)) return false;
    const continuation = isInsideItem ? line.slice(Math.min(indent, list.contentIndent)) : line;
    list.items.at(-1).push(isBlank ? "" : continuation);
    return true;
  }

  /** Whether the current line cannot continue the paragraph of a list item. */
  endsParagraph(line) {
    return ITEM.test(line) || startsBlock(line) || this.lines[this.index - 1].trim() === "";
  }

  /** Whether a list continues after the blank line at the current index. */
  continuesList(margin) {
    const next = this.lines.slice(this.index + 1, this.index + 3).find((line) => line.trim()) ?? "";
    return getIndent(next) > margin || ITEM.test(next);
  }

  /** Consume lines while `matches(line, index)` holds, and return them. */
  takeWhile(matches) {
    const start = this.index;
    while (this.index < this.lines.length && matches(this.lines[this.index], this.index)) this.index += 1;
    return this.lines.slice(start, this.index);
  }
}

function getIndent(line) {
  return line.length - line.trimStart().length;
}

function isOrderedMarker(marker) {
  return /\d/.test(marker);
}

function closesFence(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

/** Whether a line ends the paragraph before it. A list number other than 1 does not: it may be a year. */
function startsBlock(line) {
  const item = ITEM.exec(line);
  const startsList = item && (!isOrderedMarker(item[2]) || Number.parseInt(item[2], 10) === 1);
  return startsList || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line);
}
