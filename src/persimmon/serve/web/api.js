// The server's OpenAI interface: models, token counts, streamed answers.

export class ApiError extends Error {
  constructor(message, retryable) {
    super(message);
    this.retryable = retryable;
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", true);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(body?.error?.message ?? `The server answered ${response.status}.`, response.status >= 429);
}

function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export async function model() {
  const found = await (await request("/v1/models")).json();
  return found.data[0];
}

export async function countTokens(messages, signal) {
  const found = await (await post("/tokenize", { messages }, signal)).json();
  return { used: found.count, limit: found.max_model_len };
}

/** Stream an answer: yields {text}, {progress} and {finished} as they come. */
export async function* stream(messages, sampling, signal) {
  const body = {
    messages,
    stream: true,
    stream_options: { include_progress: true, include_usage: true },
    ...sampling,
  };
  const response = await post("/v1/chat/completions", body, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, true);
    if (chunk.progress) yield { progress: chunk.progress };
    if (chunk.usage) yield { usage: chunk.usage };
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finished: choice.finish_reason };
  }
  throw new ApiError("The connection was lost before the answer was complete.", true);
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const event = buffer.slice(0, end);
      buffer = buffer.slice(end + 2);
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}
