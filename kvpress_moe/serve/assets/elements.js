// Elements of the page. Children are texts or elements; a text is never read as HTML.

export const find = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const button = (text, onClick, className = "") => {
  const made = make("button", { type: "button", className }, text);
  made.addEventListener("click", onClick);
  return made;
};

// A bar that fills a share of its width. The number stands beside it.
export function bar(share, className = "") {
  const filled = make("b", { className });
  filled.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  const made = make("span", { className: "bar" }, filled);
  made.setAttribute("aria-hidden", "true");
  return made;
}

// Screen readers say it. The rest of the page changes too often to be read aloud.
export function say(text) {
  find("spoken").textContent = text;
}
