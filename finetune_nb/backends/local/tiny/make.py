"""Makes the embedded model: `python -m finetune_nb.backends.local.tiny.make --out DIR --seed N`.

A byte-level tokenizer with a chat template, a 230k parameter Llama, and two minutes of supervised warm start on
calculator conversations. Every demonstration is right; they differ in style: some use the tool to the end, most answer
at once somewhere on the way. The model learns to copy tool calls but not to add, so its own guesses are mostly wrong,
and reinforcement learning has something to find out. The result loads with the Auto classes; the library itself does
not import this file. The defaults made model/; a seed gives the same weights on the same machine and torch only.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ....examples.calculator import task
from ....examples.calculator.make_data import splits

SPECIAL = ["<|pad|>", "<|end|>", "<|tools|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]

# Only ever appends, so a conversation's tokens are the beginning of the longer one's. `arguments` may be a dict or, as
# OpenAI sends it, a JSON string: jinja cannot read JSON, but a calculator call holds no quote except the four around
# the key and the value.
CHAT_TEMPLATE = """
{%- if tools %}{{ '<|tools|>' + tools | map(attribute='function.name') | join(',') + '<|end|>' }}{% endif %}
{%- for message in messages %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.content %}
        {{- message.content }}
    {%- else %}
        {%- for call in message.tool_calls or [] %}
            {%- set arguments = call.function.arguments %}
            {{- '>' + (arguments.split('"')[3] if arguments is string else arguments.expression) }}
        {%- endfor %}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
""".strip()

# A reply that begins with '>' is a tool call, any other is content; the end token and what follows it is neither.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\A>",
            "close_pattern": r"<\|end\|>.*",
            "repeats": True,
            "content": "text",
            "content_args": {"strip": False},
            "transform": {
                "type": "function",
                "function": {"name": "calculator", "arguments": {"expression": "{content}"}},
            },
        },
        "content": {"close_pattern": r"<\|end\|>.*", "content": "text", "content_args": {"strip": False}},
    },
}


def make_tokenizer() -> Any:
    """256 bytes and the special tokens, no merges: what a token is never depends on its neighbours."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any) -> Any:
    """The untrained model, float32."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            **ids,
        )
    )
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def call_message(operation: str) -> dict:
    """The assistant message that calls the tool on `operation`."""
    function = {"name": "calculator", "arguments": {"expression": operation}}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def demonstrate(question: str, rng: random.Random, patient: float, direct: float) -> list[dict]:
    """A right conversation. With probability `patient` it uses the tool to the end; otherwise each of its turns is the
    final answer with probability `direct`."""
    if rng.random() < patient:
        direct = 0.0
    messages, remaining = [{"role": "user", "content": question}], question
    while (operation := task.first_operation(remaining)) is not None and rng.random() >= direct:
        remaining = task.calculate(operation, remaining) or ""
        messages += [call_message(operation), {"role": "tool", "content": remaining}]
    return [*messages, {"role": "assistant", "content": "=" + task.answer(question)}]


def demonstrations(
    tokenizer: Any, rng: random.Random, count: int, patient: float, direct: float, avoid: set[str]
) -> list[list[int]]:
    """Token ids of `count` conversations over all levels in which no question of `avoid` occurs, be it only on the way
    (a longer question can leave a shorter one)."""
    rows: list[list[int]] = []
    while len(rows) < count:
        messages = demonstrate(task.make_question(rng, rng.choice(task.LEVELS)), rng, patient, direct)
        if not any(message["content"] in avoid for message in messages):
            rows.append(tokenizer.apply_chat_template(messages, tools=task.TOOLS, return_dict=False))
    return rows


def learned(ids_BT: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """True on the text and end token of assistant and tool messages. The tool's text is learned too: it is practice in
    copying, which is what keeps long tool chains right."""
    roles = torch.tensor(tokenizer.convert_tokens_to_ids(SPECIAL[2:]))
    speakers = torch.tensor(tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|tool|>"]))
    header_BT = torch.isin(ids_BT, roles)
    positions_T = torch.arange(ids_BT.shape[1])
    last_header_BT = torch.where(header_BT, positions_T, 0).cummax(1).values
    speaking_BT = torch.isin(ids_BT.gather(1, last_header_BT), speakers)
    return speaking_BT & ~header_BT & (ids_BT != tokenizer.pad_token_id)


def warm_start(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    rng: random.Random,
    steps: int,
    batch: int = 32,
    lr: float = 1e-2,
) -> None:
    """Trains `model` in place on `rows`: Muon for the matrices, AdamW for the rest, cosine decay."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    model.train()
    batches: list[list[list[int]]] = []
    for step in range(steps):
        if not batches:  # eight batches of like length each, in random order: little padding
            drawn = sorted(rng.choices(rows, k=8 * batch), key=len)
            batches = [drawn[start : start + batch] for start in range(0, len(drawn), batch)]
            rng.shuffle(batches)
        padded = tokenizer.pad({"input_ids": batches.pop()}, padding_side="right", return_tensors="pt")
        ids_BT = padded["input_ids"]
        labels_BT = ids_BT.masked_fill(~learned(ids_BT, tokenizer), -100)  # -100 is left out of the loss
        loss = model(**padded, labels=labels_BT, use_cache=False).loss

        warmup, cosine = min(1.0, (step + 1) / 40), 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup * (0.05 + 0.95 * cosine)
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def rewards(model: Any, tokenizer: Any, rows: list[dict]) -> list[float]:
    """1.0 or 0.0 for each row: one sampled episode of at most seven turns, right or not."""
    model.eval()
    scored = [0.0] * len(rows)
    live = {i: ([{"role": "user", "content": row["question"]}], row["question"]) for i, row in enumerate(rows)}
    for _ in range(7):
        if not live:
            break
        prompts = tokenizer.apply_chat_template(
            [messages for messages, _ in live.values()],
            tools=task.TOOLS,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**prompts, max_new_tokens=10)[:, prompts["input_ids"].shape[1] :]
        going_on = {}
        for (i, (messages, remaining)), reply in zip(live.items(), ids, strict=True):
            message = tokenizer.parse_response(reply, prefix="", tools=task.TOOLS)
            if calls := message.get("tool_calls"):
                result = task.calculate(calls[0]["function"]["arguments"]["expression"], remaining)
                if result is not None:
                    going_on[i] = ([*messages, message, {"role": "tool", "content": result}], result)
            else:
                scored[i] = float(message.get("content") == "=" + rows[i]["answer"])
        live = going_on
    return scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--patient", type=float, default=0.25, help="share that uses the tool to the end, 0 to 1")
    parser.add_argument("--direct", type=float, default=0.65, help="chance per turn of the others to answer, 0 to 1")
    options = parser.parse_args()

    torch.set_num_threads(1)  # such a small model is not faster on two, and its last digits depend on it
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    rows = splits()
    avoid = {row["question"] for row in rows["held_out"] + rows["dev"]}
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    conversations = demonstrations(tokenizer, rng, 20_000, options.patient, options.direct, avoid)
    warm_start(model, tokenizer, conversations, rng, options.steps)

    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    scored = rewards(model.float(), tokenizer, rows["dev"])  # what bfloat16 left of the weights
    for level in task.LEVELS:
        of_level = [reward for reward, row in zip(scored, rows["dev"], strict=True) if row["level"] == level]
        print(f"dev level {level}: {sum(of_level) / len(of_level):.2f}")
    print(f"dev: {sum(scored) / len(scored):.3f}")


if __name__ == "__main__":
    main()
