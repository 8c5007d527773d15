"use strict";
// Sends the form, asks for the progress, and shows a page for each setting. Text is inserted only with textContent.

const find = (id) => document.getElementById(id);
const { defaults, experts, model, limit } = JSON.parse(find("payload").textContent);
find("model").textContent = model;
find("limit").textContent = limit.toLocaleString("en");
find("text").value = defaults.text;
find("question").value = defaults.question;
find("experts").append(...experts.map((name) => Object.assign(document.createElement("option"), { value: name })));

function addSetting(title) {
  const field = find("setting").content.cloneNode(true).firstElementChild;
  field.querySelector("legend").textContent = title;
  const output = field.querySelector("output"), ratio = field.querySelector("[name=ratio]");
  for (const name of ["ratio", "max_kl", "budget", "precision", "experts", "router"]) field.querySelector(`[name=${name}]`).value = defaults[name] ?? "";
  const say = () => { output.textContent = `${Math.round(100 * ratio.value)} %`; };
  ratio.addEventListener("input", say);
  say();
  find("settings").append(field);
  return field;
}

const first = addSetting("settings"), second = addSetting("second settings");
second.querySelector("[name=budget]").value = "uniform";
const compare = () => {
  second.hidden = second.disabled = !find("compare").checked;
};
find("compare").addEventListener("change", compare);
compare();

const values = (field) => Object.fromEntries([...field.querySelectorAll("[name]")].map((input) => [input.name, input.value]));

function title({ ratio, max_kl, budget, precision, experts, router }) {
  const shared = { "": "default budget", uniform: "uniform budget", layer: "budget shared by the heads of a layer", global: "budget shared by all heads" };
  const size = max_kl.trim() ? `KL divergence at most ${max_kl.trim()}` : `${Math.round(100 * ratio)} % of the ${precision ? "bytes" : "pairs"} removed`;
  return [size, precision, shared[budget], experts, router].filter(Boolean).join(", ");
}

// The answer of the app. A failure becomes an Error with a readable message.
async function ask(address, request) {
  let response;
  try {
    response = await fetch(address, request);
  } catch {
    throw new Error("The app does not answer. Is it still running?");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function follow(job) {
  for (;;) {
    const { state, description, done, total, error, pages } = await ask(`/jobs/${job}`);
    find("doing").textContent = `${description}: ${done} of ${total}`;
    find("progress").max = total;
    find("progress").value = done;
    if (state === "failed") throw new Error(error);
    if (state === "done") return pages;
    await new Promise((later) => setTimeout(later, 250));
  }
}

function show(job, pages, settings) {
  find("pages").replaceChildren(...Array.from({ length: pages }, (_, number) => {
    const address = `/jobs/${job}/pages/${number}`, name = title(settings[number]);
    const frame = Object.assign(document.createElement("iframe"), { src: address, title: name });
    frame.setAttribute("sandbox", "allow-scripts");
    const save = Object.assign(document.createElement("a"), { href: address, download: `explorer-${number + 1}.html`, textContent: "save this page" });
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.append(name, save);
    figure.append(caption, frame);
    return figure;
  }));
}

find("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const settings = (find("compare").checked ? [first, second] : [first]).map(values);
  const body = JSON.stringify({ text: find("text").value, question: find("question").value, settings });
  find("go").disabled = true;
  find("error").hidden = true;
  find("work").hidden = false;
  find("doing").textContent = "sending";
  try {
    const { job } = await ask("/jobs", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    show(job, await follow(job), settings);
  } catch (error) {
    find("error").textContent = error.message;
    find("error").hidden = false;
  } finally {
    find("go").disabled = false;
    find("work").hidden = true;
  }
});
