// Requests to the server: JSON, files and event streams.

import { sessionStore } from "./storage.js";

const STATE_FIELDS = ["fledge.state", "state", "handle"];

/** A failed request. `status`, `code` and `param` are those of the server's error response. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }

  /** Whether the server cannot use the state: it is deleted, it has another owner, or it is from another model. */
  get isStateUnusable() {
    return this.code === "state_not_found" || (this.status === 400 && STATE_FIELDS.includes(this.param));
  }

  /** Whether the server does not save states, although it did when the page was loaded. */
  get isStateSavingDisabled() {
    return this.status === 400 && this.param === "fledge.return_state";
  }
}

export class ApiClient {
  /** The API key. It is stored for this tab only. */
  get key() {
    return sessionStore.get("key");
  }

  set key(value) {
    sessionStore.set("key", value || null);
  }

  /**
   * Send a request and return the response. `body` is sent as JSON unless it is a file. Throws an ApiError, or an
   * AbortError after `signal`.
   */
  async request(path, { method = "GET", body, signal } = {}) {
    const headers = this.key ? { authorization: `Bearer ${this.key}` } : {};
    const isFile = body instanceof Blob;
    if (body !== undefined) headers["content-type"] = isFile ? "application/octet-stream" : "application/json";
    const payload = body === undefined || isFile ? body : JSON.stringify(body);
    let response;
    try {
      const url = new URL(path, document.baseURI);
      response = await fetch(url, { method, headers, body: payload, signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached. Is it still running?");
    }
    if (!response.ok) throw await readError(response);
    return response;
  }

  /** Send a request and return the JSON of the response. */
  async requestJson(path, options) {
    return (await this.request(path, options)).json();
  }

  /** Send a request and yield its server-sent events until [DONE]. */
  async *streamEvents(path, body, signal) {
    const response = await this.request(path, { method: "POST", body, signal });
    for await (const data of readEventData(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, { status: 500, ...event.error });
      yield event;
    }
    throw new ApiError("The answer is incomplete: the server closed the connection.");
  }
}

async function readError(response) {
  const error = await response.json().then(
    (body) => body.error,
    () => null,
  );
  const message = error?.message ?? `The server responded with status ${response.status}.`;
  return new ApiError(message, { status: response.status, code: error?.code ?? null, param: error?.param ?? null });
}

/** Yield the data of each event in a byte stream. Comments and all other fields are ignored. */
async function* readEventData(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (buffer + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      buffer = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The answer is incomplete: the connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
