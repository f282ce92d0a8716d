"""Every noun of finetuning, in the order of an epoch's road: model calls, what an evaluation returns, episodes and
trajectories, the curriculum's choice, training jobs, and the record of an epoch.

pydantic models have the field names, defaults and validators of nvidia-nat-core 1.9.0, so that a dump of one validates as the
other; frozen dataclasses are values made inside. Missing numbers are NaN, never 0. What is asked of a value in many places, such
as how many tokens were sampled, stands beside it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, SkipValidation, model_validator
from pydantic.fields import FieldInfo

from .errors import ConfigError, did_you_mean
from .hooks import resolve, shown_by
from .text import plain, text_of

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Change",
    "CurriculumSettings",
    "CurriculumState",
    "Demonstration",
    "Demonstrations",
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
    "MessageKey",
    "OpenAIMessage",
    "ReplyFormat",
    "RolloutFailure",
    "RolloutRequest",
    "RolloutResult",
    "RowError",
    "Sample",
    "SamplingParams",
    "Selection",
    "StreamEventData",
    "TTCEventData",
    "TrainingJobRef",
    "TrainingJobStatus",
    "TrainingStatusEnum",
    "Trajectory",
    "TrajectoryCollection",
    "UsageStats",
    "Validation",
    "as_float",
    "finish_reason",
    "chat_fields",
    "is_model_call",
    "is_sampled",
    "logprob_count",
    "logprob_entries",
    "logprob_values",
    "readable_logprobs",
    "same_id",
    "sampled_outcome",
    "sampled_tokens",
    "WARM_UP",
    "WarmUp",
    "WarmUpSettings",
]


class IntermediateStepCategory(StrEnum):
    """What a step is about."""

    LLM = "LLM"
    TOOL = "TOOL"
    WORKFLOW = "WORKFLOW"
    TASK = "TASK"
    FUNCTION = "FUNCTION"
    CUSTOM = "CUSTOM"
    SPAN = "SPAN"
    TTC = "TTC"


class IntermediateStepState(StrEnum):
    """Whether a step begins, continues or ends."""

    START = "START"
    CHUNK = "CHUNK"
    END = "END"


class IntermediateStepType(StrEnum):
    """What a step is about, and whether it begins, continues or ends."""

    LLM_START = "LLM_START"
    LLM_END = "LLM_END"
    LLM_NEW_TOKEN = "LLM_NEW_TOKEN"
    TOOL_START = "TOOL_START"
    TOOL_END = "TOOL_END"
    WORKFLOW_START = "WORKFLOW_START"
    WORKFLOW_END = "WORKFLOW_END"
    TASK_START = "TASK_START"
    TASK_END = "TASK_END"
    TTC_START = "TTC_START"
    TTC_END = "TTC_END"
    FUNCTION_START = "FUNCTION_START"
    FUNCTION_END = "FUNCTION_END"
    CUSTOM_START = "CUSTOM_START"
    CUSTOM_END = "CUSTOM_END"
    SPAN_START = "SPAN_START"
    SPAN_CHUNK = "SPAN_CHUNK"
    SPAN_END = "SPAN_END"


class InvocationNode(BaseModel):
    """The function that was running when a step was made."""

    function_id: str
    function_name: str
    parent_id: str | None = None
    parent_name: str | None = None


class StreamEventData(BaseModel):
    """What went in and came out. `payload` is the LLMCall for steps that finetune_nb recorded."""

    model_config = ConfigDict(extra="allow")

    input: Any | None = None
    output: Any | None = None
    chunk: Any | None = None
    payload: Any | None = None


class TTCEventData(StreamEventData):
    """One candidate among several of which test-time compute chose one: `input` is its prompt, `output` its text."""

    turn_id: str | None = None
    """Candidates of one turn have the same."""
    turn_index: int | None = None
    """Which turn of the rollout it was, from 0."""
    candidate_index: int | None = None
    """Which candidate of the turn this is, from 0."""
    score: float | None = None
    """What the candidate was chosen or left by: more is better."""


class IntermediateStepPayload(BaseModel):
    """What happened in a step. Times are seconds since 1970, UTC; `span_event_timestamp` of an END is that of its START."""

    model_config = ConfigDict(extra="allow")

    event_type: IntermediateStepType
    event_timestamp: float = Field(default_factory=time.time)
    span_event_timestamp: float | None = None
    framework: str | None = None
    name: str | None = None
    tags: list[str] | None = None
    metadata: dict[str, Any] | None = None
    data: SerializeAsAny[StreamEventData] | None = None
    usage_info: Any | None = None
    UUID: str = Field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def event_category(self) -> IntermediateStepCategory:
        return IntermediateStepCategory(self.event_type.split("_")[0])

    @property
    def event_state(self) -> IntermediateStepState:
        last = self.event_type.split("_")[-1]
        return IntermediateStepState.CHUNK if last == "TOKEN" else IntermediateStepState(last)

    @model_validator(mode="after")
    def _check_span_event_timestamp(self) -> IntermediateStepPayload:
        if self.event_state != IntermediateStepState.END and self.span_event_timestamp is not None:
            raise ValueError("span_event_timestamp can only be provided for events with an END state")
        return self

    @model_validator(mode="after")
    def _read_candidate(self) -> IntermediateStepPayload:
        """Data that was read from a file or from a dict are a candidate's again."""
        if self.event_category == IntermediateStepCategory.TTC and type(self.data) is StreamEventData:
            self.data = TTCEventData.model_validate(self.data.model_dump())
        return self


