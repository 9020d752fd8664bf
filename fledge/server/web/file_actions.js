// The buttons below the tree: save and open conversations and states as files, and remove branches.

import { byId } from "./dom.js";
import { formatNumber, truncate } from "./format.js";
import { showNotice } from "./notice.js";

export class FileActions {
  /**
   * `getCurrentId()` returns the id of the current turn, `openTurn(id)` shows a turn, and `withErrors(action)` runs an
   * action and shows its error.
   */
  constructor({ tree, client, chat, getCurrentId, openTurn, withErrors }) {
    Object.assign(this, { tree, client, chat, getCurrentId, openTurn });
    byId("save-tree").addEventListener("click", () => this.saveTree());
    byId("save-state").addEventListener("click", () => withErrors(() => this.saveState(this.currentTurn)));
    byId("open-file").addEventListener("click", () => byId("file-input").click());
    byId("file-input").addEventListener("change", () => {
      const [file] = byId("file-input").files;
      if (file) withErrors(() => this.openFile(file).finally(clearFileInput));
    });
    byId("remove-branch").addEventListener("click", () => this.confirmRemoval());
    byId("cancel-removal").addEventListener("click", () => byId("remove-dialog").close());
    byId("confirm-removal").addEventListener("click", () => {
      byId("remove-dialog").close();
      this.removeBranch(this.currentTurn);
    });
  }

  get currentTurn() {
    return this.tree.get(this.getCurrentId());
  }

  saveTree() {
    const blob = new Blob([JSON.stringify(this.tree, null, 1)], { type: "application/json" });
    download(blob, `fledge-${new Date().toISOString().slice(0, 10)}.json`);
  }

  async saveState(turn) {
    const fetchFile = () => this.client.request(`${getStatePath(turn.state)}/file`);
    if (!turn.state) await this.chat.computeState(turn);
    const response = await fetchFile().catch(async (error) => {
      if (!error.isStateUnusable || turn.kind === "state") throw error;
      this.tree.clearStates(turn.id);
      await this.chat.computeState(turn);
      return fetchFile();
    });
    const name = truncate(turn.user || turn.name, 40).replace(/[^\p{L}\p{N}]+/gu, "-");
    download(await response.blob(), `${name || "fledge"}.state`);
  }

  /** Import a conversation (JSON) into the tree, or upload a state to the server. */
  async openFile(file) {
    const firstCharacter = await file.slice(0, 1).text();
    const isJson = firstCharacter === "{" || firstCharacter === "[";
    const turn = isJson ? this.tree.importTurns(parseJson(await file.text())) : await this.uploadState(file);
    if (turn) this.openTurn(turn.id);
    else showNotice("The tree already contains every turn of this file.");
  }

  async uploadState(file) {
    const metadata = await this.client.requestJson("v1/fledge/states/file", { method: "PUT", body: file });
    const { id: state, tokens, template } = metadata;
    const name = metadata.name || file.name.replace(/\.(state|safetensors)$/, "");
    return this.tree.add({ parent: null, kind: "state", user: "", status: "done", state, name, tokens, template });
  }

  confirmRemoval() {
    const turn = this.currentTurn;
    const count = this.tree.countDescendants(turn.id);
    const descendants = count ? ` and ${formatNumber(count)} ${count === 1 ? "turn" : "turns"} after it` : "";
    const name = truncate(turn.user || "This state", 80);
    byId("remove-text").textContent = `“${name}”${descendants} will be deleted, here and on the server.`;
    byId("remove-dialog").showModal();
  }

  removeBranch(turn) {
    const removed = this.tree.remove(turn.id);
    if (removed.some((removedTurn) => this.chat.running?.turns.has(removedTurn))) this.chat.stop();
    this.openTurn(turn.parent);
    for (const { state } of removed) {
      if (state) this.client.request(getStatePath(state), { method: "DELETE" }).catch(() => {});
    }
  }
}

function getStatePath(state) {
  return `v1/fledge/states/${encodeURIComponent(state)}`;
}

function clearFileInput() {
  byId("file-input").value = "";
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("This file is damaged: it is not valid JSON.");
  }
}
