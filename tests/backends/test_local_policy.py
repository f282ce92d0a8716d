"""The local policy: what a batch samples, when it forms, and how messages and tokens become each other."""

import asyncio
import inspect
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import CALLS, byte_tokenizer, random_model  # noqa: E402

from finetune_nb.backends.local import batching  # noqa: E402
from finetune_nb.backends.local.forward import token_logprobs  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.errors import BackendError, ConfigError  # noqa: E402
from finetune_nb.types import EpisodeKey, SamplingParams  # noqa: E402

TEN = SamplingParams(max_tokens=10)
USER = [{"role": "user", "content": "1+2"}]


def policy(kind="llama", **options):
    tokenizer = byte_tokenizer(**{k: options.pop(k) for k in ("template", "response_template") if k in options})
    return LocalPolicy(random_model(kind, options.pop("positions", 128)), tokenizer, **options)


def key(example, generation=0):
    return EpisodeKey("train", 0, example, generation)


@pytest.fixture
def batches(monkeypatch):
    """The keys of each batch that was sampled, in its order."""
    seen = []
    run = LocalPolicy._sample_batch

    def watched(self, batch):
        seen.append([request.key for request in batch])
        run(self, batch)

    monkeypatch.setattr(LocalPolicy, "_sample_batch", watched)
    return seen


async def sample_all(policy, prompts, params=TEN):
    async def one(i, prompt):
        with policy.episode(key(i)):
            return await policy.sample(prompt, params, seed=i)

    return await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))


# ── what is sampled ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
async def test_logprobs_are_those_of_a_forward_pass_over_prompt_and_reply(kind):
    p = policy(kind)
    prompts = [[3, 10, 11, 12], [3, 10], [3, 10, 11, 12], [3] * 20]
    samples = await sample_all(p, prompts, SamplingParams(temperature=0.7, max_tokens=10))
    for prompt, sample in zip(prompts, samples, strict=True):
        ids_BT = torch.tensor([[*prompt, *sample.ids]])
        mask_BT = torch.arange(ids_BT.shape[1])[None] >= len(prompt)
        with torch.no_grad():
            logprobs_BT = token_logprobs(p.model, ids_BT, torch.ones_like(ids_BT), mask_BT, 0.7)
        assert sample.logprobs == pytest.approx(logprobs_BT[mask_BT].tolist(), abs=1e-4)


async def test_reply_depends_on_its_seed_and_not_on_the_rest_of_the_batch():
    p = policy()
    prompts = [[3, 10 + i % 5, *[20] * (i % 7)] for i in range(40)]
    together = await sample_all(p, prompts)
    alone = [await p.sample(prompt, TEN, seed=i) for i, prompt in enumerate(prompts)]
    assert [s.ids for s in together] == [s.ids for s in alone]
    assert len({tuple(s.ids) for s in await asyncio.gather(*(p.sample([3, 10], TEN, seed=i) for i in range(20)))}) > 10


@pytest.mark.slow
@pytest.mark.proof
async def test_tokens_come_as_often_as_their_probability_says():
    p = policy()
    prompt, temperature = [3, 10, 11], 0.8
    with torch.no_grad():
        probabilities_V = (p.model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(0)
    count = 4000
    samples = await asyncio.gather(*(p.sample(prompt, SamplingParams(temperature, 1), seed=i) for i in range(count)))
    seen = Counter(sample.ids[0] for sample in samples)
    likely = probabilities_V.topk(5).indices.tolist()
    for token in likely:
        expected = probabilities_V[token].item()
        assert seen[token] / count == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)


async def test_temperature_zero_takes_the_likeliest_token_with_its_logprob_at_temperature_one():
    p = policy()
    sample = await p.sample([3, 10, 11], SamplingParams(temperature=0, max_tokens=5), seed=0)
    ids = [3, 10, 11]
    for token, logprob in zip(sample.ids, sample.logprobs, strict=True):
        with torch.no_grad():
            logprobs_V = p.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
        assert token == logprobs_V.argmax().item()
        assert logprob == pytest.approx(logprobs_V.max().item(), abs=1e-4)
        ids.append(token)


