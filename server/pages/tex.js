"use strict";
// Formulas: the part of TeX that models write, as MathML. What is not known here is shown as it was written.

const MATHML = "http://www.w3.org/1998/Math/MathML";
const pairs = text => Object.fromEntries(text.trim().split(/\s+/).map(pair => pair.split("=")).map(([name, ...rest]) => [name, rest.join("=")]));
const LETTERS = pairs(`alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ vartheta=ϑ iota=ι kappa=κ
  lambda=λ mu=μ nu=ν xi=ξ pi=π varpi=ϖ rho=ρ varrho=ϱ sigma=σ varsigma=ς tau=τ upsilon=υ phi=ϕ varphi=φ chi=χ psi=ψ omega=ω
  Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π Sigma=Σ Upsilon=Υ Phi=Φ Psi=Ψ Omega=Ω ell=ℓ hbar=ℏ Re=ℜ Im=ℑ aleph=ℵ
  infty=∞ partial=∂ nabla=∇ emptyset=∅ varnothing=∅ imath=ı jmath=ȷ top=⊤ bot=⊥ angle=∠ triangle=△ degree=°`);
const OPERATORS = pairs(`times=× cdot=⋅ div=÷ pm=± mp=∓ ast=∗ star=⋆ circ=∘ bullet=∙ oplus=⊕ otimes=⊗ odot=⊙ leq=≤ le=≤ geq=≥
  ge=≥ neq=≠ ne=≠ ll=≪ gg=≫ approx=≈ equiv=≡ sim=∼ simeq=≃ cong=≅ propto=∝ in=∈ notin=∉ ni=∋ subset=⊂ subseteq=⊆ supset=⊃
  supseteq=⊇ cup=∪ cap=∩ setminus=∖ land=∧ wedge=∧ lor=∨ vee=∨ neg=¬ lnot=¬ forall=∀ exists=∃ nexists=∄ to=→ rightarrow=→
  leftarrow=← gets=← leftrightarrow=↔ Rightarrow=⇒ Leftarrow=⇐ Leftrightarrow=⇔ implies=⟹ iff=⟺ mapsto=↦ uparrow=↑
  downarrow=↓ longrightarrow=⟶ hookrightarrow=↪ ldots=… dots=… cdots=⋯ vdots=⋮ ddots=⋱ mid=∣ parallel=∥ perp=⟂ models=⊨
  vdash=⊢ therefore=∴ because=∵ prime=′ colon=: lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ langle=⟨ rangle=⟩ lvert=| rvert=| vert=|
  lVert=‖ rVert=‖ Vert=‖ lbrace={ rbrace=} {={ }=} |=‖ backslash=∖ square=□ checkmark=✓`);
const BIG = pairs("sum=∑ prod=∏ coprod=∐ int=∫ iint=∬ iiint=∭ oint=∮ bigcup=⋃ bigcap=⋂ bigoplus=⨁ bigotimes=⨂ bigvee=⋁ bigwedge=⋀");
const FUNCTIONS = new Set(("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp max min sup inf lim limsup "
  + "liminf det dim ker gcd deg arg Pr hom argmax argmin").split(" "));
