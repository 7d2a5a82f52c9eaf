// What is asked of the server, and what it says when it does not do it.
import { events } from "./events.js";

// Its message is a sentence for whoever reads the page.
export class Refusal extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

const key = document.querySelector("#key");

export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key?.value.trim()) headers.Authorization = `Bearer ${key.value.trim()}`;
  let response;
  try {
    response = await fetch(document.body.dataset.base + path, {
      method: "POST", headers, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal("The server cannot be reached.");
  }
  if (response.ok) return response;
  throw new Refusal(await told(response), response.status);
}

// Calls `write(choice, text)` and `ended(choice, reason)` as they come; returns `pavlov`, what the
// server says of the answer as a whole.
export async function complete(body, signal, write, ended) {
  const response = await post("v1/chat/completions", { ...body, stream: true }, signal);
  let own = null;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return own;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(sentence(chunk.error.message));
      for (const { index, delta, finish_reason: reason } of chunk.choices) {
        if (delta.content) write(index, delta.content);
        if (reason) ended(index, reason);
      }
      own = chunk.pavlov ?? own;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Refusal) throw error;
  }
  throw new Refusal("The connection to the server broke.");
}

// Texts as HTML in which nothing runs, made by the server.
export async function markdown(texts) {
  const response = await post("markdown", { texts });
  return (await response.json()).html;
}

async function told(response) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? `the server answers ${response.status}`;
  const wait = response.status === 429 && response.headers.get("Retry-After");
  return sentence(wait ? `${said}; try again in ${wait} s` : said);
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");
}
