"use strict";
// Behind a router: one worker's figures, or the sum of all.

const ALL = "";  // in place of a worker's address
const sum = values => values.reduce((total, value) => total + value, 0);
const SHARES = new Set(["hit_rate", "hit_rate_total", "device_idle", "host_us_per_step", "oldest_queued_s"]);

// Return the figures of several workers as those of one. What is no sum is the mean, or the slowest worker's.
function total(all) {
  if (all.length === 1) return all[0];
  const [first] = all, now = {...first.now};
  for (const [name, value] of Object.entries(now)) {
    const values = all.map(data => data.now[name]);
    if (name === "oldest_queued_s") now[name] = Math.max(...values);
    else if (SHARES.has(name)) now[name] = sum(values) / all.length;
    else if (typeof value === "number") now[name] = sum(values);
  }
  now.status = all.find(data => data.now.status !== "ok")?.now.status ?? "ok";
  now.kv = Object.fromEntries(Object.keys(now.kv).map(name => [name, sum(all.map(data => data.now.kv[name]))]));
  now.canary = {
    num_runs: sum(all.map(data => data.now.canary.num_runs)), num_alarms: sum(all.map(data => data.now.canary.num_alarms)),
    drift: Math.max(...all.map(data => data.now.canary.drift)),
  };
  return {
    ...first, now, latency: slowest(all.map(data => data.latency)), series: addSeries(all.map(data => data.series)),
    model: [...new Set(all.map(data => data.model))].join(", "), uptime_s: Math.max(...all.map(data => data.uptime_s)),
    requests: all.flatMap(data => data.requests).sort((a, b) => b.age_s - a.age_s),
    prefixes: all.flatMap(data => data.prefixes).sort((a, b) => b.hits * b.num_tokens - a.hits * a.num_tokens).slice(0, 12),
    branches: joinBranches(all), replicas: all.flatMap(data => data.replicas),
    processes: all.flatMap((data, i) => data.processes.map(one => ({...one, name: `worker ${i}: ${one.name}`}))),
  };
}

function slowest(latencies) {
  const names = Object.keys(latencies[0]).filter(name => name !== "num_requests");
  const worst = (name, part) => latencies.map(one => one[name][part]).filter(value => value !== null).sort((a, b) => b - a)[0] ?? null;
  return {
    num_requests: sum(latencies.map(one => one.num_requests)),
    ...Object.fromEntries(names.map(name => [name, Object.fromEntries(["p50", "p90", "p99"].map(part => [part, worst(name, part)]))])),
  };
}

// Add up curves, whose last values are of the same second or two.
function addSeries(series) {
  const length = Math.max(...series.map(one => one.age_s.length));
  const longest = series.find(one => one.age_s.length === length);
  const added = {...longest};
  for (const name of Object.keys(longest)) {
    if (name === "age_s" || name === "span_s") continue;
    added[name] = longest[name].map((_, i) => sum(series.map(one => one[name][one.age_s.length - length + i] ?? 0)));
  }
  return added;
}

function joinBranches(all) {
  const joined = [];
  let replica = 0;
  for (const data of all) {
    const first = joined.length;
    joined.push(...data.branches.map(branch => ({...branch, replica: branch.replica + replica, parent: branch.parent < 0 ? -1 : branch.parent + first})));
    replica += data.replicas.length;
  }
  return joined;
}

class Workers {
  constructor(onChoice) {
    this.urls = [];
    this.chosen = ALL;
    at("workers").addEventListener("change", () => { this.chosen = at("workers").value; onChoice(); });
  }

  // Return the figures of the chosen worker, or of all together.
  async data(spanS) {
    const read = async url => {
      const response = await ask(`dashboard/data?span=${spanS}${url ? `&worker=${encodeURIComponent(url)}` : ""}`);
      const urls = response.headers.get("X-Radixloop-Workers")?.split(" ") ?? [];
      if (!url) this.show(urls);
      return response.json();
    };
    const first = await read(ALL);
    if (this.chosen !== ALL && this.urls.includes(this.chosen)) return read(this.chosen);
    if (this.urls.length < 2) return first;
    const answers = await Promise.allSettled(this.urls.map(read));
    const well = answers.filter(answer => answer.status === "fulfilled").map(answer => answer.value);
    return {...total(well.length ? well : [first]), numWorkers: well.length, numMissing: answers.length - well.length};
  }

  show(urls) {
    if (urls.join(" ") === this.urls.join(" ")) return;
    this.urls = urls;
    at("workers").hidden = urls.length < 2;
    at("workers").replaceChildren(element("option", {value: ALL, text: `All ${urls.length} workers`}), ...urls.map(url => element("option", {value: url, text: url})));
    at("workers").value = urls.includes(this.chosen) ? this.chosen : ALL;
  }
}
