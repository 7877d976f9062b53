"use strict";
// The chat page: the conversation that is shown, the list of the others, and the message that is being written.

const at = id => document.getElementById(id);
const SAVE_INTERVAL_MS = 1500;  // while an answer grows
const MAX_IMAGE_SIDE = 2048, MAX_IMAGE_BYTES = 4 << 20, MAX_IMAGES = 16;
const NEAR_END = 80;  // pixels from the end within which the newest is followed

class Chat {
  constructor(store) {
    this.store = store;
    this.otherTabs = new BroadcastChannel("radixloop");
    this.otherTabs.onmessage = ({data: id}) => this.catchUp(id);
    this.conversation = new Conversation({settings: read("settings", {})});
    this.open = new Map();  // conversations by id that an answer of may still grow
    this.answering = new Map();  // by conversation id
    this.views = new Map();  // by turn id, of what is shown
    this.images = [];  // of the message that is being written
    this.model = "";
    this.contextLength = 0;
    this.readsImages = false;
    this.isFollowing = true;
    this.settings = new Settings(at("settings"), settings => this.changeSettings(settings));
    this.settings.show(this.conversation.settings);
  }

  // ---- the model ----

  async meet() {
    const [{data}, info] = await Promise.all([askJson("v1/models"), askJson("model_info")]);
    this.models = data;
    const names = data.map(model => model.id);
    at("models").replaceChildren(...names.map(name => element("option", {value: name, text: name})));
    at("models").hidden = names.length < 2;
    at("model").hidden = names.length > 1;
    this.useModel(names.includes(read("model", "")) ? read("model", "") : names[0]);
    this.readsImages = Boolean(info.has_image_understanding);
    at("attach").hidden = !this.readsImages;
    at("about").textContent = info.is_generation === false
      ? `${this.model} makes vectors of texts and does not chat. The API documents say how to ask it.`
      : `${this.model} answers, with room for ${count(this.contextLength)} tokens.`;
    this.cannotChat = info.is_generation === false;
    this.settings.show(this.conversation.settings, info.preferred_sampling_params ?? {});
    this.drawComposer();
  }

  useModel(name) {
    this.model = name;
    this.contextLength = this.models.find(model => model.id === name)?.max_model_len ?? 0;
    at("models").value = at("model").textContent = name;
    at("model").title = name;
  }

  // ---- conversations ----

  async go(id) {
    if (!id) return this.begin();
    if (id === this.conversation.id) return;
    let conversation = this.open.get(id);
    if (!conversation) conversation = Conversation.from(await this.store.load(id));
    if (!conversation) return this.begin();
    this.keepDraft();
    this.conversation = conversation;
    this.settings.show(conversation.settings);
    this.images = [];
    at("prompt").value = read(`draft ${id}`, "");
    this.follow();
    this.drawAll();
  }

  begin() {
    this.keepDraft();
    this.conversation = new Conversation({settings: read("settings", {})});
    this.settings.show(this.conversation.settings);
    this.images = [];
    at("prompt").value = read("draft ", "");
    this.drawAll();
    at("prompt").focus();
  }

  keepDraft() {
    const name = `draft ${this.conversation.turns.length ? this.conversation.id : ""}`, text = at("prompt").value;
    if (text) write(name, text);
    else forget(name);
  }

  async save(conversation = this.conversation) {
    if (!conversation.turns.length) return;
    try {
      await this.store.save(conversation);
      if (!this.answering.has(conversation.id)) this.otherTabs.postMessage(conversation.id);
    } catch (error) {
      notify(`This conversation could not be kept in the browser (${error?.name ?? "no room"}). Export it, or delete others.`);
    }
  }

  // Show what another tab, or an import, has added to a conversation.
  async catchUp(id) {
    const conversation = id === this.conversation.id ? this.conversation : this.open.get(id);
    const stored = conversation && Conversation.from(await this.store.load(id));
    const isNew = stored && conversation.merge(stored);
    if (isNew && conversation === this.conversation && !document.activeElement.closest(".turn")) this.drawAll();
    else this.drawList();
  }

