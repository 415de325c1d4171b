// The page: tabs, the key, and what the server says of itself. A hidden page asks nothing.

import { getHealth, getJson, useKey } from "./api.js";
import { drawCurve, drawPlacement, showNow } from "./machine.js";
import { complain, find } from "./page.js";
import { setUpText } from "./text.js";
import { offerModels, setUpVision } from "./vision.js";

const SLOW_MS = 15000;
const LOADING_MS = 2000;
const NO_KEY = "no key";
const tabs = [...document.querySelectorAll("[role=tab]")];
let timer = null;
let known = ""; // which models were described last, so that they are asked for again only where that changed

function choose(tab, focus) {
  for (const one of tabs) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", chosen);
    one.tabIndex = chosen ? 0 : -1;
    find(one.getAttribute("aria-controls")).hidden = !chosen;
  }
  find("text-panels").hidden = !["tab-chat", "tab-completion"].includes(tab.id);
  if (focus) tab.focus();
  if (tab.id === "tab-machine") {
    known = "";
    look();
  }
}

function moveTab(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -tabs.length, End: tabs.length };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const place = tabs.indexOf(document.activeElement) + steps[event.key];
  const wrapped = Math.abs(steps[event.key]) === 1 ? (place + tabs.length) % tabs.length : place;
  choose(tabs[Math.min(Math.max(wrapped, 0), tabs.length - 1)], true);
}

/** What is served, from /v1/models. */
async function describe() {
  try {
    const { data } = await getJson("/v1/models");
    const language = data.find((entry) => entry.kind === "language");
    find("model").textContent = language?.id ?? data[0]?.id ?? "";
    find("no-language").hidden = Boolean(language);
    find("machine").hidden = !language;
    offerModels(data);
    if (language?.placement?.target) drawPlacement(language.placement);
    drawCurve(language?.verify_ms ?? {});
    if (find("alert").dataset.kind === "key") tell("", "");
    known = JSON.stringify(data.map((entry) => [entry.id, entry.created, entry.kind]));
  } catch (error) {
    if (error.status === 401) {
      if (known !== NO_KEY) find("key").focus();
      known = NO_KEY;
      tell("This server wants an API key: enter it above.", "key");
    } else {
      tell(error.message, "models");
    }
  }
}

function tell(message, kind) {
  find("alert").dataset.kind = kind;
  complain(message);
}

/** How it is, from /health; then again after a while, as long as the page is seen. */
async function look() {
  clearTimeout(timer);
  let wait = SLOW_MS;
  try {
    const health = await getHealth();
    const ready = health.status === "ok";
    wait = ready ? SLOW_MS : LOADING_MS;
    say(ready ? stateOf(health) : health.error?.message ?? health.status, ready ? "ready" : "");
    if (ready) showNow(health);
    if (ready && !known) await describe();
    if (!ready) known = "";
  } catch {
    say("the server cannot be reached", "failed");
    known = "";
  }
  if (!document.hidden) timer = setTimeout(look, wait);
}

function stateOf(health) {
  const drafting = health.drafting?.state;
  return ["ready", drafting && `drafting ${drafting}`].filter(Boolean).join(", ");
}

/** Announced only where it has changed. */
function say(text, kind) {
  const state = find("state");
  if (state.textContent !== text) state.textContent = text;
  state.className = `state ${kind}`;
}

for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab, false));
  tab.addEventListener("keydown", moveTab);
}
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(find("key").value);
  describe();
});
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : look()));
setUpText();
setUpVision();
look();
