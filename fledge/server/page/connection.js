// The server: requests, streams of events, errors in its own words.

import { passing } from "./storage.js";

const STATE_FIELDS = ["fledge.state", "state", "handle"];

/** What a request came to instead of an answer; `code` and `status` as the server gave them. */
export class Failure extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }

  /** Whether the state to go on from is of no use there (any more): forgotten, somebody else's, another model's. */
  get uselessState() {
    return this.code === "state_not_found" || (this.status === 400 && STATE_FIELDS.includes(this.param));
  }

  /** Whether the server, which once did, keeps no states. */
  get keepsNone() {
    return this.status === 400 && this.param === "fledge.return_state";
  }
}

export class Connection {
  /** The key, kept for this tab only. */
  get key() {
    return passing.get("key");
  }

  set key(value) {
    passing.put("key", value || null);
  }

  /** The response; `body` is sent as JSON unless it is a file. Throws Failure, or an AbortError after `signal`. */
  async call(path, { method = "GET", body, signal } = {}) {
    const headers = this.key ? { authorization: `Bearer ${this.key}` } : {};
    const file = body instanceof Blob;
    if (body !== undefined) headers["content-type"] = file ? "application/octet-stream" : "application/json";
    let response;
    try {
      const sent = body === undefined || file ? body : JSON.stringify(body);
      response = await fetch(new URL(path, document.baseURI), {
        method,
        headers,
        body: sent,
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server cannot be reached. Is it still running?");
    }
    if (!response.ok) throw await failure(response);
    return response;
  }

  /** The JSON that a path answers with. */
  async json(path, options) {
    return (await this.call(path, options)).json();
  }

  /** Server-sent events as they come, up to [DONE]. */
  async *events(path, body, signal) {
    const response = await this.call(path, { method: "POST", body, signal });
    for await (const data of dataOf(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message, { status: 500, ...event.error });
      yield event;
    }
    throw new Failure("The answer broke off: the connection to the server ended.");
  }
}

async function failure(response) {
  const error = await response.json().then(
    (body) => body.error,
    () => null,
  );
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  return new Failure(message, { status: response.status, code: error?.code ?? null, param: error?.param ?? null });
}

/** The data of each event in a stream of bytes; comments and fields other than data are passed over. */
async function* dataOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The answer broke off: the connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
