"use strict";
// A conversation is a tree of turns: an edited or repeated turn is one more child of the same parent, and nothing is lost.
//
// turn: {id, parent, role: user | assistant | tool, text, at} and, where it has them, images (data URIs), reasoning,
// reasoningSeconds, calls [{id, name, arguments}], callId, finish, error, figures. `at`: when it last changed.

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), byte => byte.toString(36).padStart(2, "0")).join("");
const ROOT = "";
const CONTINUABLE = new Set(["length", "stopped", "interrupted", "abort"]);
const NUMBER_FIELDS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_thinking_tokens"];

class Conversation {
  constructor({id = newId(), title = "", created = Date.now(), updated = created, settings = {}, turns = [], chosen = {}} = {}) {
    Object.assign(this, {id, title, created, updated, settings, turns, chosen});
  }

  // Return a conversation of what was stored or imported; null if it is none.
  static from(value) {
    if (!isText(value?.id) || !Array.isArray(value.turns) || !value.turns.every(isTurn)) return null;
    const {created, updated, settings, chosen} = value;
    return new Conversation({
      id: /^[\w-]{1,64}$/.test(value.id) ? value.id : newId(), title: String(value.title ?? "").slice(0, 120),
      created: Number(created) || Date.now(), updated: Number(updated) || Date.now(),
      settings: cleanSettings(settings ?? {}), chosen: {...chosen}, turns: value.turns.map(cleanTurn),
    });
  }

  // Take over what a copy of this conversation has besides: another tab's, or an import's. Returns whether it had any.
  merge(copy) {
    const places = new Map(this.turns.map((turn, i) => [turn.id, i]));
    const news = copy.turns.filter(turn => !(this.turns[places.get(turn.id)]?.at >= turn.at));
    for (const turn of news) this.turns[places.get(turn.id) ?? this.turns.length] = turn;
    return news.length > 0;
  }

  add(parent, role, fields) {
    const turn = {id: newId(), parent: parent ?? ROOT, role, text: "", at: Date.now(), ...fields};
    this.turns.push(turn);
    this.choose(turn);
    if (!this.title && role === "user") this.title = turn.text.trim().split("\n")[0].slice(0, 80) || "Images";
    this.updated = Date.now();
    return turn;
  }

  choose(turn) { this.chosen[turn.parent] = turn.id; }

  siblings(turn) { return this.turns.filter(other => other.parent === turn.parent); }

  // Return the turns that are shown, first to last.
  path() {
    const byParent = Map.groupBy(this.turns, turn => turn.parent);
    const path = [];
    for (let id = ROOT; byParent.has(id) && path.length <= this.turns.length;) {
      const children = byParent.get(id);
      const turn = children.find(child => child.id === this.chosen[id]) ?? children.at(-1);
      path.push(turn);
      id = turn.id;
    }
    return path;
  }

  // Return the turns from the first to `turn`.
  upTo(turn) {
    const byId = new Map(this.turns.map(one => [one.id, one]));
    const path = [];
    for (let one = turn; one && path.length <= this.turns.length; one = byId.get(one.parent)) path.unshift(one);
    return path;
  }

  // Return the body of a request for the answer `turn`; with `continues`, for the rest of it.
  request(turn, model, continues) {
    const path = this.upTo(turn);
    if (!continues) path.pop();
    const system = this.settings.system?.trim();
    const messages = [...(system ? [{role: "system", content: system}] : []), ...path.map(messageOf).filter(Boolean)];
    return {
      model, messages, stream: true, stream_options: {include_usage: true}, return_meta_info: true,
      ...(continues ? {continue_final_message: true, add_generation_prompt: false} : {}), ...fieldsOf(this.settings),
    };
  }

  export() {
    const {id, title, created, updated, settings, turns, chosen} = this;
    const messages = this.path().map(messageOf).filter(Boolean);
    return {kind: "radixloop conversation", version: 1, id, title, created, updated, settings, messages, turns, chosen};
  }
}

const isText = value => typeof value === "string";
const isTurn = turn => Boolean(turn) && isText(turn.id) && isText(turn.text) && ["user", "assistant", "tool"].includes(turn.role);

// Return a turn of what is known of turns alone, whatever a file that was imported says besides.
function cleanTurn({id, parent, role, text, at, images, reasoning, reasoningSeconds, calls, callId, finish, error, figures}) {
  const turn = {id, parent: isText(parent) ? parent : ROOT, role, text, at: Number(at) || 0};
  if (Array.isArray(images)) turn.images = images.filter(url => isText(url) && url.startsWith("data:image/"));
  if (isText(reasoning)) Object.assign(turn, {reasoning, reasoningSeconds: Number(reasoningSeconds) || 0});
  if (Array.isArray(calls)) turn.calls = calls.filter(Boolean).map(call => ({id: String(call.id), name: String(call.name), arguments: String(call.arguments)}));
  if (isText(callId)) turn.callId = callId;
  if (isText(error)) turn.error = error;
  if (typeof figures?.tokens === "number") turn.figures = cleanFigures(figures);
  if (role === "assistant") turn.finish = isText(finish) ? finish : turn.error ? null : "interrupted";
  return turn;
}

function cleanFigures(figures) {
  const clean = {tokens: figures.tokens, is_exact: Boolean(figures.is_exact)};
  for (const name of ["prompt_tokens", "cached_tokens", "reasoning_tokens", "first_token_s", "tokens_per_s"]) {
    clean[name] = typeof figures[name] === "number" ? figures[name] : null;
  }
  return clean;
}

function cleanSettings({system, stop, thinking, tools, schema, ...numbers}) {
  const clean = Object.fromEntries(NUMBER_FIELDS.filter(name => typeof numbers[name] === "number").map(name => [name, numbers[name]]));
  if (isText(system)) clean.system = system;
  if (Array.isArray(stop)) clean.stop = stop.filter(isText);
  if (thinking === "enabled" || thinking === "disabled") clean.thinking = thinking;
  if (Array.isArray(tools)) clean.tools = tools;
  if (schema && typeof schema === "object" && !Array.isArray(schema)) clean.schema = schema;
  return clean;
}

function messageOf({role, text, images, reasoning, calls, callId}) {
  if (role === "tool") return {role, tool_call_id: callId, content: text};
  if (role === "user" && images?.length) {
    const parts = images.map(url => ({type: "image_url", image_url: {url}}));
    return {role, content: text ? [...parts, {type: "text", text}] : parts};
  }
  if (role === "user") return {role, content: text};
  if (!text && !calls?.length) return null;  // it failed before its first word
  return {
    role, content: text, ...(reasoning ? {reasoning_content: reasoning} : {}),
    ...(calls?.length ? {tool_calls: calls.map(call => ({id: call.id, type: "function", function: {name: call.name, arguments: call.arguments}}))} : {}),
  };
}

// Return the fields of a request that settings ask for. What is empty is left to the server.
function fieldsOf(settings) {
  const fields = {};
  for (const name of NUMBER_FIELDS) {
    if (typeof settings[name] === "number") fields[name] = settings[name];
  }
  if (settings.stop?.length) fields.stop = settings.stop;
  if (settings.thinking) fields.thinking = {type: settings.thinking};
  if (settings.tools?.length) fields.tools = settings.tools;
  if (settings.schema) fields.response_format = {type: "json_schema", json_schema: {name: "answer", schema: settings.schema}};
  return fields;
}
