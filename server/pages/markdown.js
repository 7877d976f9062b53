"use strict";
// Markdown as a tree of nodes. All of a model's text goes in by textContent: none of it is ever read as HTML.
//
// A streamed text is drawn as it grows: blocks that more text cannot change are kept, the last two are drawn again.

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const DELIMITERS = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MATH_OPEN = /^\s*(\$\$|\\\[|\\begin\{(?:align|equation|gather|eqnarray)\*?\})/;
const MATH_CLOSE = {"$$": "$$", "\\[": "\\]"};
const MAX_DEPTH = 16;  // of lists, quotes and emphasis within one another

const isBlank = line => !line.trim();
const hasTable = (lines, i) => lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("|") && lines[i + 1].length < 2000
  && DELIMITERS.test(lines[i + 1]);
const startsBlock = (lines, i) => FENCE.test(lines[i]) || HEADING.test(lines[i]) || RULE.test(lines[i]) || QUOTE.test(lines[i])
  || ITEM.test(lines[i]) || MATH_OPEN.test(lines[i]) || hasTable(lines, i);

// Return the blocks of `lines`: {kind, from, to, ...}, `to` being the line behind.
function blocksOf(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length;) {
    if (isBlank(lines[i])) { i++; continue; }
    const block = readBlock(lines, i);
    block.from = i;
    blocks.push(block);
    i = block.to;
  }
  return blocks;
}

function readBlock(lines, i) {
  let found = FENCE.exec(lines[i]);
  if (found) return readFence(lines, i, found);
  if ((found = HEADING.exec(lines[i]))) return {kind: "heading", level: found[1].length, text: found[2].trim().replace(/ #{1,6}$/, ""), to: i + 1};
  if (RULE.test(lines[i])) return {kind: "rule", to: i + 1};
  if (QUOTE.test(lines[i])) return readQuote(lines, i);
  if (ITEM.test(lines[i])) return readList(lines, i);
  if ((found = MATH_OPEN.exec(lines[i]))) {
    const math = readMath(lines, i, found[1]);
    if (math) return math;
  }
  if (hasTable(lines, i)) return readTable(lines, i);
  let to = i + 1;
  while (to < lines.length && !isBlank(lines[to]) && !startsBlock(lines, to)) to++;
  return {kind: "paragraph", text: lines.slice(i, to).join("\n"), to};
}

function readFence(lines, i, [, indent, fence, info]) {
  const close = new RegExp(`^ {0,3}${fence[0] === "`" ? "`" : "~"}{${fence.length},}[ \\t]*$`);
  let end = i + 1;
  while (end < lines.length && !close.test(lines[end])) end++;
  const strip = new RegExp(`^ {0,${indent.length}}`);
  return {
    kind: "code", language: info.trim().split(/\s/)[0], isOpen: end === lines.length,
    text: lines.slice(i + 1, end).map(line => line.replace(strip, "")).join("\n"), to: Math.min(end + 1, lines.length),
  };
}

function readQuote(lines, i) {
  let to = i + 1;
  while (to < lines.length && (QUOTE.test(lines[to]) || (!isBlank(lines[to]) && !startsBlock(lines, to)))) to++;
  return {kind: "quote", lines: lines.slice(i, to).map(line => line.replace(QUOTE, "")), to};
}

function readList(lines, i) {
  const [, indent, marker] = ITEM.exec(lines[i]);
  const isOrdered = /\d/.test(marker), items = [];
  let to = i, isLoose = false;
  while (to < lines.length) {
    const found = ITEM.exec(lines[to]);
    if (!found || found[1].length > indent.length + 1 || /\d/.test(found[2]) !== isOrdered || RULE.test(lines[to])) break;
    const width = found[1].length + found[2].length + Math.min((found[3] ?? " ").length, 4);
    const least = Math.min(width, found[1].length + 2);  // models indent what belongs to "10." by two or three
    const item = [found[4] ?? ""];
    for (to++; to < lines.length; to++) {
      const line = lines[to], depth = line.length - line.trimStart().length;
      if (isBlank(line)) {
        const next = lines[to + 1];
        if (next === undefined || isBlank(next) || next.length - next.trimStart().length < least) break;
        item.push("");
      } else if (depth >= least) {
        item.push(line.slice(Math.min(depth, width)));
      } else if (startsBlock(lines, to) || isBlank(lines[to - 1])) break;
      else item.push(line);
    }
    items.push(item);
    const end = to;
    while (to < lines.length && isBlank(lines[to])) to++;
    if (to === end) continue;
    const next = ITEM.exec(lines[to] ?? "");
    if (!next || /\d/.test(next[2]) !== isOrdered) { to = end; break; }
    isLoose = true;
  }
  return {kind: "list", isOrdered, start: isOrdered ? parseInt(marker, 10) : 1, items, isLoose, to};
}

function readMath(lines, i, open) {
  if (open.startsWith("\\begin")) return readEnvironment(lines, i, open.replace("begin", "end"));
  const close = MATH_CLOSE[open];
  const first = lines[i].trimStart().slice(2);
  if (first.includes(close)) {
    return first.trimEnd().endsWith(close) ? {kind: "math", text: first.trimEnd().slice(0, -2), to: i + 1} : null;
  }
  let end = i + 1;
  while (end < lines.length && !lines[end].includes(close) && !isBlank(lines[end])) end++;
  if (end === lines.length || isBlank(lines[end])) return null;
  return {kind: "math", text: [first, ...lines.slice(i + 1, end), lines[end].replace(close, "")].join("\n"), to: end + 1};
}

function readEnvironment(lines, i, close) {
  let to = i;
  while (to < lines.length && !lines[to].trimEnd().endsWith(close) && !isBlank(lines[to])) to++;
  if (to === lines.length || isBlank(lines[to])) return null;
  return {kind: "math", text: lines.slice(i, to + 1).join("\n"), to: to + 1};
}

function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/);
  return cells.map(cell => cell.trim().replaceAll("\\|", "|"));
}

