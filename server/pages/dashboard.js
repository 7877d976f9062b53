"use strict";
// The dashboard: asks for the figures once a second, and shows them.

const POLL_MS = 1000;
const SPANS = [[300, "5 min"], [3600, "hour"], [86400, "day"]];
let spanS = 300;
const requestRows = new Map();  // by rid
let latest = null;  // figures, to be drawn again at another width

function row(cells, options = {}) {
  return element("tr", options, ...cells.map(([content, kind]) => {
    const cell = element("td", {class: kind ?? null});
    if (kind === "text") {  // prompts are text, never markup
      const text = cell.appendChild(element("div", {title: content.filter(Boolean).join(" … ")}, content[0]));
      if (content[1]) text.append(element("i", {text: " … "}), content[1]);
    } else cell.append(content);
    return cell;
  }));
}

function showTiles({now, latency}) {
  set("generated", count(now.generated_per_s));
  set("prompt", count(now.prompt_per_s));
  set("running", count(now.num_running));
  set("waiting", count(now.num_waiting));
  set("oldest", now.num_waiting ? `the oldest for ${duration(now.oldest_queued_s)}` : "requests");
  set("hits", share(now.hit_rate));
  set("hits-total", `last minute; ${share(now.hit_rate_total)} in all`);
  set("ttft", duration(latency.first_token.p50));
  set("ttft-tail", `p99 ${duration(latency.first_token.p99)}`);
}

function showCurves({series}) {
  drawCurves("chart-tokens", series.age_s, series.span_s, [
    {name: "generated", colour: "blue", values: series.generated_per_s}, {name: "prompts", colour: "orange", values: series.prompt_per_s}]);
  drawCurves("chart-requests", series.age_s, series.span_s, [
    {name: "running", colour: "blue", values: series.num_running}, {name: "waiting", colour: "orange", values: series.num_waiting}]);
}

function showMemory({now: {kv}}) {
  at("held").style.width = 100 * kv.held / kv.total + "%";
  at("cached").style.width = 100 * kv.cached / kv.total + "%";
  set("kv", `${count(kv.held)} held (${share(kv.held / kv.total)}) · ${count(kv.cached)} cached (${share(kv.cached / kv.total)}) · `
    + `${count(kv.total - kv.held - kv.cached)} free, of ${count(kv.total)} tokens`);
}

function showLatency({latency}, isSum) {
  set("latency-count", latency.num_requests ? `last ${count(latency.num_requests)} requests${isSum ? ", of the slowest worker" : ""}` : "no request has ended yet");
  const stages = [["in the queue", "queue"], ["to the first token", "first_token"], ["between tokens", "token"],
                  ["whole request", "total"], ["event loop lag", "loop_lag"]];
  at("latency").replaceChildren(...stages.map(([name, key]) => row(
    [[name], ...["p50", "p90", "p99"].map(p => [duration(latency[key][p]), "number"])])));
}

function showTotals({now}) {
  const {canary} = now;
  at("totals").replaceChildren(...[
    ["requests accepted", count(now.num_requests)],
    ["aborted · refused, queue full", `${count(now.num_aborted)} · ${count(now.num_refused)}`],
    ["tokens generated", count(now.num_generated_tokens)],
    ["retractions · failed steps", `${count(now.num_retractions)} · ${count(now.num_failed_steps)}`],
    ["steps now", now.steps_per_s ? `${count(now.steps_per_s)}/s · host ${count(now.host_us_per_step)} µs · device idle ${share(now.device_idle)}` : "none"],
    ["canary", canary.num_runs ? `${count(canary.num_runs)} ${canary.num_runs === 1 ? "look" : "looks"} · drift ${canary.drift.toFixed(4)} · ${canary.num_alarms ? `${count(canary.num_alarms)} ALARMS, see the log` : "no alarm"}` : "has not looked yet"],
  ].map(([name, value]) => row([[name], [value, "number"]])));
}

function showRequests({requests, now}) {
  set("requests-count", requests.length ? `${count(requests.length)}${requests.length < now.num_running + now.num_waiting ? ` oldest of ${count(now.num_running + now.num_waiting)}` : ""}` : "");
  at("requests-table").hidden = !requests.length;
  at("no-requests").hidden = requests.length > 0;
  const live = new Set(requests.map(request => request.rid));
  for (const [rid, line] of requestRows) {
    if (live.has(rid)) continue;
    line.remove();
    requestRows.delete(rid);
  }
  requests.forEach((request, i) => {
    if (!requestRows.has(request.rid)) requestRows.set(request.rid, newRequestRow(request));
    const line = requestRows.get(request.rid);
    line.className = request.is_running ? "" : "waiting";
    const texts = [duration(request.age_s), count(request.num_prompt_tokens), request.is_running ? share(request.num_cached_tokens / request.num_prompt_tokens) : "waits",
                   `${count(request.num_output_tokens)}${request.max_new_tokens > 0 ? ` of ${count(request.max_new_tokens)}` : ""}`];
    texts.forEach((text, k) => { line.children[k + 2].textContent = text; });
    if (at("requests").children[i] !== line) at("requests").insertBefore(line, at("requests").children[i] ?? null);
  });
}