  changeSettings(settings) {
    this.conversation.settings = settings;
    write("settings", settings);
    this.save();
  }

  async remove() {
    const {conversation} = this;
    this.answering.get(conversation.id)?.stop();
    this.open.delete(conversation.id);
    await this.store.remove(conversation.id);
    this.otherTabs.postMessage(conversation.id);
    location.hash = "";
    this.begin();
    this.drawList();
    notify("Deleted.", "Undo", async () => {
      await this.save(conversation);
      location.hash = conversation.id;
    });
  }

  rename(title) {
    if (title.trim()) this.conversation.title = title.trim().slice(0, 120);
    this.drawTitle();
    this.save().then(() => this.drawList());
  }

  // ---- turns ----

  isRunning(turn) {
    return this.answering.get(this.conversation.id)?.turn === turn;
  }

  send() {
    const text = at("prompt").value.trim();
    if ((!text && !this.images.length) || this.answering.has(this.conversation.id) || this.cannotChat || !this.model) return;
    const last = this.conversation.path().at(-1);
    const turn = this.conversation.add(last?.id, "user", {text, ...(this.images.length ? {images: this.images} : {})});
    at("prompt").value = "";
    this.images = [];
    this.keepDraft();
    forget("draft ");
    this.answer(turn);
  }

  // Add an answer to `turn`, and let it grow.
  answer(turn) {
    this.grow(this.conversation.add(turn?.id, "assistant", {finish: null}));
  }

  async grow(turn, continues = false) {
    const {conversation} = this;
    const answering = new Answering(conversation, turn, () => this.drawSoon(conversation, turn));
    this.answering.set(conversation.id, answering);
    this.open.set(conversation.id, conversation);
    this.follow();
    this.drawAll();
    this.focus();
    announce("The answer is being made.");
    if (location.hash.slice(1) !== conversation.id) history.pushState(null, "", `#${conversation.id}`);
    await this.save(conversation);
    this.drawList();
    const saving = setInterval(() => this.save(conversation), SAVE_INTERVAL_MS);
    await answering.run(this.model, continues);
    clearInterval(saving);
    this.answering.delete(conversation.id);
    this.open.delete(conversation.id);
    conversation.updated = Date.now();
    if (conversation === this.conversation) {
      this.views.get(turn.id)?.draw();
      this.drawComposer();
      this.drawTitle();
      this.toEnd();
      announce(turn.error ? `The server refused: ${turn.error}` : `The answer has ended. ${turn.text.slice(0, 2000)}`);
    }
    await this.save(conversation);
    await this.store.trim();
    this.drawList();
    if (turn.error) await this.meet().catch(() => {});  // it may be another server by now, with another model
  }

  stop() {
    this.answering.get(this.conversation.id)?.stop();
  }

  isBusy() {
    if (!this.answering.has(this.conversation.id)) return false;
    notify("An answer is being made. Stop it first.");
    return true;
  }

  parentOf(turn) {
    return this.conversation.turns.find(other => other.id === turn.parent);
  }

  again(turn) {
    if (!this.isBusy()) this.answer(this.parentOf(turn));
  }

  // Ask once more for an answer that failed: for the rest of it, if some had come.
  retry(turn) {
    if (this.isBusy()) return;
    if (turn.text && !turn.calls?.length) {
      this.grow(turn, true);
      return;
    }
    Object.assign(turn, {text: "", reasoning: "", reasoningSeconds: 0, calls: [], figures: null});
    this.views.get(turn.id).node.remove();
    this.views.delete(turn.id);
    this.grow(turn);
  }

  continue(turn) {
    if (!this.isBusy()) this.grow(turn, true);
  }

