// What the official client gets from a server: node openai.mjs URL KEY. Prints one JSON object.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const chat = { model: "tiny", messages, max_tokens: 16 };
const reply = { model: "tiny", input: "hello", max_output_tokens: 16 };

async function text(stream, of) {
  let all = "";
  for await (const event of stream) all += of(event) ?? "";
  return all;
}

async function failure(work) {
  try {
    await work();
    return null;
  } catch (error) {
    return [error.constructor.name, error.status, error.code, error.param];
  }
}

const found = {};
found.models = (await client.models.list()).data.map((model) => model.id);
found.chat = (await client.chat.completions.create(chat)).choices[0].message.content;
found.chat_stream = await text(
  await client.chat.completions.create({ ...chat, stream: true }), (chunk) => chunk.choices[0]?.delta.content);
found.response = (await client.responses.create(reply)).output_text;
found.response_stream = await text(
  await client.responses.create({ ...reply, stream: true }),
  (event) => (event.type === "response.output_text.delta" ? event.delta : ""));
found.mara = (await client.chat.completions.create({ ...chat, mara: { agents: "other", decisions: true } })).mara.config;

const other = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
found.errors = {
  value: await failure(() => client.chat.completions.create({ ...chat, top_p: 2 })),
  model: await failure(() => client.chat.completions.create({ ...chat, model: "none" })),
  key: await failure(() => other.models.list()),
};
const endless = { ...chat, model: "slow", max_tokens: 150, stream: true };
for await (const _ of await client.chat.completions.create(endless)) {
  found.errors.busy = await failure(() => client.chat.completions.create({ ...chat, model: "slow" }));
  break; // which aborts the request
}
console.log(JSON.stringify(found));
