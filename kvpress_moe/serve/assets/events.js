// Server-sent events of a response. EventSource cannot send a body, so the page reads them itself.

import { lost, plain } from "./server.js";

// Yields the data of each event until the server says that it is done. An error among them is thrown.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", isDone = false;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : lost();
    });
    if (done && !isDone) throw lost();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") isDone = true;
      else {
        const event = JSON.parse(data);
        if (event.error) throw plain(event.error);
        yield event;
      }
    }
  }
}
