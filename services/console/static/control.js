// Buttons that change the run. The admin token goes into a header, which no other site's page can make a browser send; it
// is kept in this tab alone.
"use strict";
document.documentElement.classList.add("script");

const KEY = "rlif-admin-token";
const field = document.getElementById("admin-token");
const outcome = document.getElementById("outcome");
if (field) {
  field.value = sessionStorage.getItem(KEY) || "";
  field.form.addEventListener("submit", (event) => event.preventDefault());
  field.addEventListener("input", () => sessionStorage.setItem(KEY, field.value));
}

function say(text, isFault) {
  outcome.textContent = text;
  outcome.classList.toggle("fault", isFault);
}

async function words(answer) {
  try {
    const problem = await answer.json();
    return [problem.title, problem.detail].filter(Boolean).join(": ");
  } catch {
    return `the server answered ${answer.status}`;
  }
}

// The answer, or null after saying why there is none.
async function send(method, path, body, complain) {
  const headers = { Accept: "application/json, text/html" };
  const token = field ? field.value.trim() : "";
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    const answer = await fetch(path, { method, headers, body });
    if (answer.ok) return answer;
    complain(await words(answer));
  } catch {
    complain("the server does not answer");
  }
  return null;
}

for (const button of document.querySelectorAll("[data-post]")) {
  button.addEventListener("click", async () => {
    if (button.dataset.confirm && !confirm(button.dataset.confirm)) return;
    button.setAttribute("aria-busy", "true");
    const answer = await send("POST", button.dataset.post, undefined, (text) => say(text, true));
    button.removeAttribute("aria-busy");
    if (!answer) return;
    say(answer.status === 202 ? (await answer.json()).said : button.dataset.said, false);
    if (button.dataset.once) button.disabled = true;
  });
}

const spec = document.getElementById("spec");
if (spec) {
  const [preview, apply, previewed, fault] = ["preview", "apply", "previewed", "spec-fault"].map((id) =>
    document.getElementById(id),
  );
  const complain = (text) => {
    fault.textContent = text;
    spec.setAttribute("aria-invalid", "true");
  };
  // What was previewed is what is applied.
  const forget = () => {
    apply.disabled = true;
    fault.textContent = "";
    spec.removeAttribute("aria-invalid");
    previewed.replaceChildren();
  };
  spec.addEventListener("input", forget);
  preview.addEventListener("click", async () => {
    forget();
    const text = spec.value;
    preview.setAttribute("aria-busy", "true");
    const answer = await send("POST", "/console/preview", text, complain);
    preview.removeAttribute("aria-busy");
    if (!answer || spec.value !== text) return;
    previewed.innerHTML = await answer.text(); // made by the server's templates, which escape
    previewed.focus();
    apply.disabled = false;
  });
  apply.addEventListener("click", async () => {
    const answer = await send("PUT", "/v1/run/spec", spec.value, complain);
    if (!answer) return;
    const put = await answer.json();
    say(`The next groups are scored by version ${put.version} of ${put.name} (${put.spec_id})`, false);
    apply.disabled = true;
    outcome.scrollIntoView({ block: "nearest" });
  });
}