async def test_reply_ends_with_the_end_token_or_at_max_tokens():
    p = policy()
    samples = await asyncio.gather(*(p.sample([3, 10], SamplingParams(1.0, 60), seed=i) for i in range(200)))
    stopped = [s for s in samples if s.finish_reason == "stop"]
    assert 0 < len(stopped) < 200  # a random model ends about one reply in five so early
    for sample in samples:
        assert len(sample.ids) == len(sample.logprobs)
        assert sample.ids.count(1) == (sample.finish_reason == "stop")
        assert sample.ids[-1] == 1 if sample.finish_reason == "stop" else len(sample.ids) == 60


async def test_stop_text_ends_a_reply_and_the_token_that_completed_it_is_kept():
    p = policy()
    whole = await p.sample([3, 10], SamplingParams(1.0, 30), seed=3)
    text = p.tokenizer.decode(whole.ids)
    stop = text[4:6]
    first = text.index(stop)
    sample = await p.sample([3, 10], SamplingParams(1.0, 30, stop=("never there", stop)), seed=3)
    assert sample.finish_reason == "stop"
    assert p.tokenizer.decode(sample.ids) == text[: first + 2]
    assert sample.logprobs == pytest.approx(whole.logprobs[: len(sample.ids)], abs=1e-5)


async def test_reply_is_cut_where_the_model_holds_no_more():
    p = policy(positions=16)
    samples = await asyncio.gather(*(p.sample([3] * 12, SamplingParams(1.0, 50), seed=i) for i in range(8)))
    assert max(len(sample.ids) for sample in samples) == 4
    assert all(sample.finish_reason == "length" for sample in samples if sample.ids[-1] != 1)


async def test_prompt_that_cannot_be_sampled_fails_alone_with_its_reason():
    p = policy(positions=16)
    good, long, empty, unknown, silent = await asyncio.gather(
        p.sample([3, 10], TEN, 0),
        p.sample([3] * 16, TEN, 0),
        p.sample([], TEN, 0),
        p.sample([3, 262], TEN, 0),
        p.sample([3], SamplingParams(max_tokens=0), 0),
        return_exceptions=True,
    )
    assert good.ids
    for error, reason in ((long, "16 tokens"), (empty, "no ids"), (unknown, "3 to 262"), (silent, "max_tokens is 0")):
        assert isinstance(error, BackendError) and reason in str(error)


async def test_equal_prompts_are_prefilled_once_and_ended_rows_leave_the_batch(monkeypatch):
    p = policy()
    p._end_ids = frozenset(range(1, 20))  # so that rows end one by one
    rows = []
    forward = p.model.forward

    def counting(input_ids, **inputs):
        rows.append(len(input_ids))
        return forward(input_ids=input_ids, **inputs)

    counting.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(p.model, "forward", counting)
    await sample_all(p, [[3, 10 + i % 4] for i in range(32)], SamplingParams(1.0, 100))
    assert rows[0] == 4
    assert rows[1] == 32
    assert rows[-1] <= 16
    assert sorted(rows[1:], reverse=True) == rows[1:]


# ── when a batch forms ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("deterministic", [False, True])
async def test_batch_forms_when_every_live_episode_waits(batches, deterministic, monkeypatch):
    monkeypatch.setattr(batching, "QUIET_SECONDS", 5.0)
    monkeypatch.setattr(batching, "LONGEST_SECONDS", 5.0)
    p = policy(deterministic=deterministic)

    async def episode(i):
        with p.episode(key(i)):
            for turn in range(i + 1):  # a later one lives longer
                await asyncio.sleep(0.002 * (4 - i))
                await p.sample([3, 10], TEN, seed=10 * i + turn)

    started = time.monotonic()
    await asyncio.gather(*(episode(i) for i in range(4)))
    assert [[k.example for k in batch] for batch in batches] == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]
    assert time.monotonic() - started < 4


async def test_episodes_behind_a_semaphore_fill_the_place_of_one_that_ends_before_a_batch_forms(batches):
    p = policy(deterministic=True)
    semaphore = asyncio.Semaphore(4)

    async def episode(i):
        async with semaphore:
            with p.episode(key(i)):
                for turn in range(1 + i % 2):
                    await p.sample([3, 10], TEN, seed=turn)

    await asyncio.gather(*(episode(i) for i in range(12)))
    assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    assert sum(map(len, batches)) == 18


