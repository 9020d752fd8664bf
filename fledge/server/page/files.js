// Conversations and states as files: given to the reader, and taken back.

import { by } from "./element.js";

/** Offer some bytes as a download. */
export function give(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Let the reader choose a file; taken(file) gets it. */
export function asks(taken) {
  by("open-file").addEventListener("click", () => by("file").click());
  by("file").addEventListener("change", () => {
    const [file] = by("file").files;
    by("file").value = "";
    if (file) taken(file);
  });
}

/** Take a file: a conversation is merged into the tree, a state is given to the server. The turn to go to, or null. */
export async function take(file, tree, connection) {
  const start = await file.slice(0, 1).text();
  if (start === "{" || start === "[") return tree.merge(parsed(await file.text()));
  const state = await connection.json("v1/fledge/states/file", { method: "PUT", body: file });
  const name = state.name || file.name.replace(/\.(state|safetensors)$/, "");
  return tree.add({ parent: null, kind: "state", user: "", status: "done", state: state.id, name, tokens: state.tokens });
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("This file is damaged: it is no JSON.");
  }
}

/** The date for a file's name. */
export function today() {
  return new Date().toISOString().slice(0, 10);
}
