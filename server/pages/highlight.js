"use strict";
// Colours of code: comments, strings, numbers and the words that most languages keep for themselves.

const KEYWORDS = new Set((
  "abstract and as async await break case catch class const continue def default defer del do elif else enum except export "
  + "extends extern False false final finally fn for from func function global go if impl implements import in instanceof "
  + "interface is lambda let loop match mod module mut namespace new nil None nonlocal not null of or package pass private "
  + "protected pub public raise readonly return self Self sizeof static struct super switch this throw trait True true try "
  + "type typedef typeof undefined union unless unsafe until use using val var virtual void where while with yield "
  + "bool boolean char double float int long short string str unsigned "
  + "SELECT FROM WHERE INSERT UPDATE DELETE CREATE TABLE JOIN LEFT RIGHT INNER OUTER ON GROUP ORDER BY LIMIT HAVING AS AND OR "
  + "NOT NULL INTO VALUES SET DISTINCT UNION "
  + "then fi done esac echo local begin end elsif").split(" "));
const HASH = /#[^\n]*/, SLASH = /\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)/, DASH = /--[^\n]*/, MARKUP = /<!--[\s\S]*?(?:-->|$)/;
const COMMENTS = {
  python: HASH, py: HASH, bash: HASH, sh: HASH, shell: HASH, zsh: HASH, ruby: HASH, rb: HASH, yaml: HASH, yml: HASH,
  toml: HASH, r: HASH, perl: HASH, dockerfile: HASH, makefile: HASH, ini: HASH, console: HASH, sql: DASH, lua: DASH,
  haskell: DASH, html: MARKUP, xml: MARKUP, svg: MARKUP,
};
const STRING = /"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`/;
const PLAIN = new Set(["", "text", "txt", "plain", "plaintext", "output", "log", "markdown", "md", "diff"]);
const MAX_LENGTH = 50000;  // characters; more is shown in one colour

function highlight(node, text, language) {
  const name = language.toLowerCase();
  if (PLAIN.has(name) || text.length > MAX_LENGTH) {
    node.textContent = text;
    return;
  }
  const token = new RegExp(`(${(COMMENTS[name] ?? SLASH).source})|(${STRING.source})|(\\b\\d[\\w.]*\\b)|([A-Za-z_]\\w*)(\\s*\\()?`, "g");
  let last = 0;
  const add = (start, end, kind) => {
    node.append(text.slice(last, start));
    const span = node.appendChild(document.createElement("span"));
    span.className = kind;
    span.textContent = text.slice(start, end);
    last = end;
  };
  for (const found of text.matchAll(token)) {
    const start = found.index, [all, comment, string, number, word, call] = found;
    if (comment) add(start, start + all.length, "c");
    else if (string) add(start, start + all.length, "s");
    else if (number) add(start, start + all.length, "n");
    else if (KEYWORDS.has(word)) add(start, start + word.length, "k");
    else if (call) add(start, start + word.length, "f");
  }
  node.append(text.slice(last));
}
