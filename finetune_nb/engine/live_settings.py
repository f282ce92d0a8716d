"""LiveSettings: the mailbox between a run's user (a cell, a widget, another thread) and the engine that runs it.

A change is validated and becomes pending at once, or stays in the draft until it is asked for; the engine applies it at
its safe point, which for the curriculum is the next selection, also that of the epoch whose rollouts are running, and for a
live field of a component what the field says. Every change that was asked for is kept in the journal. Nothing here touches
asyncio, a trainer or a widget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..components.builder import Builder
from ..config.base import changed
from ..config.sections import Config
from ..config.yaml import dump_yaml, read_yaml
from ..errors import ConfigError, did_you_mean
from ..rewards.evaluators import weighted_reward
from ..types import WARM_UP, Change, CurriculumSettings

__all__ = [
    "LiveSettings",
    "LiveField",
    "LiveValues",
    "journal_text",
    "live_fields",
    "live_names",
    "write_live_values",
    "read_journal",
]

SAFE_POINTS = ("rollouts", "training")
REWARD = "reward"
"""The part that the weights of the reward belong to."""


def live_names(section: BaseModel) -> list[str]:
    """The live settings of one component's config."""
    return [name for name, info in type(section).model_fields.items() if _safe_point(info) in SAFE_POINTS]


def _safe_point(info: FieldInfo) -> Any:
    extra = info.json_schema_extra
    return extra.get("live") if isinstance(extra, dict) else None


def live_fields(config: Config) -> list[LiveField]:
    """The live fields of the components that a run uses, by the part that they play: adapter, builder, llm, eval."""
    found = []
    for part, (_, _, section) in _sections(config).items():
        for name, info in type(section).model_fields.items():
            safe_point = _safe_point(info)
            if safe_point not in SAFE_POINTS or not _counts(info, section):
                continue
            limits = {
                kind: getattr(m, kind) for m in info.metadata for kind in ("gt", "ge", "lt", "le") if hasattr(m, kind)
            }
            found.append(
                LiveField(
                    name=f"{part}.{name}",
                    value=getattr(section, name),
                    safe_point=str(safe_point),
                    label=name.replace("_", " "),
                    doc=info.description or "",
                    minimum=limits.get("ge", limits.get("gt")),
                    maximum=limits.get("le", limits.get("lt")),
                    check=lambda value, section=section, name=name, part=part: getattr(
                        changed(section, {name: value}, part), name
                    ),
                )
            )
    return found + _weight_fields(config)


def _counts(info: FieldInfo, section: BaseModel) -> bool:
    """Whether a field has an effect with the values that other fields of its section have."""
    extra = info.json_schema_extra
    where = extra.get("where") if isinstance(extra, dict) else None
    return not isinstance(where, dict) or all(getattr(section, name) == value for name, value in where.items())


def _weight_fields(config: Config) -> list[LiveField]:
    """The weights of the reward, if it is a weighted sum: "reward.format"."""
    section = weighted_reward(config)
    if section is None:
        return []

    def checked(part: str, value: Any) -> float:
        return changed(section, {"weights": {**section.weights, part: value}}, REWARD).weights[part]

    fields = []
    for part, weight in section.weights.items():
        doc = f"Weight of the score {part} in the reward."
        field = LiveField(
            f"{REWARD}.{part}", weight, "rollouts", f"weight of {part}", doc, check=partial(checked, part)
        )
        fields.append(field)
    return fields


def _is_weight(name: str) -> bool:
    """Whether a live setting is a weight of the reward's parts."""
    return name.startswith(f"{REWARD}.")


def write_live_values(config: Config, builder: Builder, values: Mapping[str, Any]) -> None:
    """Puts changed values into the configs that the components hold."""
    sections = _sections(config)
    for name, value in values.items():
        part, _, field = name.partition(".")
        if part == REWARD:
            weighted = weighted_reward(config)
            assert weighted is not None
            weighted.weights = {**weighted.weights, field: value}
            continue
        kind, component, section = sections[part]
        setattr(section, field, value)
        configured = getattr(builder.ready(kind, component), "configured", None) if kind else None
        if configured is not None:
            configured()


