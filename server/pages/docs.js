"use strict";
// The documents: a list of the routes, and all that one of them takes and answers.

const at = id => document.getElementById(id);
const TAGS = ["OpenAI", "Anthropic", "Ollama", "SGLang", "tokens", "server"];
const TITLES = {tokens: "Texts and tokens", server: "The server"};
const CONVERSATION = [{role: "user", content: "What is the capital of France?"}];
const EXAMPLES = {  // by route; of others the fields that are needed
  "/v1/chat/completions": {messages: CONVERSATION, max_tokens: 32}, "/v1/chat/completions/render": {messages: CONVERSATION},
  "/v1/completions": {prompt: "The capital of France is", max_tokens: 8}, "/v1/messages": {max_tokens: 32, messages: CONVERSATION},
  "/v1/messages/count_tokens": {messages: CONVERSATION}, "/v1/responses": {input: "What is the capital of France?"},
  "/v1/responses/input_tokens": {input: "What is the capital of France?"}, "/generate": {text: "The capital of France is", sampling_params: {max_new_tokens: 8}},
  "/api/chat": {messages: CONVERSATION, stream: false}, "/api/generate": {prompt: "What is the capital of France?", stream: false},
  "/tokenize": {prompt: "Hello"}, "/v1/tokenize": {prompt: "Hello"}, "/detokenize": {tokens: [1, 2, 3]}, "/v1/detokenize": {tokens: [1, 2, 3]},
  "/v1/embeddings": {input: "Hello"}, "/api/embed": {input: "Hello"}, "/api/embeddings": {prompt: "Hello"}, "/encode": {text: "Hello"},
  "/invocations": {messages: CONVERSATION, max_tokens: 32}, "/vertex_generate": {instances: [{text: "The capital of France is"}], parameters: {sampling_params: {max_new_tokens: 8}}},
  ...Object.fromEntries(["/score", "/v1/score"].map(path => [path, {text_1: "capital of France", text_2: ["Paris", "Rome"]}])),
  ...Object.fromEntries(["/rerank", "/v1/rerank", "/v2/rerank"].map(path => [path, {query: "capital of France", documents: ["Paris", "Rome"]}])),
  "/classify": {text: "Hello"}, "/v1/classify": {input: "Hello"}, "/separate_reasoning": {text: "<think>Why?</think>So.", reasoning_parser: "qwen3"},
  "/parse_function_call": {text: '<tool_call>{"name": "weather", "arguments": {}}</tool_call>', tool_call_parser: "qwen25", tools: []},
  "/abort_request": {rid: "none"}, "/update_weight_version": {new_version: "2"}, "/get_weights_by_name": {name: "model.norm.weight"}, "/close_session": {session_id: "none"},
  "/v1/batches": {input_file_id: "file-…", endpoint: "/v1/chat/completions", completion_window: "24h"}, "/update_weights_from_disk": {model_path: "…"},
  "/open_session": {capacity_of_str_len: 4096},
};

