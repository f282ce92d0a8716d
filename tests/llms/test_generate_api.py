"""`/inference/v1/generate`: what is answered, what is recorded, and what is refused."""

from __future__ import annotations

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.llms.call_recorder import CallRecorder  # noqa: E402
from finetune_nb.llms.client import PolicyLLM  # noqa: E402
from finetune_nb.rollouts.episodes import episode_from_steps  # noqa: E402
from finetune_nb.testing import ScriptedPolicy  # noqa: E402
from finetune_nb.training.batch import token_sequences  # noqa: E402
from finetune_nb.types import EpisodeKey, EvalInputItem, SamplingParams, Trajectory  # noqa: E402


@pytest.fixture(scope="module")
def policy():
    return LocalPolicy.load("embedded", deterministic=True)


@pytest.fixture
def llm(policy):
    policy.version = 3
    return PolicyLLM(policy, "tiny", SamplingParams(1.0, 12))


@pytest.fixture
def episode():
    with CallRecorder(EpisodeKey("train", 0, 0, 0), seed=1).recording() as episode:
        yield episode


def prompt(policy, text="3+4"):
    return policy.render([{"role": "user", "content": text}])


async def post(llm, body, key=None, url=None, path="/inference/v1/generate"):
    headers = {"Authorization": f"Bearer {llm.api_key if key is None else key}"}
    url = f"{llm.base_url.removesuffix('/v1')}{path}" if url is None else url
    async with httpx.AsyncClient(trust_env=False, headers=headers) as client:
        return await client.post(url, json=body, timeout=60)


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/inference/v1/generate"])
async def test_ids_come_back_with_their_log_probabilities_in_both_spellings(llm, episode, policy, path):
    ids = prompt(policy)
    asked = {"max_tokens": 6, "temperature": 0.7, "seed": 3, "logprobs": 1, "skip_special_tokens": False, "top_p": 1.0}
    body = {"model": "any", "token_ids": ids, "sampling_params": asked, "return_token_ids": True, "features": None,
            "request_id": "mine", "cache_salt": "s", "priority": 0}  # fmt: skip
    answer = (await post(llm, body, path=path)).json()
    (call,) = episode.calls
    (choice,) = answer["choices"]
    assert (call.prompt_ids, call.sampling.temperature, call.sampling.max_tokens) == (ids, 0.7, 6)
    assert choice["token_ids"] == call.response_ids
    content = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == call.logprobs
    assert [entry["token_id"] for entry in content] == call.response_ids
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in call.response_ids]
    length = len(call.response_ids)
    assert choice["weight_versions"] == [{"version": "3", "start": 0, "end": length}]
    assert choice["finish_reason"] == call.finish_reason in ("stop", "length") and choice["index"] == 0
    assert (answer["request_id"], answer["model"], answer["output_mode"]) == ("mine", "tiny", "tokens")
    assert answer["prompt_token_ids"] == ids
    total = len(ids) + length
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": length, "total_tokens": total}


async def test_the_settings_of_the_run_are_the_defaults_and_ids_of_the_prompt_are_told_when_asked_for(
    llm, episode, policy
):
    answer = (await post(llm, {"token_ids": prompt(policy)})).json()
    assert episode.calls[0].sampling == llm.sampling
    assert answer["prompt_token_ids"] is None and answer["request_id"].startswith("generate-")


async def test_turns_are_recorded_and_trained_as_those_of_any_other_request(llm, episode, policy):
    ids = prompt(policy)
    first = (await post(llm, {"token_ids": ids})).json()["choices"][0]["token_ids"]
    second = [*ids, *first, *policy.encode("\nagain ")]
    await post(llm, {"token_ids": second})
    item = EvalInputItem(id="q", input_obj="", expected_output_obj="", full_dataset_entry={})
    item.trajectory = episode.steps()
    trajectory = Trajectory(episode=episode_from_steps(item.trajectory)[0], reward=1.0)
    (sequence,) = token_sequences(trajectory, 1.0)
    assert sequence.ids == [*second, *episode.calls[1].response_ids]
    assert sequence.sampled == [False] * len(ids) + [True] * len(first) + [False] * (
        len(second) - len(ids) - len(first)
    ) + [True] * len(episode.calls[1].response_ids)


