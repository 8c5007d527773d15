// The key that the server may ask for. It is kept in this tab only, and forgotten with it.

import { find } from "./elements.js";

const PLACE = "kvpress-moe key";

let key = stored() ?? "";

function stored() {
  try {
    return sessionStorage.getItem(PLACE);
  } catch { // storage is switched off: the key lasts until the page is left
    return "";
  }
}

function keep(value) {
  key = value;
  try {
    sessionStorage.setItem(PLACE, value);
  } catch { /* see above */ }
}

export const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

function complain(text) {
  find("key-error").textContent = text;
  find("key-error").hidden = !text;
}

// Show the field. The server has refused a request, with the key that is known or for want of one.
export function demandKey() {
  find("key").hidden = false;
  complain(key ? "The server does not take this key." : "");
  if (document.activeElement === document.body) find("key-field").focus();
}

export function keyIsTaken() {
  find("key").hidden = true;
  find("key-field").value = "";
}

export function startKey(onKey) {
  find("key").addEventListener("submit", (event) => {
    event.preventDefault();
    const value = find("key-field").value.trim();
    if (!/^[\x21-\x7e]+$/.test(value)) { // a header takes no others
      complain("A key has only English letters, digits and signs, and no blanks.");
      return;
    }
    complain("");
    keep(value);
    onKey();
  });
}
