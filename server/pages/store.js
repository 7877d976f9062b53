"use strict";
// Conversations, kept by the browser and nowhere else: what is read of one to list it, and all of it.

const MAX_CONVERSATIONS = 300;  // the oldest are dropped

const done = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

class Store {
  constructor(database) {
    this.database = database;  // null: nothing is kept
    this.memory = new Map();
  }

  static async open() {
    try {
      const request = indexedDB.open("radixloop", 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("heads", {keyPath: "id"});
        request.result.createObjectStore("conversations", {keyPath: "id"});
      };
      return new Store(await done(request));
    } catch {  // a private window, or storage that is switched off
      return new Store(null);
    }
  }

  // Return {id, title, updated} of each, newest first.
  async heads() {
    const heads = this.database ? await done(this.database.transaction("heads").objectStore("heads").getAll()) : [...this.memory.values()];
    return heads.map(({id, title, updated}) => ({id, title, updated})).sort((a, b) => b.updated - a.updated);
  }

  async load(id) {
    if (!this.database) return this.memory.get(id);
    return done(this.database.transaction("conversations").objectStore("conversations").get(id));
  }

  // Keep a conversation as it is now, with what another tab has added to it since. Rejects if there is no room.
  save(conversation) {
    if (!this.database) {
      this.memory.set(conversation.id, conversation);
      return Promise.resolve();
    }
    return this.change(async (heads, conversations) => {
      const {id, title, updated} = conversation;
      const stored = Conversation.from(await done(conversations.get(id)));
      if (stored) conversation.merge(stored);
      heads.put({id, title, updated});
      conversations.put({...conversation});
    });
  }

  remove(id) {
    this.memory.delete(id);
    if (!this.database) return Promise.resolve();
    return this.change(async (heads, conversations) => {
      heads.delete(id);
      conversations.delete(id);
    });
  }

  // Drop the oldest beyond the limit.
  async trim() {
    for (const {id} of (await this.heads()).slice(MAX_CONVERSATIONS)) await this.remove(id);
  }

  change(work) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(["heads", "conversations"], "readwrite");
      transaction.oncomplete = () => resolve();
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
      work(transaction.objectStore("heads"), transaction.objectStore("conversations")).catch(reject);
    });
  }
}
