"""Text of models, tools and datasets in a real browser: no script of theirs runs, nothing is fetched, and it is read as it
was written. Each view is put into a page by itself, and into a cell's output as JupyterLab does it (innerHTML)."""

from __future__ import annotations

import math
from typing import Any

import pytest
from factories import item, make_epoch, make_trajectory

from finetune_nb.analysis.group_comparison import compare_group
from finetune_nb.analysis.learning_signal import learning_signal
from finetune_nb.analysis.rollout_group import rollout_group
from finetune_nb.text import plain
from finetune_nb.types import RolloutFailure
from finetune_nb.views.rollout import RolloutView, failure_html, trajectory_html
from finetune_nb.views.summary import epoch_html, run_html

ATTACKS = [
    "<script>window.ran = 'script'</script>",
    "<img src=http://evil.test/x.png onerror=\"window.ran = 'img'\">",
    "</pre></td></table></details></div></style></title><svg onload=\"window.ran = 'svg'\">",
    "<style>@import url(http://evil.test/a.css);.ft{background:url(http://evil.test/b.png)}</style>",
    "<iframe srcdoc=\"<script>parent.ran = 'frame'</script>\"></iframe>",
    '" onmouseover="window.ran = \'attribute\'" x="',
    "' onfocus='window.ran = 1' autofocus='",
    "<a href=\"javascript:window.ran = 'link'\" id=link>click</a>",
    "<details open ontoggle=\"window.ran = 'toggle'\">",
    "<link rel=stylesheet href=http://evil.test/c.css><base href=http://evil.test/>",
    "<meta http-equiv=refresh content='0;url=http://evil.test/'>",
    "<form action=http://evil.test/><button autofocus>go</button></form>",
    "<math><mtext><table><mglyph><style><img src onerror=\"window.ran = 'mutation'\">",
    "<!--><img src onerror=\"window.ran = 'comment'\">-->",
    "<![CDATA[<img src onerror=\"window.ran = 'cdata'\">]]>",
    "# heading **bold** [a](javascript:alert(1)) `code` $x^2$ ![p](http://evil.test/d.png)",
    "\x1b[31mred\x1b[0m \x1b]8;;http://evil.test\x07link\x1b]8;;\x07",
    "👩‍💻🏳️‍🌈 naïve",
    "\u202eevil\u202c שלום \u2066x\u2069",
    "lone \ud83d and \udc00",
    "nul \x00 byte",
    "hidden \U000e0041\U000e0042 tags",
]


def views_of(text: str) -> dict[str, Any]:
    """Every view of records that have this text wherever others put something."""
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": text}}
    top = [{"token": text, "logprob": -2.0}, {"token": "b", "logprob": -3.0}]
    logprobs = {"content": [{"token": text, "logprob": -1.0, "top_logprobs": top}, {"token": "x", "logprob": -5.0}]}
    turns = [
        item("system", text),
        item("user", text),
        item("assistant", text, logprobs=[-1.0], tokens=[text], tool_calls=[call, text], finish_reason=text),
        item("tool", text, tool_call_id=text, name=text),
        item("assistant", text + "x", logprobs=logprobs, reasoning_content=text),
        item("other", f"<think>{text}</think>{text}", name=text),
    ]
    failures = [RolloutFailure(text, 2, text)]
    epoch = make_epoch({text: [1, 0, None], "b": [0, 0]}, 1, failures=failures, scores={text: 1.0}, job="failed",
                       message=text, validation_error=text, train={text: 1.0}, reason=text)  # fmt: skip
    for place, trajectory in enumerate(epoch.collection.trajectories[0]):
        trajectory.episode = turns[: len(turns) - place]
        trajectory.metadata |= {"reward_error": text, "reasoning": text}  # type: ignore[operator]
    group = rollout_group(epoch, text)
    alone = make_trajectory(None, text, text, reply=text, reward_error=text)  # type: ignore[arg-type]
    alone.episode = turns
    return {
        "trajectory": lambda: trajectory_html(alone),
        "failure": lambda: failure_html(failures[0]),
        "rollout": lambda: RolloutView(group, 0)._repr_html_(),
        "entropy": lambda: RolloutView(group, 1, "entropy")._repr_html_(),
        "failed rollout": lambda: RolloutView(group, failures[0])._repr_html_(),
        "comparison": lambda: compare_group(group)._repr_html_(),
        "signal": lambda: learning_signal(epoch, [make_epoch({text: [1, 1]}, 0)])._repr_html_(),
        "epoch": lambda: epoch_html(epoch),
        "run": lambda: run_html(name=text, state=text, epochs=[epoch], error=text, folder=text, model=text),
    }


KINDS = list(views_of("x"))


