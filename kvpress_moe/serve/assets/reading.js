// A new document: drop a file, choose one or paste text. Each gets a card with its progress; one is read at a time.

import { button, find, make, say } from "./elements.js";
import { events } from "./events.js";
import { seconds } from "./figures.js";
import { Refusal, send } from "./server.js";

export const MOST_MIB = 16; // the server takes no longer request

let queue = Promise.resolve();

// The text of a file. Without a mark of its encoding it has to be UTF-8.
async function textOf(file) {
  if (file.size > MOST_MIB * 2 ** 20) throw new Refusal(`The file is too large. The server takes at most ${MOST_MIB} MiB.`);
  const bytes = new Uint8Array(await file.arrayBuffer().catch(() => {
    throw new Refusal("The file cannot be read. Is it a folder?");
  }));
  const encoding = bytes[0] === 0xff && bytes[1] === 0xfe ? "utf-16le" : bytes[0] === 0xfe && bytes[1] === 0xff ? "utf-16be" : "utf-8";
  try {
    const text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
    if (!text.includes("\0")) return text.replace(/\r\n?/g, "\n");
  } catch { /* it is no text */ }
  throw new Refusal("This is no plain text. Save it as a text file in UTF-8, then drop it again.");
}

class Card {
  constructor(title, text, onRead) {
    Object.assign(this, { title, text, onRead });
    this.state = make("span", { className: "state" }, "waiting");
    this.progress = make("progress");
    this.progress.setAttribute("aria-label", `Progress of ${title}`);
    this.error = make("p", { className: "error", hidden: true });
    this.error.setAttribute("role", "alert");
    this.buttons = make("p", { className: "row" });
    this.element = make("li", { className: "card" }, make("p", {}, make("b", { dir: "auto" }, title), this.state), this.progress, this.error, this.buttons);
    find("cards").append(this.element);
    this.begin();
  }

  begin() {
    this.stopper = new AbortController();
    this.element.classList.remove("wrong");
    this.progress.removeAttribute("value");
    this.error.hidden = true;
    this.show("waiting");
    this.buttons.replaceChildren(button("cancel", () => { this.stopper.abort(); this.leave(); }));
    queue = queue.then(() => this.read());
  }

  async read() {
    if (this.stopper.signal.aborted) return;
    try {
      const text = await this.text();
      if (!text.trim()) throw new Refusal("There is no text in it.");
      say(`Reading ${this.title}.`);
      this.show("waiting for the server");
      const document = await this.post(text);
      this.leave();
      say(`${this.title} has been read. You can ask about it.`);
      this.onRead(document);
    } catch (error) {
      if (!this.stopper.signal.aborted) this.fail(error);
    }
  }

  async post(text) {
    const response = await send("v1/documents", {
      method: "POST",
      data: { text, title: this.title, stream: true },
      signal: this.stopper.signal,
      onWait: (words) => this.show(words || "waiting for the server"),
    });
    let found = null;
    for await (const event of events(response)) {
      if (event.object === "document.progress") this.advance(event.done, event.total);
      else found = event;
    }
    if (!found) throw new Refusal("The server did not say what became of the text. Try again.");
    return found;
  }

  advance(done, total) {
    const now = performance.now();
    if (!(this.progress.value > 0) || done < this.last) Object.assign(this, { first: done, since: now });
    const left = (now - this.since) / 1000 / (done - this.first) * (total - done); // NaN at first
    const more = done === total ? "storing" : done - this.first >= 2 ? `about ${seconds(left)} left` : "";
    this.show(`layer ${done} of ${total}${more && `, ${more}`}`);
    if (Math.floor(4 * done / total) > Math.floor(4 * (done - 1) / total) && done < total) say(`${this.title}: layer ${done} of ${total}`);
    Object.assign(this.progress, { max: total, value: done });
    this.last = done;
  }

  show(words) {
    this.state.textContent = words;
  }

  fail(error) {
    this.element.classList.add("wrong");
    this.show("");
    this.error.textContent = error instanceof Refusal ? error.message : `The page failed: ${error.message}`;
    this.error.hidden = false;
    this.buttons.replaceChildren(button("try again", () => this.begin()), button("dismiss", () => this.leave()));
  }

  leave() {
    const hadFocus = this.element.contains(document.activeElement);
    this.element.remove();
    if (hadFocus) find("choose").focus();
  }
}

const firstLine = (text) => text.trim().split("\n", 1)[0].slice(0, 60);

function openPaste(isOpen) {
  find("paste").hidden = !isOpen;
  find("paste-open").setAttribute("aria-expanded", String(isOpen));
  find(isOpen ? "paste-text" : "paste-open").focus();
}

// onRead gets each new document.
export function startReading(onRead) {
  const add = (files) => [...files].forEach((file) => new Card(file.name, () => textOf(file), onRead));
  find("choose").addEventListener("click", () => find("file").click());
  find("file").addEventListener("change", () => {
    add(find("file").files);
    find("file").value = ""; // so that the same file can be chosen again
  });
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault(); // else the browser shows the file in place of the page
      const isLeaving = name === "drop" || (name === "dragleave" && !event.relatedTarget);
      document.body.classList.toggle("dropping", !isLeaving);
      if (name === "drop") add(event.dataTransfer.files);
    });
  }
  find("paste-open").addEventListener("click", () => openPaste(find("paste").hidden));
  find("paste-close").addEventListener("click", () => openPaste(false));
  find("paste").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = find("paste-text").value;
    new Card(find("paste-title").value.trim() || firstLine(text) || "pasted text", async () => text, onRead);
    find("paste").reset();
    openPaste(false);
  });
}
