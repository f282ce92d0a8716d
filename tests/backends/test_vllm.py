"""A policy that a vLLM server samples: exact ids, new weights for each version, and what a server may do wrong. The server is a
loopback one that samples with a small true model and refuses as vLLM does."""

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("aiohttp")

from sampled_turns import rollouts, train  # noqa: E402
from tiny_models import byte_tokenizer, random_model  # noqa: E402
from vllm_server import DEAD, VLLMServer  # noqa: E402

from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig, LoRAConfig  # noqa: E402
from finetune_nb.backends.local.lora import with_adapter  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.local.scoring import score  # noqa: E402
from finetune_nb.backends.local.vllm import process, watchdog  # noqa: E402
from finetune_nb.backends.local.vllm.client import ServerGone  # noqa: E402
from finetune_nb.backends.local.vllm.config import VLLMConfig  # noqa: E402
from finetune_nb.backends.local.vllm.sampler import VLLMSampler  # noqa: E402
from finetune_nb.errors import BackendError, ConfigError  # noqa: E402
from finetune_nb.store.durable import machine_id  # noqa: E402
from finetune_nb.types import ReplyFormat, SamplingParams  # noqa: E402

PROMPT = [3, 20, 21, 22]
LOUDER = 12.0
DRAWN = SamplingParams(temperature=1.0, max_tokens=6)


@pytest.fixture(scope="module")
def model():
    return random_model()


def policy_of(model):
    return LocalPolicy(with_adapter(copy.deepcopy(model), LoRAConfig(rank=4)), byte_tokenizer(), threads=1)


@pytest.fixture(scope="module")
def shared(model):
    """A policy whose adapter changes what the model computes."""
    policy = policy_of(model)
    changed(policy)
    return policy


def changed(policy):
    """Other weights, as after a job."""
    torch.manual_seed(policy.weights_id)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    policy.version += 1


@pytest.fixture
def server(model):
    with VLLMServer(model, byte_tokenizer()) as server:
        yield server


@pytest.fixture
async def make(model, shared, server, tmp_path):
    """Makes adapters whose policy the server samples; they are closed when the test is over. fresh: with weights of its own,
    that a test may change."""
    made = []

    def make(fresh=False, whole=False, deterministic=False, sampler=None, **settings):
        policy = policy_of(model) if fresh else shared
        if whole:
            policy = LocalPolicy(copy.deepcopy(model), byte_tokenizer(), threads=1)
        sampler = {"url": server.url, "patience": 3.0, **(sampler or {})}
        config = LocalGRPOConfig(
            lora=None if whole else {"rank": 4}, sampler=sampler, **{"learning_rate": 0.05, **settings}
        )
        made.append(LocalGRPOAdapter(config, deterministic=deterministic, policy=policy, folder=tmp_path / "run"))
        return made[-1]

    yield make
    for adapter in made:
        await adapter.aclose()


def here(policy, ids, temperature=1.0):
    return score(policy.model, PROMPT, ids, (temperature,))[0]


async def sample(adapter, params=DRAWN, seed=1, prompt=PROMPT):
    return await adapter.policy.sample(prompt, params, seed)


async def epoch(adapter, **sizes):
    """One epoch of two groups; the job's status."""
    return await train(
        adapter,
        await rollouts(
            adapter, lambda ids: float(sum(ids) % 7), **{"examples": 2, "generations": 3, "tokens": 4, **sizes}
        ),
    )


def loads(server):
    return [name for event, name in server.events if event == "load"]


# ── replies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
async def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(make, server, temperature):
    adapter = make()
    found = await sample(adapter, SamplingParams(temperature, 8))
    assert found.logprobs == pytest.approx(here(adapter.policy, found.ids, temperature), abs=1e-5)
    assert server.requests[-1]["prompt"] == PROMPT
    assert server.requests[-1]["temperature"] == temperature


async def test_greedy_reply_has_the_logprobs_of_temperature_1(make):
    adapter = make()
    found = await sample(adapter, SamplingParams(0.0, 8))
    assert found.logprobs == pytest.approx(here(adapter.policy, found.ids), abs=1e-5)


async def test_nothing_is_left_to_the_generation_settings_of_the_server(make, server):
    await sample(make(), SamplingParams(1.0, 4, stop=("x",)), seed=2**70 + 5)
    body = server.requests[-1]
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
    assert body["seed"] == (2**70 + 5) % 2**63
    assert body["stop"] == ["x"]
    assert body["stop_token_ids"] == [1]


async def test_token_that_completes_a_stop_text_is_part_of_the_reply(make):
    adapter = make()
    free = await sample(adapter, SamplingParams(1.0, 8))
    stop = adapter.policy.tokens(free.ids)[2]
    found = await sample(adapter, SamplingParams(1.0, 8, stop=(stop,)))
    first = adapter.policy.tokens(free.ids).index(stop)
    assert found.ids == free.ids[: first + 1]
    assert found.finish_reason == "stop"
    assert free.finish_reason == "length"


