// Comforts on top of a page that works without: the form is sent and answered as a whole either way.
"use strict";

const form = document.getElementById("ask");
const said = document.getElementById("status");

// ---- completions: add and remove without asking the server ----------------------------------------------------------

const list = document.getElementById("completions");
const adder = form.querySelector("button[value=add]");

function number() {
  const most = Number(list.dataset.most);
  list.querySelectorAll(".completion").forEach((field, place) => {
    const name = `completion-${place}`;
    field.querySelector("label").htmlFor = name;
    field.querySelector("label").textContent = `Completion ${place + 1}`;
    field.querySelector("textarea").id = name;
    const remover = field.querySelector("button");
    remover.value = `remove-${place}`;
    remover.setAttribute("aria-label", `Remove completion ${place + 1}`);
  });
  if (adder) adder.disabled = list.children.length >= most;
}

form.addEventListener("click", (event) => {
  const button = event.target.closest("button[name=action]");
  if (!button) return;
  event.preventDefault();
  if (button === adder) {
    list.append(document.getElementById("completion-template").content.cloneNode(true));
    number();
    list.lastElementChild.querySelector("textarea").focus();
    said.textContent = `Completion ${list.children.length} added`;
    return;
  }
  const field = button.closest(".completion");
  const next = field.nextElementSibling || field.previousElementSibling;
  if (!next) {
    field.querySelector("textarea").value = "";
    field.querySelector("textarea").focus();
    return;
  }
  field.remove();
  number();
  next.querySelector("textarea").focus();
  said.textContent = `Removed; ${list.children.length} left`;
});

// ---- sending ----------------------------------------------------------------------------------------------------------

form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit(document.getElementById("score"));
  }
});

form.addEventListener("submit", () => {
  document.getElementById("score").setAttribute("aria-busy", "true");
  said.textContent = "Scoring";
});

// A page that the browser took out of its history is not waiting for anything.
window.addEventListener("pageshow", () => document.getElementById("score").removeAttribute("aria-busy"));

// ---- the rest ---------------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copies);
    getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(text.textContent);
      said.textContent = "Copied";
      button.textContent = "Copied";
    } catch {
      said.textContent = "Selected; copy it with your keyboard"; // no clipboard on an insecure origin
    }
  });
}

for (const link of document.querySelectorAll(".problems a")) {
  link.addEventListener("click", (event) => {
    const field = document.querySelector(link.getAttribute("href"));
    if (!field) return;
    event.preventDefault();
    field.closest("details")?.setAttribute("open", "");
    field.focus();
  });
}
document.querySelector("a[href='#specs']").addEventListener("click", () => {
  document.getElementById("specs").open = true;
});

// What was there when the page came is not read out; what changes is.
const results = document.getElementById("results");
document.getElementById("outcome")?.focus();
if (results) said.textContent = results.dataset.said;
