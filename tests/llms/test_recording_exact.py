"""What is recorded is what was sampled: random agents with tools, through a whole run, and scored again token by token."""

import json
import random
from collections import Counter

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import CALLS, byte_tokenizer, random_model  # noqa: E402

import finetune_nb as ft  # noqa: E402
from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.forward import collate, micro_batches  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.training.batch import token_sequences  # noqa: E402

TOOLS = [{"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {}}}}]
SAID = ["3", "", "é ∑ 漢", "<|end|>", "line\nline", "    ", ">1+2", json.dumps({"a": [1, None]})]
# Of what random weights say, about a third begins with a printable character, which counts as a call here.
CALLING = {
    **CALLS,
    "fields": {**CALLS["fields"], "tool_calls": {**CALLS["fields"]["tool_calls"], "open_pattern": r"\A[!-~]"}},
}


async def wander(question, llm):
    """Up to four turns. Tools answer whatever comes; now and then a question follows, or the past is rewritten."""
    dice = random.Random(question)
    messages = [{"role": "user", "content": dice.choice(SAID) + question}]
    tools = TOOLS if dice.random() < 0.7 else None
    calls = 0
    for turn in range(dice.randint(1, 4)):
        reply = await llm.chat(messages, tools=tools, temperature=dice.choice([0.7, 1.0, 1.0]))
        messages.append(reply)
        for call in reply.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": dice.choice(SAID)})
        calls += len(reply.tool_calls)
        if not reply.tool_calls or dice.random() < 0.3:
            messages.append({"role": "user", "content": dice.choice(SAID)})
        if dice.random() < 0.1:
            messages = [{"role": "system", "content": f"turn {turn}"}, messages[-1]]
    return calls


@pytest.mark.parametrize(
    ("lora", "episodes"), [(None, 80), ({"rank": 4}, 80), pytest.param(None, 1000, marks=pytest.mark.slow)]
)
def test_episodes_have_the_ids_and_logprobs_that_were_sampled(tmp_path, closing, lora, episodes):
    random_model(positions=512).save_pretrained(tmp_path / "model")
    byte_tokenizer(response_template=CALLING).save_pretrained(tmp_path / "model")
    adapter = LocalGRPOAdapter(LocalGRPOConfig(model=str(tmp_path / "model"), lora=lora))
    policy, sampled = adapter.policy, Counter()
    assert isinstance(policy, LocalPolicy)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # an adapter that does something
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    sample = policy.sample

    async def watched(ids, params, seed):
        found = await sample(ids, params, seed)
        sampled[tuple(ids), tuple(found.ids), tuple(found.logprobs)] += 1
        return found

    policy.sample = watched
    run = closing(
        ft.Run(
            wander,
            lambda item: 1.0,  # nothing to learn: the weights stay as they sampled
            dataset=[{"id": i, "question": f"q{i}", "answer": ""} for i in range(episodes // 8)],
            evaluators={"calls": lambda item: float(item.output_obj)},
            adapter=adapter,
            generations=8,
            max_concurrency=episodes,
            sampling={"max_tokens": 12},
            output_dir=tmp_path / "runs",
        )
    )
    epoch = ft.run_sync(run.next_epoch())
    trajectories = [t for group in epoch.collection.trajectories for t in group]
    assert len(trajectories) == episodes and not epoch.collection.failures
    assert policy.version == 0 and epoch.metrics.scores["calls"] > 0.5

    turns = [item for t in trajectories for item in t.episode if item.role == "assistant"]
    recorded = Counter(
        (tuple(i.metadata["prompt_token_ids"]), tuple(i.metadata["token_ids"]), tuple(i.logprobs)) for i in turns
    )
    assert recorded == sampled and recorded.total() > 2 * episodes

    sequences = [s for t in trajectories for s in token_sequences(t, 0.0)]
    assert sum(map(sum, (s.sampled for s in sequences))) == sum(len(i.logprobs) for i in turns)
    assert len(sequences) < len(turns)  # turns that carry a conversation on are one sequence
    worst = 0.0
    for batch, shared in micro_batches(sequences, 16_384, sharing=True):
        tensors = collate(batch, shared=shared)
        with torch.no_grad():
            logprobs_BT = tensors.scores(policy.model).logprobs_BT
        gaps_BT = (logprobs_BT - tensors.old_logprobs_BT).abs()
        worst = max(worst, gaps_BT[tensors.mask_BT].max().item())
    print(
        f"\n{len(trajectories)} episodes, {len(turns)} turns, {len(sequences)} sequences: largest gap {worst:.1e} nats"
    )
    assert worst < 1e-4
