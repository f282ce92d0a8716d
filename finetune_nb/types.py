"""Every noun of finetuning, in the order of an epoch's road: model calls, what an evaluation returns (in eval_types.py),
episodes and trajectories, the curriculum's choice, training jobs, and the record of an epoch.

pydantic models are the seed's (field names, defaults and validators of nvidia-nat-core 1.9.0, so that a dump of one
validates as the other); frozen dataclasses are values made inside. Missing numbers are NaN, never 0. The only logic here reads
logprobs and messages that others have written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, model_validator

from .eval_types import (
    EvalInput,
    EvalInputItem,
    EvalOutput,
    EvalOutputItem,
    EvaluationRunConfig,
    EvaluationRunOutput,
    IntermediateStep,
    IntermediateStepCategory,
    IntermediateStepPayload,
    IntermediateStepState,
    IntermediateStepType,
    InvocationNode,
    RolloutFailure,
    StreamEventData,
    UsageStats,
)
from .observe import resolve

if TYPE_CHECKING:
    import numpy as np

    from .config import CurriculumSettings

__all__ = [
    "CurriculumState",
    "DPOItem",
    "EpisodeItem",
    "EpisodeItemRole",
    "EpisodeKey",
    "Epoch",
    "EpochMetrics",
    "EvalInput",
    "EvalInputItem",
    "EvalOutput",
    "EvalOutputItem",
    "EvaluationRunConfig",
    "EvaluationRunOutput",
    "GROUP_REASONS",
    "GroupReason",
    "GroupStatistics",
    "IntermediateStep",
    "IntermediateStepCategory",
    "IntermediateStepPayload",
    "IntermediateStepState",
    "IntermediateStepType",
    "InvocationNode",
    "LLMCall",
    "OpenAIMessage",
    "RolloutFailure",
    "Sample",
    "SamplingParams",
    "Selection",
    "StreamEventData",
    "TrainingJobRef",
    "TrainingJobStatus",
    "TrainingStatusEnum",
    "Trajectory",
    "TrajectoryCollection",
    "UsageStats",
    "Validation",
    "logprob_count",
    "logprob_values",
    "plain_content",
    "same_message",
]

# ── model calls ──────────────────────────────────────────────────────────────────────────────────────────────────────


class EpisodeKey(NamedTuple):
    """Which rollout something belongs to. Sorts in the order of the draw; the same key always samples the same way."""

    phase: str
    """"train", "validation" or "try" (an example run by hand)."""
    epoch: int
    """Counts from 0. For a validation: the policy's version, so that two at one epoch do not collide."""
    example: int
    """Position in the drawn examples, from 0."""
    generation: int
    """Which of the group's rollouts, from 0."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a reply is sampled."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy. Logprobs are those of the distribution that was sampled from."""
    max_tokens: int = 256
    """Longest reply, in tokens; a longer one is cut and its finish reason is "length"."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply. The token that completed one is kept, so that training sees what was sampled."""


class Sample(NamedTuple):
    """What a policy sampled."""

    ids: list[int]
    logprobs: list[float]
    """One natural logarithm a token, of the distribution that it was drawn from."""
    finish_reason: str
    """"stop" (the model ended its turn, or a stop text came) or "length"."""


@dataclass(frozen=True, slots=True)
class LLMCall:
    """One call of a language model: all that is needed to show it and to train on it exactly."""

    episode: EpisodeKey | None
    sequence: int
    """Counts the calls of the episode, from 0."""
    model: str
    """The llm's name in the config."""
    messages: list[dict[str, Any]]
    """The prompt, OpenAI chat format."""
    tools: list[dict[str, Any]] | None
    reply: dict[str, Any]
    """The assistant message: content, tool_calls, reasoning_content."""
    prompt_ids: list[int] | None
    response_ids: list[int] | None
    tokens: list[str] | None
    """Text of each response token."""
    logprobs: list[float] | None
    finish_reason: str | None
    policy_version: int | None
    """None where the model is not one of ours."""
    sampling: SamplingParams
    seconds: float
    exact: bool
    """The ids are those that the model really saw and sampled, not a re-tokenized text."""
    top_logprobs: list[dict[str, float]] | None = None
    """Of each response token the likeliest tokens in its place, text -> natural logprob, where they were asked for."""


# ── episodes and trajectories ─────────────────────────────────────────────────────────────────────────────────────────


class EpisodeItemRole(StrEnum):
    """Who speaks in an episode."""

    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"
    FUNCTION = "function"
    TOOL = "tool"
    ENVIRONMENT = "environment"
    OTHER = "other"


