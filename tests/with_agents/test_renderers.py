"""The client with which verifiers and prime-rl sample, as it is installed. It renders by itself and asks for ids."""

from __future__ import annotations

import openai
import pytest

from finetune_nb.backends.local.policy import LocalPolicy
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.rollouts.episodes import episode_from_steps
from finetune_nb.training.batch import token_sequences
from finetune_nb.types import EpisodeKey, EvalInputItem, SamplingParams, Trajectory

renderers = pytest.importorskip("renderers")

from renderers.client import generate  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
async def asked():
    """A client, its renderer and the arguments of every call, and the episode that records them."""
    policy = LocalPolicy.load("embedded", deterministic=True)
    llm = PolicyLLM(policy, "tiny", SamplingParams(1.0, 12))
    with CallRecorder(EpisodeKey("train", 0, 0, 0), seed=1).recording([policy]) as episode:
        yield (
            {"client": llm.openai(), "renderer": renderers.create_renderer(policy.tokenizer, None), "model": "tiny"},
            episode,
        )
    await gateway().close_clients()


async def test_turns_have_the_ids_and_log_probabilities_that_are_recorded(asked):
    arguments, episode = asked
    sampling = {"max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 5}
    first = await generate(messages=[{"role": "user", "content": "3+4"}], sampling_params=sampling, **arguments)
    again = arguments["renderer"].render([{"role": "user", "content": "5+6"}], add_generation_prompt=True).token_ids
    ids = [*first["prompt_ids"], *first["completion_ids"], *again]
    second = await generate(messages=[], prompt_ids=ids, sampling_params=sampling, **arguments)
    for call, told in zip(episode.calls, (first, second), strict=True):
        assert (call.prompt_ids, call.response_ids) == (told["prompt_ids"], told["completion_ids"])
        assert call.logprobs == told["completion_logprobs"] and call.finish_reason == told["finish_reason"]
    item = EvalInputItem(id="q", input_obj="", expected_output_obj="", full_dataset_entry={})
    item.trajectory = episode.steps()
    (sequence,) = token_sequences(Trajectory(episode=episode_from_steps(item.trajectory)[0], reward=1.0), 1.0)
    assert sequence.ids == [*ids, *second["completion_ids"]]


async def test_a_prompt_that_is_too_long_is_seen_before_it_is_sent_and_refused_where_it_is_sent(asked):
    arguments, episode = asked
    long = [{"role": "user", "content": "3+4" * 1000}]
    with pytest.raises(renderers.OverlongPromptError):
        await generate(messages=long, **arguments)  # by max_model_len of /v1/models
    with pytest.raises(openai.BadRequestError, match="tokens, but this model holds"):
        await generate(messages=long, max_prompt_len=10**9, **arguments)
    assert not episode.calls
