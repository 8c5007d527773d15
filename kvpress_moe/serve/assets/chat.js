// The chat: the conversation of the chosen document, and the field for the next question.

import { find } from "./elements.js";
import { Conversation } from "./conversation.js";
import { titleOf } from "./shelf.js";

const NEAR = 90; // pixels from the end within which the page follows an answer

const question = () => find("question");

function scroller() {
  return getComputedStyle(find("chat")).overflowY === "auto" ? find("chat") : document.scrollingElement;
}

export class Chat {
  // model() is the name of the model, null as long as it is not known.
  constructor(model) {
    Object.assign(this, { model, conversations: new Map(), hasDocuments: true });
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask(question().value);
    });
    question().addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.ask(question().value);
    });
    find("stop").addEventListener("click", () => {
      this.current.stop();
      question().focus();
    });
    find("anew").addEventListener("click", () => {
      this.forget(this.current.document?.id ?? null);
      this.show(this.current.document);
      question().focus();
    });
    for (const idea of find("ideas").children) idea.addEventListener("click", () => this.ask(idea.textContent));
  }

  get isUsed() {
    return question().value.trim() !== "" || Boolean(this.current?.isBusy);
  }

  show(document) {
    const id = document?.id ?? null;
    if (!this.conversations.has(id)) this.conversations.set(id, new Conversation(document, (changed) => this.draw(changed)));
    this.current = this.conversations.get(id);
    find("title").textContent = document ? titleOf(document) : "No document";
    find("turns").replaceChildren(this.current.element);
    question().placeholder = document ? "Ask about this document" : "Write to the model";
    this.draw(this.current);
    find("chat").scrollTop = find("chat").scrollHeight;
  }

  forget(id) {
    this.conversations.get(id)?.stop();
    this.conversations.delete(id);
  }

  ask(text) {
    if (!text.trim() || this.current.isBusy || this.model() === null) return;
    if (text === question().value) question().value = "";
    if (matchMedia("(pointer: fine)").matches) question().focus(); // on a phone it would bring the keyboard back
    this.current.ask(text.trim(), this.model());
    scroller().scrollTop = scroller().scrollHeight;
  }

  draw(changed) {
    if (changed !== this.current) return;
    const { isBusy, isEmpty, document } = this.current, place = scroller();
    const isNear = place.scrollHeight - place.scrollTop - place.clientHeight < NEAR;
    const isNew = isEmpty && !document && !this.hasDocuments;
    find("newcomer").hidden = !isNew;
    find("head").hidden = isNew;
    find("begin").hidden = !isEmpty || isNew;
    find("ideas").hidden = !document;
    find("begin-words").textContent = document ? "The document has been read. Ask about it as often as you like." : "Without a document the model answers from what it learned in training.";
    find("anew").hidden = isEmpty;
    find("ask").hidden = isBusy;
    find("stop").hidden = !isBusy;
    if (isNear && !isEmpty) place.scrollTop = place.scrollHeight;
  }
}