async def test_requests_that_one_episode_makes_at_once_are_sampled_together(batches):
    p = policy(deterministic=True)
    with p.episode(key(0)):
        await asyncio.gather(*(p.sample([3, 10], TEN, seed=i) for i in range(5)))
    assert [len(batch) for batch in batches] == [5]


async def test_request_does_not_wait_for_a_busy_episode_unless_deterministic(batches):
    p = policy()
    with p.episode(key(0)):  # lives, and asks nothing
        await asyncio.wait_for(asyncio.create_task(ask(p, 1)), 2)
    assert batches == [[key(1)]]


async def ask(p, example):
    with p.episode(key(example)):
        return await p.sample([3, 10], TEN, seed=example)


async def test_deterministic_policy_gives_up_on_an_episode_that_never_asks(batches, monkeypatch, caplog):
    monkeypatch.setattr(batching, "PATIENCE_SECONDS", 0.2)
    p = policy(deterministic=True)
    with p.episode(key(0)):
        await asyncio.wait_for(asyncio.create_task(ask(p, 1)), 5)
    assert "1 of 2 live episodes" in caplog.text


async def test_deterministic_request_of_no_episode_is_sampled_apart_from_those_of_episodes(batches):
    p = policy(deterministic=True)
    with p.episode(key(0)):
        waiting = asyncio.create_task(ask(p, 1))
        batching_token = batching._entered.set(None)
        await asyncio.wait_for(p.sample([3, 10], TEN, seed=5), 2)
        batching._entered.reset(batching_token)
        assert not waiting.done()
    await waiting
    assert batches == [[None], [key(1)]]


async def test_deterministic_runs_are_equal_to_the_last_digit_whatever_the_order_of_arrival():
    async def run(order):
        p = policy(deterministic=True)
        replies = {}

        async def episode(i):
            await asyncio.sleep(0.001 * order[i])
            with p.episode(key(i)):
                started.append(i)
                while len(started) < 12:
                    await asyncio.sleep(0)
                ids = [3, 10 + i]
                for turn in range(3):
                    await asyncio.sleep(0.001 * (order[i] % 3))
                    sample = await p.sample(ids, TEN, seed=i * 10 + turn)
                    replies[i, turn] = sample
                    ids = [*ids, *sample.ids, 3]

        started = []
        await asyncio.gather(*(episode(i) for i in range(12)))
        return replies

    assert await run(list(range(12))) == await run(list(range(12))[::-1])