class EpisodeItem(BaseModel):
    """One message of an episode.

    `logprobs` of an assistant turn: one float a sampled token; `[]` for a turn that the policy did not sample (masked in
    training). `metadata` keys: token_ids, tokens (their text), prompt_token_ids, exact (the ids are those that the model saw
    and sampled), drifted (True: its prompt does not begin with the ids of the turn before), temperature, finish_reason,
    tool_calls, tool_call_id, reasoning_content (what the model thought), top_logprobs (of each token the likeliest in its
    place, text -> logprob).
    """

    role: EpisodeItemRole
    content: str
    logprobs: Any | None = None
    metadata: dict | None = None

    @model_validator(mode="after")
    def check_logprobs(self) -> EpisodeItem:
        if self.role == EpisodeItemRole.ASSISTANT and self.logprobs is None:
            raise ValueError("logprobs must be provided for assistant role.")
        return self


class OpenAIMessage(BaseModel):
    """A chat message, plain."""

    role: str
    content: str


class DPOItem(BaseModel):
    """A preference: of two responses to one prompt, the better and the worse."""

    prompt: list[OpenAIMessage] | str
    chosen_response: str
    rejected_response: str


class Trajectory(BaseModel):
    """One rollout of one example, with its reward (NaN where there is none: `metadata["reward_error"]` says why).

    `metadata` keys: id, generation, run_id, reasoning, policy_version, scores (every evaluator's score by name), tools
    (what the model was told of, where it was told of any).
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    episode: list[EpisodeItem] | list[DPOItem]
    reward: float
    shaped_rewards: list[float] | None = None
    metadata: dict | None = None

    def _repr_html_(self) -> str:
        return resolve("finetune_nb.viewer:trajectory_html")(self)

    def __repr__(self) -> str:
        known = self.metadata or {}
        name = f"example={known.get('id')!r}, generation={known.get('generation')}"
        return f"Trajectory({name}, reward={self.reward:g}, {len(self.episode)} messages)"

    __str__ = __repr__


class TrajectoryCollection(BaseModel):
    """Groups of trajectories; one group = one example. Groups are keyed by `metadata["id"]`, never by position."""

    trajectories: list[list[Trajectory]]
    run_id: str
    failures: SkipValidation[list[RolloutFailure]] = Field(default_factory=list, exclude=True)

    def __repr__(self) -> str:
        rollouts = f"{sum(map(len, self.trajectories))} trajectories, {len(self.failures)} failures"
        return f"TrajectoryCollection(run_id={self.run_id!r}, {len(self.trajectories)} groups, {rollouts})"

    __str__ = __repr__


# ── the curriculum's choice ───────────────────────────────────────────────────────────────────────────────────────────


class GroupReason(StrEnum):
    """Why a group is trained on, or is not. `Selection.reasons` holds positions in this list."""

    KEPT = "kept"
    NO_REWARD_SPREAD = "no_reward_spread"
    BEYOND_PERCENTILE = "beyond_percentile"
    SUBSAMPLED = "subsampled"
    NO_REWARD = "no_reward"
    INFINITE_REWARD = "infinite_reward"
    UNDECIDED = "undecided"
    """The epoch ended before groups were chosen."""
    NOT_SUBMITTED = "not_submitted"
    """Someone else's Trainer left it out, with the curriculum off."""


GROUP_REASONS: tuple[GroupReason, ...] = tuple(GroupReason)


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """The rewards of one epoch as columns: G groups, N trajectories, both in the collection's order.

    This is the record that selection, metrics, store, frames, plots and previews all read.
    """

    example_ids: Sequence[Any]
    """(G,) the example that each group belongs to."""
    rewards: np.ndarray
    """(N,) float64; NaN = no reward."""
    offsets: np.ndarray
    """(G+1,) int64; group g is `rewards[offsets[g]:offsets[g + 1]]`."""
    counts: np.ndarray
    """(G,) int64, rewards that are not NaN."""
    means: np.ndarray
    """(G,) float64 over the rewards that are not NaN; NaN where there is none, inf where one is infinite."""
    spreads: np.ndarray
    """(G,) float64, largest minus smallest reward; NaN where there is none or one is infinite."""

    def __len__(self) -> int:
        return len(self.example_ids)


@dataclass(frozen=True)
class CurriculumState:
    """Where the curriculum stands. Stored with every epoch."""

    percentile: float
    """Share of the groups with spread that is trained on, in (0, 1]."""
    last_expansion_epoch: int = -1
    total_groups: int = 0
    """Groups with spread in the first epoch that had any; informational."""
    included_groups: frozenset[int] = frozenset()
    """Positions of the groups last trained on, in their epoch's list."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Which groups of an epoch are trained on, and why the others are not."""

    example_ids: Sequence[Any]
    """(G,)"""
    reasons: np.ndarray
    """(G,) int8, positions in GROUP_REASONS; 0 = kept."""
    kept: np.ndarray
    """(K,) positions of the kept groups, in the order in which they are submitted."""
    state: CurriculumState
    """The state after this selection."""
    settings: CurriculumSettings
    inferred: bool = False
    """True where someone else's Trainer chose, and the reasons are only what can be concluded from its choice."""

    def reason_of(self, position: int) -> GroupReason:
        return GROUP_REASONS[int(self.reasons[position])]

    def left_out(self) -> dict[GroupReason, list[Any]]:
        """Example ids of the groups that are not trained on, by reason."""
        out: dict[GroupReason, list[Any]] = {}
        for example_id, code in zip(self.example_ids, self.reasons.tolist(), strict=True):
            if code:
                out.setdefault(GROUP_REASONS[code], []).append(example_id)
        return out


