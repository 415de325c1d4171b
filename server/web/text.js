// Chat and completion: what is asked, and the answer as it comes with its accepted drafts tinted.

import { postStream } from "./api.js";
import { Meter } from "./figures.js";
import { complain, find, make } from "./page.js";

const turns = []; // of the conversation, as the API takes them
let running = null; // AbortController of the answer that is being written

function settings() {
  const number = (id) => (find(id).value === "" ? undefined : Number(find(id).value));
  return {
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    speculative: { enabled: find("draft").checked },
    stream: true,
    stream_options: { include_usage: true },
    return_drafted: true,
  };
}

/** Appends tokens to an element; neighbours of one kind share one node. */
class Writer {
  constructor(element) {
    this.element = element;
    this.open = null;
    this.text = "";
  }

  write(tokens) {
    for (const { text, drafted } of tokens) {
      if (!text) continue;
      const isMark = this.open?.parentNode?.nodeName === "MARK";
      if (this.open === null || isMark !== drafted) {
        this.open = document.createTextNode("");
        this.element.append(drafted ? make("mark", { class: "drafted" }, this.open) : this.open);
      }
      this.open.appendData(text);
      this.text += text;
    }
  }
}

/** Stream an answer into ``element``; how it ended, for people, and its text. */
async function answer(path, body, element, scrolled) {
  const writer = new Writer(element);
  const meter = new Meter();
  running = new AbortController();
  setBusy(true);
  let ended = "";
  try {
    for await (const chunk of postStream(path, { ...body, ...settings() }, running.signal)) {
      const choice = chunk.choices[0];
      if (choice) {
        const tokens = choice.tokens ?? [];
        writer.write(tokens);
        meter.take(tokens);
        meter.show();
        if (choice.finish_reason === "length") ended = "cut at the longest answer";
        if (scrolled) follow(scrolled);
      } else if (chunk.usage) {
        meter.finish(chunk.timings, chunk.usage);
      }
    }
  } catch (error) {
    ended = error.name === "AbortError" ? "stopped" : "";
    if (!ended) complain(error.message);
  } finally {
    running = null;
    setBusy(false);
  }
  return { text: writer.text, ended };
}

function setBusy(busy) {
  for (const button of document.querySelectorAll("button.stop")) button.disabled = !busy;
  for (const button of document.querySelectorAll("button.primary")) button.disabled = busy;
  find("conversation").setAttribute("aria-busy", busy);
  find("continued").setAttribute("aria-busy", busy);
}

/** Keep the newest text in sight, unless the reader has scrolled up. */
function follow(element) {
  if (element.scrollHeight - element.scrollTop - element.clientHeight < 120) element.scrollTop = element.scrollHeight;
}

function addTurn(role, text) {
  const said = make("div", { class: "said" }, text);
  const who = role === "user" ? "You" : "Model";
  const turn = make("article", { class: `turn ${role}` }, make("p", { class: "who" }, who), said);
  find("conversation").querySelector(".empty")?.remove();
  find("conversation").append(turn);
  find("conversation").scrollTop = find("conversation").scrollHeight;
  return { turn, said };
}

async function send(event) {
  event.preventDefault();
  const text = find("message").value.trim();
  if (running || !text) return;
  complain("");
  find("message").value = "";
  addTurn("user", text);
  turns.push({ role: "user", content: text });
  const { turn, said } = addTurn("assistant", "");
  const given = await answer("/v1/chat/completions", { messages: turns }, said, find("conversation"));
  if (given.ended) turn.append(make("p", { class: "note" }, given.ended));
  if (given.text) {
    turns.push({ role: "assistant", content: given.text });
  } else {
    turn.remove(); // nothing came: the question can be sent again
    turns.pop();
    find("message").value = text;
  }
}

async function goOn(event) {
  event.preventDefault();
  if (running) return;
  complain("");
  const prompt = find("prompt").value;
  find("continued").replaceChildren(make("span", { class: "prompted" }, prompt));
  await answer("/v1/completions", { prompt }, find("continued"), null);
}

export function stop() {
  running?.abort();
}

export function setUpText() {
  find("chat-form").addEventListener("submit", send);
  find("completion-form").addEventListener("submit", goOn);
  find("settings").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("button.stop")) button.addEventListener("click", stop);
  find("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  find("clear").addEventListener("click", () => {
    stop();
    turns.length = 0;
    find("conversation").replaceChildren();
    find("message").focus();
  });
}
