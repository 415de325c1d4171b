// The openai package for Node and the Vercel AI SDK against a running server; run by test_node_clients.py from a folder
// that has them. One JSON line a check; the model says what its name tells.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const { TEXT_URL, CALL_URL, JSON_URL, LONG_URL, ANSWER } = process.env;
const messages = [{ role: "user", content: "one" }];
const city = z.object({ city: z.string(), people: z.number() });
const rome = { city: "Rome", people: 3 };
const node = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "-", maxRetries: 0 });
const functions = [
  { type: "function", function: { name: "City", description: "d", parameters: { type: "object", properties: {} } } },
];

function same(found, wanted) {
  if (JSON.stringify(found) !== JSON.stringify(wanted)) throw new Error(`${JSON.stringify(found)} is not ${JSON.stringify(wanted)}`);
}

async function throws(kind, work) {
  try {
    await work();
  } catch (error) {
    if (error instanceof kind) return error;
    throw error;
  }
  throw new Error(`no ${kind.name}`);
}

async function idle(url) {
  for (let tries = 0; tries < 200; tries++) {
    const health = await (await fetch(`${url}/health`)).json();
    if (health.running === 0 && health.waiting === 0) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error("the request still runs");
}

async function joined(stream, part) {
  let text = "";
  for await (const chunk of stream) text += part(chunk) ?? "";
  return text;
}

const checks = {
  async "openai: chat"() {
    const answer = await node(TEXT_URL).chat.completions.create({ model: "tiny", messages });
    same(answer.choices[0].message.content, ANSWER);
  },
  async "openai: stream"() {
    const options = { model: "tiny", messages, stream: true, stream_options: { include_usage: true } };
    const stream = await node(TEXT_URL).chat.completions.create(options);
    same(await joined(stream, (chunk) => chunk.choices[0]?.delta.content), ANSWER);
    const helper = node(TEXT_URL).chat.completions.stream({ model: "tiny", messages });
    same(await helper.finalContent(), ANSWER);
  },
  async "openai: responses"() {
    same((await node(TEXT_URL).responses.create({ model: "tiny", input: "one" })).output_text, ANSWER);
    const stream = await node(TEXT_URL).responses.create({ model: "tiny", input: "one", stream: true });
    same(await joined(stream, (event) => (event.type === "response.output_text.delta" ? event.delta : "")), ANSWER);
  },
  async "openai: tools"() {
    const client = node(CALL_URL);
    const whole = await client.chat.completions.create({ model: "tiny", messages, tools: functions });
    const { name, arguments: given } = whole.choices[0].message.tool_calls[0].function;
    same([name, JSON.parse(given)], ["City", rome]);
    const streamed = await client.chat.completions.stream({ model: "tiny", messages, tools: functions }).finalChatCompletion();
    same(streamed.choices[0].message.tool_calls[0].function.arguments, given);
    const strict = [{ type: "function", name: "City", strict: true, parameters: z.toJSONSchema(city) }];
    const response = await client.responses.create({ model: "tiny", input: "one", tools: strict });
    same(JSON.parse(response.output.find((item) => item.type === "function_call").arguments), rome);
  },
  async "openai: structured output"() {
    const format = zodResponseFormat(city, "city");
    const answer = await node(JSON_URL).chat.completions.parse({ model: "tiny", messages, response_format: format });
    same(answer.choices[0].message.parsed, rome);
  },
  async "openai: errors"() {
    const client = node(TEXT_URL);
    const missing = await throws(OpenAI.NotFoundError, () => client.chat.completions.create({ model: "gpt-9", messages }));
    same([missing.status, missing.code], [404, "model_not_found"]);
    const wrong = { model: "tiny", messages, temperature: 9 };
    same((await throws(OpenAI.BadRequestError, () => client.chat.completions.create(wrong))).param, "temperature");
  },
  async "openai: cancel"() {
    const call = { model: "tiny", messages, max_tokens: 1900 };
    const stream = await node(LONG_URL).chat.completions.create({ ...call, stream: true });
    for await (const _ of stream) {
      stream.controller.abort();
      break;
    }
    await idle(LONG_URL);
    const signal = AbortSignal.timeout(300);
    await throws(OpenAI.APIUserAbortError, () => node(LONG_URL).chat.completions.create(call, { signal }));
    await idle(LONG_URL);
  },
};

for (const [name, model] of [
  ["openai-compatible", (url) => createOpenAICompatible({ name: "own", baseURL: `${url}/v1`, apiKey: "-", supportsStructuredOutputs: true })("tiny")],
  ["openai chat", (url) => createOpenAI({ baseURL: `${url}/v1`, apiKey: "-" }).chat("tiny")],
  ["openai responses", (url) => createOpenAI({ baseURL: `${url}/v1`, apiKey: "-" })("tiny")],
]) {
  const once = { prompt: "one", maxRetries: 0 };
  checks[`ai, ${name}: chat`] = async () => same((await generateText({ ...once, model: model(TEXT_URL) })).text, ANSWER);
  checks[`ai, ${name}: stream`] = async () => {
    same(await joined(streamText({ ...once, model: model(TEXT_URL) }).textStream, (text) => text), ANSWER);
  };
  checks[`ai, ${name}: tools`] = async () => {
    const tools = { City: tool({ description: "d", inputSchema: city, execute: async () => "sunny" }) };
    const { toolCalls } = await generateText({ ...once, model: model(CALL_URL), tools, stopWhen: stepCountIs(1) });
    same([toolCalls[0].toolName, toolCalls[0].input], ["City", rome]);
    const streamed = streamText({ ...once, model: model(CALL_URL), tools, stopWhen: stepCountIs(1) });
    same((await streamed.toolCalls)[0].input, rome);
  };
  checks[`ai, ${name}: structured output`] = async () => {
    same((await generateObject({ ...once, model: model(JSON_URL), schema: city })).object, rome);
  };
  checks[`ai, ${name}: errors`] = async () => {
    const error = await throws(Error, () => generateText({ ...once, model: model(TEXT_URL), temperature: 9 }));
    same([error.statusCode, error.name], [400, "AI_APICallError"]);
  };
  checks[`ai, ${name}: cancel`] = async () => {
    const abortSignal = AbortSignal.timeout(300);
    await throws(Error, () => generateText({ ...once, model: model(LONG_URL), abortSignal }));
    await idle(LONG_URL);
  };
}

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  let fault = null;
  try {
    await check();
  } catch (error) {
    fault = `${error.name}: ${error.message}`;
    failed++;
  }
  console.log(JSON.stringify({ name, fault }));
}
process.exit(failed ? 1 : 0);