class IntermediateStep(BaseModel):
    """One event of a workflow's run: a model call, a tool call."""

    model_config = ConfigDict(extra="forbid")

    parent_id: str
    function_ancestry: InvocationNode
    payload: IntermediateStepPayload

    @property
    def event_type(self) -> IntermediateStepType:
        return self.payload.event_type

    @property
    def event_timestamp(self) -> float:
        return self.payload.event_timestamp

    @property
    def span_event_timestamp(self) -> float | None:
        return self.payload.span_event_timestamp

    @property
    def name(self) -> str | None:
        return self.payload.name

    @property
    def tags(self) -> list[str] | None:
        return self.payload.tags

    @property
    def metadata(self) -> dict[str, Any] | None:
        return self.payload.metadata

    @property
    def data(self) -> StreamEventData | None:
        return self.payload.data

    @property
    def usage_info(self) -> Any | None:
        return self.payload.usage_info

    @property
    def UUID(self) -> str:  # noqa: N802  # NAT's name
        return self.payload.UUID

    @property
    def event_category(self) -> IntermediateStepCategory:
        return self.payload.event_category

    @property
    def event_state(self) -> IntermediateStepState:
        return self.payload.event_state


class EvalInputItem(BaseModel):
    """One dataset row and, after its rollout, what the workflow made of it."""

    id: Any
    input_obj: Any
    expected_output_obj: Any
    output_obj: Any = None
    expected_trajectory: list[IntermediateStep] = Field(default_factory=list)
    trajectory: list[IntermediateStep] = Field(default_factory=list)
    full_dataset_entry: Any

    def copy_with_updates(self, **updates: Any) -> EvalInputItem:
        """Copy the item with other values of some fields.

        Args:
            **updates: Field names with their new values.

        Returns:
            The copy.

        Raises:
            ValidationError: A value does not fit its field.
        """
        return EvalInputItem(**{**dict(self), **updates})


class EvalInput(BaseModel):
    """The items of one evaluation."""

    eval_input_items: list[EvalInputItem]


class EvalOutputItem(BaseModel):
    """One evaluator's verdict on one item. `score` None (with `error`) means that there is none."""

    id: Any
    score: Any
    reasoning: Any
    error: str | None = None


class EvalOutput(BaseModel):
    """One evaluator's verdicts on all items, and their mean."""

    average_score: Any
    eval_output_items: list[EvalOutputItem]


class EvaluationRunConfig(BaseModel):
    """What one evaluation run needs: a config (file or model) and, if not the config's own, a dataset."""

    config_file: Path | BaseModel
    dataset: str | None = None
    result_json_path: str = "$"
    skip_workflow: bool = False
    skip_completed_entries: bool = False
    endpoint: str | None = None
    endpoint_timeout: int = 300
    reps: int = 1
    override: tuple[tuple[str, str], ...] = ()
    write_output: bool = True
    adjust_dataset_size: bool = False
    num_passes: int = 0
    export_timeout: float = 60.0
    user_id: str = "nat_eval_user_id"


class UsageStats(BaseModel):
    """Seconds that the evaluation took, and what each item cost."""

    min_timestamp: float = 0.0
    max_timestamp: float = 0.0
    total_runtime: float = 0.0
    usage_stats_items: dict[Any, Any] = {}


@dataclass(frozen=True)
class RolloutFailure:
    """A rollout that ended without a trajectory. It is data: never reward 0, never gone."""

    example_id: Any
    generation: int
    error: str
    """The error's type and message."""
    steps: list[IntermediateStep] = field(default_factory=list, repr=False)
    """What had happened until then."""

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.rollout:failure_html", self)