# ── training jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────


class TrainingJobRef(BaseModel):
    """A job at a backend. Its own id is `metadata["job_id"]`; `run_id` is shared by all jobs of a run."""

    run_id: str
    backend: str
    metadata: dict | None = None


class TrainingStatusEnum(StrEnum):
    """How a job stands; the last three are final."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"


class TrainingJobStatus(BaseModel):
    """`progress` runs from 0 to 100. `metadata["metrics"]` holds what the backend measured (loss, kl, ...)."""

    run_id: str
    backend: str
    status: TrainingStatusEnum
    progress: float | None = None
    message: str | None = None
    metadata: dict | None = None


# ── the record of an epoch ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class EpochMetrics:
    """What an epoch looked like in numbers. Rewards are over all trajectories that have a finite one."""

    mean_reward: float
    min_reward: float
    max_reward: float
    group_quantiles: tuple[float, float, float]
    """10, 50 and 90 % quantiles of the groups' mean rewards: how easy and how hard the examples were."""
    trajectories: int
    groups: int
    failures: int
    groups_with_spread: int
    """Groups whose rewards differ: only these can teach."""
    kept_trajectories: int
    kept_groups: int
    kept_mean_reward: float
    sampled_tokens: int
    """Tokens that the policy sampled, in all trajectories."""
    continued_turns: int | None = None
    """Sampled turns that carry a conversation on. None in records from before these were counted."""
    drifted_turns: int | None = None
    """Those of them that were rendered anew, not behind the sampled ids; each is trained on by itself."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Mean of every evaluator, by name."""


@dataclass(frozen=True)
class Validation:
    """One evaluation of the policy on the validation dataset."""

    epoch: int
    policy_version: int | None
    mean_reward: float
    """NaN where there is none; `error` then says why."""
    examples: int
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    error: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Epoch:
    """All that is known of one epoch."""

    index: int
    """Counts from 0."""
    run_id: str
    collection: TrajectoryCollection
    statistics: GroupStatistics
    selection: Selection
    job: TrainingJobStatus | None
    """None where nothing was submitted; `reason` then says why."""
    reason: str | None
    metrics: EpochMetrics
    validations: tuple[Validation, ...]
    policy_versions: tuple[int | None, int | None]
    """The version that sampled, and the one after training."""
    started_at: float
    """Seconds since 1970, UTC."""
    seconds: Mapping[str, float]
    """What each part took: rollouts, selection, training, validation, total."""

    @property
    def curriculum(self) -> CurriculumSettings:
        return self.selection.settings

    @property
    def train_metrics(self) -> Mapping[str, float]:
        """What the backend measured while training; empty where it says nothing."""
        return ((self.job.metadata if self.job else None) or {}).get("metrics") or {}

    def _repr_html_(self) -> str:
        return resolve("finetune_nb.viewer:epoch_html")(self)

    def __repr__(self) -> str:
        return resolve("finetune_nb.viewer:epoch_text")(self)


def logprob_count(logprobs: Any) -> int:
    """How many tokens have a logprob, in whatever form they came; 0 where the form is unknown."""
    if type(logprobs) is list:
        return len(logprobs)
    try:
        return len(logprob_values(logprobs) or ())
    except (TypeError, ValueError, KeyError):
        return 0


def logprob_values(logprobs: Any) -> list[float] | None:
    """Logprobs in whatever form they came (floats, OpenAI's `{"content": [{"logprob": ...}]}` or objects like it) as
    one float a token; None where there are none."""
    if logprobs is None:
        return None
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else getattr(logprobs, "content", logprobs)
    if content is None:
        return None
    if type(content) is list and all(type(entry) is float for entry in content):
        return content.copy()
    return [
        float(entry["logprob"] if isinstance(entry, Mapping) else getattr(entry, "logprob", entry)) for entry in content
    ]


# ── messages as clients write them ────────────────────────────────────────────────────────────────────────────────────

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_THINKING_TAG = re.compile(r"(</?think(?:ing)?>)\s*")


