// What an answer did so far: counted from its tokens while it grows, the server's own figures at its end.

import { find } from "./page.js";

export class Meter {
  constructor() {
    this.began = performance.now();
    this.first = null; // ms until the first token
    this.atFirst = 0; // tokens that came with it
    this.tokens = 0;
    this.drafted = 0;
    this.show();
  }

  take(tokens) {
    const now = performance.now() - this.began;
    this.tokens += tokens.length;
    this.drafted += tokens.filter((token) => token.drafted).length;
    if (this.first === null && tokens.length) {
      this.first = now;
      this.atFirst = this.tokens;
    }
    this.last = now;
  }

  /** Tokens a verify pass: the prompt gave the first one, and every pass ends with one that was not drafted. */
  get acceptance() {
    const passes = this.tokens - this.drafted - 1;
    return passes > 0 ? (this.tokens - 1) / passes : null;
  }

  get rate() {
    const seconds = (this.last - this.first) / 1000;
    return seconds > 0.05 ? (this.tokens - this.atFirst) / seconds : null;
  }

  show() {
    write(this.rate, this.acceptance, this.tokens, this.drafted, this.first);
  }

  /** ``timings`` and ``usage`` of the stream's last chunk. */
  finish(timings, usage) {
    const share = timings.draft_n_accepted;
    write(timings.tokens_per_s, timings.acceptance_length, usage.completion_tokens, share, timings.time_to_first_token_ms);
  }
}

function write(rate, acceptance, tokens, drafted, first) {
  find("rate").textContent = rate ? rate.toFixed(1) : "–";
  find("acceptance").textContent = acceptance ? acceptance.toFixed(2) : "–";
  find("count").textContent = tokens || "–";
  find("share").textContent = tokens ? `${Math.round((100 * drafted) / tokens)} %` : "–";
  find("first").textContent = first === null ? "–" : `${(first / 1000).toFixed(2)} s`;
}