class EvaluationRunOutput(BaseModel):
    """What one evaluation run returns: all items with their outputs, and each evaluator's verdicts."""

    workflow_output_file: Path | None
    evaluator_output_files: list[Path]
    workflow_interrupted: bool
    eval_input: EvalInput
    evaluation_results: list[tuple[str, Any]]
    usage_stats: UsageStats | None = None
    profiler_results: Any = None
    config_original_file: Path | None = None
    config_effective_file: Path | None = None
    config_metadata_file: Path | None = None
    failures: SkipValidation[list[RolloutFailure]] = Field(default_factory=list, exclude=True)
    """Items whose workflow raised, hung or returned nothing; no evaluator saw them."""
    unfinished: SkipValidation[dict[str, Any]] = Field(default_factory=dict, exclude=True)
    """Evaluators by name that compare all rollouts of an example, and wait for those that are run elsewhere."""


# The curriculum's fields: type, limits and text of each. Two classes have them: CurriculumSettings, which is the curriculum
# at one moment, and the config section CurriculumLearningConfig, which says where a run starts.
Enabled = Annotated[bool, Field(description="False: every group is kept, whatever the rest says.")]
Percentile = Annotated[
    float, Field(gt=0, le=1, description="Share of the groups with spread that is trained on, in (0, 1].")
]
IncrementPercentile = Annotated[
    float, Field(gt=0, le=1, description="Added to the share at every automatic expansion, in (0, 1].")
]
ExpansionInterval = Annotated[int, Field(ge=1, description="Epochs between two expansions, at least 1.")]
MinRewardDiff = Annotated[
    float,
    Field(ge=0, description="A group whose rewards lie closer together teaches nothing and is left out. At least 0."),
]
SortAscending = Annotated[bool, Field(description="True: low mean rewards (hard examples) first.")]
RandomSubsample = Annotated[
    float | None,
    Field(gt=0, le=1, description="Share of the selected groups that is drawn at random, in (0, 1]; None: all."),
]


@dataclass(frozen=True)
class CurriculumSettings:
    """The curriculum at one moment of a run. A value: `updated` makes another one. Wrong values raise ConfigError."""

    enabled: Enabled = False
    percentile: Percentile = 0.3
    schedule: Literal["automatic", "manual"] = "automatic"
    """Whether the percentile grows by itself, or stays where it was put."""
    increment_percentile: IncrementPercentile = 0.2
    expansion_interval: ExpansionInterval = 5
    min_reward_diff: MinRewardDiff = 0.1
    sort_ascending: SortAscending = False
    random_subsample: RandomSubsample = None

    def __post_init__(self) -> None:
        for name, info in _curriculum_fields().items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), info))

    @classmethod
    def from_config(cls, config: BaseModel) -> CurriculumSettings:
        """Read the settings with which a run of a config starts.

        Args:
            config: A CurriculumLearningConfig.

        Returns:
            The settings.
        """
        return resolve("finetune_nb.config.sections:settings_from")(config)

    def to_config(self, initial_percentile: float) -> Any:
        """Convert to a section of the config.

        Args:
            initial_percentile: The percentile at which the run started.

        Returns:
            A CurriculumLearningConfig.
        """
        return resolve("finetune_nb.config.sections:section_of")(self, initial_percentile)

    def updated(self, changes: Mapping[str, Any] | CurriculumSettings) -> CurriculumSettings:
        """Copy the settings with changes.

        A percentile given without a schedule stays where it is put: the schedule becomes "manual".

        Args:
            changes: Field names with their new values, or the settings to take instead.

        Returns:
            The new settings.

        Raises:
            ConfigError: A name is unknown, or a value is out of its range.
        """
        if isinstance(changes, CurriculumSettings):
            return changes
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name == "initial_percentile":
                raise ConfigError(
                    "curriculum: initial_percentile is where a run starts. To change a run, set percentile."
                )
            if name not in known:
                raise ConfigError(f"curriculum: {name!r} is not a setting. {did_you_mean(name, known)}")
        manual = {"schedule": "manual"} if "percentile" in changes else {}
        return dataclasses.replace(self, **{**manual, **changes})

    def steered(self, changes: Mapping[str, Any] | CurriculumSettings) -> CurriculumSettings:
        """Copy the settings with changes that a person asks for, by slider, in code or as keywords.

        As `updated`, but changes by name switch the curriculum on unless they say `enabled`: they would have no effect
        otherwise.

        Args:
            changes: Field names with their new values, or the settings to take instead.

        Returns:
            The new settings.

        Raises:
            ConfigError: A name is unknown, or a value is out of its range.
        """
        if isinstance(changes, CurriculumSettings) or not changes:
            return self.updated(changes)
        return self.updated({"enabled": True, **changes})

    def resumes_after(self, before: CurriculumSettings) -> bool:
        """Whether the schedule continues from this percentile, an interval from now.

        Args:
            before: The settings before.

        Returns:
            True if it is automatic, and was not before or has been given another percentile.
        """
        return self.schedule == "automatic" and (before.schedule == "manual" or before.percentile != self.percentile)