const WITH_LIMITS = new Set("lim limsup liminf max min sup inf argmax argmin det gcd Pr".split(" "));
const ACCENTS = pairs("hat=^ widehat=^ bar=¯ overline=¯ vec=→ tilde=~ widetilde=~ dot=˙ ddot=¨ check=ˇ overrightarrow=→ overbrace=⏞");
const SPACES = {",": ".17em", ":": ".22em", ">": ".22em", ";": ".28em", "!": "-.17em", " ": ".25em", quad: "1em", qquad: "2em", enspace: ".5em"};
const ALPHABETS = {  // offsets of A and a, and the letters that Unicode had before
  mathbb: [0x1d538, 0x1d552, "C=ℂ H=ℍ N=ℕ P=ℙ Q=ℚ R=ℝ Z=ℤ"], mathcal: [0x1d49c, 0x1d4b6, "B=ℬ E=ℰ F=ℱ H=ℋ I=ℐ L=ℒ M=ℳ R=ℛ e=ℯ g=ℊ o=ℴ"],
  mathfrak: [0x1d504, 0x1d51e, "C=ℭ H=ℌ I=ℑ R=ℜ Z=ℨ"], mathbf: [0x1d400, 0x1d41a, ""], boldsymbol: [0x1d400, 0x1d41a, ""],
};
ALPHABETS.mathscr = ALPHABETS.mathcal;
ALPHABETS.bm = ALPHABETS.mathbf;
const FENCES = {matrix: ["", ""], pmatrix: ["(", ")"], bmatrix: ["[", "]"], Bmatrix: ["{", "}"], vmatrix: ["|", "|"], Vmatrix: ["‖", "‖"], cases: ["{", ""]};
const ALIGNED = new Set(["aligned", "align", "align*", "split", "eqnarray", "gathered", "gather", "gather*", "equation", "equation*", "array", "smallmatrix"]);
const IGNORED = new Set(["displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "middle", "nonumber", "notag", "hline"]);
const TEXTS = new Set(["text", "textrm", "textbf", "textit", "mbox", "mathrm", "operatorname", "mathsf", "mathtt", "mathit", "texttt"]);

const mathNode = (tag, attributes = {}, ...children) => {
  const node = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

function mathOf(source, isBlock) {
  try {
    const parser = new TexParser(source, isBlock);
    const row = mathNode("mrow", {}, ...parser.row(() => parser.isAtEnd));
    return mathNode("math", {display: isBlock ? "block" : "inline", "aria-label": source.trim()}, row);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return element("code", {class: "tex", text: source.trim()});
  }
}

class TexParser {
  constructor(source, isBlock) {
    this.tokens = source.match(/\\(?:[A-Za-z]+\*?|[\s\S])|\d+(?:[.,]\d+)*|[\s]+|[\s\S]/gu) ?? [];
    this.isBlock = isBlock;
    this.at = 0;
    this.depth = 0;
  }

  get isAtEnd() { return this.at >= this.tokens.length; }
  get next() { return this.tokens[this.at]; }

  skipSpace() { while (!this.isAtEnd && !this.next.trim()) this.at++; }

  // Return the nodes up to where `isEnd` holds.
  row(isEnd) {
    if (++this.depth > 40) throw new SyntaxError("too deep");
    const nodes = [];
    for (this.skipSpace(); !isEnd(); this.skipSpace()) {
      if (this.isAtEnd) throw new SyntaxError("an end is missing");
      const base = this.next === "^" || this.next === "_" ? mathNode("mrow") : this.atom();
      if (base?.dataset.function) nodes.push(...this.spaced(base, nodes.at(-1)));
      else if (base) nodes.push(this.scripted(base));
    }
    this.depth--;
    return nodes;
  }

  // Return a function's name with the thin space that keeps it from the letters beside it.
  spaced(base, before) {
    const thin = () => mathNode("mspace", {width: SPACES[","]});
    const node = this.scripted(base), isApart = this.isAtEnd || /^([()[\]|},&/=+-]|\\(left|right|big.*|Big.*|\W|end))$/.test(this.next);
    return [...(before && !/^m(o|space)$/.test(before.tagName) ? [thin()] : []), node, ...(isApart ? [] : [thin()])];
  }

  scripted(base) {
    let below = null;
    const above = [];
    for (this.skipSpace(); !this.isAtEnd && /^[_^']$/.test(this.next); this.skipSpace()) {
      const mark = this.tokens[this.at++];
      if (mark === "'") above.push(mathNode("mo", {}, "′"));
      else if (mark === "_") below = this.argument();
      else above.push(this.argument());
    }
    if (!below && !above.length) return base;
    const over = above.length > 1 ? mathNode("mrow", {}, ...above) : above[0];
    const isLimit = base.dataset?.limits === "1" && this.isBlock;
    const tag = isLimit ? (below && over ? "munderover" : below ? "munder" : "mover") : below && over ? "msubsup" : below ? "msub" : "msup";
    return mathNode(tag, {}, base, ...[below, over].filter(Boolean));
  }

  argument() {
    this.skipSpace();
    if (this.isAtEnd) throw new SyntaxError("an argument is missing");
    return this.next === "{" ? this.group() : this.atom() ?? mathNode("mrow");
  }

  group() {
    this.at++;
    const nodes = this.row(() => this.next === "}");
    this.at++;
    return nodes.length === 1 ? nodes[0] : mathNode("mrow", {}, ...nodes);
  }

  // Return the text of a group, as it is written.
  raw() {
    this.skipSpace();
    if (this.next !== "{") return this.tokens[this.at++] ?? "";
    let depth = 0, text = "";
    do {
      if (this.isAtEnd) throw new SyntaxError("} is missing");
      const token = this.tokens[this.at++];
      depth += token === "{" ? 1 : token === "}" ? -1 : 0;
      text += token;
    } while (depth);
    return text.slice(1, -1);
  }

  atom() {
    const token = this.tokens[this.at];
    if (token === "{") return this.group();
    if (token === "}" || token === "&") throw new SyntaxError(`${token} has no place here`);
    this.at++;
    if (token[0] === "\\" && token.length > 1) return this.command(token.slice(1));
    if (token === "~") return mathNode("mspace", {width: ".25em"});
    if (/^\d/.test(token)) return mathNode("mn", {}, token);
    if (/^\p{L}$/u.test(token)) return mathNode("mi", {}, token);
    return mathNode("mo", "()[]|".includes(token) ? {stretchy: "false"} : {}, token === "-" ? "−" : token === "*" ? "∗" : token);
  }

  command(name) {
    if (Object.hasOwn(LETTERS, name)) return mathNode("mi", {}, LETTERS[name]);
    if (Object.hasOwn(OPERATORS, name)) return mathNode("mo", {stretchy: "false"}, OPERATORS[name]);
    if (Object.hasOwn(BIG, name)) return this.limited(mathNode("mo", {largeop: "true"}, BIG[name]), !name.includes("int"));
    if (FUNCTIONS.has(name)) return this.limited(mathNode("mi", {"data-function": name}, name), WITH_LIMITS.has(name));
    if (Object.hasOwn(SPACES, name)) return mathNode("mspace", {width: SPACES[name]});
    if (/^[$%&#_]$/.test(name)) return mathNode("mo", {}, name);
    if (IGNORED.has(name)) return null;
    if (TEXTS.has(name.replace("*", ""))) return mathNode("mtext", {}, this.raw().replaceAll("\\_", "_"));
    if (Object.hasOwn(ACCENTS, name)) return mathNode("mover", {accent: "true"}, this.argument(), mathNode("mo", {stretchy: String(/^(over|wide)/.test(name))}, ACCENTS[name]));
    if (Object.hasOwn(ALPHABETS, name)) return this.lettered(...ALPHABETS[name]);
    return this.construct(name);
  }

  limited(node, hasLimits) {
    if (hasLimits) node.dataset.limits = "1";
    return node;
  }

  construct(name) {
    if (/^[dtc]?frac$/.test(name)) return mathNode("mfrac", {}, this.argument(), this.argument());
    if (/^[dt]?binom$/.test(name)) return this.fenced("(", mathNode("mfrac", {linethickness: "0"}, this.argument(), this.argument()), ")");
    if (name === "sqrt") return this.root();
    if (name === "left") return this.leftRight();
    if (name === "begin") return this.environment();
    if (name === "underline" || name === "underbrace") return mathNode("munder", {}, this.argument(), mathNode("mo", {stretchy: "true"}, name === "underline" ? "_" : "⏟"));
    if (name === "overset" || name === "stackrel") { const above = this.argument(); return mathNode("mover", {}, this.argument(), above); }
    if (name === "underset") { const below = this.argument(); return mathNode("munder", {}, this.argument(), below); }
    if (name === "boxed") return mathNode("mrow", {class: "boxed"}, this.argument());
    if (name === "not") { const node = this.argument(); node.append("̸"); return node; }
    if (name === "tag") return mathNode("mtext", {}, ` (${this.raw()})`);
    if (name === "pmod") return this.fenced("(", mathNode("mrow", {}, mathNode("mi", {}, "mod"), mathNode("mspace", {width: ".3em"}), this.argument()), ")");
    if (name === "bmod" || name === "mod") return mathNode("mo", {}, " mod ");
    throw new SyntaxError(`\\${name} is not known`);
  }

  lettered(upper, lower, known) {
    const exceptions = known ? pairs(known) : {};
    const letters = [...this.raw()].map(char => exceptions[char] ?? (/[A-Z]/.test(char) ? String.fromCodePoint(upper + char.charCodeAt() - 65)
      : /[a-z]/.test(char) ? String.fromCodePoint(lower + char.charCodeAt() - 97) : char));
    return mathNode("mi", {}, letters.join(""));
  }

  fenced(open, node, close) {
    return mathNode("mrow", {}, ...(open ? [mathNode("mo", {fence: "true", stretchy: "true"}, open)] : []), node, ...(close ? [mathNode("mo", {fence: "true", stretchy: "true"}, close)] : []));
  }

  root() {
    this.skipSpace();
    if (this.next !== "[") return mathNode("msqrt", {}, this.argument());
    this.at++;
    const degree = mathNode("mrow", {}, ...this.row(() => this.next === "]"));
    this.at++;
    return mathNode("mroot", {}, this.argument(), degree);
  }

  delimiter() {
    this.skipSpace();
    const token = this.tokens[this.at++] ?? "";
    if (token === ".") return "";
    return token[0] === "\\" ? OPERATORS[token.slice(1)] ?? "" : token;
  }

  leftRight() {
    const open = this.delimiter();
    const nodes = this.row(() => this.next === "\\right");
    this.at++;
    return this.fenced(open, mathNode("mrow", {}, ...nodes), this.delimiter());
  }

  environment() {
    const name = this.raw();
    if (!Object.hasOwn(FENCES, name) && !ALIGNED.has(name)) throw new SyntaxError(`${name} is not known`);
    if (name === "array") this.raw();
    const rows = [[]];
    for (;;) {
      const cell = this.row(() => this.next === "&" || this.next === "\\\\" || this.next === "\\end");
      rows.at(-1).push(mathNode("mtd", {}, ...cell));
      const end = this.tokens[this.at++];
      if (end === "\\end") break;
      if (end === "\\\\") rows.push([]);
    }
    this.raw();
    if (rows.at(-1).length === 1 && !rows.at(-1)[0].childNodes.length) rows.pop();
    const isAligned = ALIGNED.has(name) && name !== "array";
    const table = mathNode("mtable", {class: isAligned ? "aligned" : name === "cases" ? "cases" : ""}, ...rows.map(cells => mathNode("mtr", {}, ...cells)));
    return this.fenced(FENCES[name]?.[0] ?? "", table, FENCES[name]?.[1] ?? "");
  }
}