  // Put `text` in the place of a turn; the old one stays beside it.
  edit(turn, text) {
    if (this.isBusy()) return;
    const images = turn.images ? {images: turn.images} : {};
    const made = this.conversation.add(turn.parent, turn.role, {text, ...images, ...(turn.role === "assistant" ? {finish: "edited", reasoning: turn.reasoning} : {})});
    if (turn.role === "user") this.answer(made);
    else {
      this.drawAll();
      this.save();
    }
  }

  show(turn) {
    if (this.isBusy()) return;
    this.conversation.choose(turn);
    this.isFollowing = false;
    this.drawAll();
    this.save();
  }

  hasResult(turn, call) {
    return this.conversation.path().some(other => other.role === "tool" && other.callId === call.id);
  }

  giveResult(turn, call, text) {
    if (this.isBusy()) return;
    const made = this.conversation.add(this.conversation.path().at(-1).id, "tool", {text, callId: call.id});
    if (turn.calls.every(one => this.hasResult(turn, one))) this.answer(made);
    else this.save();
    this.views.get(turn.id).draw();
    this.drawAll();
  }

  // ---- what is seen ----

  drawAll() {
    const path = this.conversation.path(), shown = new Set(path.map(turn => turn.id)), root = at("turns");
    for (const [id, view] of this.views) {
      if (shown.has(id)) continue;
      view.node.remove();
      this.views.delete(id);
    }
    path.forEach((turn, i) => {
      let view = this.views.get(turn.id);
      if (!view) this.views.set(turn.id, view = new TurnView(turn, this));
      else if (view.turn !== turn || i >= path.length - 2 || this.conversation.siblings(turn).length > 1) {
        view.turn = turn;
        view.draw();
      }
      if (root.children[i] !== view.node) root.insertBefore(view.node, root.children[i] ?? null);
    });
    at("empty").hidden = path.length > 0;
    this.drawTitle();
    this.drawComposer();
    this.drawList();
    this.toEnd();
  }

  drawSoon(conversation, turn) {
    if (conversation !== this.conversation || this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const view = this.views.get(turn.id);
      if (!view || !this.isRunning(turn)) return;
      if (!view.grow()) view.draw();
      at("room").textContent = this.answering.get(conversation.id).pace();
      this.toEnd();
    });
  }

  drawTitle() {
    const {title} = this.conversation;
    at("title").value = title;
    document.title = title ? `${title} · radixloop` : "radixloop";
    const isEmpty = !this.conversation.turns.length;
    at("title").hidden = at("export").hidden = at("delete").hidden = isEmpty;
  }

  drawComposer() {
    const isRunning = this.answering.has(this.conversation.id);
    at("send").hidden = isRunning;
    at("stop").hidden = !isRunning;
    at("send").disabled = !this.model || this.cannotChat || (!at("prompt").value.trim() && !this.images.length);
    at("images").hidden = !this.images.length;
    at("images").replaceChildren(...this.images.map((src, i) => element("button", {type: "button", "aria-label": `Remove image ${i + 1}`, onclick: () => {
      this.images.splice(i, 1);
      this.drawComposer();
      at("prompt").focus();
    }}, element("img", {src, alt: ""}))));
    const figures = this.conversation.path().findLast(turn => turn.figures?.prompt_tokens)?.figures;
    at("room").textContent = figures && this.contextLength ? `${count(figures.prompt_tokens + figures.tokens)} of ${count(this.contextLength)} tokens` : "";
  }

  async drawList() {
    const wanted = at("filter").value.trim().toLowerCase();
    const heads = await this.store.heads();
    at("filter").hidden = heads.length < 8;
    const midnight = new Date().setHours(0, 0, 0, 0), day = 86400e3;
    const groups = [["Today", midnight], ["Last seven days", midnight - 7 * day], ["Before", -Infinity]];
    const nodes = [];
    let group = -1;
    for (const head of heads.filter(one => one.title.toLowerCase().includes(wanted))) {
      const its = groups.findIndex(([, since]) => head.updated >= since);
      if (its !== group) nodes.push(element("h3", {text: groups[its][0]}));
      group = its;
      const link = element("a", {href: `#${head.id}`, text: head.title, title: head.title, class: this.answering.has(head.id) ? "running" : ""});
      if (head.id === this.conversation.id) link.setAttribute("aria-current", "page");
      nodes.push(link);
    }
    at("conversations").replaceChildren(...nodes);
  }

  // Give the focus that a button had, which is gone, to the message; on a phone that would bring up its keyboard.
  focus() {
    if (document.activeElement === document.body && !matchMedia("(pointer: coarse)").matches) at("prompt").focus();
  }

  follow() {
    this.isFollowing = true;
  }

  toEnd() {
    const scroller = at("scroller");
    if (this.isFollowing) scroller.scrollTop = scroller.scrollHeight;
    this.seeScroll();
  }

  seeScroll() {
    const scroller = at("scroller");
    at("to-end").hidden = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
  }

  // ---- images ----

  async attach(files) {
    for (const file of files) {
      if (!file.type.startsWith("image/")) continue;
      if (this.images.length >= MAX_IMAGES) {
        notify(`A message has at most ${MAX_IMAGES} images.`);
        break;
      }
      try {
        this.images.push(await dataUri(file));
      } catch {
        notify(`${file.name} is no image that this browser reads.`);
      }
    }
    this.drawComposer();
  }
}

