// Conversations and states as files: given to the reader, and taken back; and branches that are removed for good.

import { notice } from "./composer.js";
import { by, excerpt, number } from "./element.js";

/** Let the buttons below the tree work. at(): the turn one is at, go(id) goes to one, tried(work) tells what fails. */
export function files({ tree, connection, dialogue, at, go, tried }) {
  by("save-tree").addEventListener("click", () => {
    const blob = new Blob([JSON.stringify(tree, null, 1)], { type: "application/json" });
    give(blob, `fledge-${new Date().toISOString().slice(0, 10)}.json`);
  });
  by("save-state").addEventListener("click", () => tried(() => saveState(tree.get(at()))));
  by("open-file").addEventListener("click", () => by("file").click());
  by("file").addEventListener("change", () => {
    const [file] = by("file").files;
    if (file) tried(() => open(file).finally(() => (by("file").value = "")));
  });
  by("remove").addEventListener("click", () => {
    const count = tree.following(at());
    const after = count ? ` and ${number(count)} ${count === 1 ? "turn" : "turns"} after it` : "";
    const what = excerpt(tree.get(at()).user || "This state", 80);
    by("sure-text").textContent = `“${what}”${after} will be forgotten, here and on the server.`;
    by("sure").showModal();
  });
  by("keep").addEventListener("click", () => by("sure").close());
  by("really").addEventListener("click", () => {
    by("sure").close();
    remove(tree.get(at()));
  });

  async function saveState(turn) {
    const file = () => connection.call(`v1/fledge/states/${encodeURIComponent(turn.state)}/file`);
    if (!turn.state) await dialogue.read(turn);
    const response = await file().catch(async (error) => {
      if (!error.uselessState || turn.kind === "state") throw error;
      tree.forgetStates(turn.id);
      await dialogue.read(turn);
      return file();
    });
    const name = excerpt(turn.user || turn.name, 40).replace(/[^\p{L}\p{N}]+/gu, "-");
    give(await response.blob(), `${name || "fledge"}.state`);
  }

  /** A conversation is taken into the tree, a state is given to the server. */
  async function open(file) {
    const start = await file.slice(0, 1).text();
    const turn = start === "{" || start === "[" ? tree.merge(parsed(await file.text())) : await bring(file);
    if (turn) go(turn.id);
    else notice("Everything in this file is here already.");
  }

  async function bring(file) {
    const made = await connection.json("v1/fledge/states/file", { method: "PUT", body: file });
    const { id: state, tokens, template } = made;
    const name = made.name || file.name.replace(/\.(state|safetensors)$/, "");
    return tree.add({ parent: null, kind: "state", user: "", status: "done", state, name, tokens, template });
  }

  function remove(turn) {
    const gone = tree.remove(turn.id);
    if (gone.some((each) => dialogue.running?.turns.has(each))) dialogue.stop();
    go(turn.parent);
    for (const { state } of gone)
      if (state) connection.call(`v1/fledge/states/${encodeURIComponent(state)}`, { method: "DELETE" }).catch(() => {});
  }
}

/** Offer some bytes as a download. */
function give(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("This file is damaged: it is no JSON.");
  }
}
