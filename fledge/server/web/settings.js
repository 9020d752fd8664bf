// The settings of the next answer: a form, stored in this browser.

import { byId, h } from "./dom.js";
import { localStore } from "./storage.js";

const FIELDS = [
  {
    name: "system",
    label: "System prompt",
    rows: 3,
    help: 'The model reads this text at the start of a new conversation. Only the template "world" supports it.',
  },
  {
    name: "template",
    label: "Template",
    isTemplate: true,
    help: "How messages are formatted for the model. Use the template that the model was trained with.",
  },
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 100,
    step: 0.05,
    help: "0: always the most likely token. 1: the model's own distribution. Above 1: more random.",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0,
    max: 1,
    step: 0.05,
    help: "Sample only from the most likely tokens that together reach this probability. Small models need a low one.",
  },
  {
    name: "top_k",
    label: "Top k",
    min: 0,
    step: 1,
    help: "Sample only from this number of most likely tokens. 0: no limit.",
  },
  {
    name: "presence_penalty",
    label: "Presence penalty",
    min: -100,
    max: 100,
    step: 0.1,
    help: "Makes tokens that already occurred less likely, regardless of how often they occurred.",
  },
  {
    name: "frequency_penalty",
    label: "Frequency penalty",
    min: -100,
    max: 100,
    step: 0.1,
    help: "Makes tokens less likely each time they occur.",
  },
  {
    name: "penalty_decay",
    label: "Penalty decay",
    min: 0,
    max: 1,
    step: 0.001,
    help: "The share of the penalties that remains after each further token. 1: all of it.",
  },
  {
    name: "max_tokens",
    label: "Maximum tokens",
    min: 1,
    step: 1,
    help: "The maximum length of the answer. A longer answer is cut off.",
  },
  {
    name: "seed",
    label: "Seed",
    min: 0,
    step: 1,
    help: "The same seed gives the same answer. Empty: a different seed each time. Retry adds 1 to the seed.",
  },
  {
    name: "stop",
    label: "Stop strings",
    rows: 2,
    help: "One per line. The answer ends before the first match.",
  },
];
const EXTENSION_FIELDS = ["top_k", "penalty_decay", "template"]; // not part of OpenAI's protocol: sent inside "fledge"
const TEXT_FIELDS = ["system", "stop"];

export class Settings {
  constructor() {
    this.values = localStore.get("settings") ?? {};
    this.form = byId("settings-form");
    this.form.addEventListener("input", () => this.readForm());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    byId("reset-settings").addEventListener("click", () => this.reset());
    this.render({ templates: [], template: "" });
  }

  /** Show the form. `serverInfo` has the templates of the server. */
  render(serverInfo) {
    const rows = FIELDS.map((field) => {
      const id = `set-${field.name}`;
      const helpId = `${id}-help`;
      const attributes = { id, name: field.name, "aria-describedby": helpId };
      const control = createControl(field, attributes, this.values[field.name] ?? "", serverInfo);
      return h("div.field", {}, h("label", { for: id }, field.label), control, h("p.note", { id: helpId }, field.help));
    });
    this.form.replaceChildren(...rows);
  }

  readForm() {
    for (const { name } of FIELDS) {
      const { value } = this.form.elements[name];
      if (value === "") delete this.values[name];
      else this.values[name] = value;
    }
    localStore.set("settings", this.values);
  }

  reset() {
    for (const control of this.form.elements) control.value = "";
    this.readForm();
  }

  /** The system prompt of new conversations. */
  get systemPrompt() {
    return (this.values.system ?? "").trim();
  }

  /**
   * Build the fields of a request: `body` for OpenAI's fields, `extension` for those inside "fledge". `retryIndex` is
   * the number of earlier answers to the same question.
   */
  buildFields(retryIndex, template) {
    const body = {};
    const extension = {};
    for (const { name, isTemplate } of FIELDS) {
      const value = this.values[name];
      if (value === undefined || TEXT_FIELDS.includes(name)) continue;
      const target = EXTENSION_FIELDS.includes(name) ? extension : body;
      target[name] = isTemplate ? value : Number(value);
    }
    if (body.seed !== undefined) body.seed += retryIndex;
    if (template) extension.template = template;
    const stop = (this.values.stop ?? "").split("\n").filter((line) => line !== "");
    if (stop.length) body.stop = stop;
    return { body, extension };
  }
}

function createControl(field, attributes, value, serverInfo) {
  if (field.isTemplate) return createTemplateSelect(attributes, value, serverInfo);
  const { min, max, step, rows } = field;
  const numberAttributes = { type: "number", min, max, step, inputmode: "decimal", placeholder: "server default" };
  const control = rows
    ? h("textarea", { ...attributes, rows, dir: "auto" })
    : h("input", { ...attributes, ...numberAttributes, autocomplete: "off" });
  control.value = value;
  return control;
}

function createTemplateSelect(attributes, value, { templates, template }) {
  const names = [...new Set([...templates, value].filter(Boolean))];
  const options = names.map((name) => h("option", { value: name, selected: name === value }, name));
  const defaultLabel = template ? `Model default (${template})` : "Model default";
  return h("select", attributes, h("option", { value: "" }, defaultLabel), options);
}
