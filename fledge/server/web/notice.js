// The status line above the message field.

import { byId } from "./dom.js";

/** Show a message; "" clears the line. */
export function showNotice(text) {
  byId("notice").textContent = text;
}
