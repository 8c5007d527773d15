// Puts the parts of the page together.

import { Chat } from "./chat.js";
import { find } from "./elements.js";
import { showKept } from "./kept.js";
import { keyIsTaken, startKey } from "./key.js";
import { startReading } from "./reading.js";
import { ask } from "./server.js";
import { Shelf } from "./shelf.js";

let model = null;

const chat = new Chat(() => model);

const shelf = new Shelf((document) => {
  chat.hasDocuments = shelf.documents.length > 0;
  chat.show(document);
  showKept(document);
}, (id) => chat.forget(id));

function complain(text) {
  find("shelf-error").hidden = !text;
  find("shelf-error").querySelector("p").textContent = text;
}

async function load() {
  complain("");
  try {
    const models = await ask("v1/models"), documents = await ask("v1/documents");
    model = models.data[0].id;
    find("model-name").textContent = model;
    find("model").hidden = find("main").hidden = find("shell").hidden = false;
    keyIsTaken();
    shelf.fill(documents.data);
  } catch (error) {
    if (error.status === 401) find("shell").hidden = model === null; // nothing can be done before there is a key
    else complain(error.message);
  }
}

find("kept").open = matchMedia("(min-width: 76rem)").matches; // where it has a column of its own
find("shelf-error").querySelector("button").addEventListener("click", load);
startKey(load);
startReading(async (document) => {
  if (model === null) await load(); // the server was not there before
  shelf.add(document);
  if (!chat.isUsed) shelf.choose(document);
});
load();