def _sections(config: Config) -> dict[str, tuple[str, str, BaseModel]]:
    """Part -> kind and name of the component, and its config."""
    tuning = config.finetuning
    parts = {
        "adapter": ("trainer_adapter", tuning.trainer_adapter, config.trainer_adapters),
        "builder": ("trajectory_builder", tuning.trajectory_builder, config.trajectory_builders),
        "llm": ("llm_provider", config.llm_of_workflow, config.llms),
    }
    found: dict[str, tuple[str, str, BaseModel]] = {
        part: (kind, name, section[name]) for part, (kind, name, section) in parts.items() if name and name in section
    }
    return {**found, "eval": ("", "", config.eval.general)}


@dataclass(frozen=True)
class LiveField:
    """A setting of a component that may be changed while the run continues."""

    name: str
    """Its path: "adapter.learning_rate"."""
    value: Any
    """What is asked for."""
    safe_point: str
    """When it is read: "rollouts" (the next epoch's) or "training" (the next job's)."""
    label: str = ""
    doc: str = ""
    minimum: float | None = None
    maximum: float | None = None
    check: Callable[[Any], Any] = field(default=lambda value: value, repr=False, compare=False)
    """The value as the component takes it. Raises ConfigError for one that does not fit."""


CHOSEN = "train_on"
"""The field of a Change that says: this epoch trained on rollouts that somebody chose."""


def _is_setting(change: Change) -> bool:
    """Whether a change can be made again: not what was found when a run was continued, no function that a fork was given, and
    no training on chosen rollouts or demonstrations."""
    return (
        change.source != "resume"
        and change.field not in (CHOSEN, WARM_UP)
        and not change.field.startswith("evaluator.")
    )


class UnknownSetting(ConfigError, KeyError):
    """A name that is no live setting."""

    __str__ = Exception.__str__  # that of KeyError would put the message in quotes


class LiveValues(MutableMapping[str, Any]):
    """The live settings of a run's components by name. Setting one asks for it; none can be added or removed.

    Args:
        fields: Returns the settings as they are now.
        ask: Asks for changes, all or none of them.
    """

    def __init__(self, fields: Callable[[], Sequence[LiveField]], ask: Callable[[Mapping[str, Any]], object]) -> None:
        self._fields, self._ask = fields, ask

    def _values(self) -> dict[str, Any]:
        return {field.name: field.value for field in self._fields()}

    def __getitem__(self, name: str) -> Any:
        values = self._values()
        self._require(name, values)
        return values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._fields())

    def __repr__(self) -> str:
        return repr(self._values())

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (self._values(),)  # a copy is no longer connected to the run

    def copy(self) -> dict[str, Any]:
        """Copy the values as they are now.

        Returns:
            A dict of its own.
        """
        return self._values()

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Ask for several values, all or none of them.

        Args:
            changes: Names with their new values: a mapping, or pairs.
            **more: Not used: every name has a dot.

        Raises:
            ConfigError: A name is unknown, or a value does not fit.
        """
        asked = {**dict(changes), **more}
        known = self._values()
        for name in asked:
            self._require(name, known)
        if asked:
            self._ask(asked)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return self._values() | dict(other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(other) | self._values() if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return a value: every live setting has one.

        Args:
            key: The setting's name.
            default: Not used.

        Returns:
            Its value.

        Raises:
            ConfigError: The name is unknown.
        """
        return self[key]

    def __delitem__(self, name: str) -> None:
        self._require(name, self._values())
        self._refuse(f"{name!r} cannot be removed")

    def pop(self, key: str, default: Any = None) -> Any:
        """Refuse: a live setting cannot be removed.

        Args:
            key: The setting's name.
            default: Not used.

        Raises:
            ConfigError: Always.
        """
        del self[key]

    def popitem(self) -> tuple[str, Any]:
        """Refuse: a live setting cannot be removed.

        Raises:
            ConfigError: Always.
        """
        self._refuse("no live setting can be removed")

    def clear(self) -> None:
        """Refuse: a live setting cannot be removed.

        Raises:
            ConfigError: Always.
        """
        self._refuse("no live setting can be removed")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise ConfigError(f'{what}. Set another value: run.live["adapter.learning_rate"] = 1e-5.')

    @staticmethod
    def _require(name: Any, known: Iterable[str]) -> None:
        """Raises UnknownSetting unless it is one of these names."""
        if name in known:
            return
        if name in {field.name for field in fields(CurriculumSettings)}:
            raise UnknownSetting(
                f"{name!r} is a setting of the curriculum, and not of a component: run.curriculum = {{{name!r}: ...}}."
            )
        raise UnknownSetting(f"{name!r} cannot be changed live. {did_you_mean(name, known)}")