async def test_likeliest_tokens_are_recorded_where_they_are_asked_for(make):
    found = await sample(make(), SamplingParams(1.0, 4, top_logprobs=3))
    assert [len(top) for top in found.likeliest] == [3] * 4
    for top, token, logprob in zip(found.likeliest, found.ids, found.logprobs, strict=True):
        assert top.get(token, logprob) == pytest.approx(logprob)
        assert list(top.values()) == sorted(top.values(), reverse=True)


async def test_prompt_is_held_to_what_the_server_holds(make, server):
    server.max_model_len = 40
    adapter = make()
    await sample(adapter)
    assert adapter.policy.longest == 40
    with pytest.raises(BackendError, match="the prompt has 40 tokens, but this model holds 40"):
        await sample(adapter, prompt=[5] * 40)
    assert len((await sample(adapter, SamplingParams(1.0, 100), prompt=[5] * 35)).ids) <= 5


async def test_reply_that_is_held_to_a_form_has_the_logprobs_of_the_model_itself(make, server):
    """vLLM's own are those of what the form leaves. The loopback server has no grammars: what it is asked for is looked at."""
    pytest.importorskip("llguidance")
    adapter = make()
    wanted = ReplyFormat(schema=json.dumps({"type": "integer"}))
    server.raw_logprobs = False
    await sample(adapter)
    found = await sample(adapter, SamplingParams(0.5, 6, reply_format=wanted))
    grammar = server.requests[-1]["structured_outputs"]["grammar"]
    assert grammar == adapter.policy.reply_guides.grammar(wanted, PROMPT)
    assert "%json" in grammar
    assert found.logprobs == pytest.approx(here(adapter.policy, found.ids, 0.5), abs=1e-5)


async def test_temperature_that_vllm_would_change_is_refused(make):
    with pytest.raises(ConfigError, match=r"temperature is 0.001, which vLLM takes for 0.01"):
        await sample(make(), SamplingParams(0.001, 4))


# ── new weights ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_version_has_a_name_of_its_own_and_is_what_is_sampled(make, server):
    adapter = make(fresh=True)
    gaps = []
    for _ in range(2):
        status = await epoch(adapter)
        assert status.status == "completed", status.message
        gaps.append(status.metadata["metrics"]["logprob_gap"])
    assert max(gaps) < 1e-4
    found = await sample(adapter)
    assert found.logprobs == pytest.approx(here(adapter.policy, found.ids), abs=1e-5)
    names = loads(server)
    assert len(set(names)) == 3
    # The steps are large enough that older weights would be seen.
    before = server.adapters[names[-2]]
    (stale,) = score(server.model_with(before), PROMPT, found.ids, (1.0,))
    assert max(abs(a - b) for a, b in zip(stale, found.logprobs, strict=True)) > 0.01


@pytest.mark.slow
@pytest.mark.proof
async def test_old_names_are_unloaded_before_their_folders_are_deleted(make, server):
    adapter = make(fresh=True)
    for _ in range(5):
        await sample(adapter)
        changed(adapter.policy)
    await sample(adapter)
    names = loads(server)
    unloaded = [name for event, name in server.events if event == "unload"]
    assert unloaded == [(name, True) for name in names[:-2]]  # their folders were still there
    assert set(server.adapters) == set(names[-2:])
    folder = adapter._vllm.served.folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(names[-2:])


async def test_request_that_is_under_way_keeps_its_weights_and_their_folder(make, server):
    """Newer versions come in the meantime, and the server reads each adapter again."""
    adapter = make(fresh=True)
    free = await sample(adapter)
    first = loads(server)[0]
    server.hold, server.resident = threading.Event(), 1
    slow = asyncio.create_task(sample(adapter))
    while len(server.requests) < 4:  # two proofs and a reply
        await asyncio.sleep(0.01)
    hold, server.hold = server.hold, None
    for _ in range(3):
        changed(adapter.policy)
        await sample(adapter)
    assert first not in server.adapters
    assert (adapter._vllm.served.folder / first).is_dir()
    hold.set()
    assert await slow == free
    changed(adapter.policy)
    await sample(adapter)
    assert not (adapter._vllm.served.folder / first).exists()
    assert not server.dead


async def test_weights_that_were_loaded_from_a_checkpoint_are_sampled(make, server, tmp_path):
    adapter = make(fresh=True)
    await adapter.save_checkpoint(tmp_path / "start")
    start = await sample(adapter)
    changed(adapter.policy)
    assert (await sample(adapter)).logprobs != start.logprobs
    await adapter.load_checkpoint(tmp_path / "start")
    again = await sample(adapter)
    assert (again.ids, again.logprobs) == (start.ids, pytest.approx(start.logprobs, abs=1e-5))


