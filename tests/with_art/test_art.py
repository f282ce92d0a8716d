"""The real openpipe-art with a Backend of our own that trains a small model on the CPU, on the ids that it is given."""

import asyncio
import math
import re

import art
import pytest
import torch
from openai.types.chat.chat_completion import Choice

import finetune_nb as ft
from finetune_nb.backends.art.adapter import OpenPipeArtAdapter, OpenPipeArtConfig
from finetune_nb.backends.art.trajectories import art_groups
from finetune_nb.testing import ScriptedBuilder, make_trajectory

pytestmark = [pytest.mark.slow, pytest.mark.proof]


class Bigrams:
    """A Backend of ART's protocol: a policy gradient on a table of bigrams, with the ids that stand in the Choices."""

    def __init__(self, words=128):
        self.logits = torch.zeros(words, words, requires_grad=True)
        self.seen: list[list[art.TrajectoryGroup]] = []
        self.rates: list[float] = []
        self.step = self.closed = 0
        self.error: Exception | None = None
        self.pause = 0.0

    def _model_inference_name(self, model, step=None):
        return f"{model.name}@{self.step if step is None else step}"

    async def close(self):
        self.closed += 1

    async def register(self, model):
        self.model = model

    async def _get_step(self, model):
        return self.step

    async def _delete_checkpoint_files(self, model, steps_to_keep):
        pass

    async def _prepare_backend_for_training(self, model, config):
        return "http://127.0.0.1:9/v1", "none"

    async def train(self, model, trajectory_groups, *, learning_rate=5e-6, epsilon=None):
        groups = list(trajectory_groups)
        self.seen.append(groups)
        self.rates.append(learning_rate)
        await asyncio.sleep(self.pause)
        if self.error is not None:
            raise self.error
        loss = torch.zeros(())
        for group in groups:
            rewards = torch.tensor([trajectory.reward for trajectory in group.trajectories])
            for trajectory, advantage in zip(group.trajectories, rewards - rewards.mean(), strict=True):
                for choice in trajectory.messages_and_choices:
                    if isinstance(choice, Choice):
                        ids = torch.tensor(ids_of(choice))
                        loss = loss - advantage * self.logits.log_softmax(-1)[ids[:-1], ids[1:]].sum()
        loss.backward()
        with torch.no_grad():
            self.logits -= learning_rate * self.logits.grad
            self.logits.grad = None
        self.step += 1
        return art.types.LocalTrainResult(step=self.step, metrics={"loss/train": float(loss.detach()), "odd": math.nan})

    def _train_sft(self, *args, **kwargs):
        raise RuntimeError("no SFT here")

    def likes(self, text):
        ids = torch.tensor([ord(c) for c in text])
        return float(self.logits.log_softmax(-1)[ids[:-1], ids[1:]].sum().detach())


def ids_of(choice):
    tokens = [entry.token for entry in choice.logprobs.content]
    assert all(re.fullmatch(r"token_id:\d+", token) for token in tokens)
    return [int(token.removeprefix("token_id:")) for token in tokens]


def group(*rewarded, example="q"):
    return [make_trajectory(reward, example, n, reply=reply) for n, (reply, reward) in enumerate(rewarded)]


def collection(*groups):
    return ft.TrajectoryCollection(trajectories=list(groups), run_id="run")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # ART keeps a folder where it runs


@pytest.fixture
def backend():
    return Bigrams()


@pytest.fixture
async def adapter(backend):
    made = OpenPipeArtAdapter(OpenPipeArtConfig(base_model="bigrams", learning_rate=0.5), backend=backend)
    await made.initialize(ft.FinetuneConfig())
    yield made
    await made.aclose()


def test_importing_art_leaves_transformers_as_it_is():
    from transformers import masking_utils

    from finetune_nb.backends.import_guard import restore_transformers

    restore_transformers()  # as the adapter does when it imports art
    assert masking_utils._preprocess_mask_arguments.__module__ == "transformers.masking_utils"