async def test_a_stop_token_of_the_request_ends_the_reply_and_belongs_to_it(llm, episode, policy):
    ids = prompt(policy)
    answer = await post(llm, {"token_ids": ids, "sampling_params": {"temperature": 0}})
    whole = answer.json()["choices"][0]["token_ids"]
    assert len(whole) > 2
    asked = {"temperature": 0, "stop_token_ids": [whole[1], 10**6]}
    choice = (await post(llm, {"token_ids": ids, "sampling_params": asked})).json()["choices"][0]
    end = whole.index(whole[1]) + 1
    assert (choice["token_ids"], choice["finish_reason"]) == (whole[:end], "stop")
    call = episode.calls[1]
    assert call.response_ids == whole[:end] and len(call.logprobs) == len(call.tokens) == end
    assert call.logprobs == pytest.approx(episode.calls[0].logprobs[:end])
    assert call.reply["content"] == policy.decode(whole[:end])


async def test_a_stop_text_and_several_choices(llm, episode, policy):
    ids = prompt(policy)
    said = (await post(llm, {"token_ids": ids, "sampling_params": {"temperature": 0}})).json()["choices"][0]
    text = policy.decode(said["token_ids"])[1]
    asked = {"temperature": 0, "stop": [text, "never"], "n": 2}
    answer = (await post(llm, {"token_ids": ids, "sampling_params": asked})).json()
    assert [choice["stop_reason"] for choice in answer["choices"]] == [text, text]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1] and len(episode.calls) == 3


async def test_the_model_tells_how_many_tokens_it_holds(llm, episode, policy):
    async with httpx.AsyncClient(trust_env=False, headers={"Authorization": f"Bearer {llm.api_key}"}) as client:
        listed = (await client.get(f"{llm.base_url}/models")).json()
    assert [(entry["id"], entry["max_model_len"]) for entry in listed["data"]] == [("tiny", policy.longest)]


WRONG = {
    "token_ids is null": {},
    "token_ids is empty": {"token_ids": []},
    "token_ids is": {"token_ids": [1, "2"]},
    "token_ids is [-1]": {"token_ids": [-1]},
    "sampling_params is 3": {"token_ids": [5], "sampling_params": 3},
    "stop_token_ids is": {"token_ids": [5], "sampling_params": {"stop_token_ids": "x"}},
    "logprobs is 5": {"token_ids": [5], "sampling_params": {"logprobs": 5}},
    "max_tokens is 0": {"token_ids": [5], "sampling_params": {"max_tokens": 0}},
    "top_p": {"token_ids": [5], "sampling_params": {"top_p": 0.9}},
    "min_tokens": {"token_ids": [5], "sampling_params": {"min_tokens": 4}},
    "no parameter 'stopp'": {"token_ids": [5], "sampling_params": {"stopp": ["x"]}},
    "features": {"token_ids": [5], "features": {"image": [1]}},
    "answers come whole": {"token_ids": [5], "stream": True},
    "the prompt has ids from 5 to 1000000": {"token_ids": [5, 10**6]},
    "this model holds": {"token_ids": [5] * 100_000},
}


@pytest.mark.parametrize("message", WRONG)
async def test_what_cannot_be_honoured_is_refused_as_vllm_does_and_recorded_nowhere(llm, episode, message):
    answer = await post(llm, WRONG[message])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert message in error["message"]
    assert not episode.calls


async def test_what_the_run_ignores_is_named_in_the_record(llm, policy):
    with CallRecorder(EpisodeKey("train", 0, 0, 0), ignore=frozenset({"top_p"})).recording() as episode:
        await post(llm, {"token_ids": prompt(policy), "sampling_params": {"top_p": 0.9, "max_tokens": 2}})
    assert episode.calls[0].ignored == ("top_p",)


async def test_keys_and_addresses_are_checked_as_everywhere(llm, policy):
    body = {"token_ids": prompt(policy), "sampling_params": {"max_tokens": 1}}
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        url = f"{llm.base_url.removesuffix('/v1')}/inference/v1/generate"
        key = llm.api_key
        assert (await post(llm, body, key="wrong")).json()["error"]["type"] == "AuthenticationError"
        with CallRecorder(EpisodeKey("train", 0, 1, 0)).recording():
            other = await post(llm, body, url=url)
        assert (other.status_code, other.json()["error"]["type"]) == (403, "PermissionDeniedError")
        nothing = await post(llm, body, url=url.replace("/e/", "/e/9"))
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (404, 404)
        assert not episode.calls
    ended = await post(llm, body, key=key, url=url)
    assert ended.status_code == 410 and "has ended" in ended.json()["error"]["message"]


async def test_a_model_of_another_server_is_not_asked_so(episode):
    llm = PolicyLLM(ScriptedPolicy(lambda messages, seed: "seven"), "upstream")
    llm.takes_options = True
    answer = await post(llm, {"token_ids": [5]})
    assert answer.status_code == 404 and "chat completions" in answer.json()["error"]["message"]