@cache
def _curriculum_fields() -> dict[str, FieldInfo]:
    """The fields of CurriculumSettings with their types and limits, as declared above."""
    hints = get_type_hints(CurriculumSettings, include_extras=True)
    return {name: FieldInfo.from_annotation(hint) for name, hint in hints.items()}


_LIMITS = {
    "gt": (operator.gt, "above"),
    "ge": (operator.ge, "of at least"),
    "le": (operator.le, "and at most"),
}
"""Limits of a number, as pydantic calls them: how each is tested, and how it reads in an error."""


def _checked(name: str, value: Any, info: FieldInfo) -> Any:
    """A curriculum setting as plain Python. Raises ConfigError for a value of another type or outside the limits."""
    kind = info.annotation
    if value is None and type(None) in get_args(kind):
        return None
    if kind is bool:
        holds, expected = isinstance(value, bool), "True or False"
    elif get_origin(kind) is Literal:
        choices = get_args(kind)
        holds, expected = value in choices, " or ".join(repr(choice) for choice in choices)
    else:
        holds, expected = _is_number(value, kind is int, info.metadata)

    if not holds:
        raise ConfigError(f"curriculum: {name} is {value!r}; expected {expected}.")
    # A numpy number would make two equal settings print and store differently.
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is not bool and isinstance(value, numbers.Real):
        return float(value)
    return value


def _is_number(value: Any, whole: bool, limits: Sequence[Any]) -> tuple[bool, str]:
    """Whether the value is a number within the limits, and in words what such a number is."""
    expected = "a whole number" if whole else "a number"
    kind = numbers.Integral if whole else numbers.Real
    # True counts as 1 in Python, and an upper limit is not always there to catch inf.
    holds = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]
    for limit in limits:
        for name, (within, words) in _LIMITS.items():
            bound = getattr(limit, name, None)
            if bound is not None:
                holds = holds and within(value, bound)
                expected += f" {words} {bound}"
    return holds, expected


@dataclass(frozen=True)
class Change:
    """One field that somebody changed."""

    time: float
    """Seconds since 1970, UTC."""
    source: str
    """Who: "code", "panel", "fork", "replay"; "resume": it was found when the run was continued."""
    field: str
    """Of CurriculumSettings, or the name of a LiveField."""
    old: Any
    new: Any
    epoch: int | None = None
    """The epoch that used it first; None while it is pending, or when another change came before that."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """A row to run the workflow on, and which rollout that is."""

    key: EpisodeKey
    item: EvalInputItem


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """A rollout that has ended, well or badly; not scored yet."""

    request: RolloutRequest
    output: Any
    """What the workflow returned; None where it failed."""
    steps: list[IntermediateStep]
    """The model calls that were recorded, also of a rollout that failed."""
    seconds: float
    error: str | None = None
    """The error's type and message; None where the workflow returned something."""


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
class ReplyFormat:
    """The form that a reply is held to. Schemas are kept as JSON texts, so that equal formats are equal."""

    schema: str | None = None
    """JSON schema of the reply's text; None: any text."""
    tools: str | None = None
    """The tools that it may call, as a JSON list of OpenAI schemas; None: none."""
    required: bool = False
    """Whether it must call one. Otherwise a call and a text that fits `schema` are both taken."""
    parallel: bool = True
    """Whether it may call several at once."""
    tool_parser: str | None = None
    """The format of tool calls, where the run names one; None: the tokenizer's own."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a reply is sampled."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy. Logprobs are those of the distribution that was sampled from."""
    max_tokens: int = 256
    """Longest reply, in tokens; a longer one is cut and its finish reason is "length"."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply. The token that completed one is kept, so that training sees what was sampled."""
    top_logprobs: int = 0
    """Likeliest tokens that are recorded in each place beside the sampled one, where the policy gives them."""
    reply_format: ReplyFormat | None = None
    """The form that the reply must have; None: any. Tokens that do not fit are not drawn, and the others are drawn in their
    own proportions. Logprobs stay those of the model, without the form: what is trained is how likely the model itself
    makes the tokens, and the importance ratio is one of the model's own probabilities. Such a reply is off-policy by as
    much as the form forbids."""