def plain_content(content: Any) -> Any:
    """The content of a message in the OpenAI format, as one text where it is nothing but text.

    Args:
        content: A text, None, or a list of parts.

    Returns:
        The text; "" for None; a list with other parts, such as pictures, as it is.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS else None
        if not isinstance(text, str):
            return content
        texts.append(text)
    return "".join(texts)


def same_message(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two messages in the OpenAI format are the same message, whichever client wrote them.

    Clients keep a reply in objects of their own and write it again when they send the history back. These are no differences:

    - how the arguments of a tool call are spelled: spaces, order of keys, escapes, 1 or 1.0;
    - the order of tool calls that have ids;
    - arguments that are not a JSON object, sent back as `{}` or as `{"INVALID_JSON": text}`;
    - content that is None, "", missing or split into text parts;
    - white space around thinking tags;
    - a field that only one of the two has: `index`, `type`, `refusal`, `annotations`, `name`, `reasoning_content`, the id of a
      tool call.

    Any other role, text, tool, argument or id is a difference.

    Args:
        a: A message.
        b: The other one.

    Returns:
        True where they are the same.
    """
    if a == b and not a.get("tool_calls"):  # most messages; arguments need more care, for True == 1 in Python
        return True
    if a.get("role") != b.get("role") or (a.get("tool_call_id") or None) != (b.get("tool_call_id") or None):
        return False
    for name in ("name", "reasoning_content"):
        # Agent libraries add a name, and most leave out what the model thought, but none of them writes another one.
        if a.get(name) and b.get(name) and a[name] != b[name]:
            return False
    return _same_content(a.get("content"), b.get("content")) and _same_calls(_calls_of(a), _calls_of(b))


def _same_content(a: Any, b: Any) -> bool:
    one, other = plain_content(a), plain_content(b)
    if one == other:
        return True
    # pydantic-ai takes thoughts out of the text, and puts them back in lines of their own.
    return isinstance(one, str) and isinstance(other, str) and _unbroken(one) == _unbroken(other)


def _unbroken(text: str) -> list[str]:
    """A text in pieces, without the white space around its thinking tags."""
    *pieces, last = _THINKING_TAG.split(text)
    return [piece.rstrip() for piece in pieces] + [last]


def _calls_of(message: Mapping[str, Any]) -> list[Any]:
    """The tool calls of a message, its older `function_call` among them."""
    calls = message.get("tool_calls") or []
    calls = list(calls) if isinstance(calls, list | tuple) else [calls]
    if message.get("function_call"):
        calls.append({"function": message["function_call"]})
    return calls


def _same_calls(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    if len(a) > 1:
        # LangChain puts calls whose arguments it cannot read after the others.
        ids_a, ids_b = [_id_of(call) for call in a], [_id_of(call) for call in b]
        if ids_a != ids_b and sorted(ids_a) == sorted(ids_b):
            a, b = sorted(a, key=_id_of), sorted(b, key=_id_of)
    return all(_same_call(one, other) for one, other in zip(a, b, strict=True))


def _id_of(call: Any) -> str:
    """The id of a tool call; "" where it has none."""
    return str((call.get("id") if isinstance(call, Mapping) else None) or "")


def _same_call(a: Any, b: Any) -> bool:
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return a == b
    id_a, id_b = _id_of(a), _id_of(b)
    if id_a and id_b and id_a != id_b:
        return False
    function_a, function_b = a.get("function"), b.get("function")
    if not isinstance(function_a, Mapping) or not isinstance(function_b, Mapping):
        return function_a == function_b and a.get("custom") == b.get("custom")
    return function_a.get("name") == function_b.get("name") and _same_arguments(
        function_a.get("arguments"), function_b.get("arguments")
    )


def _same_arguments(a: Any, b: Any) -> bool:
    if isinstance(a, str) and a == b:  # nothing to read where a client leaves them as they are
        return True
    one, one_is_object = _spelled(a)
    other, other_is_object = _spelled(b)
    if one == other:
        return True
    if one_is_object == other_is_object:
        return False
    sent, replaced = (one, b) if one_is_object else (other, a)
    # The Vercel AI SDK and LangChain send no arguments in place of what is no JSON object, pydantic-ai its text under a name.
    return sent in ("{}", _spelled({"INVALID_JSON": replaced})[0])


def _spelled(arguments: Any) -> tuple[str, bool]:
    """The arguments of a tool call in one spelling, and whether they are a JSON object. What is no JSON stays as it is."""
    if arguments is None or arguments == "":
        return "{}", True
    try:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        # As clients read it: some take line breaks within a text, and JavaScript has no numbers but floats.
        value = json.loads(text, strict=False, parse_int=_float, parse_float=_float)
        return json.dumps(value, sort_keys=True), isinstance(value, dict)
    except (TypeError, ValueError, RecursionError):
        return str(arguments), False


def _float(digits: str) -> float:
    """The number, 0.0 for -0."""
    return float(digits) or 0.0