@pytest.fixture
def page(browser):
    """A page that notes every request, script dialog and error."""
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.asked = []
    page.said = []

    def refuse(route):
        page.asked.append(route.request.url)
        route.abort()

    context.route("**/*", refuse)
    page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    yield page
    context.close()


READER = """() => {
    document.querySelectorAll('details').forEach(fold => { fold.open = true; });
    document.querySelectorAll('*').forEach(node => {
        for (const kind of ['mouseover', 'mouseenter', 'focus', 'click', 'load', 'error', 'toggle'])
            if (!(kind === 'click' && node.tagName === 'SUMMARY')) node.dispatchEvent(new Event(kind));
    });
    const foreign = 'script, img:not([src^="data:image/svg+xml,"]), iframe, object, embed, link, base, form, a, video, ' +
        'audio, math, h1, button, input';
    const count = selector => document.querySelectorAll(selector).length;
    const all = [...document.querySelectorAll('*')];
    return new Promise(done => setTimeout(() => done({
        ran: window.ran ?? null,
        title: document.title,
        text: document.querySelector('.ft').textContent,
        foreign: count(`.ft :is(${foreign})`),
        views: count('.ft'),
        styles: count('style'),
        handlers: all.flatMap(node => node.getAttributeNames()).filter(name => name.startsWith('on')),
    }), 5));
}"""
"""Does what a reader does (opens every fold, moves over everything), then says what there is."""


def is_harmless(page, markup: str) -> str:
    """Shows the markup both ways; returns what a reader sees."""
    text = ""
    for way in ("page", "cell"):
        page.asked.clear()
        if way == "page":
            page.set_content(f"<!doctype html><meta charset=utf-8><title>a view</title>{markup}")
        else:
            page.set_content("<!doctype html><meta charset=utf-8><title>a view</title><div id=cell></div>")
            page.evaluate("markup => { document.getElementById('cell').innerHTML = markup; }", markup)
        found = page.evaluate(READER)
        text = found.pop("text")
        assert found == {"ran": None, "title": "a view", "foreign": 0, "views": 1, "styles": 1, "handlers": []}
        assert [url for url in page.asked if not url.startswith(("about:", "data:"))] == []
        assert page.said == []
    return text


def test_a_page_that_is_not_escaped_would_be_noticed(page) -> None:
    with pytest.raises(AssertionError):
        is_harmless(page, f"<div class=ft>{ATTACKS[1]}</div>")
    page.set_content(f"<div class=ft>{ATTACKS[1]}{ATTACKS[2]}</div>")
    assert page.evaluate(READER)["ran"] in ("img", "svg")
    assert "http://evil.test/x.png" in page.asked


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_nothing_is_fetched_and_the_text_is_there(page, kind: str) -> None:
    for attack in ATTACKS:
        shown = is_harmless(page, views_of(attack)[kind]())
        expected = plain(attack if kind != "signal" else attack[:30])  # there, the text is only an id
        assert " ".join(expected.split()) in " ".join(shown.split()), attack


@pytest.mark.parametrize("kind", ["trajectory", "rollout", "comparison"])
def test_a_megabyte_in_every_turn_is_shown_within_200_kb(page, kind: str) -> None:
    text = "<img src=http://evil.test/ onerror=window.ran=1>\u202e" * 20_000
    markup = views_of(text)[kind]()
    assert len(markup.encode()) <= 200_000
    assert "characters left out" in is_harmless(page, markup)


def test_colours_reach_contrast_in_light_and_dark(browser) -> None:
    """Text against what is behind it: at least 4.5 to 1 (WCAG 2, AA) for every tint of the heat map."""
    turn = item("assistant", "abcdef", logprobs=[-0.01, -0.3, -1.0, -2.0, -3.0, -6.0], tokens=list("abcdef"))
    epoch = make_epoch([[1, 0]])
    epoch.collection.trajectories[0][0].episode = [turn]
    markup = RolloutView(rollout_group(epoch), 0)._repr_html_()
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.set_content(f"<!doctype html><body>{markup}")
        found = page.evaluate(
            """() => {
                const parts = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
                const over = (top, below) => { const a = top[3] ?? 1;
                    return [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]); };
                const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => { const v = c[i] / 255;
                    return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
                return [...document.querySelectorAll('.ft-heat :is(span, u)')].map(span => {
                    const chain = []; for (let n = span; n; n = n.parentElement) chain.unshift(n);
                    let behind = [255, 255, 255];
                    chain.forEach(n => { behind = over(parts(getComputedStyle(n).backgroundColor), behind); });
                    const a = light(parts(getComputedStyle(span).color)), b = light(behind);
                    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
                });
            }"""
        )
        assert len(found) == 11  # five of the legend, six tokens
        assert min(found) >= 4.5 and math.isfinite(max(found)), (scheme, found)
        context.close()
