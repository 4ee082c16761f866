// Comforts on top of a page that works without: the form is sent and answered as a whole either way.
"use strict";

const form = document.getElementById("ask");
const said = document.getElementById("status");
const tip = document.getElementById("tip");
document.documentElement.classList.add("script");

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

// ---- tokens: values on hover and focus, arrow keys --------------------------------------------------------------------

function show(token) {
  if (token.title) {
    token.dataset.tip = token.title; // or the browser's own tip would cover ours
    token.removeAttribute("title");
  }
  tip.textContent = token.dataset.tip;
  tip.hidden = false;
  const place = token.getClientRects()[0];
  const left = Math.min(place.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = place.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 4 ? above : place.bottom + 6}px`;
}

function hide() {
  tip.hidden = true;
}

for (const text of document.querySelectorAll(".tokens")) {
  text.removeAttribute("tabindex");
  const first = text.querySelector(".token");
  if (first) first.tabIndex = 0;
  text.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token");
    if (token) show(token);
  });
  text.addEventListener("pointerleave", hide);
  text.addEventListener("focusin", (event) => {
    show(event.target);
    said.textContent = tip.textContent;
  });
  text.addEventListener("focusout", hide);
  text.addEventListener("keydown", (event) => {
    const here = event.target.closest(".token");
    const to = {
      ArrowRight: () => here.nextElementSibling,
      ArrowLeft: () => here.previousElementSibling,
      Home: () => text.firstElementChild,
      End: () => text.lastElementChild,
    }[event.key];
    if (event.key === "Escape") hide();
    if (!to) return;
    event.preventDefault();
    const next = to();
    if (!next) return;
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
document.addEventListener("scroll", hide, { passive: true, capture: true });

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
