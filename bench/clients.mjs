// Run the Vercel AI SDK against a server, for bench/clients.py: node --input-type=module - URL MODEL KEY < clients.mjs
// Prints [check, null or why it failed] for each check.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, name, apiKey] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "server", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true,
});
const asked = { model: provider(name), maxOutputTokens: 96, temperature: 0, maxRetries: 0 };

const checks = {
  async chat() {
    let failure;
    const stream = streamText({
      ...asked, prompt: "What is the capital of France?", onError: ({ error }) => { failure = error; },
    });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    if (failure) throw failure;
    assert.ok(text.trim(), "no text came");
    assert.ok((await stream.usage).outputTokens > 0, "no usage");
  },

  async tools() {
    const weather = tool({
      description: "Look up the weather in a city.",
      inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
      execute: async ({ city }) => `Sunny in ${city}, 21 degrees.`,
    });
    const { steps, text } = await generateText({
      ...asked,
      prompt: "What is the weather in Paris? Use the tool.",
      tools: { weather },
      stopWhen: ({ steps }) => steps.length === 2,
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "weather" } : "none" }),
    });
    assert.equal(steps.length, 2, "the result was not sent back");
    assert.match(steps[0].toolResults[0].output, /^Sunny in (Paris|Rome)/);
    assert.ok(text.trim(), "no text came after the result");
  },

  async structured() {
    const schema = z.object({ name: z.enum(["Paris", "Rome"]), isCapital: z.boolean() });
    const { output } = await generateText({
      ...asked, prompt: "Describe Paris, as JSON.", output: Output.object({ schema }),
    });
    schema.parse(output);
  },

  async embeddings() {
    const values = ["The cat sat on the mat.", "Stocks fell sharply today."];
    const { embeddings } = await embedMany({ model: provider.embeddingModel(name), values, maxRetries: 0 });
    assert.equal(embeddings.length, 2);
    assert.ok(embeddings[0].length > 1 && embeddings[0].length === embeddings[1].length);
    assert.notDeepEqual(embeddings[0], embeddings[1]);
  },
};

for (const [check, run] of Object.entries(checks)) {
  const failure = await run().then(() => null, (error) => `${error}`.slice(0, 500));
  console.log(JSON.stringify([check, failure]));
}
