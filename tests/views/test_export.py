"""Taking a run away: what stands in the files, and that nothing in them can run."""

from __future__ import annotations

import csv
import json
import zipfile
from html.parser import HTMLParser

import pandas as pd
import pytest
from factories import item, make_epoch
from records import Views, epoch_of, failed, stored, with_tool
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.redaction import remember_secret
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.types import Change, Trajectory
from finetune_nb.views.export import EXPORTS, FRAMES
from finetune_nb.views.report import verdict

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \x00\x1b[31m \ud800 \u202e"


def run_of(*epochs) -> Views:
    run = Views(*epochs)
    run.changes = (Change(0.0, "panel", "percentile", 0.3, 0.5, 0),)
    return run


RUN = run_of(make_epoch({"q": [1.0, 0.0, None], 7: [0.5, 0.25]}, failures=[failed("q")], scores={"correct": 1.0}))


@pytest.mark.parametrize("frame", sorted({*FRAMES} - {"labels"}))  # a run of records alone has none
def test_every_frame_comes_back_from_every_kind_of_table(frame, tmp_path):
    there = getattr(RUN, frame)()
    table = pd.read_csv(RUN.export(tmp_path / "x.csv", frame))
    parquet = pd.read_parquet(RUN.export(tmp_path / "x.parquet", frame))
    lines = pd.read_json(RUN.export(tmp_path / "x.jsonl", frame), lines=True)
    for found in (table, parquet, lines):
        assert found.columns.tolist() == there.columns.tolist()
        assert len(found) == len(there) > 0
    for name in there.columns[[dtype.kind in "iufb" for dtype in there.dtypes]]:
        pd.testing.assert_series_equal(parquet[name], there[name])


def test_trajectories_are_what_is_exported_by_default_and_can_be_filtered(tmp_path):
    path = RUN.export(tmp_path / "new" / "x.csv", example=7, columns=["trajectory", "reward"])
    assert path.read_text() == '"trajectory","reward"\n"e0/7/0",0.5\n"e0/7/1",0.25\n'


def test_a_line_of_jsonl_is_a_trajectory_with_its_conversation(tmp_path):
    run = run_of(epoch_of([[with_tool()]]), make_epoch([[None]], 1, failures=[failed()]))
    for each in (run, run_of(*stored(tmp_path, *run.records))):
        lines = [json.loads(line) for line in each.export(tmp_path / "x.jsonl").read_text().splitlines()]
        assert [line["reward"] for line in lines] == [1.0, None, None]
        assert lines[2]["error"] == "TimeoutError: too slow"
        assert [message["role"] for message in lines[0]["messages"]][2:4] == ["assistant", "tool"]
        assert lines[0]["messages"][2]["tool_calls"][0]["function"]["name"] == "add"
        assert lines[0]["messages"][3]["tool_call_id"] == "c1"
    assert len(run.export(tmp_path / "x.jsonl", epoch=0).read_text().splitlines()) == 1


def test_a_log_of_inspect_has_each_conversation_with_its_scores(tmp_path):
    run = run_of(epoch_of([[with_tool()]]), make_epoch([[None]], 1, failures=[failed()]))
    with zipfile.ZipFile(run.export(tmp_path / "x.eval")) as archive:
        assert archive.namelist()[0] == "_journal/start.json" and archive.namelist()[-2:] == [
            "summaries.json",
            "header.json",
        ]
        header, summaries = (json.loads(archive.read(name)) for name in ("header.json", "summaries.json"))
        samples = [json.loads(archive.read(f"samples/{each['id']}_epoch_{each['epoch']}.json")) for each in summaries]
    assert (header["results"]["total_samples"], header["results"]["completed_samples"]) == (3, 1)
    assert samples[0]["scores"]["reward"] == {"value": 1.0} and samples[1]["scores"] is None
    assert samples[2]["error"]["message"] == summaries[2]["error"] == "TimeoutError: too slow"
    called, answered = samples[0]["messages"][2:4]
    assert called["tool_calls"][0]["function"] == "add" and isinstance(called["tool_calls"][0]["arguments"], dict)
    assert answered["tool_call_id"] == called["tool_calls"][0]["id"]
    with pytest.raises(ConfigError, match="holds whole conversations"):
        run.export(tmp_path / "y.eval", "messages")


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\tx", "\n=1", "＝1"])
def test_a_spreadsheet_takes_no_text_for_a_formula(text, tmp_path):
    run = run_of(epoch_of([[Trajectory(episode=[item("user", text)], reward=1.0, metadata={"id": text})]]))
    rows = list(csv.DictReader(run.export(tmp_path / "x.csv", "messages").open(newline="")))
    assert rows[0]["content"] == rows[0]["example"] == f"'{text}"
    exact = pd.read_parquet(run.export(tmp_path / "x.parquet", "messages"))
    assert exact.content[0] == text


def test_a_number_stays_one_in_a_spreadsheet(tmp_path):
    run = run_of(epoch_of([[Trajectory(episode=[item("user", "-7"), item("user", "\x1b[31m")], reward=-1.0)]]))
    frame = pd.read_csv(run.export(tmp_path / "x.csv", "messages"), dtype=str)
    assert frame.content.tolist() == ["-7", "␛[31m"]


@pytest.mark.slow
@pytest.mark.proof
def test_known_secrets_are_in_no_export(tmp_path):
    secret = "sk-export-0123456789abcdef"
    remember_secret(secret)
    run = run_of(make_epoch({secret: [1.0, 0.0]}, failures=[failed(secret)], scores={"a": 1.0}))
    run.records[0].collection.trajectories[0][0].episode[1].content = f"key {secret}"
    for suffix in EXPORTS:
        path = run.export(tmp_path / f"x{suffix}")
        assert secret.encode() not in path.read_bytes(), suffix
    for frame in ("messages", "tokens", "groups"):
        assert secret.encode() not in run.export(tmp_path / "x.csv", frame).read_bytes()


def test_mixed_ids_stay_apart_in_parquet(tmp_path):
    run = run_of(make_epoch({7: [1.0], "7": [0.0]}))
    assert pd.read_parquet(run.export(tmp_path / "x.parquet")).example.tolist() == ["7", '"7"']


def test_what_cannot_be_exported_is_said_before_a_file_is_there(tmp_path):
    for path, frame, message in [("x.xlsx", None, "cannot export to 'x.xlsx'"), ("x.csv", "rows", "no frame 'rows'"),
                                 ("x.html", "groups", "shows the whole run")]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            RUN.export(tmp_path / path, frame)
    assert list(tmp_path.iterdir()) == []


class Reader(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.text += data


def test_the_report_is_one_page_with_plots_tables_and_trajectories(tmp_path):
    run = run_of(*(make_epoch({"q": [1.0, 0.5, 0.0], "r": [0.0, 0.0]}, i, failures=[failed("q")]) for i in range(3)))
    for each in (run, run_of(*stored(tmp_path, *run.records))):
        page = Reader(each.export(tmp_path / "report.html").read_text(encoding="utf-8"))
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        pictures = [image for image in images if not image["src"].startswith("data:image/svg+xml,")]
        assert len(pictures) == 7
        assert all(p["src"].startswith("data:image/png;base64,") and p["alt"] for p in pictures)
        for said in (
            "the best",
            "the worst",
            "a failed rollout",
            "TimeoutError: too slow",
            "Live changes",
            "percentile",
        ):
            assert said in page.text
        assert "groups with spread" in page.text  # in words, which a narrow page can break
        assert [tag for tag, _ in page.tags].count("h1") == 1
        assert [tag for tag, _ in page.tags].count("figcaption") == len(pictures)


@pytest.mark.parametrize(
    ("newest", "said"),
    [
        (1.0, "The reward of the 6 examples that epochs 0 and 1 share rose: +0.75, 95 % interval +0.75 to +0.75."),
        (0.25, "Whether the reward of the 6 examples that epochs 0 and 1 share changed is not clear: 0,"),
        (0.0, "share fell: -0.25, 95 % interval -0.25 to -0.25."),
    ],
)
def test_a_report_says_in_a_sentence_what_came_of_the_run(newest, said):
    first = {f"q{place}": [0.5, 0.0] for place in range(6)}
    then = {f"q{place}": [newest, newest] for place in range(6)}
    assert said in verdict([make_epoch(first), make_epoch(then, 1)])
    other = make_epoch({"r": [1.0, 0.0]}, 1)
    assert "share no example" in verdict([make_epoch(first), other])
    assert verdict([other]) == "One epoch has ended, with a mean reward of 0.5."
    validated = [make_epoch(first, validation=0.25), make_epoch(then, 1), make_epoch(then, 2, validation=0.75)]
    assert verdict(validated).endswith(" On held-out examples it went from 0.25 to 0.75.")
    assert "held-out" not in verdict(validated[:2])


async def test_a_report_has_the_configuration_without_its_secrets(tmp_path, closing):
    adapter = FakeAdapter(policy=ScriptedPolicy(coin))
    run = closing(ft.Run(guess, right, dataset=sums(4), generations=2, adapter=adapter, output_dir=tmp_path, name="r"))
    await run.next_epoch()
    remember_secret("num_generations")
    text = Reader(run.export(tmp_path / "x.html").read_text(encoding="utf-8")).text
    assert "config.yml, " in text and "finetuning:" in text and "num_generations" not in text


@pytest.mark.slow
@pytest.mark.proof
def test_nothing_in_a_report_can_run_or_fetch_anything(tmp_path):
    run = run_of(
        make_epoch(
            {HOSTILE: [1.0, 0.0]}, failures=[failed(HOSTILE)], scores={HOSTILE: 1.0}, job="failed", message=HOSTILE
        )
    )
    run.id = HOSTILE
    run.changes = (Change(0.0, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 0),)
    run.records[0].collection.trajectories[0][0].episode[1].content = HOSTILE
    text = run.export(tmp_path / "x.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert not {tag for tag, _ in page.tags} & {"iframe", "object", "link", "a", "form"}
    assert [a.get("type") for tag, a in page.tags if tag == "script"] == ["application/json", "module"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "href"]
    assert all(a.get("src", "data:").startswith("data:") for _, a in page.tags)
    assert "\x1b" not in text and "\u202e" not in text
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and policy.count("script-src") == policy.count("'sha256-") == 1
    text = run.export(tmp_path / "x.html", browser=False).read_text(encoding="utf-8")
    page = Reader(text)
    assert "script" not in {tag for tag, _ in page.tags} and "script-src" not in text


@pytest.mark.slow
def test_a_report_has_gaps_where_only_some_epochs_have_a_number(tmp_path):
    epochs = [make_epoch([[1, 0]], 0), epoch_of([[with_tool()]], 1)]  # what the second was trained on is not known
    assert "trained groups" in Reader(run_of(*epochs).export(tmp_path / "x.html").read_text()).text


def test_a_run_without_an_epoch_has_a_report_too(tmp_path):
    assert "no epoch yet" in Reader(Views().export(tmp_path / "x.html").read_text()).text