async def test_many_callers_at_once_wait_for_one_load(make, server):
    adapter = make()
    await asyncio.gather(*(sample(adapter, seed=i) for i in range(12)))
    assert len(loads(server)) == 1


async def test_everything_is_taken_off_the_server_at_the_end(make, server, tmp_path):
    adapter = make(fresh=True)
    await sample(adapter)
    changed(adapter.policy)
    await sample(adapter)
    await adapter.aclose()
    assert server.adapters == {}
    assert not (tmp_path / "run" / "vllm").exists()
    adapter.policy.version += 1
    with pytest.raises(BackendError, match="the run is closed"):
        await sample(adapter)


@pytest.fixture
def ended():
    """A process that has ended."""
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    process.wait()
    return process


async def test_folders_of_processes_that_have_ended_are_deleted(make, ended, tmp_path):
    place = tmp_path / "run" / "vllm"
    here, another = machine_id(), "0" * 8
    left, alive, elsewhere = (
        place / f"adapters-{machine}-{pid}-abcd"
        for machine, pid in ((here, ended.pid), (here, os.getpid()), (another, ended.pid))
    )
    for folder in (left, alive, elsewhere):
        folder.mkdir(parents=True)
    await sample(make())
    assert [folder.exists() for folder in (left, alive, elsewhere)] == [False, True, True]


# ── all weights ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_all_weights_are_read_by_the_server_after_each_job(make, server):
    adapter = make(whole=True)
    for _ in range(2):
        status = await epoch(adapter)
        assert status.status == "completed", status.message
        assert status.metadata["metrics"]["logprob_gap"] < 1e-4
    found = await sample(adapter)
    assert found.logprobs == pytest.approx(here(adapter.policy, found.ids), abs=1e-5)
    assert [event for event, _ in server.events] == ["reload", "switch"] * 3  # and its cache of prompts is emptied
    assert loads(server) == []


async def test_weights_are_not_replaced_while_a_reply_is_sampled(make, server):
    adapter = make(whole=True)
    free = await sample(adapter)
    server.hold = hold = threading.Event()
    slow = asyncio.create_task(sample(adapter))
    while len(server.requests) < 3:  # a proof and a reply
        await asyncio.sleep(0.01)
    server.hold = None
    changed(adapter.policy)
    new = asyncio.create_task(sample(adapter))
    await asyncio.sleep(0.2)
    assert len([event for event, _ in server.events if event == "reload"]) == 1
    hold.set()
    assert await slow == free
    assert (await new).logprobs != free.logprobs
    assert len([event for event, _ in server.events if event == "reload"]) == 2


async def test_server_that_was_started_again_reads_all_weights_again(make, server, model):
    adapter = make(whole=True)
    changed(adapter.policy)
    before = await sample(adapter)
    server.stop()
    server.model = copy.deepcopy(model)
    server.name = "base2"
    server.start()
    assert await sample(adapter) == before


async def test_server_that_reads_no_weights_is_refused_with_what_it_lacks(make, server):
    server.reads_weights = False
    with pytest.raises(ConfigError, match=r"VLLM_SERVER_DEV_MODE=1, or train an adapter: training=\{'lora': \{\}\}"):
        await sample(make(whole=True))


async def test_server_that_has_not_read_the_weights_is_not_asked(make, server, monkeypatch):
    adapter = make(whole=True)
    await sample(adapter)
    asked = len(server.requests)
    monkeypatch.setattr("vllm_server.load_file", lambda path: (path / "missing").read_bytes())
    changed(adapter.policy)
    with pytest.raises(
        BackendError, match=r"has not read the weights \(500: .*\), and has none any more. Start it again"
    ):
        await sample(adapter)
    assert len(server.requests) == asked
    assert not server.dead


# ── servers that are not as they should be ───────────────────────────────────────────────────────────────────────────


async def test_adapters_that_were_unloaded_behind_our_back_are_loaded_again(make, server):
    adapter = make()
    before = await sample(adapter)
    server.forget()
    assert await sample(adapter) == before
    assert len(loads(server)) == 2


@pytest.mark.slow
@pytest.mark.proof
async def test_server_that_is_restarted_within_an_epoch_is_waited_for(make, server):
    adapter = make()
    await sample(adapter)
    server.seconds = 0.3
    asked = [asyncio.create_task(sample(adapter, seed=i)) for i in range(6)]
    await asyncio.sleep(0.15)
    server.stop()
    server.forget()
    told = []
    adapter._vllm.tell = told.append
    await asyncio.sleep(0.5)
    server.start()
    found = await asyncio.gather(*asked)
    assert told[0].startswith("waiting for the vLLM server at http://127.0.0.1")
    assert told[-1] is None
    for reply in found:
        assert reply.logprobs == pytest.approx(here(adapter.policy, reply.ids), abs=1e-5)
    assert len(set(loads(server))) == 2