function readTable(lines, i) {
  let to = i + 2;
  while (to < lines.length && !isBlank(lines[to]) && lines[to].includes("|")) to++;
  const aligns = cellsOf(lines[i + 1]).map(cell => cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "");
  return {kind: "table", head: cellsOf(lines[i]), aligns, rows: lines.slice(i + 2, to).map(cellsOf), to};
}

// ---- nodes ----

function draw(lines, depth = 0) {
  if (depth > MAX_DEPTH) return [element("p", {text: lines.join("\n")})];
  return blocksOf(lines).map(block => drawBlock(block, depth));
}

function drawBlock(block, depth) {
  if (block.kind === "heading") return inlined(element(`h${Math.min(block.level + 1, 6)}`), block.text);
  if (block.kind === "rule") return element("hr");
  if (block.kind === "code") return codeBlock(block);
  if (block.kind === "quote") return element("blockquote", {}, ...draw(block.lines, depth + 1));
  if (block.kind === "list") return drawList(block, depth);
  if (block.kind === "table") return drawTable(block);
  if (block.kind === "math") return element("div", {class: "math"}, mathOf(block.text, true));
  return inlined(element("p"), block.text);
}

function drawList(block, depth) {
  const list = element(block.isOrdered ? "ol" : "ul");
  if (block.isOrdered && block.start !== 1) list.setAttribute("start", block.start);
  for (const lines of block.items) {
    const item = list.appendChild(element("li"));
    const task = /^\[([ xX])\] /.exec(lines[0]);
    const body = draw(task ? [lines[0].slice(4), ...lines.slice(1)] : lines, depth + 1);
    if (!block.isLoose && body[0]?.tagName === "P") body.splice(0, 1, ...body[0].childNodes);
    item.append(...body);
    if (task) {
      item.className = "task";
      item.prepend(element("input", {type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "to do" : "done"}));
    }
  }
  return list;
}

function drawTable({head, aligns, rows}) {
  const row = (cells, tag) => element("tr", {}, ...head.map((_, i) => {
    const cell = inlined(element(tag), cells[i] ?? "");
    if (aligns[i]) cell.className = aligns[i];
    return cell;
  }));
  return element("div", {class: "table", tabindex: 0, role: "region", "aria-label": "table"},
    element("table", {}, element("thead", {}, row(head, "th")), element("tbody", {}, ...rows.map(cells => row(cells, "td")))));
}

