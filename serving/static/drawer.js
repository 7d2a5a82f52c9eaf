// All candidates of an answer, with what each member of the ensemble says of them.
import { markdown } from "./server.js";

const SVG = "http://www.w3.org/2000/svg";
const drawer = document.querySelector("#drawer");
const list = drawer.querySelector("#candidates");
const penalty = Number(document.body.dataset.penalty);

drawer.querySelector("#close").addEventListener("click", () => drawer.close());
// A click beside it.
drawer.addEventListener("click", (event) => { if (event.target === drawer) drawer.close(); });

export const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

const bound = (candidate) => candidate.reward - penalty * candidate.disagreement;
const endings = { length: "cut off", stop: "finished", rejected: "given up early, judged by its beginning" };
const rejected = (candidate) => candidate.finish_reason === "rejected";

// The best `sent` of them were shown as answers.
export function openDrawer(candidates, sent) {
  const scored = candidates.every((each) => each.reward !== null);
  const ranked = scored ? [...candidates].sort((a, b) => rejected(a) - rejected(b) || bound(b) - bound(a)) : candidates;
  const axis = scored ? axisOf(ranked) : null;
  drawer.querySelector("h2").textContent = candidates.length === 1 ? "1 candidate" : `${candidates.length} candidates`;
  list.replaceChildren(...ranked.map((candidate, place) => shown(candidate, place, axis, sent)));
  drawer.showModal();
  drawer.scrollTop = 0;
  const texts = [...list.querySelectorAll(".text")];
  markdown(ranked.map((each) => each.text)).then((html) => {
    texts.forEach((text, at) => { text.innerHTML = html[at]; text.classList.remove("raw"); });
  }, () => {});  // They stay as plain text.
}

function shown(candidate, place, axis, sent) {
  const part = document.querySelector("#candidate").content.cloneNode(true);
  const text = part.querySelector(".text");
  text.textContent = candidate.text;
  text.classList.add("raw");
  part.querySelector("h3 small").hidden = place >= sent;
  part.querySelector("h3 span").textContent = axis ? `Rank ${place + 1}` : `Candidate ${place + 1}`;
  const figures = [];
  if (axis) {
    figures.push(`lower bound ${signed(bound(candidate))}`, `reward ${signed(candidate.reward)}`,
      `disagreement ${candidate.disagreement.toFixed(2)}`);
    part.querySelector(".chart").append(chart(candidate, axis));
  }
  if (candidate.finish_reason) figures.push(endings[candidate.finish_reason]);
  if (candidate.domain_shift) figures.push("of a kind the ensemble does not know");
  part.querySelector(".figures").textContent = figures.join(" · ");
  return part;
}

// The chart

// One axis for all candidates, with round numbers on it; `at` places a value on it.
function axisOf(candidates) {
  const values = candidates.flatMap((each) => [
    ...each.rewards, each.reward - each.disagreement, each.reward + each.disagreement,
  ]);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 1e-6) [low, high] = [low - 1, high + 1];
  const power = 10 ** Math.floor(Math.log10((high - low) / 4));
  const step = power * [1, 2, 5, 10].find((factor) => 4 * power * factor >= high - low);
  const ticks = [];
  for (let tick = Math.ceil(low / step); tick * step <= high; tick++) ticks.push(tick * step);
  return { ticks, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), at: (value) => `${4 + (92 * (value - low)) / (high - low)}%` };
}

function chart({ reward, rewards, disagreement }, { ticks, digits, at }) {
  const svg = draw("svg", { role: "img", height: 48, "aria-label":
    `Rewards of ${rewards.length} members: ${rewards.map(signed).join(", ")}; `
    + `mean ${signed(reward)}, disagreement ${disagreement.toFixed(2)}.` });
  const line = (value, from, to, kind) => draw("line", { x1: at(value), x2: at(value), y1: from, y2: to, class: kind });
  for (const tick of ticks) {
    const label = draw("text", { x: at(tick), y: 45, "text-anchor": "middle" });
    label.textContent = tick.toFixed(digits).replace("-", "−");
    svg.append(line(tick, 2, 32, "grid"), label);
  }
  const [left, right] = [at(reward - disagreement), at(reward + disagreement)];
  svg.append(draw("rect", { x: left, y: 9, width: `${parseFloat(right) - parseFloat(left)}%`, height: 16, rx: 3, class: "spread" }));
  svg.append(line(reward, 5, 29, "mean"));
  svg.append(...rewards.map((each) => draw("circle", { cx: at(each), cy: 17, r: 4, class: "member" })));
  return svg;
}

function draw(kind, attributes) {
  const element = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