// Return an image as a data URI, made smaller if it is a large one.
async function dataUri(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_IMAGE_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= MAX_IMAGE_BYTES && /\/(png|jpeg|webp)$/.test(file.type)) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
  }
  const canvas = element("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function announce(text) {
  at("announcer").textContent = text;
}

function notify(text, label, onclick) {
  const notice = at("notice");
  clearTimeout(notify.timer);
  notice.replaceChildren(element("span", {text}), ...(label ? [element("button", {type: "button", text: label, onclick: () => {
    notice.hidden = true;
    onclick();
  }})] : []));
  notice.hidden = false;
  notify.timer = setTimeout(() => { notice.hidden = true; }, label ? 8000 : 5000);
}

function download(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 2)], {type: "application/json"}));
  element("a", {href: url, download: `${name.replace(/[^\p{L}\p{N} _-]+/gu, "").trim().slice(0, 60) || "conversation"}.json`}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

async function importFiles(chat, files) {
  let last = null;
  for (const file of files) {
    try {
      const value = JSON.parse(await file.text());
      for (const one of Array.isArray(value) ? value : [value]) {
        const conversation = Conversation.from(one);
        if (!conversation) throw new SyntaxError("no conversation");
        await chat.save(last = conversation);
        await chat.catchUp(conversation.id);
      }
    } catch {
      notify(`${file.name} holds no conversations that were exported here.`);
    }
  }
  if (last) location.hash = last.id;
  chat.drawList();
}

async function exportAll(store) {
  const all = [];
  for (const {id} of await store.heads()) {
    const conversation = Conversation.from(await store.load(id));
    if (conversation) all.push(conversation.export());
  }
  download("radixloop conversations", all);
}

function listenToMessage(chat) {
  const prompt = at("prompt");
  at("composer").addEventListener("submit", event => { event.preventDefault(); chat.send(); });
  at("stop").addEventListener("click", () => { chat.stop(); prompt.focus(); });
  prompt.addEventListener("input", () => chat.drawComposer());
  if (!CSS.supports("field-sizing", "content")) {  // then it grows by hand
    prompt.addEventListener("input", () => {
      prompt.style.height = "auto";
      prompt.style.height = `${prompt.scrollHeight}px`;
    });
  }
  prompt.addEventListener("keydown", event => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); chat.send(); }
    else if (event.key === "ArrowUp" && !prompt.value) {
      const last = chat.conversation.path().findLast(turn => turn.role === "user");
      if (last && !chat.answering.has(chat.conversation.id)) { event.preventDefault(); chat.views.get(last.id).edit(); }
    }
  });
  prompt.addEventListener("paste", event => {
    const files = [...event.clipboardData.files];
    if (chat.readsImages && files.length) { event.preventDefault(); chat.attach(files); }
  });
  at("attach").addEventListener("click", () => at("files").click());
  at("files").addEventListener("change", async () => { await chat.attach([...at("files").files]); at("files").value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, event => {
      if (!chat.readsImages) return;
      event.preventDefault();
      at("composer").classList.toggle("dropping", name === "dragover");
      if (name === "drop") chat.attach([...event.dataTransfer.files]);
    });
  }
}

