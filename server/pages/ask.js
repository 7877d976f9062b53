"use strict";
// Requests to the server. A key that it wants is asked for, and kept in this page's memory alone.

const element = (tag, options = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "role" && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
};

// A link that skips what is before the page's matter must not change the URL's fragment, which names what is shown.
const skipLink = document.querySelector(".skip");
skipLink?.addEventListener("click", event => {
  event.preventDefault();
  document.querySelector(skipLink.hash).focus();
});

let apiKey = "";
let keyAsked = null;  // one dialog for all requests that wait for it

class ServerError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const headersWithKey = headers => apiKey ? {...headers, Authorization: `Bearer ${apiKey}`} : headers;

function askForKey() {
  keyAsked ??= new Promise(resolve => {
    const input = element("input", {class: "field", type: "password", id: "key", autocomplete: "off", required: true});
    const dialog = element("dialog", {id: "key-dialog", "aria-labelledby": "key-title"},
      element("form", {method: "dialog"},
        element("h2", {id: "key-title", text: apiKey ? "This key does not open it" : "This server asks for a key"}),
        element("p", {text: "It stays in this page's memory, and is asked for again when the page is loaded anew."}),
        element("label", {}, element("span", {class: "visually-hidden", text: "API key"}), input),
        element("button", {class: "solid", text: "Continue"})));
    dialog.addEventListener("cancel", event => event.preventDefault());
    dialog.addEventListener("close", () => {
      apiKey = input.value.trim();
      dialog.remove();
      keyAsked = null;
      resolve();
    });
    document.body.append(dialog);
    dialog.showModal();
    input.focus();
  });
  return keyAsked;
}

// Return the response of a request that succeeded; a `ServerError` carries what the server said.
async function ask(path, options = {}) {
  for (;;) {
    const used = apiKey;
    const response = await fetch(path, {...options, headers: headersWithKey(options.headers ?? {})});
    if (response.ok) return response;
    if (response.status === 401) {
      if (used === apiKey) await askForKey();
      continue;
    }
    let message = `the server answered ${response.status}`;
    try {
      const body = await response.json();
      message = body.error?.message ?? body.message ?? message;
    } catch { /* no JSON: a proxy's page */ }
    throw new ServerError(response.status, message, Number(response.headers.get("Retry-After")) || 0);
  }
}

const askJson = async (path, options) => (await ask(path, options)).json();
