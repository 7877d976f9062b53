"use strict";
// How a turn looks, and what can be done to it. `chat` does it.

const count = value => Math.round(value).toLocaleString("en-US");
const seconds = value => value < 1 ? `${Math.max(Math.round(value * 1000), 1)} ms` : value < 60 ? `${value.toFixed(value < 10 ? 1 : 0)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
const quiet = (text, onclick, options = {}) => element("button", {class: "quiet on-hover", type: "button", text, onclick, ...options});
const ENDS = {length: "The answer ended at its longest length.", stopped: "Stopped.", interrupted: "The answer was interrupted.", abort: "The server ended the answer."};
const NAMES = {user: "You", assistant: "Answer", tool: "Result of a tool"};

class TurnView {
  constructor(turn, chat) {
    this.turn = turn;
    this.chat = chat;
    this.node = element("article", {class: `turn ${turn.role}`, "aria-label": NAMES[turn.role], "data-id": turn.id});
    this.body = element("div", {class: turn.role === "assistant" ? "body markdown" : "body"});
    this.markdown = turn.role === "assistant" ? new MarkdownView(this.body) : null;
    this.draw();
  }

  get isStreaming() { return this.chat.isRunning(this.turn); }

  // Draw all of it; while it streams only what grows.
  draw() {
    const {turn} = this;
    this.node.classList.toggle("streaming", this.isStreaming);
    this.node.setAttribute("aria-busy", String(this.isStreaming));
    if (turn.role !== "assistant") {
      this.body.textContent = turn.text;
      this.node.replaceChildren(...this.images(), ...(turn.text ? [this.body] : []), this.actions());
      return;
    }
    this.grow();
    this.node.replaceChildren(...this.reasoning(), this.body, ...this.calls(), ...this.notes(), this.actions());
  }

  // Draw what has come since; the nodes around the text are made anew when there is another kind of them.
  grow() {
    const {turn} = this;
    const kinds = [Boolean(turn.reasoning), Boolean(turn.text), turn.calls?.length ?? 0, this.isStreaming].join();
    const isSame = kinds === this.kinds;
    this.kinds = kinds;
    this.markdown.update(turn.text, !this.isStreaming);
    if (this.thoughts && turn.reasoning) this.growReasoning();
    turn.calls?.forEach((call, i) => this.callTexts?.[i] && (this.callTexts[i].textContent = prettyJson(call.arguments)));
    return isSame;
  }

  images() {
    return (this.turn.images ?? []).map(src => element("img", {src, alt: "attached image"}));
  }

  reasoning() {
    if (!this.turn.reasoning) return [];
    if (!this.thoughts) {
      const inner = element("div", {class: "markdown"});
      this.thoughts = {view: new MarkdownView(inner), summary: element("summary")};
      this.thoughts.node = element("details", {class: "reasoning"}, this.thoughts.summary, inner);
      this.thoughts.node.addEventListener("toggle", () => this.growReasoning());
    }
    this.growReasoning();
    return [this.thoughts.node];
  }

  growReasoning() {
    const {turn, thoughts} = this;
    const isThinking = this.isStreaming && !turn.reasoningSeconds;
    const tokens = turn.figures?.reasoning_tokens;
    thoughts.summary.textContent = isThinking ? "Thinking…"
      : `Thought${turn.reasoningSeconds ? ` for ${seconds(turn.reasoningSeconds)}` : ""}${tokens ? `, ${count(tokens)} tokens` : ""}`;
    if (thoughts.node.open) thoughts.view.update(turn.reasoning, !this.isStreaming);
  }

  calls() {
    const {turn} = this;
    this.callTexts = (turn.calls ?? []).map(call => element("code", {text: prettyJson(call.arguments)}));
    return (turn.calls ?? []).map((call, i) => element("figure", {class: "call"},
      element("figcaption", {}, element("span", {class: "soft", text: "Calls"}), element("b", {text: call.name})),
      element("pre", {tabindex: 0}, this.callTexts[i]),
      this.isStreaming || this.chat.hasResult(turn, call) ? null : this.resultForm(call)));
  }

  resultForm(call) {
    const input = element("textarea", {class: "field", placeholder: "What the tool returns", "aria-label": `Result of ${call.name}`});
    return element("form", {onsubmit: event => {
      event.preventDefault();
      this.chat.giveResult(this.turn, call, input.value);
    }}, input, element("button", {class: "solid", text: "Send"}));
  }

  notes() {
    const {turn} = this;
    if (this.isStreaming) return turn.text || turn.reasoning || turn.calls?.length ? [] : [element("span", {class: "wait", role: "img", "aria-label": "The answer is being made"})];
    if (turn.error) {
      return [element("div", {class: "note error", role: "alert"}, element("span", {text: turn.error}),
        element("button", {class: "plain", type: "button", text: "Try again", onclick: () => this.chat.retry(turn)}))];
    }
    if (!ENDS[turn.finish]) return [];
    const canContinue = CONTINUABLE.has(turn.finish) && turn.text && !turn.calls?.length;
    return [element("div", {class: "note"}, element("span", {text: ENDS[turn.finish]}),
      canContinue ? element("button", {class: "plain", type: "button", text: "Continue", onclick: () => this.chat.continue(turn)}) : null)];
  }

  actions() {
    const {turn, chat} = this, row = element("div", {class: "actions"});
    const siblings = chat.conversation.siblings(turn), at = siblings.indexOf(turn);
    if (siblings.length > 1) {
      const go = step => () => chat.show(siblings[at + step]);
      row.append(element("span", {class: "siblings"},
        element("button", {class: "quiet", type: "button", "aria-label": "The one before", text: "‹", disabled: !at, onclick: go(-1)}),
        element("span", {text: `${at + 1} / ${siblings.length}`}),
        element("button", {class: "quiet", type: "button", "aria-label": "The next one", text: "›", disabled: at === siblings.length - 1, onclick: go(1)})));
    }
    row.append(quiet("Copy", event => copy(turn.text, event.currentTarget)));
    if (turn.role !== "tool") row.append(quiet("Edit", () => this.edit()));
    if (turn.role === "assistant") {
      row.append(quiet("Again", () => chat.again(turn), {"aria-label": "Answer again"}));
      if (turn.figures) row.append(element("span", {class: "figures", text: figuresOf(turn.figures)}));
    }
    return row;
  }

  edit() {
    const {turn, chat} = this;
    const area = element("textarea", {class: "field", "aria-label": "Edited text"});
    area.value = turn.text;
    const save = () => {
      if (area.value !== turn.text || turn.role === "user") chat.edit(turn, area.value);
      else this.draw();
    };
    const cancel = () => { this.draw(); chat.focus(); };
    const label = turn.role === "user" ? "Send" : "Keep";
    this.node.replaceChildren(element("form", {class: "editor", onsubmit: event => { event.preventDefault(); save(); }}, area,
      element("div", {}, element("button", {class: "plain", type: "button", text: "Cancel", onclick: cancel}), element("button", {class: "solid", text: label}))));
    area.addEventListener("keydown", event => {
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
      else if (event.key === "Enter" && (turn.role === "user" ? !event.shiftKey : event.ctrlKey || event.metaKey) && !event.isComposing) { event.preventDefault(); save(); }
    });
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {  // it is still being written
    return text;
  }
}

function figuresOf({tokens, is_exact: isExact, prompt_tokens: prompt, cached_tokens: cached, first_token_s: first, tokens_per_s: rate}) {
  const parts = [`${isExact ? "" : "≈ "}${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`];
  if (rate) parts.push(`${rate < 10 ? rate.toFixed(1) : count(rate)} tokens/s`);
  if (first !== null) parts.push(`first after ${seconds(first)}`);
  if (prompt !== null && cached !== null) parts.push(`${count(cached)} of ${count(prompt)} prompt tokens cached`);
  return parts.join(" · ");
}