async def test_rewarded_replies_become_likelier(adapter, backend):
    before = backend.likes("good"), backend.likes("evil")
    for _ in range(5):
        ref = await adapter.submit(collection(group(("good", 1.0), ("evil", 0.0))))
        status = await adapter.wait_until_complete(ref)
        assert status.status == "completed"
    assert backend.likes("good") > before[0] + 1
    assert backend.likes("evil") < before[1]
    assert status.metadata["step"] == 5
    assert status.metadata["metrics"].keys() == {"loss/train", "trajectories"}
    assert await adapter.status(ref) == status  # as often as one likes


async def test_the_learning_rate_is_passed_and_can_be_changed_live(adapter, backend):
    for rate in (0.5, 1e-3):
        adapter.adapter_config.learning_rate = rate
        await adapter.wait_until_complete(await adapter.submit(collection(group(("a", 1.0), ("b", 0.0)))))
    assert backend.rates == [0.5, 1e-3]


async def test_a_run_trains_by_art(adapter, backend, closing):
    def rewards(epoch):
        return {f"q{n}": [0.0, 1.0] for n in range(4)}

    run = closing(ft.Run(builder=ScriptedBuilder(rewards), adapter=adapter, curriculum=dict(initial_percentile=0.5)))
    epoch = await run.next_epoch()
    assert epoch.job.status == "completed"
    assert [g.trajectories[0].metadata["id"] for g in backend.seen[0]] == ["q0", "q1"]
    assert math.isfinite(epoch.train_metrics["loss/train"])
    run.close()
    assert backend.closed == 0  # it was handed over, and is somebody else's


async def test_a_job_that_fails_says_why_and_one_can_be_canceled(adapter, backend):
    backend.error = RuntimeError("no memory left")
    status = await adapter.wait_until_complete(await adapter.submit(collection(group(("a", 1.0), ("b", 0.0)))))
    assert (status.status, status.message) == ("failed", "RuntimeError: no memory left")
    backend.error, backend.pause = None, 60
    ref = await adapter.submit(collection(group(("a", 1.0), ("b", 0.0))))
    await asyncio.sleep(0)
    await adapter.cancel(ref)
    assert (await adapter.wait_until_complete(ref)).status == "canceled"
    with pytest.raises(ft.UnknownJob):
        await adapter.status(ft.TrainingJobRef(run_id="run", backend="openpipe_art", metadata={"job_id": "x"}))


# ── trajectories ─────────────────────────────────────────────────────────────────────────────────────────────────────