class Documents {
  constructor(openapi) {
    this.schemas = new Schemas(openapi.components.schemas);
    this.operations = Object.entries(openapi.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => ({
      ...operation, path, method: method.toUpperCase(), id: operation.operationId, tag: operation.tags[0],
    })));
    at("version").textContent = `API ${openapi.info.version}`;
    at("filter").addEventListener("input", () => this.list());
    addEventListener("hashchange", () => this.show());
    this.list();
    this.show();
  }

  body(operation) {
    const [type, content] = Object.entries(operation.requestBody?.content ?? {})[0] ?? [];
    return type ? {type, schema: this.schemas.resolve(content.schema)} : null;
  }

  // Return whether a route, or one of its fields, has `wanted` in its name.
  fits(operation, wanted) {
    const names = Object.keys(this.body(operation)?.schema.properties ?? {});
    return [operation.path, operation.summary, operation.tag, ...names].some(text => text.toLowerCase().includes(wanted));
  }

  list() {
    const wanted = at("filter").value.trim().toLowerCase(), nodes = [];
    for (const tag of TAGS) {
      const fitting = this.operations.filter(operation => operation.tag === tag && (!wanted || this.fits(operation, wanted)));
      if (!fitting.length) continue;
      nodes.push(element("h2", {text: TITLES[tag] ?? tag}));
      nodes.push(...fitting.map(({id, path, method}) => element("a", {href: `#${id}`, "aria-current": id === this.current ? "page" : null},
        element("span", {class: `method ${method}`, text: method}), element("span", {}, ...path.split(/(?<=\/)/).flatMap(part => [part, element("wbr")])))));
    }
    at("routes").replaceChildren(...(nodes.length ? nodes : [element("p", {class: "soft", text: "Nothing has this in its name."})]));
    for (const row of document.querySelectorAll(".field-row")) row.classList.toggle("found", Boolean(wanted) && row.dataset.name.toLowerCase().includes(wanted));
  }

  show() {
    const operation = this.operations.find(({id}) => id === location.hash.slice(1)) ?? this.operations.find(({path}) => path === "/v1/chat/completions");
    this.current = operation.id;
    document.title = `${operation.path} · radixloop`;
    const main = at("operation");
    main.replaceChildren(...this.draw(operation));
    main.scrollTop = 0;
    this.list();
    at("routes").querySelector("[aria-current]")?.scrollIntoView({block: "nearest"});
  }

  draw(operation) {
    const body = this.body(operation), answer = this.answer(operation);
    const parameters = operation.parameters ?? [];
    return [
      element("h1", {text: operation.summary}),
      element("p", {class: "route"}, element("span", {class: `method ${operation.method}`, text: operation.method}), operation.path),
      element("p", {class: "soft", text: operation.security?.length === 1 && !Object.keys(operation.security[0]).length
        ? "Needs no key." : "Where the server has keys, send one as Authorization: Bearer KEY, or as X-Api-Key."}),
      ...(parameters.length ? [element("h2", {class: "part", text: "Parameters"}), this.rows(parameters.map(({name, schema, required, in: place}) =>
        [name, {...schema, description: place === "path" ? "part of the path" : "behind the ? of the URL"}, required]), 0)] : []),
      ...(body ? [element("h2", {class: "part", text: body.type === "application/json" ? "Body, a JSON object" : "Form"}), this.rows(this.schemas.fields(body.schema), 0)] : []),
      element("h2", {class: "part", text: "Answer"}), ...answer,
      element("h2", {class: "part", text: "Errors"}),
      element("dl", {class: "statuses"}, ...Object.entries(operation.responses).filter(([status]) => status !== "200").flatMap(([status, {description}]) =>
        [element("dt", {text: status}), element("dd", {text: description})])),
      ...this.trial(operation, body),
    ];
  }

  answer(operation) {
    const contents = Object.entries(operation.responses["200"].content ?? {});
    const [type, {schema}] = contents[0];
    const objects = this.schemas.objects(schema);
    const nodes = [element("p", {class: "kind", text: `${type}: ${this.schemas.kind(schema)}`})];
    if (contents.length > 1) nodes.push(element("p", {class: "kind", text: `With stream: ${contents[1][0]}.`}));
    if (objects.length) nodes.push(this.rows(this.schemas.fields(objects[0]).map(([name, field]) => [name, field, false]), 0));
    return nodes;
  }

  // Return a table of fields: [name, schema, is needed] each.
  rows(fields, depth) {
    return element("div", {class: "fields"}, ...fields.map(([name, field, isNeeded]) => this.row(name, this.schemas.resolve(field), field, isNeeded, depth)));
  }

  row(name, field, written, isNeeded, depth) {
    const hasDefault = "default" in field && field.default !== "" && JSON.stringify(field.default) !== "[]" && JSON.stringify(field.default) !== "{}";
    const inner = depth < MAX_DEPTH ? this.schemas.objects(written) : [];
    return element("div", {class: "field-row", "data-name": name},
      element("div", {}, name, isNeeded ? element("span", {class: "needed", text: "needed"}) : null),
      element("div", {},
        field.description ? element("div", {text: field.description}) : null,
        element("div", {class: "kind"}, this.schemas.kind(written), hasDefault ? "; default " : "", hasDefault ? element("code", {text: JSON.stringify(field.default)}) : ""),
        ...inner.slice(0, 24).map(object => this.fold(object, inner.length > 1, depth))));
  }

  // Return the fields of an object within a field: drawn when they are unfolded.
  fold(object, isOneOfMany, depth) {
    const details = element("details", {}, element("summary", {text: isOneOfMany ? `Fields of ${object.title ?? "it"}` : "Its fields"}));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(this.rows(this.schemas.fields(object), depth + 1));
    });
    return details;
  }

  trial(operation, body) {
    if (operation.path.includes("{") || (body && body.type !== "application/json")) return [];
    const input = body ? element("textarea", {class: "field", spellcheck: "false", "aria-label": "Body"}) : null;
    if (body) input.value = JSON.stringify(EXAMPLES[operation.path] ?? Object.fromEntries((body.schema.required ?? []).map(name => [name, ""])), null, 2);
    const state = element("span", {class: "soft", role: "status"}), shown = element("pre", {hidden: true, tabindex: 0});
    const form = element("form", {class: "try", onsubmit: event => {
      event.preventDefault();
      this.send(operation, input, state, shown);
    }}, input, element("div", {class: "row"}, element("button", {class: "solid", text: "Send"}), state), shown);
    const curl = element("pre", {tabindex: 0, text: this.curl(operation, input)});
    input?.addEventListener("input", () => { curl.textContent = this.curl(operation, input); });
    return [element("h2", {class: "part", text: "Try it"}), form, element("h2", {class: "part", text: "With curl"}), curl];
  }

  curl({method, path}, input) {
    const url = new URL(path.slice(1), new URL(".", location.href)).href;
    if (!input) return `curl ${method === "GET" ? "" : `-X ${method} `}${url}`;
    const text = input.value.replaceAll("'", "'\\''");
    return `curl ${method === "POST" ? "" : `-X ${method} `}${url} -H 'Content-Type: application/json' -d '${text}'`;
  }

  async send({method, path}, input, state, shown) {
    const started = performance.now();
    shown.hidden = true;
    state.textContent = "Waiting…";
    try {
      const response = await ask(path.slice(1), {method, ...(input ? {body: input.value, headers: {"Content-Type": "application/json"}} : {})});
      const text = await response.text();
      shown.textContent = response.headers.get("Content-Type")?.includes("json") ? pretty(text) : text;
      state.textContent = `${response.status} after ${Math.round(performance.now() - started)} ms`;
    } catch (error) {
      shown.textContent = error.message;
      state.textContent = error instanceof ServerError ? `${error.status}` : "no connection";
    }
    shown.hidden = false;
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {  // a line each, as Ollama streams
    return text;
  }
}

async function start() {
  try {
    window.documents = new Documents(await askJson("openapi.json"));
  } catch (error) {
    at("state").textContent = error instanceof ServerError ? error.message : "There is no connection to the server.";
  }
}
start();
