// The conversation. The server keeps nothing of it: each question goes with all that was said before.
import { openDrawer, signed } from "./drawer.js";
import { sendFeedback } from "./feedback.js";
import { complete, markdown, Refusal } from "./server.js";

const byId = (id) => document.getElementById(id);
const [log, question, trouble, bestOf, compare] =
  ["log", "question", "trouble", "best_of", "compare"].map(byId);
const scored = "scored" in document.body.dataset;
const welcome = byId("welcome");

let said = [];       // Turns as they are sent.
let writing = null;  // Aborts the answer that is being written.
let pending = null;  // Settles the two answers that wait for a verdict.

// One question and what becomes of it

async function ask(text) {
  const messages = [...said, { role: "user", content: text }];
  const turn = addTurn(text);
  const two = compare?.checked ?? false;
  const body = request(messages, two);
  // Which of the two stands first is chance, so that no place is better.
  const order = two ? shuffled() : [0];
  const answers = order.map((choice) => addAnswer(turn, choice));
  if (two) answers.forEach((answer, at) => label(answer, at ? "Second answer" : "First answer"));
  answers.forEach((answer) => wait(answer, two || !(body.best_of > 1) ? "Writing" : `Writing ${body.best_of} candidates, to send the best`));
  const by = (choice) => answers[order.indexOf(choice)];

  const own = writing = new AbortController();
  show(turn);
  let pavlov = null;
  let failed = null;
  try {
    pavlov = await complete(body, own.signal,
      (choice, piece) => write(by(choice), piece), (choice, reason) => { by(choice).reason = reason; });
  } catch (error) {
    failed = error;
  }
  if (writing !== own) return;  // A new chat was begun.
  writing = null;
  const stopped = failed?.name === "AbortError";
  if (failed && !stopped) complain(failed);
  show();
  if (failed && !answers.some((answer) => answer.text)) {
    giveBack(turn, text);
    if (failed.status === 401) openSettings(true);
    return;
  }
  answers.forEach((answer) => finish(answer, failed && (stopped ? "Stopped." : "Broken off.")));
  render(answers);
  answers.forEach((answer) => Object.assign(answer, pavlov?.choices[answer.choice], { version: pavlov?.weight_version }));
  if (two) compareTwo(turn, messages, answers, pavlov);
  else {
    said = [...messages, { role: "assistant", content: answers[0].text }];
    tell(answers[0], pavlov?.candidates, 1);
    if (answers[0].receipt) offerThumbs(answers[0], messages);
  }
  show(turn);
}

function request(messages, two) {
  const body = { messages };
  const number = (id) => byId(id).valueAsNumber;
  if (!Number.isNaN(number("temperature"))) body.temperature = number("temperature");
  if (!Number.isNaN(number("max_tokens"))) body.max_tokens = number("max_tokens");
  if (two) body.n = 2;
  if (two || bestOf) body.best_of = Math.max(two ? 2 : 1, bestOf?.valueAsNumber ?? 1);
  if (scored) body.score = true;
  if (body.best_of > 1 || scored) body.candidates = true;
  return body;
}

function shuffled() {
  return crypto.getRandomValues(new Uint8Array(1))[0] % 2 ? [1, 0] : [0, 1];
}

// Nothing was written: what was typed goes back to where it was typed.
function giveBack(turn, text) {
  turn.remove();
  welcome.hidden = log.querySelector(".turn") !== null;
  question.value = question.value ? `${text}\n${question.value}` : text;
  question.focus();
}

function complain(error) {
  trouble.textContent = error instanceof Refusal ? error.message : "Something on this page went wrong; reload it.";
  trouble.hidden = false;
  if (!(error instanceof Refusal)) console.error(error);
}

// What is on the page

const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);

function addTurn(text) {
  const turn = copyOf("turn");
  turn.querySelector(".said").textContent = text;
  welcome.hidden = true;
  log.append(turn);
  return turn;
}

// An answer as it grows: its element, the choice that it is, and its text.
function addAnswer(turn, choice) {
  const box = copyOf("answer");
  turn.querySelector(".answers").append(box);
  box.querySelector(".copy").addEventListener("click", () => copy(answer));
  const answer = { box, choice, text: "", reason: null, part: (name) => box.querySelector(`.${name}`) };
  answer.part("text").classList.add("raw");
  return answer;
}

function label(answer, text) {
  const heading = answer.box.querySelector("h2");
  heading.textContent = text;
  heading.hidden = false;
  answer.box.setAttribute("aria-label", text);
}

function wait(answer, text) {
  answer.part("waiting").textContent = text;
}

function write(answer, piece) {
  const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  answer.text += piece;
  answer.part("waiting").hidden = true;
  answer.part("text").hidden = false;
  answer.part("text").append(piece);
  if (follow) log.scrollTop = log.scrollHeight;
}

function finish(answer, note) {
  answer.part("waiting").hidden = true;
  const cut = answer.reason === "length" ? "Cut off at the longest answer that was asked for." : "";
  answer.part("ended").textContent = note || cut || (answer.text ? "" : "The answer is empty.");
  answer.part("ended").hidden = !answer.part("ended").textContent;
  answer.part("below").hidden = !answer.text;
}

