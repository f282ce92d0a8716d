// The tasks of agent_libraries.py in the words of the Vercel AI SDK.
//
//     node tasks.mjs MODULES PROVIDER TASK QUESTION AGAIN
//
// MODULES is the folder that has node_modules, PROVIDER "openai" or "compatible". The gateway's address and key come by
// OPENAI_BASE_URL and OPENAI_API_KEY. Prints what the agent got, as JSON.
import { createRequire } from "node:module";

const [modules, provider, task, question, again] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const { Output, generateText, stepCountIs, streamText, tool } = require("ai");
const { z } = require("zod");

const model = {
  openai: () => require("@ai-sdk/openai").openai("policy"), // by the Responses API, the provider's default
  compatible: () =>
    require("@ai-sdk/openai-compatible").createOpenAICompatible({
      name: "gateway",
      baseURL: process.env.OPENAI_BASE_URL,
      apiKey: process.env.OPENAI_API_KEY,
      supportsStructuredOutputs: true,
    })("policy"),
}[provider]();

const add = tool({
  description: "Add two numbers.",
  inputSchema: z.object({ a: z.number(), b: z.number() }),
  execute: async ({ a, b }) => a + b,
});

const tasks = {
  plain: async () => (await generateText({ model, prompt: question })).text,
  tools: async () => (await generateText({ model, prompt: question, tools: { add }, stopWhen: stepCountIs(5) })).text,
  stream: async () => {
    const pieces = [];
    for await (const piece of streamText({ model, prompt: question }).textStream) pieces.push(piece);
    return pieces;
  },
  structured: async () => {
    const schema = z.object({ value: z.number() });
    return (await generateText({ model, prompt: question, output: Output.object({ schema }) })).output;
  },
  turns: async () => {
    const messages = [{ role: "user", content: question }];
    const first = await generateText({ model, messages });
    messages.push(...first.response.messages, { role: "user", content: again });
    return (await generateText({ model, messages })).text;
  },
};

console.log(JSON.stringify(await tasks[task]()));
