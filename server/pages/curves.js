"use strict";
// Curves over time, and their values under the pointer.

const LEFT = 40, RIGHT = 4, TOP = 8, BOTTOM = 20;  // pixels around a drawing
const drawn = new Map();  // by id of the drawing: what the pointer asks about

function svgNode(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function roundUp(value) {  // to the next 1, 2, 2.5 or 5 times a power of ten
  if (value <= 4) return 4;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map(step => step * power).find(step => step >= value);
}

function ageText(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min ago` : `${(seconds / 3600).toFixed(1)} h ago`;
}

// Draw `lines`, each {name, colour, values}, over the last `spanS` seconds. `ages`: seconds before now.
function drawCurves(id, ages, spanS, lines) {
  const svg = at(id), width = svg.clientWidth, height = svg.clientHeight;
  const right = width - RIGHT, bottom = height - BOTTOM;
  const highest = roundUp(Math.max(1, ...lines.flatMap(line => line.values)));
  const x = age => right - (right - LEFT) * Math.min(age, spanS) / spanS, y = value => bottom - (bottom - TOP) * value / highest;
  const nodes = [];
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const level = y(highest * part);
    nodes.push(svgNode("line", {x1: LEFT, x2: right, y1: level, y2: level, class: "gridline"}));
    if (part !== 0.25 && part !== 0.75) nodes.push(svgNode("text", {x: LEFT - 8, y: level + 4, "text-anchor": "end"}, short(highest * part)));
  }
  const [unit, unitS] = spanS > 7200 ? ["h", 3600] : ["min", 60], most = spanS > 600 ? 6 : 5, parts = width < 420 ? (most === 6 ? 3 : 2) : most;
  for (let i = parts; i >= 0; i--) {
    const age = spanS * i / parts;
    nodes.push(svgNode("text", {x: x(age), y: height - 3, "text-anchor": i === parts ? "start" : i ? "middle" : "end"}, i ? `−${+(age / unitS).toFixed(1)} ${unit}` : "now"));
  }
  for (const [index, {colour, values}] of lines.entries()) {
    const points = values.map((value, i) => [x(ages[i]), y(value)]).filter((_, i) => ages[i] <= spanS);
    if (!points.length) continue;
    const path = "M" + points.map(point => point.map(v => v.toFixed(1)).join(",")).join("L");
    if (!index) nodes.push(svgNode("path", {d: `${path}L${points.at(-1)[0]},${bottom}L${points[0][0]},${bottom}Z`, class: "area"}));
    nodes.push(svgNode("path", {d: path, class: `curve ${colour}`}));
  }
  const cursor = svgNode("line", {y1: TOP, y2: bottom, x1: 0, x2: 0, class: "cursor", visibility: "hidden"});
  svg.replaceChildren(...nodes, cursor);
  if (!drawn.has(id)) {
    svg.addEventListener("pointermove", event => point(id, event));
    svg.addEventListener("pointerleave", () => leave(id));
  }
  const place = drawn.get(id)?.place;
  drawn.set(id, {ages, lines, x, cursor, place});
  if (place) point(id, place);
}

// Show the values at the pointer.
function point(id, {clientX, clientY}) {
  const one = drawn.get(id), offset = clientX - at(id).getBoundingClientRect().left;
  if (!one.ages.length) return;
  const i = one.ages.reduce((best, age, j) => Math.abs(one.x(age) - offset) < Math.abs(one.x(one.ages[best]) - offset) ? j : best, 0);
  one.place = {clientX, clientY};
  for (const name of ["x1", "x2"]) one.cursor.setAttribute(name, one.x(one.ages[i]));
  one.cursor.setAttribute("visibility", "visible");
  showTip(one.lines.map(line => `${line.name} ${line.values[i] < 10 ? +line.values[i].toFixed(1) : count(line.values[i])}`).join("\n") + `\n${ageText(one.ages[i])}`, clientX, clientY);
}

function leave(id) {
  drawn.get(id).place = null;
  drawn.get(id).cursor.setAttribute("visibility", "hidden");
  at("tip").hidden = true;
}

function showTip(text, x, y) {
  const tip = at("tip");
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = `${Math.min(x + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.max(y - tip.offsetHeight - 10, 8)}px`;
}