def test_requests_from_several_loops_share_a_batch(batches):
    p = policy(deterministic=True)
    entered = threading.Barrier(3)

    async def episode(i):
        with p.episode(key(i)):
            entered.wait()
            return await p.sample([3, 10], TEN, seed=i)

    threads = [threading.Thread(target=lambda i=i: asyncio.run(episode(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert batches == [[key(0), key(1), key(2)]]


async def test_cancelled_request_leaves_its_batch_and_the_others_are_answered(batches):
    p = policy(deterministic=True)
    with p.episode(key(9)):
        tasks = [asyncio.create_task(ask(p, i)) for i in range(3)]
        await asyncio.sleep(0.05)
        tasks[1].cancel()
        await asyncio.sleep(0.05)
    first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert first.ids and third.ids
    assert isinstance(second, asyncio.CancelledError)
    assert batches == [[key(0), key(2)]]


async def test_cancelling_the_only_reply_frees_the_policy_at_once():
    p = policy(positions=100_000)
    p._end_ids = frozenset()
    endless = asyncio.create_task(p.sample([3, 10], SamplingParams(1.0, 50_000), seed=0))
    await asyncio.sleep(0.3)
    endless.cancel()
    started = time.monotonic()
    assert (await p.sample([3, 10], TEN, seed=0)).ids
    assert time.monotonic() - started < 3


async def test_model_error_reaches_every_caller_and_the_policy_stays_usable(monkeypatch):
    p = policy()

    def broken(**_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(p.model, "forward", broken)
        errors = await asyncio.gather(*(p.sample([3, 10], TEN, i) for i in range(5)), return_exceptions=True)
    assert all(isinstance(e, BackendError) and "out of memory" in str(e) for e in errors)
    assert len(set(map(id, errors))) == 5
    assert (await p.sample([3, 10], TEN, 0)).ids


async def test_weights_that_diverged_are_named_as_the_cause():
    p = policy()
    with torch.no_grad():
        p.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(BackendError, match="not finite"):
        await p.sample([3, 10], TEN, 0)


async def test_sampling_does_not_block_the_event_loop():
    p = policy(positions=4000)
    p._end_ids = frozenset()
    sampling = asyncio.create_task(p.sample([3, 10], SamplingParams(1.0, 400), seed=0))
    turns = 0
    while not sampling.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert turns > 10


@pytest.mark.slow
def test_interpreter_ends_quietly_and_soon_while_a_reply_is_sampled():
    script = (
        "import sys, threading, asyncio, time; sys.path[:0] = sys.argv[1:]\n"
        "from tiny_models import *; from finetune_nb.backends.local.policy import LocalPolicy\n"
        "from finetune_nb.types import SamplingParams\n"
        "p = LocalPolicy(random_model(positions=10**6), byte_tokenizer()); p._end_ids = frozenset()\n"
        "run = lambda: asyncio.run(p.sample([3, 10], SamplingParams(1.0, 10**5), 0))\n"
        "threading.Thread(target=run, daemon=True).start(); time.sleep(1.5); print('interpreter_exiting')\n"
    )
    paths = [str(Path(__file__).parents[1] / "support"), "."]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "interpreter_exiting"), done.stderr


# ── text and tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_conversation_is_carried_on_behind_the_very_ids_that_were_sampled():
    p = policy()
    prompt = p.render(USER)
    replies = [await p.sample(prompt, SamplingParams(1.0, 6), seed=i) for i in range(30)]
    for sample in [*replies, replies[0]._replace(ids=[40, 41, 1])]:
        messages = [*USER, p.parse(sample.ids), {"role": "tool", "content": "3"}]
        ids = p.render(messages, previous_ids=[*prompt, *sample.ids])
        assert ids[: len(prompt) + len(sample.ids)] == [*prompt, *sample.ids]
        rest = p.tokenizer.decode(ids[len(prompt) + len(sample.ids) :])
        assert rest == ("" if sample.ids[-1] == 1 else "<|end|>") + "\n<|tool|>3<|end|>\n<|assistant|>"


def test_appending_template_gives_the_same_ids_whole_or_carried_on():
    p = policy()
    reply = {"role": "assistant", "content": "three"}
    previous = p.render(USER) + p.tokenizer("three<|end|>")["input_ids"]
    messages = [*USER, reply, {"role": "user", "content": "and é?"}]
    assert p.render(messages, previous_ids=previous) == p.render(messages)


def test_template_that_rewrites_the_past_is_rendered_whole():
    only_last = "{% for m in messages[-1:] %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    p = policy(template=only_last)
    messages = [*USER, {"role": "assistant", "content": "three"}, {"role": "user", "content": "and 4?"}]
    assert p.render(messages, previous_ids=[3, 4, 5]) == p.render(messages)
    assert p.tokenizer.decode(p.render(messages)) == "<|user|>and 4?<|end|><|assistant|>"


def test_tool_call_arguments_reach_the_template_as_a_dict():
    p = policy()
    function = {"name": "calc", "arguments": '{"expression": "1+2"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    assert ">1+2<|end|>" in p.tokenizer.decode(p.render([*USER, call]))
    assert function["arguments"] == '{"expression": "1+2"}'  # the caller's message stays as it was


def test_rollouts_that_begin_alike_get_equal_prompts_of_their_own_rendered_once(monkeypatch):
    p, rendered = policy(), []
    render = p._render_text
    monkeypatch.setattr(p, "_render_text", lambda *args, **options: rendered.append(1) or render(*args, **options))
    first = p.render(USER)
    expected = list(first)
    first.append(7)
    assert p.render([dict(USER[0])]) == expected and len(rendered) == 1
    p.tokenizer.chat_template = p.tokenizer.chat_template.replace("user", "person") + "!"
    assert p.tokenizer.decode(p.render(USER)).endswith("!")  # another template is another prompt
    p._openings.update({("", str(i)): [] for i in range(2000)})
    assert p.render([{"role": "user", "content": "9"}]) and len(p._openings) == 1


def test_prompt_that_tells_the_time_is_rendered_anew():
    p = policy(template="{{ strftime_now('%f') }}<|assistant|>")
    assert len({tuple(p.render(USER)) for _ in range(5)}) > 1


def test_messages_that_are_no_json_are_rendered_all_the_same():
    p = policy()
    content = [{"type": "text", "text": "1"}, {"type": "image", "image": object()}]
    assert p.render([{"role": "user", "content": content}])


def test_model_without_chat_template_is_refused_with_the_way_out():
    p = policy(template=None)
    with pytest.raises(ConfigError, match=r"no chat template.*chat_template\.jinja"):
        p.render(USER)


def test_messages_that_the_template_refuses_are_an_error_of_ours():
    p = policy(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BackendError, match=r"roles user.*must alternate"):
        p.render(USER)


def test_reply_with_a_tool_call_is_an_openai_message():
    p = policy(response_template=CALLS)
    message = p.parse(p.tokenizer(">1+2<|end|>")["input_ids"])
    (call,) = message["tool_calls"]
    assert (message["role"], call["type"], call["function"]["name"]) == ("assistant", "function", "calc")
    assert json.loads(call["function"]["arguments"]) == {"expression": "1+2"}
    assert p.parse(p.tokenizer("three<|end|>")["input_ids"]) == {"role": "assistant", "content": "three"}


def test_parsing_never_raises_whatever_the_model_wrote():
    generator = torch.Generator().manual_seed(0)
    for response_template in (CALLS, None, {"fields": {"tool_calls": {"open_pattern": "("}}}):
        p = policy(response_template=response_template)
        for length in [0, 1, 2, 5, 30] * 20:
            ids = torch.randint(0, 262, (length,), generator=generator).tolist()
            for reply in (ids, p.tokenizer(">")["input_ids"] + ids):
                message = p.parse(reply)
                assert message["role"] == "assistant"
                assert isinstance(message["content"], str) or message["tool_calls"]
                json.dumps(message)


def test_response_template_that_cannot_work_is_said_once_and_not_used(caplog):
    p = policy(response_template={"fields": {}})
    assert "response template" in caplog.text
    caplog.clear()
    assert p.parse(p.tokenizer(">1+2<|end|>")["input_ids"]) == {"role": "assistant", "content": ">1+2"}
    assert not caplog.text


def test_tokens_are_the_text_of_each_id():
    p = policy()
    ids = p.tokenizer("aé<|end|>")["input_ids"]
    assert p.tokens(ids) == ["a", "\ufffd", "\ufffd", "<|end|>"]


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
async def test_any_model_directory_is_loaded_sampled_and_saved(kind, tmp_path):
    made = policy(kind)
    made.save(tmp_path / "model")
    loaded = LocalPolicy.load(tmp_path / "model")
    prompt = loaded.render(USER)
    assert loaded.model.dtype == torch.float32
    assert (await loaded.sample(prompt, TEN, 7)).ids == (await made.sample(prompt, TEN, 7)).ids


async def test_embedded_model_calls_its_tool():
    p = LocalPolicy.load("embedded")
    schema = {"type": "object", "properties": {"expression": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "calculator", "description": "", "parameters": schema}}]
    prompt = p.render([{"role": "user", "content": "12+7-3"}], tools)
    replies = [p.parse(s.ids) for s in await asyncio.gather(*(p.sample(prompt, TEN, i) for i in range(40)))]
    calls = [json.loads(r["tool_calls"][0]["function"]["arguments"]) for r in replies if r.get("tool_calls")]
    assert {"expression": "12+7"} in calls


@pytest.mark.parametrize(
    "options", [{"name_or_dir": "no/such/../model"}, {"dtype": "int8"}, {"dtype": "save"}, {"device": "abacus"}]
)
def test_model_dtype_or_device_that_does_not_exist_is_a_config_error(options):
    with pytest.raises(ConfigError, match=r"[Ee]xpected"):
        LocalPolicy.load(**{"name_or_dir": "embedded", **options})
