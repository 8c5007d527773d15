// A conversation about one document, or about none. Answers come piece by piece, and can be stopped.

import { button, make, say } from "./elements.js";
import { events } from "./events.js";
import { Refusal, send } from "./server.js";
import { Stopwatch } from "./stopwatch.js";

const MOST_TOKENS = 256;

class Turn {
  constructor(question) {
    this.text = "";
    this.answer = make("p", { className: "text", dir: "auto" });
    this.state = make("p", { className: "note state" }, "reading the question");
    this.rest = make("div");
    this.element = make("li", {},
      make("div", { className: "asked" }, make("span", { className: "unseen" }, "You: "), make("p", { dir: "auto" }, question)),
      make("div", { className: "answered" }, make("span", { className: "unseen" }, "Answer: "), this.answer, this.state, this.rest));
    this.element.setAttribute("aria-busy", "true");
  }

  write(piece) {
    this.text += piece;
    this.answer.append(piece);
    this.state.textContent = "";
  }

  // Words about the answer, which is complete now.
  end(words, note) {
    this.element.removeAttribute("aria-busy");
    this.state.textContent = note;
    if (words.length) this.rest.append(make("ul", { className: "took" }, ...words.map((word) => make("li", {}, word))));
    say(`${this.text || "The answer is empty."} ${note}`);
  }

  fail(message, again) {
    this.element.removeAttribute("aria-busy");
    this.state.textContent = "";
    const error = make("p", { className: "error" }, message);
    error.setAttribute("role", "alert");
    this.rest.append(error, make("p", { className: "row" }, again));
  }
}

export class Conversation {
  constructor(document, onChange) {
    Object.assign(this, { document, onChange, history: [], stopper: null });
    this.element = make("ol", { className: "turns" });
  }

  get isBusy() {
    return this.stopper !== null;
  }

  get isEmpty() {
    return this.element.childElementCount === 0;
  }

  stop() {
    this.stopper?.abort();
  }

  async ask(question, model) {
    const turn = new Turn(question), { signal } = this.stopper = new AbortController();
    this.element.append(turn.element);
    this.onChange(this);
    let watch = new Stopwatch(), usage = null, finish = null;
    const onWait = (words) => {
      turn.state.textContent = words || "reading the question";
      watch = new Stopwatch(); // the time in which the server did not take the question is no part of the answer
    };
    try {
      const response = await send("v1/chat/completions", { method: "POST", data: this.request(question, model), signal, onWait });
      for await (const event of events(response)) {
        const choice = event.choices?.[0], piece = choice?.delta?.content;
        usage = event.usage ?? usage;
        finish = choice?.finish_reason ?? finish;
        if (!piece) continue;
        watch.piece();
        turn.write(piece);
        this.onChange(this);
      }
      this.remember(question, turn.text);
      turn.end(watch.words(usage, this.document), finish === "length" ? `It ends here: the page asks for at most ${MOST_TOKENS} tokens.` : turn.text ? "" : "The model had nothing to say.");
    } catch (error) {
      if (signal.aborted) {
        this.remember(question, turn.text);
        turn.end(watch.words(null, this.document), "You stopped it.");
      } else {
        this.fail(turn, question, model, error);
      }
    } finally {
      this.stopper = null;
      this.onChange(this);
    }
  }

  request(question, model) {
    return {
      model,
      messages: [...this.history, { role: "user", content: question }],
      ...(this.document && { documents: [this.document.id] }),
      stream: true,
      stream_options: { include_usage: true },
      max_tokens: MOST_TOKENS,
      temperature: 0,
    };
  }

  // Later questions are sent with the earlier turns. Those without an answer are left out: roles must alternate.
  remember(question, answer) {
    if (answer) this.history.push({ role: "user", content: question }, { role: "assistant", content: answer });
  }

  fail(turn, question, model, error) {
    const again = button("ask again", () => {
      if (this.isBusy) return;
      turn.element.remove();
      this.ask(question, model);
    });
    turn.fail(error instanceof Refusal ? error.message : `The page failed: ${error.message}`, again);
  }
}
