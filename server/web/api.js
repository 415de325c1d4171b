// Requests to the server this page came from. The key lives in this module and nowhere else.

let key = "";

export function useKey(value) {
  key = value.trim();
}

/** An answer that is an error; the message is for people. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new ApiError(answer.status, body?.error?.message ?? `The server answered ${answer.status}.`);
}

export async function getJson(path) {
  return (await request(path)).json();
}

/** /health, whatever its status. */
export async function getHealth() {
  const answer = await fetch("/health", { cache: "no-store", credentials: "omit" });
  return answer.json();
}

export async function postForm(path, form, signal) {
  return (await request(path, { method: "POST", body: form, signal })).json();
}

/** Post JSON and give the payload of every server-sent event up to [DONE]. */
export async function* postStream(path, body, signal) {
  const answer = await request(path, {
    method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" },
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, "The connection ended before the answer did.");
    const events = (waiting + value).split(/\r?\n\r?\n/);
    waiting = events.pop();
    for (const data of events.flatMap((event) => event.split(/\r?\n/)).filter((line) => line.startsWith("data: "))) {
      if (data === "data: [DONE]") return;
      const payload = JSON.parse(data.slice("data: ".length));
      if (payload.error) throw new ApiError(0, payload.error.message);
      yield payload;
    }
  }
}
