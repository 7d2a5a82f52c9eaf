// What people say of answers, sent once they have agreed to its being kept.
import { post } from "./server.js";

const dialog = document.querySelector("#consent");
let agreed = null;  // What was said in this session: null as long as nobody asked.

// Sends a verdict on one answer, or two in the order shown; true if it was sent. With `askAgain`
// somebody who said "Not now" is asked once more.
export async function sendFeedback(messages, answers, verdict, askAgain) {
  if (agreed === null || (!agreed && askAgain)) agreed = await ask();
  if (!agreed) return false;
  const judged = answers.map(({ text, receipt }) => ({ text, receipt }));
  await post("v1/feedback", { messages, answers: judged, verdict, comment: "", consent: true });
  return true;
}

function ask() {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "send"), { once: true });
  });
}
