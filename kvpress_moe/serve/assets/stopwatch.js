// How long an answer took, and how much of its prompt came from a cache. What is not known is left out.

import { isKnown, seconds } from "./figures.js";

export class Stopwatch {
  constructor() {
    this.asked = performance.now();
  }

  piece() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  // A list of texts. usage is null if the answer was stopped.
  words(usage, document) {
    const list = [];
    if (this.first) list.push(`first token after ${seconds((this.first - this.asked) / 1000)}`);
    if (usage) {
      const speed = (usage.completion_tokens - 1) / (this.last - this.first) * 1000; // the first token is counted above
      if (Number.isFinite(speed) && speed > 0) list.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens per second`);
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      list.push(`${cached.toLocaleString("en")} of ${usage.prompt_tokens.toLocaleString("en")} prompt tokens from the cache`);
    }
    if (usage && isKnown(document?.read_seconds)) list.push(`reading the document anew takes about ${seconds(document.read_seconds)}`);
    return list;
  }
}
