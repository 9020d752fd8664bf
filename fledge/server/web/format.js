// Text and numbers formatted for display.

/** Shorten a text to one line of at most `length` characters. Surrogate pairs stay intact. */
export function truncate(text, length) {
  const line = text
    .slice(0, 8 * length)
    .replace(/\s+/g, " ")
    .trim();
  const characters = [...line];
  return characters.length > length ? `${characters.slice(0, length - 1).join("")}…` : line;
}

/** Format a number: 4 → "4", 0.3333 → "0.333", 12345.6 → "12,346". */
export function formatNumber(value, digits = 3) {
  const options = value >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: digits };
  return new Intl.NumberFormat("en", options).format(value);
}

/** Format a number of bytes: 433000 → "433 kB". */
export function formatBytes(value) {
  if (value < 1000) return `${value} bytes`;
  if (value < 1e6) return `${formatNumber(value / 1e3, 2)} kB`;
  return value < 1e9 ? `${formatNumber(value / 1e6, 3)} MB` : `${formatNumber(value / 1e9, 3)} GB`;
}