// In place of the plain text, which stays where the server does not help.
async function render(answers) {
  try {
    const html = await markdown(answers.map((answer) => answer.text));
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    answers.forEach((answer, at) => {
      answer.part("text").innerHTML = html[at];
      answer.part("text").classList.remove("raw");
    });
    if (atEnd) log.scrollTop = log.scrollHeight;
  } catch (error) {
    console.warn(error);
  }
}

function tell(answer, candidates, sent) {
  const figures = [];
  if (answer.version) figures.push(`version ${answer.version.slice(0, 8)}`);
  if (answer.reward != null) figures.push(`reward ${signed(answer.reward)}`, `disagreement ${answer.disagreement.toFixed(2)}`);
  answer.part("told").textContent = figures.join(" · ");
  answer.part("told").title = answer.version ?? "";
  answer.part("shift").hidden = !answer.domain_shift;
  const more = answer.part("more");
  more.hidden = !candidates;
  more.textContent = `Candidates (${candidates?.length})`;
  more.addEventListener("click", () => openDrawer(candidates, sent));
}

// What stands beside the field goes by what is going on; `turn` is brought into sight.
function show(turn) {
  byId("send").hidden = writing !== null;
  byId("stop").hidden = writing === null;
  log.setAttribute("aria-busy", String(writing !== null));
  if (turn) log.scrollTop = log.scrollHeight;
}

async function copy(answer) {
  const button = answer.part("copy");
  try {
    await navigator.clipboard.writeText(answer.text);
    button.textContent = "Copied";
  } catch {
    // Browsers copy for a page from another machine only over https.
    getSelection().selectAllChildren(answer.part("text"));
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// What people say of it

function offerThumbs(answer, messages) {
  const thumbs = answer.box.querySelectorAll(".thumb");
  const free = (yes) => thumbs.forEach((each) => { each.disabled = !yes; });
  for (const thumb of thumbs) {
    thumb.hidden = false;
    thumb.addEventListener("click", async () => {
      free(false);
      const sent = await sending(answer.part("done"), () => sendFeedback(messages, [answer], thumb.value, true));
      if (sent) thumb.setAttribute("aria-pressed", "true");
      else free(true);
    });
  }
}

async function sending(place, send) {
  try {
    const sent = await send();
    place.textContent = sent ? "Thank you." : "";
    return sent;
  } catch (error) {
    complain(error);
    return false;
  }
}

function compareTwo(turn, messages, answers, pavlov) {
  const verdicts = turn.querySelector(".verdicts");
  verdicts.hidden = false;
  const settle = (verdict) => {
    pending = null;
    verdicts.hidden = true;
    const kept = { first: 0, second: 1, tie: 0 }[verdict];
    answers.forEach((answer, at) => {
      tell(answer, at === (kept ?? 0) ? pavlov?.candidates : null, 2);
      answer.box.classList.toggle("left", at !== kept);
    });
    const settled = turn.querySelector(".settled");
    settled.hidden = false;
    if (kept === undefined) {
      settled.textContent = "Neither goes on; your question is in the field again.";
      question.value ||= messages.at(-1).content;
    } else {
      said = [...messages, { role: "assistant", content: answers[kept].text }];
      settled.textContent = `The ${kept ? "second" : "first"} answer goes on.`;
    }
    question.focus();
    if (answers.every((answer) => answer.receipt)) {
      const thanks = document.createElement("span");
      settled.append(" ", thanks);
      sending(thanks, () => sendFeedback(messages, answers, verdict, false));
    }
  };
  verdicts.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) settle(button.value);
  });
  pending = { settle, verdicts };
  if (!question.value) verdicts.focus();
}

// What is pressed

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || writing) return;
  trouble.hidden = true;
  if (pending) {
    complain(new Refusal("Say first which of the two answers is better."));
    pending.verdicts.focus();
    return;
  }
  question.value = "";
  question.focus();
  ask(text);
});

question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});

function stop() {
  writing?.abort();
  question.focus();
}

byId("stop").addEventListener("click", stop);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && writing) stop();
  const verdict = { 1: "first", 2: "second", 3: "tie", 4: "bad" }[event.key];
  if (pending && verdict && !event.target.matches("textarea, input")) {
    event.preventDefault();
    pending.settle(verdict);
  }
});

byId("new").addEventListener("click", () => {
  writing?.abort();
  [said, writing, pending] = [[], null, null];
  log.querySelectorAll(".turn").forEach((each) => each.remove());
  welcome.hidden = false;
  trouble.hidden = true;
  show();
  question.focus();
});

function openSettings(yes) {
  byId("settings").hidden = !yes;
  byId("more_settings").setAttribute("aria-expanded", String(yes));
  if (yes) byId("settings").querySelector("input").focus();
}

byId("more_settings").addEventListener("click", () => openSettings(byId("settings").hidden));

const sayBestOf = () => { byId("best_of_shown").value = bestOf.value; };
bestOf?.addEventListener("input", sayBestOf);
if (bestOf) sayBestOf();  // A reloaded page keeps its values.
