// The list of documents: choose one, or delete one after a second question.

import { button, find, make, say } from "./elements.js";
import { count, sizes } from "./figures.js";
import { Refusal, ask } from "./server.js";

export const titleOf = (document) => document.title.trim() || "without a title";

const inShort = ({ tokens, bytes, full_bytes }) => `${count(tokens, "token")}, ${sizes(bytes, full_bytes)}`;

export class Shelf {
  // onChoose gets a document or null, onDelete the id of one that is gone.
  constructor(onChoose, onDelete) {
    Object.assign(this, { onChoose, onDelete, documents: [], chosen: null, rows: new Map() });
    find("none").addEventListener("click", () => this.pick(null));
  }

  pick(document) {
    this.choose(document);
    if (matchMedia("(max-width: 57.99rem)").matches) find("main").scrollIntoView(); // there it is below the list
  }

  // All documents, the oldest first, as the server lists them.
  fill(documents) {
    this.documents = [...documents].reverse();
    this.rows = new Map(this.documents.map((document) => [document.id, this.row(document)]));
    find("list").replaceChildren(...this.rows.values());
    this.choose(this.documents.find(({ id }) => id === this.chosen) ?? this.documents[0] ?? null);
  }

  // A document that was read now, or that the server had already.
  add(document) {
    if (this.rows.has(document.id)) return;
    this.documents.unshift(document);
    this.rows.set(document.id, this.row(document));
    find("list").prepend(this.rows.get(document.id));
  }

  choose(document) {
    this.chosen = document?.id ?? null;
    const mark = (pick, isChosen) => (isChosen ? pick.setAttribute("aria-current", "true") : pick.removeAttribute("aria-current"));
    for (const [id, row] of this.rows) mark(row.querySelector(".pick"), id === this.chosen);
    mark(find("none"), this.chosen === null);
    this.onChoose(document);
  }

  row(document) {
    const pick = button("", () => this.pick(document), "pick");
    pick.append(make("b", { dir: "auto" }, titleOf(document)), make("small", {}, inShort(document)));
    const remove = button("", () => this.confirm(document), "remove");
    remove.setAttribute("aria-label", `delete ${titleOf(document)}`);
    remove.title = "delete";
    return make("li", {}, pick, remove);
  }

  confirm(document) {
    const row = this.rows.get(document.id);
    const error = make("p", { className: "error", hidden: true });
    error.setAttribute("role", "alert");
    const close = () => {
      question.remove();
      row.classList.remove("confirming");
      row.querySelector(".remove").focus();
    };
    let isAsked = false; // a disabled button would lose the focus
    const keep = button("keep it", close), remove = button("delete", async () => {
      if (isAsked) return;
      isAsked = true;
      try {
        await this.remove(document);
      } catch (refusal) {
        isAsked = false;
        error.textContent = refusal.message;
        error.hidden = false;
      }
    }, "danger");
    const words = make("p", {}, "Delete this document? All who use this server lose it.");
    const question = make("div", { className: "confirm" }, words, make("p", { className: "row" }, remove, keep), error);
    question.setAttribute("role", "group");
    question.setAttribute("aria-label", `Delete ${titleOf(document)}?`);
    question.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
    });
    row.classList.add("confirming");
    row.append(question);
    keep.focus();
  }

  async remove(document) {
    try {
      await ask(`v1/documents/${encodeURIComponent(document.id)}`, { method: "DELETE" });
    } catch (error) {
      if (!(error instanceof Refusal) || error.status !== 404) throw error; // 404: somebody else has deleted it
    }
    this.forget(document.id);
    say(`${titleOf(document)} is deleted.`);
  }

  // Take a document that is gone out of the list.
  forget(id) {
    const row = this.rows.get(id), hadFocus = row.contains(globalThis.document.activeElement);
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    this.rows.delete(id);
    this.documents = this.documents.filter((other) => other.id !== id);
    if (hadFocus) (next?.querySelector(".pick") ?? find("choose")).focus();
    this.onDelete(id);
    this.choose(this.chosen === id ? this.documents[0] ?? null : this.documents.find((other) => other.id === this.chosen) ?? null);
  }
}
