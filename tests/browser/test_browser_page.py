"""The trajectory browser's page in a bare Chromium, with this process as its kernel: keys, filters, comparing, labels, text that
nobody should trust, and what assistive technology sees."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest
from factories import item, make_epoch, sampled
from records import Views, failed, stored, with_tool

from finetune_nb.errors import BackendError
from finetune_nb.notebook.mount import module

from .jupyterlab import until
from .test_hostile_content import ATTACKS

pytest.importorskip("playwright.sync_api", reason='no playwright: pip install "finetune_nb[dev]"')
from .bare import VIEW, BarePage


def answer(generation, last=" so"):
    """A reply of five tokens, with alternatives for the second one; the fourth is the least likely."""
    tokens = [("I", -0.1), (" think", -2.5), (last, -0.01), (f" {generation}", -4.0), ("\n", -0.5)]
    return sampled(*tokens, top_logprobs=[{}, {" think": -2.5, " know": -0.2}, {}, {}, {}])


def records():
    """Two epochs: a with a failure and a missing reward, b, and c in the second alone. Rollouts part in their last turn."""
    first = make_epoch({"a": [1, 0, None, 0.5], "b": [0, 0]}, 0, failures=[failed("a", 7)], scores={"judge": 0.5})
    second = make_epoch({"a": [1, 0, None, 0.5], "b": [0, 1], "c": [1, 1]}, 1)
    for epoch in (first, second):
        for group in epoch.collection.trajectories:
            for generation, trajectory in enumerate(group):
                long = item("system", "rules " * 600)
                thought = item("assistant", "<think>hm, hm</think>\nYes.", logprobs=[])
                trajectory.episode = [*with_tool().episode, long, thought, answer(generation)]
                trajectory.metadata["reasonings"] = {"judge": f"because it is {generation}"}
    return first, second


class Folder(Views):
    def __init__(self, folder, *epochs):
        super().__init__(*epochs)
        self.folder = folder


@pytest.fixture
def opened(browser):
    """opened(run, **options) shows the run in a page."""
    pages = []

    def open(run=None, **options):
        pages.append(BarePage(browser, (run or Views(*records())).browse(), **options))
        pages[-1].focus()
        return pages[-1]

    yield open
    for page in pages:
        problems = page.problems
        page.close()
        assert problems == []


def test_keys_go_through_examples_generations_epochs_turns_and_tokens(opened):
    shown = opened()
    assert shown.text(".head .id") == "a" and shown.browser.epoch == 1
    shown.press("j", "l")
    assert shown.text(".head .id") == "b" and shown.text(".switch [aria-pressed=true]") == "1: 1"
    shown.press("[")
    assert (
        shown.text(".head .id") == "b"
        and "epoch 0" in shown.text(".what")
        and shown.text(".measures").startswith("reward 0")
    )
    shown.press("[")
    assert shown.said == "this is the first epoch"
    shown.press("n", "n")
    assert shown.said == "turn 3 of 8"
    shown.press(".")
    assert shown.said == "unlikely token 1 of 8" and '" 1"' in shown.text(".inspector .which")
    shown.press(".")
    assert shown.said == "unlikely token 2 of 8"
    shown.press(",", ",")
    assert shown.said == "unlikely token 8 of 8"
    shown.press("k", "G")
    assert shown.text(".head .id") == "b"
    until(lambda: shown.browser.example == "b", 10, "the example in Python", lambda: shown.page.wait_for_timeout(50))
    assert shown.browser.epoch == 0


def test_the_inspector_says_what_is_known_of_a_token_and_of_the_rollout(opened):
    shown = opened(Views(records()[0]))
    shown.page.get_by_text(" think", exact=True).last.click()
    said = shown.text(".inspector")
    for wanted in (
        "0.0821",
        "-2.5",
        '" know"',
        "0.819",
        "judge 0.5",
        "because it is 0",
        "teaches: their rewards differ",
    ):
        assert wanted in said
    shown.page.get_by_role("button", name="raw JSON").click()
    shown.page.locator(".raw pre").wait_for()
    assert '"reward": 1.0' in shown.text(".raw pre")


def test_arguments_are_json_long_texts_and_thinking_are_folded_and_never_a_whole_reply(opened):
    shown = opened()
    assert shown.text(".call pre") == '{\n  "a": 2,\n  "b": 2\n}'
    rules = shown.page.locator(".turn").nth(5)
    assert len(rules.inner_text()) < 1000
    rules.get_by_role("button", name="show all 3,600 characters").click()
    assert len(rules.inner_text()) > 3500
    thinking = shown.page.locator(".turn").nth(6)
    assert "Yes." in thinking.inner_text() and "hm, hm" not in thinking.inner_text()
    thinking.get_by_role("button", name="thinking").click()
    assert "hm, hm" in thinking.inner_text()
    lengths = shown.page.evaluate(
        "['<think>a</think>b', '<think>a</think>', '<think>a', 'a</think>b', 'b'].map(module.thinkingLength)"
    )
    assert [length > 0 for length in lengths] == [True, False, False, True, False]
    shown.press("e")
    assert shown.page.locator(".turn .title[aria-expanded=false]").count() == 1
    shown.press("E")
    assert shown.page.locator(".turn .title[aria-expanded=false]").count() == 8


def test_filters_sorts_and_searches_narrow_the_list_and_are_python_s_too(opened):
    shown = opened(Views(*records()))
    shown.press("[", "f")
    shown.page.get_by_label("state of the rollout").select_option("failed")
    shown.settle()
    assert shown.browser.filter == {"failed": True} and shown.page.locator(".row").count() == 1
    assert "TimeoutError: too slow" in shown.text(".error") and shown.text(".top button") == "filter (1)"
    shown.page.get_by_role("button", name="clear").click()
    shown.page.get_by_label("sort by").select_option("mean")
    shown.settle()
    assert shown.browser.sort == "mean" and shown.page.locator(".row .id").first.inner_text() == "b"
    shown.focus()
    shown.press("/")
    shown.page.keyboard.type("TIMEOUT")
    shown.press("Enter")
    shown.page.get_by_text("1 rollout in 1 epoch").wait_for()
    assert shown.browser.filter == {"text": "TIMEOUT"} and shown.page.locator(".row").count() == 1
    shown.browser.filter = {"reward": (1, None)}
    shown.page.locator(".switch [aria-pressed=true]", has_text="0: 1").wait_for()
    assert shown.page.locator(".row").count() == 1 and shown.text(".switch [aria-pressed=true]") == "0: 1"
    assert shown.browser.selection.trajectory.tolist() == ["e0/a/0"]


def test_two_rollouts_are_compared_where_they_part_also_of_two_epochs(opened):
    shown = opened()
    shown.press("c")
    shown.page.locator(".turn.parts").nth(1).wait_for()
    assert shown.said == "they part in turn 8"
    assert shown.page.locator(".turn.shared").count() == 14
    shown.press("d")
    assert [each.strip() for each in shown.page.locator(".tokens .parts").all_inner_texts()] == ["0", "1"]
    shown.page.get_by_label("epoch of this rollout").nth(1).select_option("0")
    shown.settle()
    measures = shown.page.locator(".measures").all_inner_texts()
    assert "judge 0.5" in measures[1] and "judge" not in measures[0]
    shown.press("c")
    assert shown.page.locator(".reader").count() == 1 and shown.page.locator(".turn.shared").count() == 0
    shown.press("C", "j")
    heads = shown.page.locator(".head .id").all_inner_texts()
    assert heads == ["b", "a"]


def test_orders_and_the_ends_of_the_epochs_have_keys_and_a_label_is_repeated_by_one(opened, tmp_path):
    run = Folder(tmp_path / "run", *stored(tmp_path, *records()))
    shown = opened(run)
    shown.press("l", "{")
    assert "epoch 0" in shown.text(".what")
    shown.press("}")
    assert "epoch 1" in shown.text(".what")
    shown.press("X")
    assert shown.said == "nothing was labelled here yet: press x"
    for _ in range(5):
        shown.press("s")
    assert shown.browser.sort == "call" and shown.said == "sort: least likely tool call"
    shown.press(".")
    assert "-3" in shown.text(".inspector")  # the reply has a token of -4
    shown.press("S")
    assert shown.browser.sort == "unlikely"
    shown.press(".")
    assert "-4" in shown.text(".inspector")
    shown.press("x")
    shown.page.keyboard.type("seen")
    shown.press("Enter", "j", "X")
    shown.page.locator(".labels li").wait_for()
    assert len(run.labels()) == 2 and set(run.labels().tag) == {"seen"}


def test_labels_are_added_shown_to_other_pages_and_removed(opened, tmp_path):
    run = Folder(tmp_path / "run", *stored(tmp_path, *records()))
    shown, other = opened(run), opened(run)
    shown.press("x")
    shown.page.keyboard.type("hacked")
    shown.page.get_by_label("note").fill("it prints the answer")
    shown.page.get_by_label("label", exact=True).press("Enter")
    shown.page.locator(".labels li").wait_for()
    assert run.labels().loc[0, ["name", "tag", "note"]].tolist() == ["e1/a/0", "hacked", "it prints the answer"]
    began = time.monotonic()
    other.page.locator(".labels li").wait_for()
    assert "hacked" in other.text(".labels li") and time.monotonic() - began < 5
    shown.page.get_by_role("button", name="remove the label hacked").click()
    shown.page.locator(".labels li").wait_for(state="detached")
    assert len(run.labels()) == 0


def test_groups_and_epochs_are_labelled_and_their_labels_are_seen_in_list_and_head(opened, tmp_path):
    run = Folder(tmp_path / "run", *stored(tmp_path, *records()))
    shown = opened(run)
    for level, tag in (("group", "hard"), ("epoch", "early")):
        shown.page.get_by_label("what is labelled").select_option(level)
        shown.press("x")
        shown.page.keyboard.type(tag)
        shown.press("Enter")
        shown.page.locator(".labels li", has_text=tag).wait_for()
    assert run.labels()[["name", "level", "tag"]].values.tolist() == [
        ["e1/a", "group", "hard"],
        ["e1", "epoch", "early"],
    ]
    assert shown.page.locator(".row", has_text="⚑ hard").count() == 1
    assert "⚑ early" in shown.text(".scrubber") and "labelled early" in shown.page.locator(".scrubber").get_attribute(
        "title"
    )
    shown.press("l")
    assert "hard of the group" in shown.text(".labels ul")
    shown.press("f")
    shown.page.get_by_label("filter by label").select_option("hard")
    shown.settle()
    assert shown.browser.filter == {"label": "hard"} and shown.page.locator(".row").count() == 1
    shown.page.get_by_label("filter by label").select_option("early")
    shown.settle()
    assert shown.page.locator(".row").count() == 3


def test_keys_are_typed_in_fields_and_escape_leaves_step_by_step(opened):
    shown = opened()
    shown.press("?")
    assert shown.page.locator(".help").count() == 1
    shown.press("Escape")
    assert shown.page.locator(".help").count() == 0
    shown.press("/")
    shown.page.keyboard.type("jdd?")
    assert shown.page.get_by_label("search the text").input_value() == "jdd?" and shown.text(".head .id") == "a"
    focused = "document.activeElement.shadowRoot?.activeElement?.className ?? document.activeElement.tagName"
    shown.press("Escape")
    assert shown.page.evaluate(focused) == "ftb"
    shown.press("Escape")
    assert shown.page.evaluate(focused) == "BODY"
    # Plain keys are kept from the page, and those with Ctrl are not.
    shown.page.evaluate("window.heard = []; document.addEventListener('keydown', (event) => heard.push(event.key))")
    shown.focus()
    shown.press("j", "d", "Control+s")
    assert shown.page.evaluate("heard") == ["Control", "s"]
    assert shown.page.evaluate("[...document.querySelectorAll('[data-lm-suppress-shortcuts]')].length") == 0


def test_a_new_epoch_is_followed_and_a_kernel_that_is_gone_greys_it_out(opened):
    run = Views(records()[0])
    shown = opened(run)
    assert "epoch 0" in shown.text(".what")
    run._records = records()
    shown.page.get_by_text("epoch 1 has ended").wait_for()
    shown.page.locator(".what").filter(has_text="epoch 1").wait_for()  # its rollouts have to come first
    shown.page.evaluate("model.answers = false; model.emit('comm:close')")
    assert shown.page.locator(".ftb.lost").count() == 1
    assert "Run the cell again, or: ft.Run.open('none').browse(epoch=0)" in shown.text(".banner")
    shown.press("n")
    assert "turn" in shown.said  # what is loaded can still be read


def test_an_epoch_that_was_run_again_is_shown_as_it_is_now(opened):
    first, second = records()
    run = Views(first, second)
    shown = opened(run)
    shown.press("[", "]")  # both epochs are known to the page
    assert "epoch 1" in shown.text(".what") and "so 0" in shown.text(".turns")
    again = dataclasses.replace(records()[1], started_at=second.started_at + 60)
    for group in again.collection.trajectories:
        for trajectory in group:
            trajectory.episode[-1] = answer(0, last=" again")
    run._records = (first, again)
    until(
        lambda: "again 0" in shown.text(".turns"),
        10,
        "the rollouts of the second time",
        lambda: shown.page.wait_for_timeout(50),
    )


class Running(Folder):
    """A run in the middle of its second epoch. Each state of that is told from the one before by how much of it there is."""

    state = "running"


def running(rewards):
    """Of the second epoch what there is so far; its conversations are long."""
    epoch = make_epoch(rewards, 1, job=None)
    for group in epoch.collection.trajectories:
        for trajectory in group:
            generation = trajectory.metadata["generation"]
            lines = [item("user", f"question {turn}\n" * 12) for turn in range(5)]
            trajectory.episode = [*lines, answer(generation), item("user", "and now?\n" * 12), answer(generation)]
    return epoch


def test_a_running_epoch_grows_and_ends_under_the_hand_of_who_reads_it(opened, tmp_path):
    run = Running(tmp_path, records()[0])
    run.partial = running({"b": [None, None]})
    shown = opened(run)
    assert "epoch 0" in shown.text(".what")  # nobody is taken to an epoch that is sampled
    shown.page.wait_for_function(f"() => {VIEW}.epochs.length === 2")
    shown.focus()
    shown.press("]", "l", ".")
    assert shown.text(".what .dim") == "epoch 1, running" and "not scored yet" in shown.text(".measures")
    assert shown.page.locator(".row").count() == 1 and shown.text(".row .signal") == "running"
    assert "running, 2 rollouts so far" in shown.text(".scrubber") and shown.page.locator(".error").count() == 0
    shown.press("n")
    place = f"() => [{VIEW}.readers[0].turn, {VIEW}.readers[0].token, {VIEW}.readers[0].element.scrollTop]"
    before = shown.page.evaluate(place)
    assert before[0] > 1 and before[2] > 100

    run.partial = running({"a": [None], "b": [None, None, None]})
    shown.page.locator(".row").nth(1).wait_for()
    assert shown.page.locator(".row[aria-selected=true] .id").inner_text() == "b"
    assert shown.text(".head .id") == "b" and shown.text(".switch [aria-pressed=true]") == "1: ○"
    assert shown.page.evaluate(place) == before

    run._records, run.partial = (run._records[0], running({"a": [1, 0], "b": [0, 0.5, 1]})), None
    shown.page.get_by_text("epoch 1 has ended").wait_for()
    shown.page.locator(".switch [aria-pressed=true]", has_text="1: 0.5").wait_for()
    assert shown.text(".what .dim") == "epoch 1" and shown.text(".measures").startswith("reward 0.5")
    assert shown.page.evaluate(place) == before and '" 1"' in shown.text(".inspector .which")
    assert shown.page.locator(".row[aria-selected=true] .id").inner_text() == "b"
    shown.press("k")
    assert shown.text(".head .id") == "a"


class Trained(Views):
    """A run that knows what its tokens have changed by: after epoch 0 a little, after epoch 1 more."""

    def kept_weights(self):
        return [epoch for epoch in (0, 1) if epoch < len(self.records)]

    def token_changes(self, trajectory, epoch=None):
        if trajectory.metadata["id"] == "b":
            raise BackendError("turn 3 has no prompt ids")
        found = [0.0, 2.0, -0.1, -3.0, 0.3]
        return [
            [value * (0.1 + epoch) for value in found]
            for each in trajectory.episode
            if each.metadata and "tokens" in each.metadata
        ]


def test_tokens_are_tinted_by_what_training_has_changed(opened):
    run = Trained(*records())
    for epoch in run.records:
        for group in epoch.collection.trajectories:
            for trajectory in group:
                trajectory.episode = [item("user", "2+2"), answer(0)]
    shown = opened(run)
    shown.press("t", "t")
    assert shown.page.get_by_label("weights that the change is under").is_hidden()
    shown.press("t")
    shown.page.locator(".note", has_text="nats a token").wait_for()
    tokens = shown.page.locator(".tokens span")
    colours = [tokens.nth(place).evaluate("e => e.style.background") for place in range(5)]
    assert colours[0] == "" and colours[1].startswith("rgba(0, 119, 204") and colours[3].startswith("rgba(217, 95, 2")
    assert "likelier" in tokens.nth(1).get_attribute("class") and "unlikely" in tokens.nth(3).get_attribute("class")
    shown.press(".")
    assert shown.said == "changed token 1 of 5" and '" 0"' in shown.text(".inspector .which")
    assert "-3.3 nats" in shown.text(".inspector") and "probability after epoch 1" in shown.text(".inspector")

    shown.page.get_by_label("weights that the change is under").select_option("0")
    shown.page.locator(".note", has_text="after epoch 0").wait_for()
    shown.page.wait_for_function("() => " + VIEW + ".readers[0].changes?.[3] > -1")
    assert "-0.3 nats" in shown.text(".inspector")
    shown.focus()
    shown.press("j")
    shown.page.locator(".note", has_text="no change can be shown: turn 3 has no prompt ids").wait_for()
    assert tokens.nth(3).evaluate("e => e.style.background") == ""
    asked = len([each for each in shown.asked if each["op"] == "change"])
    shown.press("k")
    shown.page.locator(".note", has_text="nats a token").wait_for()
    assert len([each for each in shown.asked if each["op"] == "change"]) == asked  # it was known
    shown.press("t")
    assert shown.page.locator(".note").is_hidden() and tokens.nth(3).evaluate("e => e.style.background") == ""


def test_a_slow_kernel_is_said_and_a_late_answer_is_taken(opened):
    shown = opened()
    shown.page.evaluate(
        """() => { const pass = model.pass;
                   model.pass = async (content) => {
                     if (content.op === "body") await new Promise((done) => setTimeout(done, 3000));
                     return pass.call(model, content);
                   }; }"""
    )
    shown.page.keyboard.press("j")
    shown.page.get_by_text("the kernel has not answered yet").wait_for()
    shown.page.locator(".head .id", has_text="b").wait_for()
    until(lambda: shown.said == "", 10, "the end of that", lambda: shown.page.wait_for_timeout(50))

    shown.page.keyboard.press("j")
    shown.page.get_by_text("the kernel has not answered yet").wait_for()
    shown.page.keyboard.press("n")
    shown.page.locator(".head .id", has_text="c").wait_for()
    shown.settle()
    assert shown.said.startswith("turn ")  # what was said since stays


def test_it_mounts_on_the_static_html_once_a_kernel_answers_and_gives_it_back(browser):
    silent = BarePage(browser, None, mounts=True)
    silent.page.wait_for_timeout(100)
    assert silent.page.locator("#still").is_visible() and silent.page.locator(".ftb").count() == 0
    silent.close()
    shown = BarePage(browser, Views(*records()).browse(), mounts=True)
    assert not shown.page.locator("#still").is_visible()
    shown.page.evaluate("document.body.append(Object.assign(document.createElement('div'), {id: 'second'}))")
    shown.page.evaluate("document.getElementById('second').dataset.ftMount = 'here'; document.body.append('x')")
    shown.page.locator("#second .ftb .measures").wait_for()
    shown.page.evaluate("model.emit('comm:close')")
    assert shown.page.locator("#still").is_visible() and shown.page.locator(".ftb").count() == 0
    assert shown.problems == []
    shown.close()


def hostile_run(text):
    """A run with that text wherever others put something."""
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": text}}
    epoch = make_epoch({text: [1, 0, None], "b": [0, 0]}, failures=[failed(text)], scores={text: 0.5})
    for group in epoch.collection.trajectories:
        for trajectory in group:
            top = [{text: -1.0, "x": -2.0}]
            trajectory.episode = [
                item("system", text, name=text),
                item(
                    "assistant",
                    text,
                    logprobs=[-1.0],
                    tokens=[text],
                    tool_calls=[call],
                    finish_reason=text,
                    top_logprobs=top,
                ),
                item("tool", text, tool_call_id=text),
                item("assistant", f"<think>{text}</think>{text}", logprobs=[], reasoning_content=text),
            ]
            trajectory.metadata |= {"reasonings": {text: text}, "reasoning": text, "reward_error": text, "output": text}
    run = Views(epoch)
    run.id = text
    return run


def test_hostile_text_runs_nothing_and_makes_no_element(opened):
    plain, shown = opened(hostile_run("plain")), opened(hostile_run("".join(ATTACKS)))
    requests = []
    shown.page.on("request", lambda request: requests.append(request.url))
    kinds = []
    for page in (plain, shown):
        page.press(".", "c", "t", "c", "j", "k", "?", "Escape")
        for fold in page.page.locator(".folded > button").all():
            fold.click()
        page.page.get_by_role("button", name="raw JSON").click()
        page.page.locator(".raw pre").wait_for()
        root = "document.querySelector('#place > div').shadowRoot"
        kinds.append(set(page.page.evaluate(f"[...{root}.querySelectorAll('*')].map(e => e.tagName)")) - {"MARK"})
    assert kinds[0] == kinds[1]
    assert shown.page.evaluate("window.ran") is None and requests == []
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", shown.page.evaluate(f"{root}.textContent"))


def test_the_module_puts_no_text_in_as_markup():
    source = module("browser.js")
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\bimport\b", source
    )
    assert found == []


def test_only_what_is_in_sight_is_made(opened):
    epoch = make_epoch({f"q{place}": [0, 1] for place in range(3000)})
    tokens = [(" word", -0.5)] * 899 + [(" last", -6.0)]
    epoch.collection.trajectories[0][0].episode = [sampled(*tokens) for _ in range(20)]
    shown = opened(Views(epoch))
    spans = shown.page.locator(".tokens span")
    assert 900 <= spans.count() <= 4500 and shown.page.locator(".row").count() < 40
    shown.press("n", "n")
    assert spans.count() <= 9000
    for _ in range(18):
        shown.page.keyboard.press("n")
    assert shown.said == "turn 20 of 20"
    shown.press(".")
    assert shown.page.locator(".tokens .at").inner_text() == " last"
    shown.press("G")
    assert shown.text(".head .id") == "q2999" and shown.page.locator(".row").count() < 40


def test_what_was_loaded_is_forgotten_beyond_a_limit(opened):
    shown = opened()
    sizes = shown.page.evaluate(
        """() => { const cache = new module.Cache(100); for (let i = 0; i < 50; i++) cache.put(i, "v" + i, 30);
                   return [cache.size, cache.entries.size, cache.get(0) ?? null, cache.get(49)]; }"""
    )
    assert sizes == [90, 3, None, "v49"]


# ── assistive technology ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 1000, 700, 390])
def test_axe_finds_no_serious_or_critical_violation(opened, axe, width, dark):
    run = Trained(*records())
    shown = opened(run, width=width, dark=dark)
    shown.page.add_script_tag(content=axe)
    found = {}
    for name, keys in {
        "read": ["[", "."],
        "compare": ["c", "d"],
        "keys": ["c", "?"],
        "filter": ["Escape", "f"],
        "change": ["Escape", "t", "t", "t", "."],
    }.items():
        shown.press(*keys)
        shown.page.wait_for_timeout(150)
        violations = shown.page.evaluate(
            "axe.run(document, {resultTypes: ['violations']}).then(found => found.violations)"
        )
        for violation in violations:
            if violation["impact"] in ("serious", "critical"):
                found[name, violation["id"]] = violation["nodes"][0]["html"]
    assert found == {}
    overflow = "document.documentElement.scrollWidth <= innerWidth"
    assert shown.page.evaluate(overflow)