class Sample(NamedTuple):
    """What a policy sampled."""

    ids: list[int]
    logprobs: list[float]
    """One natural logarithm a token, of the distribution that it was drawn from."""
    finish_reason: str
    """"stop" (the model ended its turn, or a stop text came) or "length"."""
    likeliest: list[dict[int, float]] | None = None
    """Of each place the likeliest tokens, id -> natural logarithm, where `top_logprobs` asked for them."""
    entropies: list[float] | None = None
    """Entropy (nats) in each place, of the policy's own distribution over its whole vocabulary at temperature 1. None: the
    policy does not measure it."""


@dataclass(frozen=True, slots=True)
class LLMCall:
    """One call of a language model: all that is needed to show it and to train on it exactly."""

    episode: EpisodeKey | None
    sequence: int
    """Counts the calls of the episode, from 0."""
    model: str
    """The model's name: of an llm of type "policy" its trainer adapter's."""
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
    ignored: tuple[str, ...] = ()
    """What the request asked for and was not honoured, because the run says so or because it is only wished for."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template with which the prompt was rendered; None: none, or not rendered here."""
    entropies: list[float] | None = None
    """Of each response token the policy's entropy in its place, see `Sample`; None where it was not measured."""
    llm: str | None = None
    """The llm's name in the config; None where it has none there."""


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


RESCORED = "rescored"
"""Key of `Trajectory.metadata`, true where the epoch's own reward was replaced before anything was trained on."""


class MessageKey:
    """The keys of `EpisodeItem.metadata`, each with its value. T is the number of sampled tokens.

    Only a turn that the policy sampled has the first ten; `SampledTurn.of(item)` reads them all at once.
    """

    TOKEN_IDS = "token_ids"
    """(T,) ints: what was sampled, in the policy's vocabulary."""
    PROMPT_TOKEN_IDS = "prompt_token_ids"
    """Ints: the prompt that it was sampled after."""
    TOKENS = "tokens"
    """(T,) texts: what each sampled token says."""
    TOP_LOGPROBS = "top_logprobs"
    """(T,) mappings: the likeliest tokens in each place, text -> natural logprob."""
    ENTROPIES = "entropies"
    """(T,) floats: entropy (nats) in each place, of the policy's own distribution over its whole vocabulary at temperature 1."""
    TEMPERATURE = "temperature"
    """At which it was sampled; 0 is greedy."""
    FINISH_REASON = "finish_reason"
    """Why it ended: "stop", "length" (cut at the token limit), "tool_calls", ..."""
    SECONDS = "seconds"
    """That the model call took."""
    EXACT = "exact"
    """Whether the ids are those that the model saw and sampled, not those of a text that was tokenized again."""
    DRIFTED = "drifted"
    """True where the prompt does not begin with the ids of the turn before."""
    CONVERSATION = "conversation"
    """Which conversation of the episode a message belongs to, from 0; the first one does not say it."""
    TOOL_CALLS = "tool_calls"
    """The tools that an assistant calls, as OpenAI has them."""
    TOOL_CALL_ID = "tool_call_id"
    """Which call the message of a tool answers."""
    NAME = "name"
    """Of the tool, or of the person, that speaks."""
    REASONING_CONTENT = "reasoning_content"
    """What an assistant thought before its answer."""
    IGNORED = "ignored"
    """Names of the request's parameters that were not honoured in sampling the turn; only where there are any."""


