"""The parts of the control panel that are only looked at, as HTML: what the run is doing, what was asked for, the newest
epochs, the log; and the panel's style sheet.

Pure functions. Which of the panel's buttons make sense is said by the style sheet too: the kernel must not write to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.diagnosis import epoch_warnings
from ..engine.live_settings import LiveField
from ..engine.state import RolloutCount, RunStatus, State
from ..text import cut, duration, number, plain
from ..types import Change, CurriculumSettings, Epoch
from ..views.html import Html, bar, drifted, element, table, view
from .reward_curve import reward_curve

__all__ = [
    "asked_html",
    "log_html",
    "note_html",
    "record_html",
    "spoken_html",
    "status_html",
    "style_html",
]

BUTTONS = ("start", "step", "epochs", "pause", "resume", "stop", "abort")
_SHOWN = {
    **dict.fromkeys((State.NEW, State.READY, State.FAILED), ("start", "step", "epochs")),
    State.RUNNING: ("pause", "stop", "abort"),
    State.PAUSING: ("resume", "stop", "abort"),
    State.PAUSED: ("resume", "stop", "abort"),
    State.STOPPING: ("abort",),
    State.ABORTING: (),
}
_SIGNS = {
    "running": "▶",
    "paused": "❚❚",
    "failed": "▲",
    "closed": "✕",
    "aborting": "✕",
    "stopping": "■",
    "pausing": "❚❚",
}


def status_html(doing: RunStatus, number_: int) -> str:
    """The head of panel `number_`: state, epochs, how far the running one is, and what went wrong."""
    state = element(
        "span", f"{_SIGNS.get(doing.state, '●')} {doing.state}", class_=f"ft-state {_css_name(doing.state)}"
    )
    head = [state, element("strong", plain(cut(doing.name, 80)), class_="ft-name"), _how_far(doing)]
    parts = [element("div", head, class_="ft-head"), element("div", _epoch_line(doing), class_="ft-now")]
    if doing.ahead is not None:
        parts.append(element("div", _ahead_line(doing.next_index + 1, doing.ahead), class_="ft-now"))
    if doing.error:
        error = ["▲ The last epoch failed: ", element("span", cut(doing.error, 600))]
        parts.append(element("div", error, class_="ft-banner ft-broken", role="alert"))
    elif doing.notice:
        parts.append(element("div", _SIGNS.get(doing.state, "●"), " ", doing.notice, class_="ft-banner"))
    if doing.read_only:
        parts.append(element("div", doing.read_only, class_="ft-banner"))
    return view(Html(f"<style>{_buttons_style(doing, number_)}</style>"), *parts, styled=False)


def spoken_html(doing: RunStatus) -> str:
    """What a screen reader says when it changes: the state, and the epoch that ended last. Not how far an epoch is: that changes
    twice a second."""
    newest = doing.epochs[-1] if doing.epochs else None
    said = plain(doing.state)
    if newest is not None:
        said += f". Epoch {newest.index} ended with mean reward {number(newest.metrics.mean_reward)}"
    return str(element("span", said))


def note_html(said: str | None) -> str:
    """An error beside the field that it is about."""
    return (
        ""
        if said is None
        else view(element("div", "▲ ", cut(said, 400), class_="ft-broken", role="alert"), styled=False)
    )


def _css_name(state: str) -> str:
    return f"ft-is-{state}" if state.isalpha() else "ft-is-other"


def _how_far(doing: RunStatus) -> Html:
    ended, planned = doing.next_index, max(doing.planned, doing.next_index)
    text = f"{ended} of {planned} epochs"
    left = doing.seconds_left()
    if math.isfinite(left):
        text += f" · about {f'{left:.0f} s' if left < 60 else duration(left)} left"
    return element("span", bar(ended, planned or 1, text), class_="ft-far")


def _epoch_line(doing: RunStatus) -> list[Any]:
    if not doing.active:
        newest = doing.epochs[-1] if doing.epochs else None
        if newest is None:
            return ["no epoch yet"]
        ended = [f"epoch {newest.index} ended with mean reward {number(newest.metrics.mean_reward)}"]
        if newest.metrics.rewards_missing:
            ended.append(element("span", cut(newest.metrics.rewards_missing_text, 160), class_="ft-bad"))
        return ended
    if doing.state == State.PAUSED and not doing.phase:
        return [f"epoch {doing.next_index} comes next"]
    phase = f"epoch {doing.next_index} · {doing.phase or 'starting'}"
    parts: list[Any] = [element("span", phase, class_="ft-phase")]
    if doing.phase == "training" and doing.job:
        parts.append(bar(doing.trained, 100, plain(cut(doing.job, 80))))
    elif doing.phase and doing.total:
        parts.append(bar(doing.done, doing.total, f"{doing.done:,} of {doing.total:,} rollouts"))
    if doing.failed:
        parts.append(element("span", f"{doing.failed:,} failed", class_="ft-bad"))
    parts.append(element("span", duration(doing.seconds), class_="ft-dim"))
    return parts


def _ahead_line(epoch: int, count: RolloutCount) -> list[Any]:
    """The epoch that is sampled while the running one trains."""
    parts: list[Any] = [element("span", f"epoch {epoch} · rollouts", class_="ft-phase")]
    if count.total:
        parts.append(bar(count.done, count.total, f"{count.done:,} of {count.total:,} rollouts"))
    if count.failed:
        parts.append(element("span", f"{count.failed:,} failed", class_="ft-bad"))
    return parts


def _buttons_style(doing: RunStatus, number_: int) -> str:
    shown = () if doing.read_only else _SHOWN.get(doing.state, ())  # type: ignore[call-overload]
    hidden = [name for name in BUTTONS if name not in shown]
    if doing.read_only:
        hidden += ["inputs", "answer"]
    return "".join(f".ft-panel-{number_} .ft-b-{name}{{display:none}}" for name in hidden)


# ── what was asked for ───────────────────────────────────────────────────────────────────────────────────────────────


def asked_html(
    applied: CurriculumSettings,
    pending: CurriculumSettings | None,
    draft: Mapping[str, Any],
    live: Sequence[LiveField],
    waiting: Sequence[Change],
    number_: int,
    said: str | None = None,
    preview: Html | None = None,
    own_tripwires: int = 0,
) -> str:
    """What is in force, what waits for its safe point, what is only tried out, and what that would do.

    waiting: changes of live fields that no epoch has used yet. said: an answer to the last press of a button."""
    parts: list[Any] = []
    if said:
        parts.append(element("div", "▲ ", cut(said, 400), class_="ft-banner ft-broken", role="alert"))
    parts.append(element("div", element("strong", "In force "), _in_force(applied), class_="ft-line"))
    asked = pending or applied
    news = [(name, getattr(applied, name), getattr(asked, name)) for name in vars(asked)]
    chips = [_chip(name, old, new) for name, old, new in news if old != new]
    chips += [_chip(change.field, change.old, change.new) for change in waiting if "." in change.field]
    if chips:
        when = element("span", "from the next safe point on", class_="ft-dim")
        parts.append(element("div", element("strong", "Asked for "), chips, when, class_="ft-line ft-asked"))
    if draft:
        known = {field.name: field.value for field in live}
        news = [(name, known.get(name, getattr(asked, name, None)), value) for name, value in draft.items()]
        chips = [_chip(name, old, new) for name, old, new in news if old != new]
        note = element("span", "not asked for yet: Apply or Revert", class_="ft-dim")
        parts.append(element("div", element("strong", "Tried out "), chips, note, class_="ft-line ft-draft"))
    if preview is not None:
        parts.append(preview)
    if own_tripwires:
        many = "tripwire" if own_tripwires == 1 else "tripwires"
        parts.append(element("div", f"{own_tripwires} {many} from code may pause the run, too", class_="ft-dim"))
    dim = "" if draft else f".ft-panel-{number_} .ft-b-apply,.ft-panel-{number_} .ft-b-revert{{opacity:.45}}"
    return view(Html(f"<style>{dim}</style>"), *parts, styled=False)


def _in_force(settings: CurriculumSettings) -> str:
    if not settings.enabled:
        return "no curriculum: all groups are kept"
    parts = [f"percentile {settings.percentile:.2f}, {settings.schedule}"]
    if settings.schedule == "automatic" and settings.percentile < 1:
        parts.append(f"+{settings.increment_percentile:g} every {settings.expansion_interval} epochs")
    parts.append(f"spread at least {settings.min_reward_diff:g}")
    parts.append("worst first" if settings.sort_ascending else "best first")
    if settings.random_subsample is not None:
        parts.append(f"{settings.random_subsample:.0%} drawn at random")
    return " · ".join(parts)


def _chip(name: str, old: Any, new: Any) -> Html:
    label = name.rpartition(".")[2].replace("_", " ")
    return element("span", f"{label} {_value(old)} → ", element("b", _value(new)), class_="ft-chip", title=name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "all" if value is None else number(value) if isinstance(value, float) else plain(cut(value, 40))


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────────


def record_html(epochs: Sequence[Epoch], changes: Sequence[Change]) -> str:
    """The reward curve and the newest epochs."""
    return view(reward_curve(epochs, changes), _newest(epochs), styled=False)


def _newest(epochs: Sequence[Epoch]) -> Html:
    if not epochs:
        return Html()
    headers = ["epoch", "reward", "teach", "kept", "trained on", "failed", "no reward", "validation", "time"]
    newest = epochs[-1]
    warnings = []
    if newest.metrics.rewards_missing:
        missing = cut(newest.metrics.rewards_missing_text, 400)
        warnings.append(element("div", f"▲ epoch {newest.index}: {missing}", class_="ft-banner ft-broken"))
    for warning in epoch_warnings(newest.metrics):
        warnings.append(element("div", f"▲ epoch {newest.index}: {warning}", class_="ft-banner"))
    drift = drifted(newest.metrics)
    if drift:
        warnings.append(element("div", f"drift in epoch {newest.index}: {drift}", class_="ft-banner"))
    return element("div", table([_row(epoch) for epoch in epochs[:-5:-1]], headers), *warnings)


def _row(epoch: Epoch) -> list[Any]:
    metrics, check = epoch.metrics, epoch.validations[-1] if epoch.validations else None
    checked = "" if check is None else "failed" if check.error else number(check.mean_reward)
    texts = (f"{metrics.groups_with_spread} of {metrics.groups}", duration(epoch.seconds.get("total")))
    teach, took = (text.replace(" ", "\u00a0") for text in texts)
    trained = "" if epoch.trained_groups is None else epoch.trained_groups
    missing = "" if metrics.rewards_missing is None else metrics.rewards_missing
    counted = [metrics.kept_groups, trained, metrics.failures, missing]
    return [epoch.index, metrics.mean_reward, teach, *counted, checked, took]


def log_html(lines: Sequence[str]) -> str:
    """The last lines of the log; nothing where there are none."""
    if not lines:
        return ""
    text = "\n".join(plain(cut(line, 300)) for line in lines)
    shown = element("pre", text, class_="ft-log", tabindex=0, role="group", aria_label="log")
    return view(element("div", "log", class_="ft-section"), shown, styled=False)


def style_html() -> str:
    """The style sheet of all of these, which is on the page once."""
    return view(Html(f"<style>{_STYLE}</style>"))


_STYLE = """
.ft-panel{border:1px solid var(--jp-border-color2,rgba(128,128,128,.35));border-radius:6px;padding:0 0 6px;max-width:1180px;
background:var(--jp-layout-color1,var(--jp-layout-color0,#fff));overflow:hidden}
.ft-panel .ft{background:none;max-width:none;padding:4px 0}
.ft-panel .ft table,.ft-panel .ft.ft tbody tr,.ft-panel .ft.ft tbody tr:nth-child(even){background:none}
.ft-panel .ft.ft td,.ft-panel .ft.ft th{padding:1px 12px 1px 0}
.ft-panel .widget-html-content{line-height:1.45;min-width:0;width:100%}
.ft-panel .ft-b-record,.ft-panel .ft-b-answer{min-width:0;max-width:100%}
.ft-panel .ft-b-status{padding:4px 14px 0;background:var(--jp-layout-color2,rgba(128,128,128,.08));margin:0}
.ft-panel .ft-b-bar{padding:0 12px 6px;background:var(--jp-layout-color2,rgba(128,128,128,.08));
border-bottom:1px solid var(--jp-border-color2,rgba(128,128,128,.35));margin:0 0 4px;overflow:visible}
.ft-panel .ft-b-body{padding:0 12px;overflow:visible;gap:8px 22px}
.ft-panel .ft-b-log{padding:0 14px}
.ft-panel .ft-b-style{display:none}
.ft-panel .widget-toggle-buttons{display:flex;flex-flow:row nowrap;align-items:center}
.ft-panel .widget-toggle-buttons>.widget-label{flex:0 0 132px;text-align:right;margin-right:8px}
.ft-panel .ft-b-heading{margin:0}
body[data-jp-theme-light='false'] .ft-panel{--jp-widgets-dropdown-arrow:url("data:image/svg+xml,
%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'%3E%3Cpath d='M5 7l4 4l4 -4' fill='none' stroke='%23ccc'%20
stroke-width='2'/%3E%3C/svg%3E")}
.ft-panel .ft-section{font-weight:600;font-size:11px;letter-spacing:.06em;text-transform:uppercase;opacity:.7;margin:6px 0 0}
.ft-head{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:center}
.ft-name{font-size:15px}
.ft-far{margin-left:auto;font-variant-numeric:tabular-nums}
.ft-now{display:flex;flex-wrap:wrap;gap:0 16px;min-height:1.5em;font-variant-numeric:tabular-nums}
.ft-state{border-radius:11px;padding:1px 11px;font-weight:600;border:1px solid currentColor;color:var(--fg)}
.ft-is-running{color:var(--jp-success-color1,#2e7d32)}
.ft-is-paused,.ft-is-pausing,.ft-is-stopping{color:var(--jp-warn-color1,#b26a00)}
.ft-is-failed,.ft-is-aborting{color:var(--bad)}
.ft-banner{border-left:4px solid var(--jp-warn-color1,#e69500);background:rgba(230,149,0,.13);color:var(--fg);
padding:4px 10px;margin:5px 0 2px;border-radius:2px;max-height:7.5em;overflow:auto}
.ft-banner.ft-broken{border-color:var(--bad);background:rgba(211,47,47,.13)}
.ft-chip{display:inline-block;border:1px solid rgba(128,128,128,.5);border-radius:10px;padding:0 8px;margin:1px 6px 1px 0;
font-size:12px;font-variant-numeric:tabular-nums}
.ft-draft .ft-chip{border-style:dashed;border-color:var(--enter)}
.ft-asked .ft-chip{border-color:var(--on)}
.ft-line{margin:1px 0}
.ft-empty{padding:60px 20px;text-align:center;border:1px dashed rgba(128,128,128,.4);border-radius:4px}
.ft-curve{display:block;width:100%;height:auto;max-width:760px}
.ft-curve path,.ft-key path{fill:none}
.ft-mean{stroke:var(--on);stroke-width:2;stroke-linejoin:round}
.ft-dot{fill:var(--on)}
.ft-range.ft-range{fill:var(--on);fill-opacity:.16}
.ft-kept{stroke:var(--leave);stroke-width:1.6;stroke-dasharray:6 3}
.ft-check.ft-check{fill:var(--enter);stroke:var(--bg);stroke-width:1}
.ft-percentile{stroke:currentColor;stroke-opacity:.55;stroke-width:1.3;stroke-dasharray:2 3}
.ft-mark.ft-mark{fill:currentColor;fill-opacity:.75}
.ft-mark-line{stroke:currentColor;stroke-opacity:.45;stroke-width:1}
.ft-grid{stroke:currentColor;stroke-opacity:.13}
.ft-tick{fill:currentColor;font-size:11px;opacity:.8}
.ft-keys{display:flex;flex-wrap:wrap;gap:0 16px;font-size:12px;padding-left:36px}
.ft-key svg{vertical-align:-2px;margin-right:5px}
.ft .ft-log{font-size:11.5px;max-height:8em;overflow:auto;margin:0}
.ft-panel{container-type:inline-size}
.ft-panel .ft-b-spoken{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);margin:0}
.ft-panel .ft-b-note,.ft-panel .ft-b-note .widget-html-content{margin:0;min-height:0;height:auto}
.ft-panel .ft-b-note .ft{padding:0 0 2px 140px}
.ft-panel .ft-b-note .ft-broken{border-left:3px solid var(--bad);padding:1px 8px;color:var(--fg)}
.ft-panel .jupyter-button{border:1px solid var(--jp-border-color1,rgba(128,128,128,.6));border-radius:4px;font-weight:500}
.ft-panel .jupyter-button:not(.mod-primary):not(.mod-active){background:var(--jp-layout-color1,#fff);
color:var(--jp-ui-font-color1,inherit)}
.ft-panel .jupyter-button:hover{box-shadow:0 1px 3px rgba(0,0,0,.35)}
.ft-panel :focus-visible{outline:2px solid var(--jp-brand-color1,#1a73b8);outline-offset:1px}
.ft-panel .ft-b-fold{display:none}
@container(max-width:830px){.ft-panel .ft-b-fold{display:inline-block}.ft-panel .ft-b-seen{order:-1;flex-basis:100%!important}
.ft-panel .ft-b-inputs{display:none;flex:1 1 100%!important}
.ft-panel:has(.ft-b-fold.mod-active) .ft-b-inputs{display:flex}}
.ft-gone-note{border-left:4px solid var(--jp-warn-color1,#e69500);background:rgba(230,149,0,.13);padding:6px 10px;margin:4px 0}
.ft-gone>.ft-panel{opacity:.5;filter:grayscale(1)}
@container(max-width:480px){.ft-panel .ft-curve{overflow:visible}.ft-panel .ft-tick{font-size:20px}
.ft-panel .ft-curve path{vector-effect:non-scaling-stroke}}
.ft-gone .jupyter-widgets-disconnected::before{display:none}
@container(max-width:640px){.ft-panel .ft.ft td,.ft-panel .ft.ft th{padding-right:7px}}
.ft-has-panel [data-ft-record]{display:none}
""".strip().replace("\n", "")