class LiveSettings:
    """The live settings of a run. Every method may be called from any thread."""

    def __init__(self, curriculum: CurriculumSettings, live: Iterable[LiveField] = ()) -> None:
        self._lock = threading.Lock()
        self._applied = curriculum
        self._pending: CurriculumSettings | None = None
        self._live = {field.name: field for field in live}
        self._configured = {name: field.value for name, field in self._live.items()}
        self._untaken: set[str] = set()  # live fields whose change the engine has not taken over
        self._draft: dict[str, Any] = {}
        self.at_once = False
        """Whether what is put into the draft is asked for at once."""
        self._journal: list[Change] = []
        self._told = 0  # how many entries of the journal came from the record
        self._waiting: dict[str, int] = {}  # field -> place in the journal of its last change, while that is pending
        self._repeat: list[Change] = []
        self.when_asked: Callable[[], None] = lambda: None
        """Called after somebody asked for other settings: it writes the journal."""

    @property
    def applied(self) -> CurriculumSettings:
        """What the last selection used; before the first one, what it will use."""
        with self._lock:
            return self._applied

    @property
    def pending(self) -> CurriculumSettings | None:
        """What the next selection will use, where that is asked for and not yet taken over."""
        with self._lock:
            return self._pending if self._pending != self._applied else None

    @property
    def curriculum(self) -> CurriculumSettings:
        """What the next selection will use."""
        with self._lock:
            return self._pending or self._applied

    @property
    def live_fields(self) -> tuple[LiveField, ...]:
        """The settings of components that may be changed, with the values that are asked for."""
        with self._lock:
            return tuple(self._live.values())

    @property
    def journal(self) -> tuple[Change, ...]:
        """Every change that was asked for, in order."""
        with self._lock:
            return tuple(self._journal)

    @property
    def draft(self) -> dict[str, Any]:
        """What is tried out and not asked for: the fields, also live ones, that would become other than they are."""
        with self._lock:
            return self._news_in(self._draft)

    @property
    def drafted(self) -> CurriculumSettings:
        """The curriculum that would be asked for."""
        with self._lock:
            return self._with_draft()

    @property
    def waiting(self) -> tuple[Change, ...]:
        """The last change of each field that no epoch has used yet."""
        with self._lock:
            return tuple(self._journal[place] for place in self._waiting.values())

    @property
    def waiting_weights(self) -> dict[str, float]:
        """Weights of the reward's parts that are asked for and that no epoch has used yet."""
        return {change.field.partition(".")[2]: change.new for change in self.waiting if _is_weight(change.field)}

    @property
    def drafted_weights(self) -> dict[str, float]:
        """Weights of the reward's parts that are tried out and not asked for."""
        return {name.partition(".")[2]: value for name, value in self.draft.items() if _is_weight(name)}

    # ── whoever steers ───────────────────────────────────────────────────────────────────────────────────────────────

    def change(self, changes: Mapping[str, Any] | CurriculumSettings, source: str = "code") -> CurriculumSettings:
        """Asks for other settings; names with a dot are live fields. Returns the curriculum that is asked for. Raises
        ConfigError, and changes nothing, if they do not fit."""
        with self._lock:
            after = self._change(changes, source)
        self.when_asked()
        return after

    def _change(self, changes: Mapping[str, Any] | CurriculumSettings, source: str) -> CurriculumSettings:
        live: dict[str, LiveField] = {}
        if not isinstance(changes, CurriculumSettings):
            for name in [name for name in changes if "." in str(name)]:
                found = self._live_field(name)
                live[name] = replace(found, value=found.check(changes[name]))
            changes = {name: value for name, value in changes.items() if name not in live}
        before = self._pending or self._applied
        after = before.steered(changes) if changes else before
        for name in (f.name for f in fields(after)):
            self._note(source, name, getattr(before, name), getattr(after, name))
        for name, given in live.items():
            if self._note(source, name, self._live[name].value, given.value):
                self._live[name] = given
                self._untaken.add(name)
        if changes:
            self._pending = after
        return after

    def replay(self, changes: Iterable[Change]) -> None:
        """Makes the changes of another run's journal again, each right before the safe point of the epoch that used it
        there; those that no epoch used are left out. Raises ConfigError where one of them cannot be made here."""
        with self._lock:
            # What was found when a run was continued was never asked for.
            used = [change for change in changes if change.epoch is not None and _is_setting(change)]
            settings = CurriculumSettings()
            for change in used:
                label = f"replay: {change.field} of epoch {change.epoch}: "
                try:
                    if "." in change.field:
                        self._live_field(change.field).check(change.new)
                    else:
                        settings.updated({change.field: change.new})
                except ConfigError as error:
                    raise ConfigError(label + str(error)) from None
            self._repeat = used

    def _repeat_now(self, epoch: int, names: Callable[[str], bool]) -> None:
        due = [change for change in self._repeat if change.epoch == epoch and names(change.field)]
        if due:
            self._repeat = [change for change in self._repeat if change not in due]
            asked = self._pending or self._applied
            values = {change.field: change.new for change in due}
            curriculum = {name: value for name, value in values.items() if "." not in name}
            if curriculum:  # as whole settings: among changes, a percentile would mean "manual"
                self._change(replace(asked, **curriculum), "replay")
            self._change({name: value for name, value in values.items() if "." in name}, "replay")

    def draft_changes(self, changes: Mapping[str, Any], source: str = "panel") -> CurriculumSettings:
        """Puts changes into the draft; with `at_once`, asks for them. Returns the curriculum of the draft. Raises
        ConfigError, and changes nothing, if they do not fit."""
        with self._lock:
            if self.at_once:
                return self._change(changes, source)
            draft = {**self._draft, **changes}
            if "percentile" in changes and "schedule" not in changes:
                draft["schedule"] = "manual"
            if any("." not in name for name in changes):
                draft.setdefault("enabled", True)  # as in CurriculumSettings.steered
            for name in [name for name in changes if "." in name]:
                draft[name] = self._live_field(name).check(changes[name])
            curriculum = self._with_draft(draft)
            self._draft = self._news_in(draft)
            return curriculum

    def apply_draft(self, source: str = "panel") -> CurriculumSettings:
        """Asks for what is in the draft, and empties it. Raises ConfigError, and changes nothing, if it does not fit."""
        with self._lock:
            curriculum = self._change(self._draft, source) if self._draft else self._pending or self._applied
            self._draft = {}
        self.when_asked()
        return curriculum

    def drop_draft(self) -> None:
        """Empties the draft."""
        with self._lock:
            self._draft = {}

    def _with_draft(self, draft: Mapping[str, Any] | None = None) -> CurriculumSettings:
        changes = self._draft if draft is None else draft
        return (self._pending or self._applied).steered({k: v for k, v in changes.items() if "." not in k})

    def _news_in(self, draft: Mapping[str, Any]) -> dict[str, Any]:
        """What of a draft is other than what is asked for already."""
        asked = self._pending or self._applied
        known = {name: field.value for name, field in self._live.items()}
        news = {k: v for k, v in draft.items() if v != (known[k] if "." in k else getattr(asked, k))}
        if "percentile" in news:  # alone it would mean "manual"
            news["schedule"] = draft.get("schedule", "manual")
        if not asked.enabled and any("." not in name for name in news):  # alone they would mean "on"
            news["enabled"] = draft.get("enabled", True)
        return news

    def _live_field(self, name: str) -> LiveField:
        if name not in self._live:
            raise ConfigError(f"{name!r} cannot be changed live. {did_you_mean(name, self._live)}")
        return self._live[name]

    def _note(self, source: str, name: str, old: Any, new: Any) -> bool:
        if old == new:
            return False
        self._waiting[name] = len(self._journal)
        self._journal.append(Change(time.time(), source, name, old, new))
        return True

    # ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────────

    def restore(
        self,
        settings: CurriculumSettings | None,
        journal: Sequence[Change],
        epoch: int,
        live: Mapping[str, Any] | None = None,
    ) -> None:
        """The record's word of the settings in force and of the changes so far, where a run continues with `epoch`. A
        change that was pending, or used by an unfinished epoch, is pending again; one that was asked for
        here in the meantime stays, after them. live: the values of live fields."""
        with self._lock:
            own = self._journal[self._told :]
            self._journal, self._told = [*journal, *own], len(journal)
            self._waiting = {}
            for place, change in enumerate(self._journal):
                self._waiting.pop(change.field, None)
                if change.epoch is None or change.epoch >= epoch:
                    self._waiting[change.field] = place
            self._applied = settings or self._applied
            waiting = {name: self._journal[place].new for name, place in self._waiting.items()}
            curriculum = {name: value for name, value in waiting.items() if "." not in name}
            self._pending = replace(self._applied, **curriculum) if curriculum else None
            for name, value in {**(live or {}), **waiting}.items():
                if name in self._live:
                    self._live[name] = replace(self._live[name], value=self._live[name].check(value))
            self._untaken = {name for name in waiting if name in self._live}

    def note(self, changes: Sequence[Change]) -> None:
        """Takes into the journal what is no change of a live setting: what was found when the run was continued, say."""
        with self._lock:
            self._journal += changes

    def apply(self, epoch: int) -> tuple[CurriculumSettings, bool]:
        """The engine's safe point: the settings for this epoch's selection, and whether the schedule just became
        automatic again or got another percentile."""
        with self._lock:
            self._repeat_now(epoch, lambda name: "." not in name)
            before, after = self._applied, self._pending or self._applied
            self._applied, self._pending = after, None
            self._settle_journal(epoch, [name for name in self._waiting if name not in self._live])
            return after, after.resumes_after(before)

    def take_live(self, safe_point: str, epoch: int) -> dict[str, Any]:
        """The live fields of that safe point which have been changed since it was last passed."""
        with self._lock:
            self._repeat_now(epoch, lambda name: "." in name and self._live[name].safe_point == safe_point)
            names = [name for name in self._untaken if self._live[name].safe_point == safe_point]
            self._untaken.difference_update(names)
            self._settle_journal(epoch, [name for name in names if name in self._waiting])
            return {name: self._live[name].value for name in names}

    def _settle_journal(self, epoch: int, names: Iterable[str]) -> None:
        for name in names:
            place = self._waiting.pop(name)
            self._journal[place] = replace(self._journal[place], epoch=epoch)

    def live_values(self) -> dict[str, Any]:
        """The live fields that the components have otherwise than the config says, by name."""
        with self._lock:
            return {
                name: field.value
                for name, field in self._live.items()
                if name not in self._untaken and field.value != self._configured[name]
            }

    def note_percentile(self, percentile: float) -> None:
        """The engine's word of the percentile that a selection used, which the schedule may have moved."""
        with self._lock:
            before = self._applied
            self._applied = replace(before, percentile=percentile)
            if self._pending is not None and self._pending.percentile == before.percentile:
                self._pending = replace(self._pending, percentile=percentile)


