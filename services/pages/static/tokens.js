// Shaded tokens: values on hover and focus, arrow keys from one to the next. A page has #tip for them, and #status, which
// is read out.
"use strict";
document.documentElement.classList.add("script");

(() => {
  const said = document.getElementById("status");
  const tip = document.getElementById("tip");

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
  // The focus itself may have scrolled the page: what has it keeps its tip.
  function follow() {
    const here = document.activeElement;
    if (!tip.hidden && here && here.matches(".token")) show(here);
    else hide();
  }

  document.addEventListener("scroll", follow, { passive: true, capture: true });
})();
