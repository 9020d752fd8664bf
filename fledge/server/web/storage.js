// Values that the page stores in the browser. If the storage is full or blocked, values are kept in memory instead and
// the page continues to work.

const PREFIX = "fledge.";

class BrowserStorage {
  /** `kind` is "localStorage" (permanent, shared by all tabs) or "sessionStorage" (this tab only). */
  constructor(kind) {
    this.rejected = new Map(); // values that the browser's storage did not accept
    this.onError = () => {};
    try {
      this.area = window[kind];
      this.area.getItem(`${PREFIX}theme`); // throws if storage is blocked
    } catch {
      this.area = null;
    }
  }

  /** Return the stored value, or null. */
  get(name) {
    if (this.rejected.has(name)) return this.rejected.get(name);
    const json = this.area?.getItem(PREFIX + name) ?? null;
    try {
      return json === null ? null : JSON.parse(json);
    } catch {
      return null;
    }
  }

  /** Store a value; null deletes it. */
  set(name, value) {
    try {
      if (value === null) this.area.removeItem(PREFIX + name);
      else this.area.setItem(PREFIX + name, JSON.stringify(value));
      this.rejected.delete(name);
    } catch {
      this.rejected.set(name, value);
      if (value !== null) this.onError();
    }
  }

  /** List the names that start with `prefix`. */
  listNames(prefix) {
    const keys = Array.from({ length: this.area?.length ?? 0 }, (_, index) => this.area.key(index));
    const names = keys.filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
    return [...new Set([...names, ...this.rejected.keys()])].filter((name) => name.startsWith(prefix));
  }
}

export const localStore = new BrowserStorage("localStorage");
export const sessionStore = new BrowserStorage("sessionStorage");
