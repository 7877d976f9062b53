"use strict";
// Numbers as people read them.

const at = id => document.getElementById(id);
const set = (id, text) => { at(id).textContent = text; };
const count = value => Math.round(value).toLocaleString("en-US");
const short = value => value >= 1e6 ? (value / 1e6).toFixed(1) + "M" : value >= 1e4 ? (value / 1e3).toFixed(value >= 1e5 ? 0 : 1) + "k" : count(value);
const share = value => (100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0) + " %";

const times = value => value === 1 ? "once" : `${count(value)} times`;

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0995) return (seconds * 1e3).toFixed(seconds < 0.00995 ? 1 : 0) + " ms";
  if (seconds < 0.9995) return Math.round(seconds * 1e3) + " ms";
  return seconds < 100 ? seconds.toFixed(seconds < 10 ? 2 : 1) + " s" : count(seconds) + " s";
}

function span(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}