// Rows stay as long as their requests: a click must meet the button that it began on.
function newRequestRow({rid, head, tail, client}) {
  return row([[[head, tail], "text"], [client], ["", "number"], ["", "number"], ["", "number"], ["", "number"], [endButton(rid), "number"]]);
}

// Return a button that ends a request when it is pressed twice: rows move up while they are looked at.
function endButton(rid) {
  let isSure = false;
  return element("button", {type: "button", text: "End", "aria-label": `End ${rid}`, title: rid, onclick: ({currentTarget: button}) => {
    if (isSure) end(rid);
    isSure = !isSure;
    button.textContent = isSure ? "Sure?" : "End";
    button.setAttribute("aria-label", `${isSure ? "Really end" : "End"} ${rid}`);
  }});
}

async function end(rid) {
  await ask("abort_request", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({rid})}).catch(error => lose(error.message));
}

function showReplicas({replicas, ranks}) {
  at("replicas-card").hidden = replicas.length < 2 && ranks < 2;
  set("ranks", ranks > 1 ? `each over ${ranks} ranks` : "");
  at("replicas").replaceChildren(...replicas.map((replica, i) => {
    const bar = element("div", {class: "bar"}, element("div", {class: "blue"}), element("div", {class: "green"}));
    bar.children[0].style.width = 100 * replica.held / replica.total + "%";
    bar.children[1].style.width = 100 * replica.cached / replica.total + "%";
    return row([[`replica ${i}`], [count(replica.num_running), "number"], [count(replica.num_waiting), "number"], [bar],
                [share(replica.hit_rate_total), "number"], [count(replica.num_generated_tokens), "number"],
                [count(replica.num_retractions), "number"], [replica.canary_drift.toFixed(4), "number"]]);
  }));
}

function showProcesses({processes}) {
  at("processes-card").hidden = processes.length < 2;
  at("processes").replaceChildren(...processes.map(({name, pid, memory_bytes: memory, cores, is_alive: isAlive}) => row(
    [[name], [String(pid), "number"], [`${(memory / 2 ** 30).toFixed(2)} GiB`, "number"], [cores === null ? "–" : cores.toFixed(2), "number"], [isAlive ? "alive" : "STOPPED", "number"]])));
}

function showPrefixes({prefixes}) {
  at("prefixes").replaceChildren(...prefixes.map(prefix => row(
    [[[prefix.head, prefix.tail], "text"], [count(prefix.num_tokens), "number"], [times(prefix.hits), "number"], [count(prefix.num_users), "number"]])));
  at("prefix-table").hidden = !prefixes.length;
  at("no-prefixes").hidden = prefixes.length > 0;
}

function show(data) {
  const {now} = data;
  latest = data;
  document.title = `${count(now.generated_per_s)} tok/s · ${data.model}`;
  set("model", data.model);
  set("status", now.status);
  at("status").className = "status " + ({ok: "ok", busy: "soft"}[now.status] ?? "bad");
  set("uptime", `up ${span(data.uptime_s)} · context ${count(data.context_length)} tokens${data.numMissing ? ` · ${data.numMissing} workers do not answer` : ""}`);
  showTiles(data);
  showCurves(data);
  showRequests(data);
  showMemory(data);
  drawTree(data.branches, data.replicas.length);
  showLatency(data, data.numWorkers > 1);
  showTotals(data);
  showReplicas(data);
  showProcesses(data);
  showPrefixes(data);
}

function lose(reason) {
  document.body.classList.add("stale");
  set("status", reason);
  at("status").className = "status bad";
}

const workers = new Workers(() => poll());
let timer = 0;

async function poll() {
  clearTimeout(timer);
  try {
    const data = await workers.data(spanS);
    at("main").hidden = false;
    document.body.classList.remove("stale");
    show(data);
  } catch (error) {
    lose(error instanceof ServerError ? error.message : "no connection");
    if (!(error instanceof ServerError || error instanceof TypeError)) throw error;
  } finally {
    clearTimeout(timer);
    timer = setTimeout(poll, document.hidden ? 5 * POLL_MS : POLL_MS);
  }
}

function chooseSpan(seconds) {
  spanS = seconds;
  at("spans").replaceChildren(...SPANS.map(([value, text]) => element("button", {
    type: "button", role: "radio", "aria-checked": String(value === spanS), text, onclick: () => { chooseSpan(value); poll(); },
  })));
}

addEventListener("resize", () => latest && show(latest));
chooseSpan(spanS);
poll();