CALL = {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def episode():
    return [
        ft.EpisodeItem(role="system", content="s"),
        ft.EpisodeItem(role="user", content="1+1"),
        ft.EpisodeItem(
            role="assistant",
            content="",
            logprobs=[-0.5, -0.25],
            metadata={"token_ids": [7, 9], "tokens": ["ad", "d"], "tool_calls": [CALL], "finish_reason": "tool_calls"},
        ),
        ft.EpisodeItem(role="tool", content="2", metadata={"tool_call_id": "call_0"}),
        ft.EpisodeItem(role="assistant", content="an example", logprobs=[]),
        ft.EpisodeItem(role="user", content="and?"),
        ft.EpisodeItem(role="assistant", content="2", logprobs=[-1.0], metadata={"token_ids": [5]}),
        ft.EpisodeItem(role="user", content="anew", metadata={"conversation": 1}),
        ft.EpisodeItem(role="assistant", content="3", logprobs=[-1.5], metadata={"token_ids": [6], "conversation": 1}),
    ]


def test_trajectories_become_arts_with_their_ids_tool_calls_and_conversations():
    metadata = {"id": "q", "generation": 1, "policy_version": 3, "scores": {"f": 0.5, "g": None}, "nested": {"x": 1}}
    ((made,),) = [
        g.trajectories
        for g in art_groups(collection([ft.Trajectory(episode=episode(), reward=0.5, metadata=metadata)]))
    ]
    assert made.reward == 0.5
    assert (made.initial_policy_version, made.final_policy_version) == (3, 3)
    assert made.metrics == {"f": 0.5}
    assert made.metadata == {"id": "q", "generation": 1, "policy_version": 3}
    sampled = [m for m in made.messages_and_choices if isinstance(m, Choice)]
    assert [ids_of(choice) for choice in sampled] == [[7, 9], [5]]
    assert [[e.logprob for e in choice.logprobs.content] for choice in sampled] == [[-0.5, -0.25], [-1.0]]
    assert [call.model_dump() for call in sampled[0].message.tool_calls] == [CALL]
    assert sampled[0].finish_reason == "tool_calls"
    assert made.messages_and_choices[3] == {"role": "tool", "content": "2", "tool_call_id": "call_0"}
    assert made.messages_and_choices[4] == {"role": "assistant", "content": "an example"}
    (history,) = made.additional_histories
    assert ids_of(history.messages_and_choices[1]) == [6]
    assert art.Trajectory.model_validate_json(made.model_dump_json()).reward == 0.5  # as a remote backend would get it


def test_art_takes_the_sampled_ids_as_they_are():
    """By ART's own tokenization, with a tokenizer that would cut the text otherwise."""
    from art.preprocessing.tokenize import tokenize_trajectory_groups
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({f"w{n}": n for n in range(64)} | {"user": 64, "assistant": 65, "end": 66}, "w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} end {% endfor %}"
    ids = [7, 9, 7]  # the text that they are said to be is another one

    def sampled(reward):
        items = [
            ft.EpisodeItem(role="user", content="w1 w2"),
            ft.EpisodeItem(role="assistant", content="w3", logprobs=[-0.5] * 3, metadata={"token_ids": ids}),
        ]
        return ft.Trajectory(episode=items, reward=reward)

    groups = art_groups(collection([sampled(1.0), sampled(0.0)]))
    results = list(tokenize_trajectory_groups(tokenizer, groups, False, True, shuffle_group_trajectories=False))
    assert len(results) == 2
    for result in results:
        trained = [token for token, on in zip(result.token_ids, result.assistant_mask, strict=True) if on]
        assert trained[: len(ids)] == ids


def test_what_cannot_be_trained_on_exactly_is_refused():
    text = [ft.EpisodeItem(role="user", content="q"), ft.EpisodeItem(role="assistant", content="a", logprobs=[-1.0])]
    with pytest.raises(ft.BackendError, match="1 logprobs and no token_ids"):
        art_groups(collection([ft.Trajectory(episode=text, reward=1.0)]))
    pair = ft.DPOItem(prompt="q", chosen_response="a", rejected_response="b")
    with pytest.raises(ft.BackendError, match="is a preference"):
        art_groups(collection([ft.Trajectory(episode=[pair], reward=1.0)]))
    assert art_groups(collection([make_trajectory(math.nan)])) == []


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_option_that_the_backend_does_not_take_is_said(backend):
    config = OpenPipeArtConfig(base_model="bigrams", train_options={"epsilom": 0.2})
    with pytest.raises(ft.ConfigError, match="train takes no 'epsilom'. Did you mean 'epsilon'"):
        await OpenPipeArtAdapter(config, backend=backend).initialize(ft.FinetuneConfig())


async def test_a_backend_that_needs_more_packages_names_them():
    config = ft.load_config(
        {"trainer_adapters": {"a": {"_type": "openpipe_art", "base_model": "m", "backend": "local"}}}
    )
    with pytest.raises(ft.BackendError, match=r'pip install "openpipe-art\[backend\]"'):
        await OpenPipeArtAdapter(config.trainer_adapters["a"]).initialize(ft.FinetuneConfig())


def test_the_toolkits_plugin_with_this_art_is_refused_with_the_pin_that_heals_it():
    pytest.importorskip("nat.plugins.openpipe")
    from nat.plugins.openpipe.config import ARTBackendConfig, ARTTrainerAdapterConfig
    from nat.plugins.openpipe.trainer_adapter import ARTTrainerAdapter

    from finetune_nb.backends.nat.opening import check_art

    adapter = ARTTrainerAdapter(ARTTrainerAdapterConfig(backend=ARTBackendConfig(ip="127.0.0.1", port=9)))
    with pytest.raises(ft.ConfigError, match=r"openpipe-art 0\.5\.\d+ does not have.*openpipe-art==0\.5\.17"):
        check_art(adapter)


def test_the_toolkit_as_pip_installs_it_is_told_what_it_lacks(tmp_path):
    (tmp_path / "config.yml").write_text("finetuning: {enabled: true}")
    with pytest.raises(ft.ConfigError, match=r"nvidia-nat-profiler==1\.9\.0"):
        ft.Run.from_nat(tmp_path / "config.yml")
