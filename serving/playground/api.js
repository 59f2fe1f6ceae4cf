// Requests to the gateway, with its user's key, which stays in this tab.

/** What the server says of a request that failed, in one line. */
export class ServerError extends Error {}

export const key = {
  get: () => sessionStorage.getItem("key"),
  set: (value) => sessionStorage.setItem("key", value),
  forget: () => sessionStorage.removeItem("key"),
};

/** The answer to a GET, or to a POST of `body`. A 401 also sends the event "needkey". */
export async function ask(path, body, signal) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  const request = { method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, { ...request, headers, signal });
  } catch (error) {
    throw told(error, "The gateway cannot be reached.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) document.dispatchEvent(new Event("needkey"));
  throw new ServerError(`${answer.status}: ${await messageOf(answer)}`);
}

/** The data of server-sent events, one by one. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const whole = (rest + value).split(/\r?\n\r?\n/);
      rest = whole.pop();
      for (const event of whole) if (event.startsWith("data:")) yield event.slice(5).trim();
    }
  } catch (error) {
    throw told(error, "The connection broke off.");
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading frees the model server
  }
}

function told(error, message) {
  return error.name === "AbortError" ? error : new ServerError(message);
}

async function messageOf(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300) || answer.statusText; // not the gateway's own: as it came
  }
}
