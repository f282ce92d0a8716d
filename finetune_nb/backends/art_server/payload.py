"""What `art run` is sent, as ours. A training request carries conversations; here each sampled turn of one is found among
the calls that this server answered, so that it is trained on after the very prompt and with the very ids that it was sampled.

ART's own server renders the conversation anew. An agent that asks every turn by itself (a game that shows only the board)
is then trained on prompts that it never saw; here it is not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field

from ...errors import BackendError
from ...llms.call_recorder import CallRecorder
from ...llms.chat_tokenizer import ChatTokenizer
from ...rollouts.episodes import episode_from_steps
from ...types import EpisodeKey, EvalInputItem, LLMCall, SamplingParams, Trajectory, TrajectoryCollection

__all__ = [
    "AnsweredCalls",
    "Model",
    "TrainRequest",
    "collection_of",
]

AS_ID = "token_id:"


class Model(BaseModel):
    """art.TrainableModel, as far as it is read here."""

    name: str
    project: str
    base_model: str = ""
    internal: dict[str, Any] | None = Field(default=None, alias="_internal_config")

    @property
    def trainer_args(self) -> dict[str, Any]:
        """The `training` section of the Toolkit's config."""
        return (self.internal or {}).get("trainer_args") or {}


class SentConversation(BaseModel):
    messages_and_choices: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


class SentTrajectory(SentConversation):
    additional_histories: list[SentConversation] = []
    reward: float | None


class SentGroup(BaseModel):
    trajectories: list[SentTrajectory]


class TrainRequest(BaseModel):
    """The body of /_train_model."""

    model: Model
    trajectory_groups: list[SentGroup]
    config: dict[str, Any] = {}
    dev_config: dict[str, Any] = {}

    @property
    def learning_rate(self) -> float | None:
        """The user's: the Toolkit's plugin puts 5e-5 into `config` whatever its own config says."""
        given = self.model.trainer_args.get("learning_rate", self.config.get("learning_rate"))
        if given is not None and not (isinstance(given, int | float) and 0 < given < math.inf):
            raise BackendError(f"the learning rate is {given!r}; expected a number above 0.")
        return given

    @property
    def kl_coef(self) -> float:
        """Weight of the KL divergence from the first weights: the user's `beta`, which the Toolkit's plugin passes on under a
        name that ART does not know, or else ART's `kl_penalty_coef`."""
        given = self.model.trainer_args.get("beta", self.config.get("kl_penalty_coef")) or 0.0
        if not (isinstance(given, int | float) and 0 <= given < math.inf):
            raise BackendError(f"beta, the weight of the KL divergence, is {given!r}; expected a number from 0.")
        return float(given)


class AnsweredCalls:
    """The calls that were answered here, found again by what a conversation keeps of them: the log probability of every
    sampled token, to the last digit, and the message before."""

    def __init__(self, calls: Iterable[LLMCall] = ()) -> None:
        self._by_logprobs: defaultdict[tuple[float, ...], list[LLMCall]] = defaultdict(list)
        for call in calls:
            self._by_logprobs[tuple(call.logprobs or ())].append(call)

    def find(self, tokens: Sequence[str], logprobs: Sequence[float], before: Any) -> LLMCall | None:
        """The call that sampled these tokens; None where there is none, or none that is certain."""
        found = [
            call
            for call in self._by_logprobs.get(tuple(logprobs), ())
            if list(tokens) in ([f"{AS_ID}{token}" for token in call.response_ids or ()], call.tokens)
        ]
        if len({tuple(call.prompt_ids or ()) for call in found}) > 1:
            found = [call for call in found if call.messages[-1].get("content") == before]
        return found[0] if len({tuple(call.prompt_ids or ()) for call in found}) == 1 else None