function codeBlock({language, text, isOpen}) {
  const code = element("code");
  highlight(code, text, isOpen ? "" : language);
  return element("figure", {class: "code"},
    element("figcaption", {}, element("span", {text: language || "text"}),
      element("button", {class: "quiet", type: "button", text: "Copy", onclick: event => copy(code.textContent, event.currentTarget)})),
    element("pre", {tabindex: 0}, code));
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no permission, or a page without TLS
    const area = document.body.appendChild(element("textarea", {class: "visually-hidden"}));
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = button.textContent;
  if (label === "Copied") return;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1500);
}

// ---- within a line ----

const SPECIAL = /[\\`*_~[!<$\n]|https?:\/\//g;
const MARKS = {"***": ["strong", "em"], "**": ["strong"], "__": ["strong"], "~~": ["del"], "*": ["em"], "_": ["em"]};
const isWord = char => char !== undefined && /[\p{L}\p{N}_]/u.test(char);

function inlined(node, text, depth = 0) {
  if (depth > MAX_DEPTH) {
    node.append(text);
    return node;
  }
  const hopeless = new Set();  // marks that have no end in the rest of the text
  let plain = 0, i = 0;
  while (i < text.length) {
    SPECIAL.lastIndex = i;
    const at = SPECIAL.exec(text)?.index ?? text.length;
    if (at === text.length) break;
    const piece = readInline(text, at, hopeless, depth);
    if (!piece) {
      i = at + (/^(\*+|_+|~+|`+|\$+)/.exec(text.slice(at, at + 64))?.[0].length ?? 1);
      continue;
    }
    node.append(text.slice(plain, at), ...piece.nodes);
    plain = i = piece.to;
  }
  node.append(text.slice(plain));
  node.normalize();
  return node;
}

function readInline(text, i, hopeless, depth) {
  const char = text[i];
  if (char === "\n") return {nodes: [element("br")], to: i + 1};
  if (char === "\\") return readEscape(text, i, hopeless);
  if (char === "`") return readCode(text, i, hopeless);
  if (char === "$") return readDollar(text, i, hopeless);
  if (char === "<") return readAngle(text, i);
  if (char === "[" || char === "!") return readLink(text, i, hopeless, depth);
  if (char === "h") return readUrl(text, i);
  return readMark(text, i, hopeless, depth);
}

// Return the place of `close` from `from` on, or -1; after the first time at once.
function find(text, close, from, hopeless) {
  if (hopeless.has(close)) return -1;
  const at = text.indexOf(close, from);
  if (at < 0) hopeless.add(close);
  return at;
}