class EpisodeItem(BaseModel):
    """One message of an episode.

    `logprobs` of an assistant turn: one float a sampled token; `[]` for a turn that the policy did not sample (masked in
    training). `metadata` keys: token_ids, tokens (their text), prompt_token_ids, exact (the ids are those that the model saw
    and sampled), drifted (True: its prompt does not begin with the ids of the turn before), temperature, finish_reason,
    seconds (that the model call took), conversation (counts from 0), tool_calls, tool_call_id, name, reasoning_content (what
    the model thought), top_logprobs (of each token the likeliest in its place, text -> logprob), entropies (nats, one a
    sampled token, where the policy measures them), ignored (names of the request's parameters that were not honoured).
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
        return shown_by("finetune_nb.views.rollout:trajectory_html", self)

    def __repr__(self) -> str:
        known = self.metadata or {}
        name = f"example={known.get('id')!r}, generation={known.get('generation')!r}"
        return plain(f"Trajectory({name}, reward={self.reward:g}, {len(self.episode)} messages)")

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
    """Why a group is kept to be trained on, or is not. `Selection.reasons` holds positions in this list."""

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
    """(G,) float64, largest minus smallest reward; NaN where there is none or one is infinite, inf where the difference of
    finite ones is beyond floats. Such groups teach nothing."""

    def __len__(self) -> int:
        return len(self.example_ids)


@dataclass(frozen=True)
class CurriculumState:
    """The state of the curriculum. Stored with every epoch."""

    percentile: float
    """Share of the groups with spread that is trained on, in (0, 1]."""
    last_expansion_epoch: int = -1
    total_groups: int = 0
    """Groups with spread in the first epoch that had any; informational."""
    included_groups: frozenset[int] = frozenset()
    """Positions of the groups last kept, in their epoch's list."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Which groups of an epoch are kept to be trained on, and why the others are not."""

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
        """Example ids of the groups that are not kept, by reason."""
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
    """The state of a job; the last three are final."""

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
    """What an epoch looked like in numbers. Rewards are over all trajectories that have a finite one.

    Every number is a column of the frame of epochs, in this order. Metrics sinks get those with a "log" in their metadata,
    by that name.
    """

    mean_reward: float = field(metadata={"log": "reward/mean"})
    min_reward: float = field(metadata={"log": "reward/min"})
    max_reward: float = field(metadata={"log": "reward/max"})
    kept_mean_reward: float = field(metadata={"log": "reward/kept"})
    group_quantiles: tuple[float, float, float]
    """10, 50 and 90 % quantiles of the groups' mean rewards: how easy and how hard the examples were."""
    trajectories: int = field(metadata={"log": "rollouts/finished"})
    groups: int = field(metadata={"log": "groups/all"})
    groups_with_spread: int = field(metadata={"log": "groups/with_spread"})
    """Groups whose rewards differ: only these can teach."""
    kept_trajectories: int
    kept_groups: int = field(metadata={"log": "groups/kept"})
    """Groups that were selected. Those of them that the job trained on are `Epoch.trained_groups`."""
    failures: int = field(metadata={"log": "rollouts/failed"})
    sampled_tokens: int = field(metadata={"log": "rollouts/sampled_tokens"})
    """Tokens that the policy sampled, in all trajectories."""
    mean_entropy: float | None = field(default=None, metadata={"log": "rollouts/entropy"})
    """Of the policy at each sampled token, in nats, over all tokens where it was recorded. None where it was not."""
    replies_cut: int | None = field(default=None, metadata={"log": "rollouts/replies_cut"})
    """Trajectories whose last sampled turn was cut at the token limit. None in records from before these were counted."""
    length_correlation: float | None = field(default=None, metadata={"log": "reward/length_correlation"})
    """How the reward goes with the number of sampled tokens, from -1 to 1, see `training.metrics.length_correlation`. None where
    lengths or rewards do not differ enough to say."""
    continued_turns: int | None = None
    """Sampled turns that continue a conversation. None in records from before these were counted."""
    drifted_turns: int | None = field(default=None, metadata={"log": "rollouts/drifted_turns"})
    """Those of them that were rendered anew instead of continuing the sampled ids; each is trained on by itself."""
    rewards_missing: int | None = field(default=None, metadata={"log": "rollouts/rewards_missing"})
    """Trajectories without a reward. None in records from before these were counted."""
    reward_error: str | None = None
    """Why most of them have none: the most frequent error."""
    version_lag: int | None = field(default=None, metadata={"log": "rollouts/version_lag"})
    """Policy versions by which the weights were older that sampled, than those that trained: 0 where no job came in between. None
    where that is not known."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Mean of every evaluator, by name."""

    @property
    def rewards_missing_text(self) -> str:
        """How many rewards are missing and why: "rewards missing 44 of 48: RateLimitError: ..."; "" if none is."""
        if not self.rewards_missing:
            return ""
        text = f"rewards missing {self.rewards_missing:,} of {self.trajectories:,}"
        return f"{text}: {self.reward_error}" if self.reward_error else text


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
    rewards_missing: int | None = None
    """Items without a finite reward, failed rollouts among them. None where that was not counted."""
    reward_error: str | None = None
    """The most frequent reason of these."""