def collection_of(
    groups: Sequence[SentGroup], answered: AnsweredCalls, tokenizer: ChatTokenizer, run_id: str
) -> tuple[TrajectoryCollection, int, int]:
    """The trajectories, how many sampled turns they have, and how many of these nobody sampled here: such a turn is
    rendered anew (`exact` is False). Raises BackendError for turns that cannot be read."""
    turns = unknown = 0
    made: list[list[Trajectory]] = []
    for g, group in enumerate(groups):
        made.append([])
        for n, sent in enumerate(group.trajectories):
            where = f"group {g}, trajectory {n}"
            calls: list[LLMCall] = []
            for conversation in (sent, *sent.additional_histories):
                calls += _calls_of(conversation, answered, tokenizer, where)
            turns, unknown = turns + len(calls), unknown + sum(not call.exact for call in calls)
            numbered = [replace(call, sequence=i) for i, call in enumerate(calls)]
            item = EvalInputItem.model_construct(
                id=f"group {g}", trajectory=CallRecorder(EpisodeKey("train", 0, g, n), calls=numbered).steps()
            )
            try:
                episode, version = episode_from_steps(item.trajectory)
            except ValueError as error:
                raise BackendError(f"{where}: {error}") from None
            metadata = {"id": item.id, "generation": n, "run_id": run_id, "policy_version": version}
            reward = math.nan if sent.reward is None else sent.reward
            made[-1].append(Trajectory(episode=episode, reward=reward, metadata=metadata))
    return TrajectoryCollection(trajectories=made, run_id=run_id), turns, unknown


def _calls_of(
    conversation: SentConversation, answered: AnsweredCalls, tokenizer: ChatTokenizer, where: str
) -> list[LLMCall]:
    """A call for every turn that was sampled; ART marks one by sending an OpenAI choice in place of a message."""
    calls: list[LLMCall] = []
    so_far: list[dict[str, Any]] = []
    for sent in conversation.messages_and_choices:
        if "message" not in sent:
            so_far.append(sent)
            continue
        content = (sent.get("logprobs") or {}).get("content") or []
        try:
            tokens = [str(token["token"]) for token in content]
            logprobs = [float(token["logprob"]) for token in content]
        except (TypeError, KeyError, ValueError):
            raise BackendError(f"{where}: the logprobs of a choice are not those of the OpenAI API.") from None
        message = {key: value for key, value in dict(sent["message"]).items() if value is not None}
        if not tokens:
            raise BackendError(
                f"{where} has a choice without logprobs, so it cannot be trained on. Sample from this server, or with "
                "`logprobs: true`."
            )
        call = answered.find(tokens, logprobs, so_far[-1].get("content") if so_far else None)
        calls.append(call or _unknown(conversation, so_far, message, tokens, logprobs, sent, tokenizer, where))
        so_far.append(message)
    return calls


def _unknown(
    conversation: SentConversation,
    so_far: list[dict[str, Any]],
    message: dict[str, Any],
    tokens: list[str],
    logprobs: list[float],
    sent: dict[str, Any],
    tokenizer: ChatTokenizer,
    where: str,
) -> LLMCall:
    """A turn that somebody else sampled: its own ids as far as they are told, its prompt rendered anew."""
    ids: list[int] = []
    for token in tokens:
        told = token.removeprefix(AS_ID)
        found = [int(told)] if token.startswith(AS_ID) and told.isdecimal() else tokenizer.encode(token)
        if len(found) != 1:
            raise BackendError(f"{where}: {token!r} is no token of the model that is trained here.")
        ids += found
    return LLMCall(
        episode=None,
        sequence=0,
        model="",
        messages=list(so_far),
        tools=conversation.tools,
        reply=message,
        prompt_ids=list(tokenizer.render(so_far, conversation.tools)),
        response_ids=ids,
        tokens=tokenizer.tokens(ids),
        logprobs=logprobs,
        finish_reason=sent.get("finish_reason"),
        policy_version=None,
        sampling=SamplingParams(),
        seconds=math.nan,
        exact=False,
    )
