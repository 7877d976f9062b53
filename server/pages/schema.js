"use strict";
// JSON schemas in words: what a value may be, where it ends, and an example of it.

const MAX_DEPTH = 6;  // of objects in objects that can be unfolded
const FAR = 1e9;  // limits beyond it are those of numbers, not of the field
// Fields that nearly every request has come first, in this order.
const FIRST = ["model", "messages", "prompt", "input", "text", "input_ids", "sampling_params", "system", "instructions", "stream", "max_tokens", "max_completion_tokens",
  "max_new_tokens", "max_output_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "n", "tools", "tool_choice", "response_format", "reasoning_effort", "thinking"];

class Schemas {
  constructor(components) { this.components = components; }

  resolve(schema) {
    if (!schema?.$ref) return schema ?? {};
    const {$ref, ...more} = schema;
    return {...this.components[$ref.split("/").pop()], ...more};
  }

  // Return the objects within a schema that have fields of their own.
  objects(schema) {
    const found = this.resolve(schema);
    if (found.properties && Object.keys(found.properties).length) return [found];
    const parts = [...(found.anyOf ?? found.oneOf ?? []), ...(found.items ? [found.items] : [])];
    return parts.flatMap(part => this.objects(part));
  }

  // Return what a value may be, in words.
  kind(schema) {
    const found = this.resolve(schema);
    if ("const" in found) return JSON.stringify(found.const);
    if (found.enum) return found.enum.map(value => JSON.stringify(value)).join(" | ");
    const options = found.anyOf ?? found.oneOf;
    if (options) return options.length > 8 ? `one of ${options.length} objects` : [...new Set(options.map(one => this.kind(one)))].join(" or ");
    if (found.type === "array") return found.items ? `list of ${this.kind(found.items)}${this.length(found)}` : "list";
    if (found.type === "object") return found.additionalProperties?.type ? `object of ${this.kind(found.additionalProperties)}` : "object";
    if (found.type === "integer" || found.type === "number") return found.type + this.range(found);
    if (found.type === "string") return `string${found.format === "binary" ? ", a file" : ""}${this.length(found)}`;
    if (Array.isArray(found.type)) return found.type.join(" or ");
    return found.type ?? "anything";
  }

  range({minimum: low, maximum: high, exclusiveMinimum: above, exclusiveMaximum: below}) {
    const parts = [];
    if (low > -FAR) parts.push(`at least ${low}`);
    if (above !== undefined) parts.push(`above ${above}`);
    if (high < FAR) parts.push(`at most ${high}`);
    if (below !== undefined) parts.push(`below ${below}`);
    return parts.length ? `, ${parts.join(", ")}` : "";
  }

  length({minLength, maxLength, minItems, maxItems}) {
    const low = minLength ?? minItems, high = maxLength ?? maxItems;
    return (low > 0 ? `, at least ${low} long` : "") + (high !== undefined ? `, at most ${high.toLocaleString("en-US")} long` : "");
  }

  // Return [name, schema, is needed] of an object's fields: needed and usual ones first.
  fields(schema) {
    const needed = new Set(schema.required ?? []);
    const rank = name => needed.has(name) ? -1 : FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length;
    return Object.entries(schema.properties ?? {}).map(([name, field]) => [name, field, needed.has(name)]).sort((a, b) => rank(a[0]) - rank(b[0]));
  }
}
