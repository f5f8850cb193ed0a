// What a program does with Anthropic's TypeScript SDK and batches; the same as batches.py beside it.
// Prints what it saw as one JSON object. Of Sluice it knows only the header `sluice-lane`. Arguments: SDK's folder,
// base URL, key, and the id of a batch if only its results are to be read.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [folder, baseURL, apiKey, only] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const { default: Anthropic } = require("@anthropic-ai/sdk");
const { version } = JSON.parse(readFileSync(`${folder}/node_modules/@anthropic-ai/sdk/package.json`));

const client = new Anthropic({ baseURL, apiKey });
const batches = client.messages.batches;

const request = (number, model = "claude-haiku-5-5", text = `Say ${number}.`) => ({
  custom_id: `row-${number}`,
  params: {
    model: number === 7 ? "claude-no-such-model" : model,
    max_tokens: 32,
    messages: [{ role: "user", content: text }],
  },
});

const rest = () => new Promise((resolve) => setTimeout(resolve, 200));

const error = async (call) => {
  try {
    await call();
  } catch (found) {
    return {
      class: found.constructor.name,
      status: found.status,
      type: found.error.error.type,
      message: found.error.error.message,
      request_id: found.requestID ?? found.request_id,
    };
  }
  return {};
};

const until = async (id) => {
  let batch = await batches.retrieve(id);
  while (batch.processing_status !== "ended") {
    await rest();
    batch = await batches.retrieve(id);
  }
  return batch;
};

const read = async (id) => {
  const found = [];
  for await (const each of await batches.results(id)) {
    found.push({
      custom_id: each.custom_id,
      type: each.result.type,
      stop_reason: each.result.type === "succeeded" ? each.result.message.stop_reason : null,
      error: each.result.type === "errored" ? each.result.error.error.type : null,
    });
  }
  return found;
};

if (only) {
  let found = [];
  const failed = await error(async () => {
    found = await read(only);
  });
  console.log(JSON.stringify({ results: found, error: failed }));
  process.exit(0);
}

const created = await batches.create({ requests: Array.from({ length: 12 }, (_, n) => request(n)) });
const ended = await until(created.id);
const results = await read(created.id);
const second = await batches.create(
  { requests: [request(0, "claude-opus-5-5")] },
  { headers: { "sluice-lane": "batch" } },
);
const canceled = await batches.cancel(second.id);
const third = await batches.create({ requests: [request(0)] });
const paged = [];
for await (const each of batches.list({ limit: 1 })) paged.push(each.id);
await until(third.id);
const deleted = await batches.delete(third.id);

console.log(
  JSON.stringify({
    version,
    created,
    ended,
    results,
    canceled: canceled.processing_status,
    paged,
    ids: [created.id, second.id, third.id],
    deleted,
    missing: await error(() => batches.retrieve(third.id)),
    refused: await error(() => batches.create({ requests: [request(1), request(1)] })),
    no_lane: await error(() =>
      batches.create({ requests: [request(1)] }, { headers: { "sluice-lane": "cheap" } }),
    ),
    too_large: await error(() =>
      batches.create({ requests: [request(1, undefined, "x".repeat(4_100_000))] }),
    ),
    no_key: await error(() =>
      new Anthropic({ baseURL, apiKey: "sk-ant-test-nobody" }).messages.batches.retrieve(created.id),
    ),
  }),
);