WARM_UP = "warm_up"
"""The kind of an epoch that learned demonstrations."""


@dataclass(frozen=True)
class Demonstration:
    """A conversation whose assistant's turns are to be learned."""

    row: int
    """Its position in what was given, from 0."""
    messages: list[dict[str, Any]]
    """OpenAI messages. An assistant's message with "weight": 0 is context, and not learned."""
    tools: list[dict[str, Any]] | None = None
    """OpenAI tool schemas."""


@dataclass(frozen=True)
class RowError:
    """A row of demonstrations that cannot be learned."""

    row: int
    """Its position in what was given, from 0."""
    error: str
    held_out: bool = False
    """Whether it is one of those that are held out."""


@dataclass(frozen=True)
class Demonstrations:
    """What was read of rows: conversations, and what is wrong with the other rows."""

    rows: Sequence[Demonstration] = ()
    errors: Sequence[RowError] = ()


@dataclass(frozen=True)
class WarmUpSettings:
    """How demonstrations are learned."""

    learning_rate: float | None = None
    """Of an AdamW of the warm-up's own; constant. None: that of the trainer adapter."""
    batch_size: int = 8
    """Rows of one optimizer step."""
    epochs: int = 1
    """Passes over all rows."""
    max_length: int | None = None
    """Tokens of a row that count; what comes after them is cut off. None: as many as the model holds."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "max_length"):
            value = getattr(self, name)
            if value is not None or name != "max_length":
                if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                    raise ConfigError(f"{name} of a warm-up is {value!r}; expected a whole number from 1 up.")
        rate = self.learning_rate
        if rate is not None and (
            isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 < rate < math.inf
        ):
            raise ConfigError(f"learning_rate of a warm-up is {rate!r}; expected a number above 0.")


@dataclass(frozen=True)
class WarmUp:
    """What became of a warm-up."""

    losses: Sequence[float]
    """Cross entropy (nats a learned token), one an optimizer step; empty where it did not end."""
    held_out_losses: Sequence[float]
    """The same of the rows that were held out, before the first pass and after each; empty where none were given."""
    errors: Sequence[RowError]
    """Rows that were not learned; the first hundred."""


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
    """What each part took: rollouts, selection, training, validation, total. Of the total, "ahead" is what overlapped with the
    epoch before, and "paused" a pause."""

    @property
    def curriculum(self) -> CurriculumSettings:
        return self.selection.settings

    @property
    def train_metrics(self) -> Mapping[str, float]:
        """What the backend measured while training; empty where it says nothing."""
        return ((self.job.metadata if self.job else None) or {}).get("metrics") or {}

    @property
    def kind(self) -> str:
        """What it learned from: "rollouts", or "warm_up" for demonstrations (see `Run.warm_up`)."""
        known = (self.job.metadata if self.job else None) or {}
        return WARM_UP if known.get("kind") == WARM_UP else "rollouts"

    @property
    def warm_up(self) -> WarmUp | None:
        """Losses and rows of a warm-up; None for an epoch of rollouts."""
        if self.kind != WARM_UP or self.job is None:
            return None
        # A folder may be somebody else's: what is there is taken as it can be read.
        known = {name: each for name, each in (self.job.metadata or {}).items() if isinstance(each, list)}
        losses, held_out = ([as_float(each) for each in known.get(name, ())] for name in ("losses", "held_out_losses"))
        errors = [
            RowError(int(each["row"]), text_of(each.get("error")), each.get("held_out") is True)
            for each in known.get("row_errors", ())
            if isinstance(each, Mapping) and isinstance(each.get("row"), int)
        ]
        return WarmUp(losses, held_out, errors)

    @property
    def trained_groups(self) -> int | None:
        """How many of the kept groups the job trained on: 0 where it made no optimizer step, None where it does not say.

        A group is kept by the selection. It is trained on only if its rewards differ: else every advantage is 0.
        """
        if self.job is None or self.train_metrics.get("optimizer_steps") == 0:
            return 0
        found = as_float(self.train_metrics.get("trained_groups"))
        return int(found) if math.isfinite(found) else None

    @property
    def trained(self) -> bool:
        """Whether a job completed, with an optimizer step as far as it says."""
        completed = self.job is not None and self.job.status == TrainingStatusEnum.COMPLETED
        return completed and self.trained_groups != 0

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.summary:epoch_html", self)

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.summary:epoch_text", self)


_ASSISTANT = EpisodeItemRole.ASSISTANT  # looking it up in the enum takes as long as the comparison


def chat_fields(known: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a chat message says besides its role and text: tool calls, which call it answers, its name; only those there.

    Args:
        known: The metadata of a message, or a message as OpenAI has it: the keys are the same.
    """
    fields = {}
    for key in (MessageKey.TOOL_CALLS, MessageKey.TOOL_CALL_ID, MessageKey.NAME):
        if known and known.get(key):
            fields[key] = known[key]
    return fields


