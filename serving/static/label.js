// The keyboard alone suffices: 1 to 4 judge a line and go to the next, Enter sends, s skips.
"use strict";
const form = document.querySelector("form.verdicts");
const onward = document.querySelector("a.button[autofocus]");

if (onward) onward.focus();

if (form) {
  const lines = [...form.querySelectorAll("fieldset")];
  let at = 0;
  let visible = 0;
  let since = document.hidden ? null : performance.now();

  const show = (line) => {
    at = Math.max(0, Math.min(line, lines.length - 1));
    lines.forEach((each, place) => each.classList.toggle("now", place === at));
  };
  const judged = (line) => line.querySelector("input:checked") !== null;
  const unjudged = () => lines.findIndex((line) => !judged(line));

  // Time counts while the page can be seen.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && since !== null) { visible += performance.now() - since; since = null; }
    else if (!document.hidden && since === null) since = performance.now();
  });
  form.addEventListener("submit", () => {
    const now = since === null ? 0 : performance.now() - since;
    form.elements.seconds.value = ((visible + now) / 1000).toFixed(2);
    // A second press must not send it twice.
    setTimeout(() => form.querySelectorAll("button").forEach((each) => { each.disabled = true; }));
  });
  form.addEventListener("change", (event) => {
    const line = lines.findIndex((each) => each.contains(event.target));
    if (line >= 0) show(line + 1);
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const choices = lines[at].querySelectorAll("input");
    const digit = Number(event.key);
    if (Number.isInteger(digit) && digit >= 1 && digit <= choices.length) {
      choices[digit - 1].checked = true;
      const next = unjudged();
      show(next < 0 ? lines.length - 1 : next);
    } else if (event.key === "Backspace") {
      show(judged(lines[at]) ? at : at - 1);
      lines[at].querySelectorAll("input").forEach((each) => { each.checked = false; });
    } else if (event.key === "Enter" && !event.target.matches("a, button, summary")) {
      form.requestSubmit();
    } else if (event.key === "s") {
      form.querySelector("button[formaction]").click();
    } else if (event.key === "c") {
      form.elements.comment.focus();
    } else return;
    event.preventDefault();
  });
}
