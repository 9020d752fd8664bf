// How the next answer is drawn: fields with a word about each, kept in this browser.

import { by, h } from "./element.js";
import { lasting } from "./storage.js";

const FIELDS = [
  {
    name: "system",
    label: "System text",
    area: 3,
    about: "What the model reads before a new conversation begins. Only the template world has a place for it.",
  },
  {
    name: "template",
    label: "Template",
    choices: [],
    about: "How messages are laid out for the model. Take the one it was tuned with.",
  },
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 100,
    step: 0.05,
    about: "0: always the likeliest word. 1: as the model weighs them. Above: wilder.",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0,
    max: 1,
    step: 0.05,
    about: "Draw only from the likeliest words that together have this share. Small models need a small one.",
  },
  {
    name: "top_k",
    label: "Top k",
    min: 0,
    step: 1,
    about: "Draw only from so many of the likeliest words. 0: from all.",
  },
  {
    name: "presence_penalty",
    label: "Presence penalty",
    min: -100,
    max: 100,
    step: 0.1,
    about: "Makes words that have been used less likely, however often.",
  },
  {
    name: "frequency_penalty",
    label: "Frequency penalty",
    min: -100,
    max: 100,
    step: 0.1,
    about: "The same, for each time they have been used.",
  },
  {
    name: "penalty_decay",
    label: "Penalty decay",
    min: 0,
    max: 1,
    step: 0.001,
    about: "How much of the penalties is left after each further word. 1: all of it.",
  },
  {
    name: "max_tokens",
    label: "Longest answer",
    min: 1,
    step: 1,
    about: "In tokens. An answer that reaches it stops in the middle.",
  },
  {
    name: "seed",
    label: "Seed",
    min: 0,
    step: 1,
    about: "The same seed gives the same answer again. Empty: another one each time. Retry counts it up.",
  },
  { name: "stop", label: "Stop texts", area: 2, about: "One a line. The answer ends before the first of them." },
];
const OWN = ["top_k", "penalty_decay", "template"]; // in the request's field fledge, not among OpenAI's

export class Settings {
  constructor() {
    this.values = lasting.get("settings") ?? {};
    this.form = by("fields");
    this.form.addEventListener("input", () => this.read());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    by("reset").addEventListener("click", () => this.reset());
    this.draw({ templates: [], template: "" });
  }

  /** Show the fields as this server has them. */
  draw(server) {
    const rows = FIELDS.map((field) => {
      const id = `set-${field.name}`;
      return h(
        "div.field",
        {},
        h("label", { for: id }, field.label),
        this.control(field, id, server),
        h("p.aside", { id: `${id}-about` }, field.about),
      );
    });
    this.form.replaceChildren(...rows);
  }

  control(field, id, server) {
    const given = { id, name: field.name, "aria-describedby": `${id}-about` };
    const value = this.values[field.name] ?? "";
    if (field.choices) {
      const names = [...new Set([...server.templates, value].filter(Boolean))];
      const options = names.map((name) => h("option", { value: name, selected: name === value }, name));
      const standard = server.template ? `The model's own (${server.template})` : "The model's own";
      return h("select", given, h("option", { value: "" }, standard), options);
    }
    if (field.area) {
      const area = h("textarea", { ...given, rows: field.area, dir: "auto" });
      area.value = value;
      return area;
    }
    const { min, max, step } = field;
    const input = h("input", {
      ...given,
      type: "number",
      min,
      max,
      step,
      inputmode: "decimal",
      placeholder: "the server's choice",
      autocomplete: "off",
    });
    input.value = value;
    return input;
  }

  read() {
    for (const field of FIELDS) {
      const { value } = this.form.elements[field.name];
      if (value === "") delete this.values[field.name];
      else this.values[field.name] = value;
    }
    lasting.put("settings", this.values);
  }

  reset() {
    for (const control of this.form.elements) control.value = "";
    this.read();
  }

  /** The system text of conversations that begin now. */
  get system() {
    return (this.values.system ?? "").trim();
  }

  /** The fields of a request. again: how many answers to the same question there are already. */
  request(again, template) {
    const body = {};
    const own = {};
    for (const field of FIELDS) {
      const value = this.values[field.name];
      if (value === undefined || field.name === "system" || field.name === "stop") continue;
      (OWN.includes(field.name) ? own : body)[field.name] = field.choices ? value : Number(value);
    }
    if (body.seed !== undefined) body.seed += again;
    if (template) own.template = template;
    const stops = (this.values.stop ?? "").split("\n").filter((line) => line !== "");
    if (stops.length) body.stop = stops;
    return { body, own };
  }
}
