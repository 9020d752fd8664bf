// What the browser keeps. Storage may be full or forbidden: then the page works on, and says so once.

/** `kind` is localStorage (all tabs, for good) or sessionStorage (this tab). */
class Drawer {
  constructor(kind) {
    this.memory = new Map(); // what storage did not take
    this.onfull = () => {};
    try {
      this.place = window[kind];
      this.place.getItem("fledge.theme");
    } catch {
      this.place = null;
    }
  }

  /** What was put there, or null. */
  get(name) {
    if (this.memory.has(name)) return this.memory.get(name);
    const text = this.place?.getItem(`fledge.${name}`) ?? null;
    try {
      return text === null ? null : JSON.parse(text);
    } catch {
      return null;
    }
  }

  /** Keep it; null forgets it. */
  put(name, value) {
    try {
      if (value === null) this.place.removeItem(`fledge.${name}`);
      else this.place.setItem(`fledge.${name}`, JSON.stringify(value));
      this.memory.delete(name);
    } catch {
      this.memory.set(name, value);
      if (value !== null) this.onfull();
    }
  }

  /** The names that begin so. */
  names(prefix) {
    const stored = Array.from({ length: this.place?.length ?? 0 }, (_, at) => this.place.key(at));
    const found = stored.filter((name) => name.startsWith("fledge.")).map((name) => name.slice("fledge.".length));
    return [...new Set([...found, ...this.memory.keys()])].filter((name) => name.startsWith(prefix));
  }
}

export const lasting = new Drawer("localStorage");
export const passing = new Drawer("sessionStorage");