function listenToPage(chat) {
  const sidebar = at("sidebar");
  const toggleSidebar = isOpen => {
    sidebar.classList.toggle("open", isOpen);
    at("shade").hidden = !isOpen;
    if (isOpen) at("close-sidebar").focus();
  };
  at("open-sidebar").addEventListener("click", () => toggleSidebar(true));
  at("close-sidebar").addEventListener("click", () => { toggleSidebar(false); at("open-sidebar").focus(); });
  at("shade").addEventListener("click", () => toggleSidebar(false));
  const begin = () => { toggleSidebar(false); if (location.hash) location.hash = ""; else chat.begin(); };
  at("new").addEventListener("click", begin);
  at("filter").addEventListener("input", () => chat.drawList());
  at("models").addEventListener("change", () => { write("model", at("models").value); chat.useModel(at("models").value); chat.drawComposer(); });
  at("open-settings").addEventListener("click", () => at("settings").showModal());
  at("export").addEventListener("click", () => download(chat.conversation.title, chat.conversation.export()));
  at("delete").addEventListener("click", () => chat.remove());
  at("export-all").addEventListener("click", () => exportAll(chat.store));
  at("import").addEventListener("click", () => at("import-file").click());
  at("import-file").addEventListener("change", async () => {
    await importFiles(chat, [...at("import-file").files]);
    at("import-file").value = "";
    at("settings").close();
  });
  at("title").addEventListener("change", () => chat.rename(at("title").value));
  at("title").addEventListener("keydown", event => event.key === "Enter" && at("prompt").focus());
  at("to-end").addEventListener("click", () => { chat.follow(); chat.toEnd(); });
  const follow = () => {
    const scroller = at("scroller");
    chat.isFollowing = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
    chat.seeScroll();
  };
  for (const name of ["wheel", "touchmove", "keyup", "scrollend"]) at("scroller").addEventListener(name, follow, {passive: true});
  at("scroller").addEventListener("scroll", () => chat.seeScroll(), {passive: true});
  addEventListener("hashchange", () => { toggleSidebar(false); chat.go(location.hash.slice(1)); });
  addEventListener("pagehide", () => chat.keepDraft());
  addEventListener("visibilitychange", () => { chat.keepDraft(); if (!document.hidden) chat.drawList(); });
  addEventListener("keydown", event => {
    if (event.key === "Escape" && sidebar.classList.contains("open")) toggleSidebar(false);
    else if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
    else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) { event.preventDefault(); begin(); }
  });
}

async function start() {
  const chat = new Chat(await Store.open());
  window.chat = chat;
  listenToMessage(chat);
  listenToPage(chat);
  await chat.go(location.hash.slice(1));
  if (!chat.store.database) notify("This browser keeps nothing for this page: conversations end with it.");
  for (let delay = 1000; ; delay = Math.min(2 * delay, 15000)) {
    try {
      await chat.meet();
      break;
    } catch (error) {
      at("about").textContent = error instanceof ServerError ? error.message : "There is no connection to the server. Trying again…";
      await new Promise(resolve => setTimeout(resolve, delay));
    }
  }
}
start();