async def test_server_that_stays_away_fails_the_rollout_and_loses_nothing(make, server):
    adapter = make(fresh=True, sampler={"patience": 0.3})
    await sample(adapter)
    changed(adapter.policy)
    server.stop()
    with pytest.raises(BackendError, match=r"does not answer: .* for 0.3 s \(sampler.patience\). Start it, then run"):
        await sample(adapter)
    server.forget()
    server.start()
    found = await sample(adapter)
    assert found.logprobs == pytest.approx(here(adapter.policy, found.ids), abs=1e-5)


async def test_another_server_at_the_same_address_is_seen(make, server):
    adapter = make(sampler={"patience": 0.5})
    await sample(adapter)
    server.stop()
    other = VLLMServer(random_model(seed=7), byte_tokenizer(), name="other", port=server.port)
    expected = pytest.raises(
        ConfigError, match=r"does not sample the model that is trained: .* It serves /models/other"
    )
    with other, expected:
        await sample(adapter)


@pytest.mark.parametrize("other", [False, True])
async def test_server_that_was_started_again_between_epochs_is_compared_again(make, server, other):
    adapter = make(fresh=True)
    for _ in range(3):  # with more than the adapters that are compared on each server
        await sample(adapter)
        changed(adapter.policy)
    server.stop()
    server.forget()
    if other:
        server.model = random_model(seed=3)
    asked = len(server.requests)
    server.start()
    if other:
        with pytest.raises(ConfigError, match="does not sample the model that is trained"):
            await sample(adapter)
    else:
        found = await sample(adapter)
        assert found.logprobs == pytest.approx(here(adapter.policy, found.ids), abs=1e-5)
        assert len(server.requests) - asked == 3  # the model, the adapter, and the reply


async def test_wrong_base_model_is_refused_before_anything_is_sampled(make, server):
    adapter = make()
    server.model = random_model(seed=3)
    with pytest.raises(ConfigError, match=r"log probabilities of the same ids differ by .* nats .* at most 0.02"):
        await sample(adapter)
    assert loads(server) == []


async def test_model_with_fewer_tokens_is_refused(make, server):
    server.model.config.vocab_size = 30
    with pytest.raises(ConfigError, match=r"refuses a prompt of \d+ ids \(400: Token id \d+ is out of vocabulary\)"):
        await sample(make())


async def test_adapter_that_the_server_does_not_apply_is_seen_once_it_computes_something(make, server, monkeypatch):
    adapter = make(fresh=True)
    await sample(adapter)
    changed(adapter.policy)
    monkeypatch.setattr(server, "model_with", lambda place: server.model)
    with pytest.raises(ConfigError, match="does not sample the adapter as it is trained"):
        await sample(adapter)


@pytest.fixture
def half_precision(server):
    """The server computes in bfloat16, with logits so large that it shows."""
    server.model.lm_head.weight.data *= LOUDER
    server.model.bfloat16()
    return server


@pytest.fixture
def louder(shared):
    """What is trained has such logits, too."""
    head = shared.model.get_output_embeddings()
    before = head.weight.data.clone()
    head.weight.data *= LOUDER
    yield
    head.weight.data = before


async def test_server_in_another_precision_is_refused_where_nobody_said_so(make, half_precision, louder):
    with pytest.raises(ConfigError, match=r"set sampler.dtype to 'bfloat16', and importance_cap to 2.0"):
        await sample(make(importance_cap=2.0))


async def test_server_in_another_precision_samples_what_a_correction_is_set_for(make, half_precision, louder):
    adapter = make(sampler={"dtype": "bfloat16"}, importance_cap=2.0)
    found = await sample(adapter, SamplingParams(1.0, 32))
    far = [abs(a - b) for a, b in zip(found.logprobs, here(adapter.policy, found.ids), strict=True)]
    assert 1e-4 < sum(far) / len(far) < 0.15


async def test_another_model_is_refused_in_half_precision_too(make, half_precision):
    with pytest.raises(ConfigError, match=r"in float32 here and bfloat16 there at most 0.15 are expected"):
        await sample(make(sampler={"dtype": "bfloat16"}, importance_cap=2.0))


def test_other_precision_needs_a_correction_or_a_word_that_it_may_be_missing(make, caplog):
    with pytest.raises(ConfigError, match=r"samples in bfloat16, and the model is trained in float32.* importance_cap"):
        make(sampler={"dtype": "bfloat16"}).policy  # noqa: B018
    assert "nothing corrects for it" not in caplog.text
    make(sampler={"dtype": "bfloat16"}, max_logprob_gap=0.2).policy  # noqa: B018
    assert "nothing corrects for it" in caplog.text
    make(sampler={"dtype": "float32"}).policy  # noqa: B018


