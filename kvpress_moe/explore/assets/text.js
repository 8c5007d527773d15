// The text, token by token. Class eN: the expert. Class kN: how many of the chosen heads keep it, from 0 (none) to 8 (all).

const LEVELS = 8, CHUNK = 250;

class Text {
  constructor(element, tokens, onPick) {
    this.element = element;
    this.current = null;
    this.classes = Array(tokens.length).fill("");
    this.spans = tokens.map((text, index) => {
      const span = document.createElement("span");
      span.textContent = text === "" ? "▫" : text.replace(/\n/g, "↵\n");
      span.index = index;
      return span;
    });
    this.fill(tokens);
    const pick = (event) => event.target.index !== undefined && this.pick(event.target.index, onPick);
    element.addEventListener("pointerover", (event) => event.pointerType === "mouse" && pick(event));
    element.addEventListener("click", pick);
    element.addEventListener("keydown", (event) => {
      const to = this.target(event.key);
      if (to === null) return;
      event.preventDefault();
      this.pick(Math.min(Math.max(to, 0), tokens.length - 1), onPick);
      this.spans[this.current].scrollIntoView({ block: "nearest" });
    });
  }

  // Chunks end at line breaks or sentences if possible. The browser does not draw chunks that are out of sight.
  fill(tokens) {
    const chunks = document.createDocumentFragment();
    let chunk = null, size = 0;
    this.spans.forEach((span, index) => {
      if (!chunk) {
        chunk = chunks.appendChild(document.createElement("div"));
        chunk.className = "chunk";
        size = 0;
      }
      chunk.append(span);
      size++;
      const text = tokens[index];
      if (text.includes("\n") ? size > CHUNK : size > (/[.!?]$/.test(text) ? 2 * CHUNK : 3 * CHUNK)) chunk = null;
    });
    this.element.append(chunks);
  }

  paint(keepers, ofHowMany, judges) {
    for (let s = 0; s < this.spans.length; s++) {
      const share = keepers[s] / ofHowMany;
      const level = share === 0 ? 0 : share === 1 ? LEVELS : Math.min(Math.max(Math.round(share * LEVELS), 1), LEVELS - 1);
      const wanted = `k${level} e${judges[s] % 8}`;
      if (this.classes[s] !== wanted) this.spans[s].className = this.classes[s] = wanted;
    }
    if (this.current !== null) this.spans[this.current].classList.add("current");
  }

  pick(index, onPick) {
    if (this.current !== null) this.spans[this.current].classList.remove("current");
    this.current = index;
    this.spans[index].classList.add("current");
    onPick(index);
  }

  // The token that a key leads to from the current one; null for other keys.
  target(key) {
    const here = this.current ?? -1;
    if (key === "ArrowRight") return here + 1;
    if (key === "ArrowLeft") return here - 1;
    if (key === "Home") return 0;
    if (key === "End") return this.spans.length - 1;
    if (key === "ArrowDown" || key === "ArrowUp") return this.inLine(Math.max(here, 0), key === "ArrowDown" ? 1 : -1);
    return null;
  }

  // The token below (step 1) or above (step -1).
  inLine(index, step) {
    const from = this.spans[index].getBoundingClientRect();
    for (let i = index + step, line = null; i >= 0 && i < this.spans.length; i += step) {
      const box = this.spans[i].getBoundingClientRect();
      if (Math.abs(box.bottom - from.bottom) < from.height / 2) continue;
      if (line === null) line = box.bottom;
      if (Math.abs(box.bottom - line) > from.height / 2) return i - step; // the whole line was left or right of it
      if (step > 0 ? box.right >= from.left : box.left <= from.left) return i;
    }
    return index;
  }

  show(index) {
    this.spans[index].scrollIntoView({ block: "center" });
  }
}
