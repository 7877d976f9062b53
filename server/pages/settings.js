"use strict";
// The drawer with the system prompt, the sampling settings, tools and the form of an answer.

const NUMBERS = [  // name, label, default where the model says nothing, step, lowest, highest
  ["temperature", "Temperature", 1, 0.05, 0, 2], ["top_p", "Top p", 1, 0.01, 0, 1], ["top_k", "Top k", "off", 1, 1, null],
  ["min_p", "Min p", 0, 0.01, 0, 1], ["max_tokens", "Longest answer", "no limit", 1, 1, null],
  ["max_thinking_tokens", "Longest reasoning", "no limit", 1, 0, null], ["seed", "Seed", "random", 1, null, null],
  ["repetition_penalty", "Repetition penalty", 1, 0.01, 0.01, 2], ["presence_penalty", "Presence penalty", 0, 0.1, -2, 2],
  ["frequency_penalty", "Frequency penalty", 0, 0.1, -2, 2],
];

const read = (name, fallback) => {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? fallback;
  } catch {  // not kept here, or not ours
    return fallback;
  }
};
const write = (name, value) => {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch { /* a private window: it holds for as long as the page is open */ }
};
const forget = name => {
  try {
    localStorage.removeItem(name);
  } catch { /* nothing is kept here */ }
};

class Settings {
  // onChange: called with all settings after each change.
  constructor(dialog, onChange) {
    this.dialog = dialog;
    this.form = dialog.querySelector("form");
    this.onChange = onChange;
    for (const [name, label, , step, min, max] of NUMBERS) {
      dialog.querySelector("#numbers").append(element("label", {text: label},
        element("input", {class: "field", type: "number", name, step: "any", "data-step": step, min: min === null ? null : String(min), max: max === null ? null : String(max), inputmode: "decimal"})));
    }
    this.form.addEventListener("input", event => this.take(event.target));
    dialog.addEventListener("click", event => event.target === dialog && dialog.close());
    dialog.querySelector("#reset-settings").addEventListener("click", () => { this.show({}); this.onChange({}); });
    const theme = dialog.querySelector("#theme");
    theme.value = read("theme", "light dark");
    theme.addEventListener("input", () => { write("theme", theme.value); applyTheme(); });
  }

  // Show `settings`; `defaults`: the model's own, by name.
  show(settings, defaults = this.defaults ?? {}) {
    this.settings = {...settings};
    this.defaults = defaults;
    for (const [name, , usual] of NUMBERS) {
      this.form.elements[name].value = settings[name] ?? "";
      this.form.elements[name].placeholder = defaults[name === "max_tokens" ? "max_new_tokens" : name] ?? usual;
    }
    this.form.elements.system.value = settings.system ?? "";
    this.form.elements.stop.value = (settings.stop ?? []).join("\n");
    this.form.elements.thinking.value = settings.thinking ?? "";
    this.form.elements.tools.value = settings.tools ? JSON.stringify(settings.tools, null, 2) : "";
    this.form.elements.schema.value = settings.schema ? JSON.stringify(settings.schema, null, 2) : "";
    for (const field of this.form.elements) this.complain(field, "");
  }

  // Take one field into the settings, if what it says can be used.
  take(field) {
    if (!field.name) return;
    const value = this.valueOf(field);
    if (value === null) return;
    if (value === undefined) delete this.settings[field.name];
    else this.settings[field.name] = value;
    this.onChange({...this.settings});
  }

  // Return what a field says; undefined: nothing; null: what cannot be used.
  valueOf(field) {
    const text = field.value.trim();
    this.complain(field, "");
    if (field.type === "number") return field.validity.valid ? (text ? Number(text) : undefined) : null;
    if (!text) return undefined;
    if (field.name === "stop") return field.value.split("\n").filter(Boolean);
    if (field.name !== "tools" && field.name !== "schema") return field.name === "system" ? field.value : text;
    try {
      const value = JSON.parse(text);
      if (Array.isArray(value) !== (field.name === "tools") || typeof value !== "object") throw new SyntaxError(field.name === "tools" ? "a list is needed" : "an object is needed");
      return value;
    } catch (error) {
      this.complain(field, error.message);
      return null;
    }
  }

  complain(field, message) {
    field.parentNode.querySelector("small")?.remove();
    field.removeAttribute("aria-invalid");
    if (!message) return;
    field.setAttribute("aria-invalid", "true");
    field.after(element("small", {text: message}));
  }
}

function applyTheme() {
  document.documentElement.style.colorScheme = read("theme", "light dark");
}
applyTheme();
