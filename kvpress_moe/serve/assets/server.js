// Requests to the server: with the key, with errors in plain English, and with patience while it is busy.

import { authorization, demandKey } from "./key.js";

const MOST_TRIES = 4;
const LONGEST_WAIT = 30; // seconds

export class Refusal extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export const lost = () => new Refusal("The connection to the server was lost. Is it still running?");

// What the page says of the server's error. Where the server's own words name fields of a request, it finds others.
export function plain({ message, code }, status = 0) {
  const [, got, limit] = /got (\d+ \w+), expected ((?:at most|fewer than) \d+)/.exec(message) ?? [];
  const words = {
    invalid_api_key: "The server asks for a key. Enter it above, then try again.",
    context_length_exceeded: `This is too long for the model${got ? `: it has ${got}, and the model takes ${limit}` : ""}. ${message?.startsWith("messages") ? "Begin a new chat" : "Shorten the text"}.`,
    not_found: "The server does not have this document any more.",
    model_not_found: "The server has another model now. Load this page again.",
    queue_full: "The server is still busy. Try again in a minute.",
  };
  return new Refusal(words[code] ?? message ?? `The server answered with status ${status}.`, status, code);
}

// The response, if the server takes the request. onWait is told what to show while the server is busy.
export async function send(path, { method = "GET", data, signal, onWait = () => {} } = {}) {
  const body = data && JSON.stringify(data);
  for (let tries = 1; ; tries++) {
    const response = await reach(path, { method, body, signal, headers: { ...authorization(), ...(body && { "Content-Type": "application/json" }) } });
    if (response.ok) return response;
    if (response.status === 401) demandKey();
    if (response.status !== 429 || tries === MOST_TRIES) throw await refusalOf(response);
    const asked = Number(response.headers.get("Retry-After") ?? NaN); // NaN too if it is a date
    await wait(Math.min(LONGEST_WAIT, asked >= 0 ? asked : 2), signal, (left) => {
      onWait(left ? `The server is busy. Next try in ${left} s (${tries} of ${MOST_TRIES - 1}).` : "");
    });
  }
}

export const ask = async (path, options) => (await send(path, options)).json();

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : lost();
  }
}

async function refusalOf(response) {
  const answer = await response.json().catch(() => ({})); // something between here and the server may answer in HTML
  return plain(answer.error ?? {}, response.status);
}

async function wait(seconds, signal, tell) {
  for (let left = Math.ceil(seconds); left > 0; left--) {
    tell(left);
    await new Promise((later, stop) => {
      setTimeout(later, 1000);
      signal?.addEventListener("abort", () => stop(signal.reason), { once: true });
    });
  }
  tell(0);
}