FIELDS = ("time", "source", "field", "old", "new", "epoch")


def journal_text(run_id: str, changes: Sequence[Change]) -> str:
    """The file's text."""
    return dump_yaml({"run": run_id, "changes": [_written(change) for change in changes]})


def _written(change: Change) -> dict[str, Any]:
    when = datetime.fromtimestamp(change.time, UTC).isoformat(timespec="milliseconds")
    old = float(f"{change.old:.12g}") if isinstance(change.old, float) else change.old  # 0.9, not 0.8999999999999999
    return {**{name: getattr(change, name) for name in FIELDS}, "time": when, "old": old}


def read_journal(path: str | Path) -> list[Change]:
    """The changes of a file that `run.export("journal.yaml")` wrote, in its order. Raises ConfigError for one that is
    none. Whether a run has such a field, and takes such a value, is asked when the change is repeated."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"replay: {path} cannot be read ({type(error).__name__}). Expected a journal that "
            'run.export("journal.yaml") wrote.'
        ) from None
    data = read_yaml(text, f"replay {path.name}")
    changes = data.get("changes") if isinstance(data, Mapping) else None
    if not isinstance(changes, list):
        raise ConfigError(f"replay {path.name}: found no list `changes`. Expected a journal that run.export wrote.")
    return [_read(entry, f"replay {path.name}, changes[{place}]") for place, entry in enumerate(changes)]


def _read(entry: Any, label: str) -> Change:
    if not isinstance(entry, Mapping) or not {"field", "new", "epoch"} <= entry.keys() <= {*FIELDS}:
        raise ConfigError(f"{label}: expected {', '.join(FIELDS)}, of which field, new and epoch are needed.")
    name, epoch = entry["field"], entry["epoch"]
    if not isinstance(name, str):
        raise ConfigError(f"{label}: field is {name!r}; expected the name of a setting.")
    if epoch is not None and (not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0):
        raise ConfigError(f"{label}: epoch is {epoch!r}; expected a whole number from 0, or null.")
    return Change(
        _seconds(entry.get("time")), str(entry.get("source", "")), name, entry.get("old"), entry["new"], epoch
    )


def _seconds(time: Any) -> float:
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return 0.0
