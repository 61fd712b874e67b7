// The conversation. Text of people and of models goes into text nodes, never into markup.

import { ServerError, events, request } from "./api.js";
import { digits, plural, seconds } from "./words.js";

const CONTINUED_TOKENS = 256; // a text without a chat's end goes on for ever; the API's own default is 16
const FIELDS = { temperature: Number, top_p: Number, max_tokens: Number, seed: Number };

export class Chat {
  constructor(root, onRefused) {
    this.root = root;
    this.onRefused = onRefused;
    this.log = root.querySelector("#log");
    this.prompt = root.querySelector("#prompt");
    this.send = root.querySelector("#send");
    this.stop = root.querySelector("#stop");
    this.model = null;
    this.messages = [];
    this.answering = null; // what stops the answer that is being written
    root.querySelector("#composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.answering) this.root.querySelector("#composer").requestSubmit();
    });
    this.stop.addEventListener("click", () => this.answering?.abort());
    root.addEventListener("keydown", (event) => event.key === "Escape" && this.answering?.abort());
    root.querySelector("#clear").addEventListener("click", () => this.#clear());
  }

  // model: an object of /v1/models.
  serve(model) {
    const about = model.expertflow ?? {};
    this.model = model.id;
    this.chats = about.chat !== false;
    this.root.querySelector("#system-field").hidden = !this.chats;
    this.root.querySelector("#max_tokens").placeholder = this.chats ? "to the end" : CONTINUED_TOKENS;
    this.root.querySelector("#prompt-label").textContent = this.chats ? "Message" : "Text to continue";
    this.root.querySelector("#hint").textContent = this.chats
      ? "Ask something, and watch which experts it takes."
      : "This model has no chat template: it continues the text that you give it, and remembers nothing of it.";
  }

  #clear() {
    this.answering?.abort();
    this.messages = [];
    for (const message of this.log.querySelectorAll(".message")) message.remove();
    this.root.querySelector("#hint").hidden = false;
    this.prompt.focus();
  }

  async #ask() {
    const text = this.prompt.value;
    if (!text.trim() || !this.model || this.answering) return;
    this.prompt.value = "";
    this.root.querySelector("#hint").hidden = true;
    const asked = { role: "user", content: text };
    this.#add("user", this.chats ? "You" : "Your text").text.textContent = text;
    const shown = this.#add("assistant", this.chats ? "Model" : "Continued");
    this.#busy(new AbortController(), shown);
    const conversation = this.messages; // New conversation may come before the answer's end
    const answer = await this.#answer([...conversation, asked], shown);
    this.#busy(null, shown);
    if (answer) conversation.push(asked, { role: "assistant", content: answer });
    else if (!this.prompt.value) this.prompt.value = text; // nothing came of it: to be sent again
  }

  // The text of the answer as far as it came; also why it ended, in `shown`.
  async #answer(messages, shown) {
    const started = performance.now();
    let text = "", tokens = 0, first = null, ended = "";
    try {
      const [path, body] = this.#request(messages);
      for await (const data of events(await request(path, { body, signal: this.answering.signal }))) {
        if (data === null || data === "[DONE]") continue;
        const piece = JSON.parse(data);
        if (piece.error) throw new ServerError(0, piece.error.message);
        tokens = piece.usage?.completion_tokens ?? tokens;
        const choice = piece.choices?.[0];
        const more = choice?.delta?.content ?? choice?.text ?? "";
        ended = choice?.finish_reason ?? ended;
        if (more) {
          first ??= performance.now();
          text += more;
          this.#write(shown.text, more);
        }
      }
    } catch (error) {
      this.#failed(error, shown);
      if (error.name === "AbortError") ended = "stopped";
    }
    const taken = (performance.now() - (first ?? started)) / 1000;
    const notes = [];
    if (tokens) notes.push(plural(tokens, "token"));
    if (tokens > 1 && taken > 0) notes.push(`${digits((tokens - 1) / taken)} tokens/s`);
    if (first) notes.push(`first after ${seconds((first - started) / 1000)}`);
    if (ended === "length") notes.push("ended by the limit");
    if (ended === "stopped") notes.push("stopped");
    shown.note.textContent = notes.join(" · ");
    return text;
  }

  #request(messages) {
    const body = { model: this.model, stream: true, stream_options: { include_usage: true } };
    for (const [name, parse] of Object.entries(FIELDS)) {
      const { value } = this.root.querySelector(`#${name}`);
      if (value !== "") body[name] = parse(value);
    }
    if (!this.chats) return ["v1/completions", { max_tokens: CONTINUED_TOKENS, ...body, prompt: messages.at(-1).content }];
    const system = this.root.querySelector("#system").value;
    const start = system ? [{ role: "system", content: system }] : [];
    return ["v1/chat/completions", { ...body, messages: [...start, ...messages] }];
  }

  #failed(error, shown) {
    if (error.name === "AbortError") return;
    const told = document.createElement("p");
    told.className = "error";
    told.setAttribute("role", "alert");
    told.textContent = error instanceof ServerError ? error.message : `The connection was lost: ${error.message}.`;
    shown.text.after(told);
    if (error.status === 401) this.onRefused(error.message);
  }

  #busy(stopper, shown) {
    this.answering = stopper;
    const stopped = document.activeElement === this.stop;
    this.stop.hidden = !stopper;
    this.send.disabled = Boolean(stopper);
    // A screen reader reads the answer when it is whole, not word by word.
    this.log.setAttribute("aria-busy", String(Boolean(stopper)));
    shown.article.classList.toggle("answering", Boolean(stopper));
    if (stopped) this.prompt.focus();
  }

  #add(role, who) {
    const article = document.createElement("article"), heading = document.createElement("h3");
    const text = document.createElement("div"), note = document.createElement("p");
    article.className = `message ${role}`;
    heading.textContent = who;
    text.className = "text";
    note.className = "note";
    article.append(heading, text, note);
    this.log.append(article);
    this.log.scrollTop = this.log.scrollHeight;
    return { article, text, note };
  }

  #write(element, text) {
    const { log } = this;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    element.append(text);
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
}
