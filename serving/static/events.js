// The data of each server-sent event of a body, wherever its bytes are cut.
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  let halved = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const text = decoder.decode(value, { stream: true });
      if (!text) continue;
      // The \n of a \r\n whose \r has ended a line already.
      rest += halved && text.startsWith("\n") ? text.slice(1) : text;
      halved = text.endsWith("\r");
      const lines = rest.split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
