"""Warm-ups: demonstrations rendered as token sequences, and the job that learns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import DatasetError, FinetuneError
from ..llms.chat_tokenizer import ChatTokenizer
from ..llms.demonstrations import learned_tokens
from ..redaction import redacting_logger
from ..rollouts.demonstrations import row_error
from ..types import WARM_UP, Demonstrations, RowError, TrainingJobStatus, TrainingStatusEnum, WarmUpSettings
from .batch import TokenSequence, TrainingBatch
from .jobs import Report, TrainingJob

__all__ = [
    "Lesson",
    "WarmUpJob",
    "WarmUpReport",
    "lesson_of",
    "told",
]

logger = redacting_logger(__name__)

MOST_ERRORS = 100
"""Rows that cannot be learned, of which the record keeps the error."""
OF_ROLLOUTS = ("trained_trajectories", "trained_groups", "groups_without_signal", "truncated_trajectories")
"""Metrics of a training job that a warm-up has not."""


class WarmUpReport(Report, Protocol):
    """What a warm-up has done so far."""

    losses: list[float]
    """One an optimizer step."""
    held_out_losses: list[float]
    """Before the first pass, and after each."""


@dataclass(frozen=True)
class Lesson:
    """Rows as token sequences; each row has at least one."""

    rows: list[list[TokenSequence]] = field(repr=False)
    errors: Sequence[RowError]
    """Rows that cannot be learned."""
    truncated: int
    """Rows that were cut at the longest length."""

    @property
    def batch(self) -> TrainingBatch:
        """The same as what a training job learns from."""
        return TrainingBatch(self.rows, [], 0, truncated=self.truncated, supervised=True)


def lesson_of(
    demonstrations: Demonstrations,
    tokenizer: ChatTokenizer,
    settings: WarmUpSettings,
    longest: int | None,
    held_out: bool = False,
) -> Lesson:
    """Render demonstrations.

    Args:
        demonstrations: The conversations.
        tokenizer: Of the policy.
        settings: Its max_length and chat_template_kwargs count.
        longest: Tokens that the model holds; None: any number.
        held_out: Whether they are held out, for the errors.

    Returns:
        The rows. One that cannot be rendered, or whose replies are all beyond the longest length, is an error.
    """
    most = min((each for each in (settings.max_length, longest) if each is not None), default=None)
    rows: list[list[TokenSequence]] = []
    errors = list(demonstrations.errors)
    truncated = 0
    for demonstration in demonstrations.rows:
        try:
            pieces = learned_tokens(
                tokenizer, demonstration.messages, demonstration.tools, settings.chat_template_kwargs
            )
        except FinetuneError as error:
            errors.append(row_error(demonstration.row, error, held_out))
            continue
        except Exception as error:  # a row is somebody else's, and a template is a program
            problem = FinetuneError(f"cannot be rendered: {type(error).__name__}: {error}")
            errors.append(row_error(demonstration.row, problem, held_out))
            continue
        cut = [piece.cut(most) for piece in pieces]
        sequences = [_sequence(piece.ids, piece.learned) for piece in pieces if any(piece.learned[1:])]
        if not sequences:
            problem = FinetuneError(f"nothing to learn is among its first {most} tokens (max_length)")
            errors.append(row_error(demonstration.row, problem, held_out))
            continue
        truncated += any(cut)
        rows.append(sequences)
    return Lesson(rows, sorted(errors, key=lambda error: error.row), truncated)


def _sequence(ids: list[int], learned: list[bool]) -> TokenSequence:
    nothing = [0.0] * len(ids)
    return TokenSequence(ids, learned, nothing, 1.0, nothing)


def told(lesson: Lesson, held_out: Lesson) -> None:
    """Warns of rows that cannot be learned. Raises DatasetError where none can."""
    for part, what in ((lesson, "demonstrations"), (held_out, "held-out demonstrations")):
        if not part.errors:
            continue
        first = "; ".join(f"row {error.row}: {error.error}" for error in part.errors[:3])
        if not part.rows:
            raise DatasetError(
                f"none of the {len(part.errors)} {what} can be used: {first}. Expected rows with `messages`, a list of objects "
                "with role and content, of which the assistant's are learned."
            )
        total = len(part.rows) + len(part.errors)
        logger.warning("%d of %d %s are left out: %s", len(part.errors), total, what, first)
    if not lesson.rows:
        raise DatasetError("there is no demonstration: expected at least one row with `messages`.")


class WarmUpJob(TrainingJob):
    """A job that learns demonstrations. If it is canceled or fails, the weights are those before it."""

    def __init__(
        self,
        run_id: str,
        backend: str,
        policy_version: int,
        lesson: Lesson,
        held_out: Lesson,
        settings: WarmUpSettings,
        report: WarmUpReport,
        before: TrainingJob | None,
    ) -> None:
        errors = [*lesson.errors, *held_out.errors]
        self._row_errors = [vars(error) for error in errors[:MOST_ERRORS]]
        self._facts = {
            "rows": len(lesson.rows),
            "rows_left_out": len(lesson.errors),
            "rows_cut": lesson.truncated,
            "held_out_rows": len(held_out.rows),
            "passes": settings.epochs,
            "batch_size": settings.batch_size,
        }
        super().__init__(run_id, backend, policy_version, lesson.batch, report, before)

    def _make(self, status: TrainingStatusEnum, message: str) -> TrainingJobStatus:
        made, report = super()._make(status, message), self.report
        metadata = dict(made.metadata or {})
        metrics = {key: value for key, value in metadata["metrics"].items() if key not in OF_ROLLOUTS}
        metadata |= {"kind": WARM_UP, "metrics": metrics | self._facts, "row_errors": self._row_errors}
        if status == TrainingStatusEnum.COMPLETED:  # until then each step would copy them
            metadata |= {"losses": list(report.losses), "held_out_losses": list(report.held_out_losses)}  # type: ignore[attr-defined]
        return made.model_copy(update={"metadata": metadata})
