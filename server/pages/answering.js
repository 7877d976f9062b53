"use strict";
// One streamed answer: its events, what they add to the turn, and what it cost.

// Yield the data of each server-sent event.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const {done: isDone, value} = await reader.read();
    if (isDone) return;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter(line => line.startsWith("data:")).map(line => line.slice(5).trimStart()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

class Answering {
  constructor(conversation, turn, onNews) {
    Object.assign(this, {conversation, turn, onNews});
    this.controller = new AbortController();
    this.startedAt = performance.now();
    this.firstAt = this.reasonedAt = 0;
    this.numPieces = 0;
  }

  stop() { this.controller.abort(); }

  // Ask for the answer, or with `continues` for the rest of it, until it ends, however it ends.
  async run(model, continues) {
    const {turn} = this;
    turn.finish = null;
    turn.at = Date.now();
    delete turn.error;
    try {
      const response = await ask("v1/chat/completions", {
        method: "POST", headers: {"Content-Type": "application/json"}, signal: this.controller.signal,
        body: JSON.stringify(this.conversation.request(turn, model, continues)),
      });
      for await (const chunk of eventsOf(response)) {
        if (chunk.error) throw new ServerError(chunk.error.code ?? 500, chunk.error.message);
        this.take(chunk);
        this.onNews();
      }
      turn.finish ??= "interrupted";
    } catch (error) {
      this.fail(error);
    }
    turn.at = Date.now();
    this.count();
    this.onNews();
  }

  take({choices = [], usage}) {
    const {turn} = this;
    for (const {delta = {}, finish_reason: finish, meta_info: account} of choices) {
      const reasoning = delta.reasoning_content ?? delta.reasoning;
      if (reasoning) {
        this.begin();
        turn.reasoning = (turn.reasoning ?? "") + reasoning;
      }
      if (delta.content) {
        this.begin();
        if (turn.reasoning && !turn.reasoningSeconds) turn.reasoningSeconds = (performance.now() - this.firstAt) / 1000;
        turn.text += delta.content;
      }
      for (const call of delta.tool_calls ?? []) this.call(call);
      if (finish) turn.finish = finish;
      if (account) this.account = account;
    }
    if (usage) this.usage = usage;
  }

  begin() {
    this.firstAt ||= performance.now();
    this.numPieces++;
  }

  call({index = 0, id, function: called = {}}) {
    this.begin();
    const calls = this.turn.calls ??= [];
    calls[index] ??= {id: id ?? newId(), name: "", arguments: ""};
    calls[index].name += called.name ?? "";
    calls[index].arguments += called.arguments ?? "";
  }

  fail(error) {
    if (error.name === "AbortError") this.turn.finish = "stopped";
    else if (error instanceof ServerError) this.turn.error = error.message + (error.retryAfter ? ` (again in ${error.retryAfter} s)` : "");
    else if (this.firstAt) this.turn.finish = "interrupted";
    else this.turn.error = "There is no connection to the server.";
  }

  // Return how much has come so far, and how fast, for who watches it.
  pace() {
    const seconds = (performance.now() - this.firstAt) / 1000;
    if (!this.firstAt || seconds < 0.5) return "";
    return `${this.numPieces.toLocaleString("en-US")} tokens · ${Math.round(this.numPieces / seconds)} tokens/s`;
  }

  // Write down what the answer cost: by the server's account, or, of one that was stopped, by what has come.
  count() {
    const {turn, account, usage} = this;
    if (!this.firstAt && !account) return;
    const seconds = (performance.now() - this.firstAt) / 1000;
    const tokens = account?.completion_tokens ?? this.numPieces;
    turn.figures = {
      tokens, is_exact: Boolean(account),
      prompt_tokens: account?.prompt_tokens ?? usage?.prompt_tokens ?? null,
      cached_tokens: account?.cached_tokens ?? null,
      reasoning_tokens: usage?.completion_tokens_details?.reasoning_tokens ?? null,
      first_token_s: this.firstAt ? (this.firstAt - this.startedAt) / 1000 : null,
      tokens_per_s: tokens > 1 ? (tokens - 1) / Math.max(account?.decode_time ?? seconds, 1e-3) : null,
    };
    if (turn.reasoning && !turn.reasoningSeconds) turn.reasoningSeconds = seconds;
  }
}