def is_model_call(step: IntermediateStep, functions: Sequence[str] | None = None, model: str | None = None) -> bool:
    """Whether a step is a call of a language model that is trained on.

    Args:
        step: The step.
        functions: Names of functions whose calls count, as in `finetuning.target_functions`. Default: all.
        model: The model whose calls count, as in `finetuning.target_model`. Default: all.
    """
    if step.event_type != IntermediateStepType.LLM_END or step.data is None:
        return False
    if functions is not None and step.function_ancestry.function_name not in functions:
        return False
    call = step.data.payload
    return model is None or model in (call.model if isinstance(call, LLMCall) else step.name, step.name)


def is_sampled(item: EpisodeItem | DPOItem) -> bool:
    """Whether it is a turn that the policy sampled: an assistant's, except those without a logprob (`logprobs == []`).

    Never raises: logprobs in a form that nobody can read count as there.
    """
    if not isinstance(item, EpisodeItem) or item.role != _ASSISTANT:
        return False
    logprobs = item.logprobs
    if (
        logprobs is None or type(logprobs) is list
    ):  # as they nearly always are: trajectories come in hundreds of thousands
        return logprobs != []
    return readable_logprobs(logprobs) != []


def sampled_outcome(trajectory: Trajectory) -> tuple[int, str | None]:
    """`sampled_tokens` and `finish_reason`, in one pass."""
    tokens, reason = 0, None
    for item in trajectory.episode:
        if is_sampled(item):
            assert isinstance(item, EpisodeItem)
            tokens += logprob_count(item.logprobs)
            reason = item.metadata.get(MessageKey.FINISH_REASON) if item.metadata else None
    return tokens, reason


def sampled_tokens(trajectory: Trajectory) -> int:
    """How many tokens the policy sampled in all turns; 0 for preferences, and for logprobs in an unknown form."""
    tokens = 0
    for item in trajectory.episode:
        logprobs = getattr(item, "logprobs", None)  # a preference has none
        if logprobs is not None and item.role == _ASSISTANT:  # type: ignore[union-attr]
            tokens += logprob_count(logprobs)
    return tokens


def finish_reason(trajectory: Trajectory) -> str | None:
    """Why the last turn that the policy sampled ended: "stop", "length" (cut at the token limit), "tool_calls", ...

    None where the record does not say it of that turn, whatever it says of earlier ones, and where nothing was sampled.
    """
    return sampled_outcome(trajectory)[1]


def logprob_count(logprobs: Any) -> int:
    """How many tokens have a logprob, in whatever form they came; 0 where the form is unknown."""
    if type(logprobs) is list:
        return len(logprobs)
    return len(readable_logprobs(logprobs) or ())


def readable_logprobs(logprobs: Any) -> list[float] | None:
    """As `logprob_values`; None also where the form is unknown, which a record of somebody else may have."""
    try:
        return logprob_values(logprobs)
    except (TypeError, ValueError, KeyError, OverflowError):
        return None


def logprob_entries(logprobs: Any) -> Any:
    """What logprobs hold, one entry a token: floats, or OpenAI's entries from `{"content": [...]}` or an object like it."""
    if isinstance(logprobs, Mapping):
        return logprobs.get("content")
    return getattr(logprobs, "content", logprobs)


def logprob_values(logprobs: Any) -> list[float] | None:
    """Logprobs in whatever form they came (floats, OpenAI's `{"content": [{"logprob": ...}]}` or objects like it) as
    one float a token; None where there are none."""
    content = logprob_entries(logprobs)
    if content is None:
        return None
    if type(content) is list and set(map(type, content)) <= {float}:
        return content.copy()
    return [
        float(entry["logprob"] if isinstance(entry, Mapping) else getattr(entry, "logprob", entry)) for entry in content
    ]


def same_id(one: Any, other: Any) -> bool:
    """Whether two ids name the same example: their texts are equal. 7 and "7", which a person typed, are; 1, 1.0 and True,
    which Python holds for equal, are not."""
    return text_of(one) == text_of(other)


def as_float(value: Any) -> float:
    """A number as a float; NaN for anything else, and for an integer that no float holds."""
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        return math.nan