function readEscape(text, i, hopeless) {
  const next = text[i + 1];
  if (next === "(" || next === "[") {
    const close = next === "(" ? "\\)" : "\\]", end = find(text, close, i + 2, hopeless);
    if (end > 0) return {nodes: [mathOf(text.slice(i + 2, end), next === "[")], to: end + 2};
  }
  if (next === "\n") return {nodes: [element("br")], to: i + 2};
  return next && /[!-/:-@[-`{-~]/.test(next) ? {nodes: [next], to: i + 2} : null;
}

function readCode(text, i, hopeless) {
  const run = /^`+/.exec(text.slice(i, i + 64))[0];
  for (let end = find(text, run, i + run.length, hopeless); end > 0; end = text.indexOf(run, end)) {
    const length = /^`+/.exec(text.slice(end, end + 64))[0].length;
    if (length === run.length) {
      const inner = text.slice(i + run.length, end).replaceAll("\n", " ");
      return {nodes: [element("code", {text: /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner})], to: end + run.length};
    }
    end += length;
  }
  hopeless.add(run);
  return null;
}

function readDollar(text, i, hopeless) {
  const mark = text[i + 1] === "$" ? "$$" : "$", from = i + mark.length;
  if (/\s/.test(text[from] ?? " ")) return null;
  for (let end = find(text, mark, from, hopeless); end > 0; end = text.indexOf(mark, end + 1)) {
    if (text.slice(from, end).includes("\n\n") || end - from > 2000) return null;
    if (text[end - 1] === "\\" || /\s/.test(text[end - 1]) || /\d/.test(text[end + mark.length] ?? "")) continue;
    return end > from ? {nodes: [mathOf(text.slice(from, end), mark === "$$")], to: end + mark.length} : null;
  }
  return null;
}

function readAngle(text, i) {
  const found = /^<(?:(https?:\/\/[^\s<>]+)>|br ?\/?>)/i.exec(text.slice(i, i + 2048));
  if (!found) return null;
  return {nodes: [found[1] ? linkTo(found[1], found[1]) : element("br")], to: i + found[0].length};
}

function readLink(text, i, hopeless, depth) {
  const start = text[i] === "!" ? i + 1 : i;
  if (text[start] !== "[" || hopeless.has("](") || text.indexOf("](", start) < 0) {
    if (text[start] === "[") hopeless.add("](");
    return null;
  }
  let open = 0, end = start;
  for (; end < text.length && end - start < 2000; end++) {
    if (text[end] === "\\") end++;
    else if (text[end] === "[") open++;
    else if (text[end] === "]" && !--open) break;
  }
  const target = /^\]\(\s*<?((?:[^\s()<>]|\([^\s()]*\))*)>?(?:\s+["'(][^"')]*["')])?\s*\)/.exec(text.slice(end, end + 4096));
  if (open || !target) return null;
  const label = text.slice(start + 1, end), to = end + target[0].length;
  if (start > i) return {nodes: [linkTo(target[1], `🖼 ${label || target[1]}`)], to};  // nothing is loaded from elsewhere
  const link = linkTo(target[1], "");
  link.replaceChildren();
  return {nodes: [inlined(link, label || target[1], depth + 1)], to};
}

function readUrl(text, i) {
  if (isWord(text[i - 1])) return null;
  let url = /^https?:\/\/[^\s<>"'`|\\^{}]+/.exec(text.slice(i, i + 2048))?.[0].replace(/[.,:;!?*_~]+$/, "");
  while (url?.endsWith(")") && url.split(")").length > url.split("(").length) url = url.slice(0, -1);
  return url && url.length > 8 ? {nodes: [linkTo(url, url)], to: i + url.length} : null;
}

// Return a link; a target that is not one of the web is shown as text.
function linkTo(target, label) {
  let url = null;
  try { url = new URL(target); } catch { /* no URL */ }
  if (!url || !["http:", "https:"].includes(url.protocol)) return element("span", {class: "no-link", title: target, text: label});
  return element("a", {href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", text: label});
}

function readMark(text, i, hopeless, depth) {
  const run = /^(\*{1,3}|_{1,2}|~~)/.exec(text.slice(i, i + 3))?.[0];
  if (!run) return null;
  const from = i + run.length;
  if (/\s/.test(text[from] ?? " ") || text[from] === run[0] || (run[0] === "_" && isWord(text[i - 1]))) return null;
  for (let end = find(text, run, from, hopeless); end > 0; end = text.indexOf(run, end)) {
    let length = run.length;
    while (text[end + length] === run[0]) length++;
    const isEnd = !/\s/.test(text[end - 1]) && text[end - 1] !== "\\" && end > from && !(run[0] === "_" && isWord(text[end + length]))
      && (length === run.length || length === run.length + 2 || (length === 3 && run.length < 3));
    if (isEnd) {
      const close = end + length - run.length;  // "**a *b***": what is within ends first
      const tags = MARKS[run], node = element(tags[0]);
      inlined(tags[1] ? node.appendChild(element(tags[1])) : node, text.slice(from, close), depth + 1);
      return {nodes: [node], to: close + run.length};
    }
    end += length;
  }
  hopeless.add(run);
  return null;
}

// ---- a text that grows ----

class MarkdownView {
  constructor(root) {
    this.root = root;
    this.kept = 0;  // characters that are drawn for good, in `numKept` nodes
    this.numKept = 0;
    this.text = "";
  }

  // Draw `text`, which begins with the one before unless it is another.
  update(text, isDone = false) {
    if (!text.startsWith(this.text.slice(0, this.kept))) {
      this.kept = this.numKept = 0;
      this.root.replaceChildren();
    }
    this.text = text;
    const lines = text.slice(this.kept).split("\n"), blocks = blocksOf(lines);
    while (this.root.childNodes.length > this.numKept) this.root.lastChild.remove();
    this.root.append(...blocks.map(block => drawBlock(block, 0)));
    if (isDone || blocks.length < 3) return;
    const line = blocks[blocks.length - 2].from;
    for (let i = 0; i < line; i++) this.kept += lines[i].length + 1;
    this.numKept += blocks.length - 2;
  }
}