async def test_raw_log_probabilities_are_refused_with_the_flag(make, server):
    server.raw_logprobs = True
    with pytest.raises(ConfigError, match="Start it with --logprobs-mode processed_logprobs"):
        await sample(make())


async def test_server_without_token_ids_is_refused(make, server):
    server.token_ids = False
    with pytest.raises(ConfigError, match=r"no token ids .* Expected vLLM 0.10.2"):
        await sample(make())


async def test_server_that_loads_no_adapters_is_refused_with_the_flag(make, server):
    server.loads_adapters = False
    with pytest.raises(
        ConfigError, match=r"--enable-lora and the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    ):
        await sample(make())


async def test_rank_that_is_too_large_is_refused_with_the_flag(make, server):
    server.max_rank = 2
    with pytest.raises(ConfigError, match=r"LoRA rank 4 is greater than max_lora_rank 2.*--max-lora-rank"):
        await sample(make())


async def test_server_that_does_not_see_the_folder_is_refused(make, server, monkeypatch):
    from finetune_nb.backends.local.vllm import adapters

    monkeypatch.setattr(adapters, "SHARED_DISK_SECONDS", 0.3)
    monkeypatch.setattr("vllm_server.Path.is_file", lambda path: False)
    with pytest.raises(ConfigError, match=r"No adapter found for .*set sampler.folder to one that both have"):
        await sample(make())


async def test_reply_that_was_aborted_is_an_error_though_its_status_is_200(make, server):
    adapter = make()
    await sample(adapter)
    server.finish_reason = "abort"
    with pytest.raises(BackendError, match=r"gave up a reply \(finish reason 'abort'\)"):
        await sample(adapter)


async def test_slow_server_gives_no_reply_in_time_and_stops_sampling(make, server):
    adapter = make(sampler={"request_timeout": 0.3})
    await sample(adapter)
    server.seconds = 5.0
    with pytest.raises(BackendError, match=r"no reply within 0.3 s \(sampler.request_timeout\)"):
        await sample(adapter)
    for _ in range(50):
        if server.cancelled:
            break
        await asyncio.sleep(0.02)
    assert server.cancelled == 1


async def test_full_queue_is_waited_for(make, server):
    adapter = make()
    await sample(adapter)
    server.refusals = [(503, "The server's queue is full (max_num_queued_reqs=1)")] * 3
    before = len(server.requests)
    await sample(adapter)
    assert len(server.requests) - before == 4


async def test_queue_that_stays_full_is_an_error_that_says_what_to_change(make, server):
    adapter = make(sampler={"patience": 0.2})
    await sample(adapter)
    server.refusals = [(503, "queue is full")] * 100
    with pytest.raises(BackendError, match=r"full for 0.2 s \(503: queue is full\).*max_concurrency"):
        await sample(adapter)


async def test_dead_engine_is_an_error_and_nothing_is_trained_on(make, server):
    adapter = make(sampler={"patience": 0.2})
    await sample(adapter)
    server.dead = True
    with pytest.raises(BackendError, match=rf"has lost a request 4 times \({DEAD[:20]}"):
        await sample(adapter)


async def test_refused_request_is_told_as_the_server_says_it(make, server):
    adapter = make()
    await sample(adapter)
    server.refusals = [(400, "max_tokens must be at least 1, got 0.")]
    with pytest.raises(BackendError, match=r"refuses a request \(400: max_tokens must be at least 1"):
        await sample(adapter)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": "base"}, "answers with model 'base'"),
        ({"choices": []}, "no completion"),
        ({"choices": [{"finish_reason": "stop", "token_ids": [5], "logprobs": None}]}, "no token ids"),
        (
            {"choices": [{"finish_reason": "stop", "token_ids": [5, 6], "logprobs": {"token_logprobs": [-1]}}]},
            "no token ids",
        ),
        ({"choices": [{"finish_reason": "stop", "token_ids": [5], "logprobs": {"token_logprobs": [None]}}]}, "finite"),
        (
            {"choices": [{"finish_reason": "stop", "token_ids": [999], "logprobs": {"token_logprobs": [-1]}}]},
            "below 262",
        ),
        (
            {
                "choices": [
                    {
                        "finish_reason": "stop",
                        "token_ids": [5],
                        "prompt_token_ids": [9],
                        "logprobs": {"token_logprobs": [-1]},
                    }
                ]
            },
            "another prompt",
        ),
    ],
)
def test_answer_that_is_not_the_whole_of_a_reply_is_an_error(change, problem):
    from finetune_nb.backends.local.vllm.replies import sample_in

    good = {
        "model": "v0",
        "choices": [{"finish_reason": "stop", "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}}],
    }
    assert sample_in(good, "v0", PROMPT, DRAWN, 262).ids == [5]
    with pytest.raises((BackendError, ConfigError), match=problem):
        sample_in({**good, **change}, "v0", PROMPT, DRAWN, 262)


async def test_key_is_sent_and_shown_nowhere(make, server, caplog):
    server.key = "a-secret-key"
    adapter = make(sampler={"api_key": "a-secret-key"})
    await sample(adapter)
    with pytest.raises(BackendError, match=r"refuses our key \(401\)"):
        await sample(make())
    assert "a-secret-key" not in repr(adapter.adapter_config) + adapter.policy.description + caplog.text


async def test_server_sleeps_while_a_job_trains_and_no_request_is_under_way(make, server):
    adapter = make(fresh=True, sampler={"sleep": True})
    await epoch(adapter)
    await sample(adapter)
    assert [path for event, path in server.events if event == "switch"] == ["/sleep", "/wake_up"]
    assert [event for event, _ in server.events] == ["load", "switch", "switch", "load"]


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("vllm2", 'expected "vllm", the address'),
        ("http://user:key@host:8000", "without a user name or a password"),
        ({"url": "http://host:8000", "python": "/x"}, "python is for a server that is started here"),
        ({"api_key": "k"}, "api_key is for a server that runs"),
        ({"folder": "relative"}, "expected an absolute path"),
        ({"gpu": 0.5}, "gpu"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, problem):
    with pytest.raises(ValueError, match=problem):
        LocalGRPOConfig(lora={}, sampler=given)


def test_sampler_is_a_word_an_address_or_a_mapping():
    assert LocalGRPOConfig(lora={}, sampler="vllm").sampler == VLLMConfig()
    assert LocalGRPOConfig(lora={}, sampler="http://host:8000/v1").sampler.root == "http://host:8000"
    assert LocalGRPOConfig(lora={}, sampler={"gpu_memory": 0.3}).sampler.gpu_memory == 0.3
    assert LocalGRPOConfig().sampler is None


def test_repeatable_runs_are_refused(make):
    with pytest.raises(ConfigError, match="deterministic is on"):
        _ = make(deterministic=True).policy


def test_replicas_are_refused(make):
    with pytest.raises(ConfigError, match="replicas of it would sample by themselves"):
        make().policy.replica()


def test_run_takes_the_sampler_and_the_config_of_a_run_has_it(tmp_path):
    import finetune_nb as ft
    from finetune_nb.testing import sums

    run = ft.Run(
        lambda question, llm: "",
        lambda output: 0.0,
        sums(2),
        training={"lora": {"rank": 4}},
        sampler="http://127.0.0.1:1/v1",
        output_dir=tmp_path,
    )
    assert run.config.trainer_adapters["adapter"].sampler.url == "http://127.0.0.1:1/v1"
    run.close()


async def test_run_samples_and_trains_with_exact_ids(server, model, tmp_path):
    import finetune_nb as ft

    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")

    async def talk(question, llm):
        messages = [{"role": "user", "content": question}]
        for _ in range(2):
            reply = await llm.chat(messages)
            messages += [reply, {"role": "user", "content": "and?"}]
        return reply.content

    async with ft.Run(
        talk,
        lambda output: float(sum(map(ord, output))),
        [{"question": "one"}, {"question": "two"}],
        model=str(tmp_path / "model"),
        training={"lora": {"rank": 4}, "learning_rate": 0.01},
        sampler=server.url,
        sampling={"max_tokens": 3},
        generations=3,
        output_dir=tmp_path,
    ) as run:
        for _ in range(2):
            epoch = await run.next_epoch()
            assert epoch.job.metadata["metrics"]["logprob_gap"] < 1e-4
        assert run.epochs().drifted_turns.sum() == 0
        assert f"sampled by vLLM at {server.url.removesuffix('/v1')}" in run._driver.policy_told
    server.stop()
    opened = ft.Run.open(run.folder)
    (first,) = set(opened.trajectories(epoch=0).trajectory[:1])
    assert opened.logprob_change(first, epoch=1).change.abs().max() > 1e-3  # scored here: no server is asked
    opened.close()


# ── a server of our own ──────────────────────────────────────────────────────────────────────────────────────────────

STAND_IN = """
import subprocess, sys, time
print("(EngineCore pid=1) ERROR [core.py:1] ValueError: no room", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def guarded(tmp_path):
    """A server with a child that ignores to be asked, below a watchdog: the watchdog's process, the server's pid, its child's."""
    log = tmp_path / "server.log"
    command = [sys.executable, "-I", watchdog.__file__, str(log), sys.executable, "-c", STAND_IN]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    server = int(guard.stdout.readline())
    wait_until(lambda: log.exists() and len(log.read_text().split("\n")) > 2)
    yield guard, server, int(log.read_text().split("\n")[1])
    guard.stdin.close()
    guard.wait(30)
    guard.stdout.close()


def test_closing_the_pipe_ends_a_server_and_all_of_its_processes(guarded, monkeypatch):
    guard, server, child = guarded
    assert is_alive(server)
    assert is_alive(child)
    guard.stdin.close()
    wait_until(lambda: not is_alive(server) and not is_alive(child))


def test_processes_of_a_server_that_was_killed_are_ended(guarded):
    guard, server, child = guarded
    os.kill(server, 9)
    wait_until(lambda: not is_alive(child) and guard.poll() is not None)


def test_log_that_grows_without_end_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LARGEST_LOG", 1000)
    monkeypatch.setattr(watchdog, "TURN_SECONDS", 0.02)
    monkeypatch.setattr(watchdog.select, "select", lambda *args: (time.sleep(0.02), ([], [], []))[1])
    log = tmp_path / "log"
    code = "import time\nfor i in range(40): print('x' * 99, flush=True); time.sleep(0.01)"
    assert watchdog.main(str(log), sys.executable, "-c", code) == 0
    assert log.stat().st_size < 2500
    assert (tmp_path / "log.1").stat().st_size > 1000


STARTED = """
import http.server, json, os, sys
options = dict(zip(sys.argv[1:], sys.argv[2:]))
print("options", " ".join(sys.argv[1:]), os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], flush=True)
if "--fail" in sys.argv:
    sys.exit("(EngineCore pid=1) ERROR [core.py:1] ValueError: no room for the model")
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        name = "other" if "--other" in sys.argv else options["--served-model-name"]
        content = json.dumps({"data": [{"id": name, "parent": None}]}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
if "--deaf" in sys.argv:
    import time; time.sleep(600)
http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Answer).serve_forever()
"""


@pytest.fixture
def own(tmp_path):
    """Makes servers of our own, of an environment whose vLLM only tells what it serves."""
    (tmp_path / "vllm.py").write_text(STARTED)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nif [ "$1" = -I ]; then echo \'{"vllm": "0.32.0"}\'; exit; fi\n'
        f'shift 2; exec {sys.executable} -I {tmp_path / "vllm.py"} "$@"\n'
    )
    python.chmod(0o755)
    made = []

    def own(*args, **settings):
        config = VLLMConfig(python=str(python), args=list(args), **settings)
        made.append(process.VLLMProcess(config, "/models/base", 12, "bfloat16", tmp_path / "vllm"))
        return made[-1]

    yield own
    for each in made:
        each.stop()


def test_own_server_serves_under_a_name_that_nobody_else_has_and_ends_with_all_its_processes(own):
    server, told = own(), []
    client = server.start()
    server.wait(client, tell=told.append)
    assert [model["id"] for model in client.models()] == [server.name]
    said = server.log.read_text()
    assert "--model /models/base" in said and "--max-lora-rank 16" in said and "--dtype bfloat16" in said
    assert "--gpu-memory-utilization 0.4" in said and said.splitlines()[0].endswith(" 1")
    assert told and told[0].startswith("vLLM is starting, 0 s")
    pid, first = server.pid, server.name
    assert is_alive(pid)
    server.stop()
    assert not is_alive(pid) and not server.running
    server.start()
    assert server.name != first


def test_embedded_model_is_refused_at_once_where_vllm_has_no_kernel_for_it(monkeypatch, tmp_path):
    policy = LocalPolicy.load("embedded", device="cpu", lora=LoRAConfig(rank=4))
    monkeypatch.setattr(process, "_environment", lambda config: (sys.executable, True))
    with pytest.raises(ConfigError, match=r"cannot serve the embedded model on a CPU.*Name a real model"):
        VLLMSampler.of(policy, VLLMConfig(), tmp_path)
    assert not isinstance(policy.sampler, VLLMSampler)


def test_own_server_that_ends_while_it_starts_says_why(own):
    server = own("--fail")
    with pytest.raises(
        BackendError, match=r"before it served anything: ValueError: no room for the model. Its log: .*server.log"
    ):
        server.wait(server.start())


def test_own_server_that_does_not_answer_in_time_is_ended(own):
    server = own("--deaf", startup_seconds=0.3)
    client = server.start()
    pid = server.pid
    with pytest.raises(BackendError, match=r"does not serve after 0.3 s \(sampler.startup_seconds\)"):
        server.wait(client)
    assert not is_alive(pid)


def test_another_server_on_the_port_is_not_taken_for_our_own(own):
    server = own("--other")
    with pytest.raises(BackendError, match="another server answers at .*: it serves other"):
        server.wait(server.start())


async def test_run_that_is_closed_does_not_wait_for_its_server_to_start(own, shared, tmp_path):
    from finetune_nb.backends.local.vllm.sampler import VLLMSampler

    server = own("--deaf")
    sampler = VLLMSampler(shared, server.config, server, tmp_path / "adapters")
    asked = asyncio.create_task(sampler.submit(PROMPT, DRAWN, 0))
    while server.pid is None:
        await asyncio.sleep(0.02)
    pid = server.pid
    await asyncio.wait_for(sampler.aclose(), 15.0)
    assert not is_alive(pid)
    with pytest.raises(BackendError, match="as the run was closed"):
        await asked


async def test_own_server_that_keeps_ending_is_not_started_for_ever(own, shared, tmp_path):
    from finetune_nb.backends.local.vllm.sampler import MOST_STARTS, VLLMSampler

    server = own("--fail")
    sampler = VLLMSampler(shared, server.config, server, tmp_path / "adapters")
    for _ in range(MOST_STARTS):
        with pytest.raises(BackendError, match="before it served anything"):
            await sampler.submit(PROMPT, DRAWN, 0)
    with pytest.raises(BackendError, match="has ended 3 times in 60 minutes: ValueError: no room"):
        await sampler.submit(PROMPT, DRAWN, 0)
    await sampler.aclose()


@pytest.mark.parametrize(("adapted", "kind"), [(True, ServerGone), (False, BackendError)])
def test_own_server_that_ends_while_it_is_compared_is_gone_if_it_had_replied_before(
    own, shared, tmp_path, monkeypatch, adapted, kind
):
    from finetune_nb.backends.local.vllm import sampler as module

    server = own()
    sampler = module.VLLMSampler(shared, server.config, server, tmp_path / "adapters")
    client = server.start()
    server.wait(client)

    def ends(*args):
        os.killpg(server.pid, signal.SIGKILL)
        raise BackendError("the vLLM server refuses a request (500: EngineCore encountered an issue)")

    monkeypatch.setattr(module, "prove", ends)
    with pytest.raises(BackendError, match="the vLLM server has ended. Its log: ") as raised:
        sampler._prove(client, server.name, adapted)
    assert type(raised.value) is kind


LOGS = {
    "worker": (
        "(APIServer pid=1) WARNING 11-29 [utils.py] Found ulimit. This can cause errors like `OSError: [Errno 24] Too many`\n"
        "(Worker pid=3) ERROR 11-29 18:55:39 [multiproc_executor.py:1063] RuntimeError: Unsupported CPU attention: head_dim=16\n"
        "(EngineCore pid=2) ERROR 11-29 18:55:39 [core.py:1512] RuntimeError: Worker failed with error 'Unsupported'\n"
        "(APIServer pid=1) ERROR [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
        "nanobind: leaked 3 instances!\n",
        "RuntimeError: Unsupported CPU attention: head_dim=16",
    ),
    "options": (
        "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --no-such-option\n",
        "error: unrecognized arguments: --no-such-option",
    ),
    "nothing": ("INFO: started\n", ""),
}


@pytest.mark.parametrize("kind", LOGS)
def test_error_that_came_first_in_a_log_is_found(tmp_path, kind):
    text, expected = LOGS[kind]
    (tmp_path / "log").write_text(text)
    assert process.first_error(tmp_path / "log") == expected


def test_environment_without_vllm_is_refused_with_what_to_install():
    with pytest.raises(
        ConfigError, match=r"there is no vLLM in the environment of .*pip install vllm.*FINETUNE_NB_VLLM_PYTHON"
    ):
        process._environment(VLLMConfig(python=sys.executable))
    with pytest.raises(ConfigError, match="cannot be run"):
        process._environment(VLLMConfig(python="/no/such/python"))


def test_options_of_a_server_depend_on_where_it_runs():
    on_gpu = process.options(
        VLLMConfig(gpu_memory=0.8, sleep=True, max_model_len=4096), "m", "n", 1, 16, "bfloat16", False
    )
    text = " ".join(on_gpu)
    assert "--gpu-memory-utilization 0.8" in text and "--enable-sleep-mode" in text and "--max-model-len 4096" in text
    assert "--logprobs-mode processed_logprobs" in text and "--generation-config vllm" in text
    assert "--no-enable-chunked-prefill" not in text
    whole = process.options(VLLMConfig(), "m", "n", 1, None, "bfloat16", False)
    assert "--enable-lora" not in whole and "--enable-lora" in on_gpu
    on_cpu = " ".join(process.options(VLLMConfig(), "m", "n", 1, 16, "float32", True))
    assert "--no-enable-chunked-prefill" in on_cpu and "--gpu-memory-utilization" not in on_cpu
