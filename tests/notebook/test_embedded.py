"""What a report holds of a run's rollouts for its browser: how much, in which order, and without secrets."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
from factories import item, make_epoch, sampled
from records import Views, failed, stored, with_tool

from finetune_nb.analysis.rollout_body import rollout_body
from finetune_nb.errors import ConfigError
from finetune_nb.notebook.embedded import embedded_browser
from finetune_nb.redaction import remember_secret


def data_of(part):
    """The data as the page's script parses them."""
    (text,) = re.findall(r'<script type="application/json" id="ft-rollouts-data">(.*?)</script>', part.html)
    return json.loads(text)


def inflated(text):
    data = zlib.decompress(base64.b64decode(text))
    length = int.from_bytes(data[:4], "little")
    at, items = 4 + length, []
    for about, sizes in json.loads(data[4:at]):
        columns = []
        for size in sizes:
            columns.append(data[at : at + size])
            at += size
        items.append((about, columns))
    assert at == len(data)
    return items


def epochs(count=3):
    found = []
    for number in range(count):
        epoch = make_epoch({"a": [1, 0, None], "b": [0, 0]}, number, failures=[failed("a", 1)])
        epoch.collection.trajectories[0][0].episode = with_tool().episode
        found.append(epoch)
    return found


def test_every_rollout_is_in_it_as_the_kernel_would_send_it(tmp_path):
    records = epochs()
    for run in (Views(*records), Views(*stored(tmp_path, *records))):
        part = embedded_browser(run)
        assert "All 18 rollouts of 3 epochs, whole." in part.html
        data = data_of(part)
        assert [each[0] for each in data["hello"]["epochs"]] == [0, 1, 2] and data["hello"]["epoch"] == 2
        first, _, third, fourth = inflated(data["epochs"]["1"]["bodies"]["0"])
        expected = rollout_body(records[1].collection.trajectories[0][0])
        assert first == (json.loads(json.dumps(expected.about)), expected.columns)
        assert third[0]["error"] == "TimeoutError: too slow" and fourth[0]["turns"]  # by generation: 0, 1, 1, 2
        ((about, columns),) = inflated(data["epochs"]["1"]["index"])
        assert about == {"epoch": 1, "inferred": False, "version": None}
        assert np.frombuffer(columns[0], "<u4").tolist() == [0, 4, 6]
        assert np.frombuffer(columns[14], "<f4").tolist()[:1] == [-3.0]


def test_the_newest_epoch_then_the_first_take_the_room_and_what_is_left_out_is_said():
    run = Views(*epochs(4))
    whole = data_of(embedded_browser(run))["epochs"]
    indexes = sum(len(each["index"]) for each in whole.values())
    size = sum(map(len, whole["3"]["bodies"].values())) + len(whole["0"]["bodies"]["0"])
    part = embedded_browser(run, (indexes + size) / 1e6)
    kept = {number: sorted(each["bodies"]) for number, each in data_of(part)["epochs"].items()}
    assert kept == {"3": ["0", "1"], "0": ["0"], "1": [], "2": []}
    assert "10 of 24 rollouts are in this page, whole; of the others, it has the numbers." in part.html
    part = embedded_browser(run, (len(whole["3"]["index"]) + 10) / 1e6)
    assert list(data_of(part)["epochs"]) == ["3"] and "3 epochs of 4 did not fit" in part.html
    assert embedded_browser(Views()) is None


def test_a_secret_is_in_none_of_it_also_as_several_tokens(tmp_path):
    secret = "sk-embedded-0123456789"
    remember_secret(secret)
    run = Views(make_epoch({secret: [1.0, 0.0]}, failures=[failed(secret)], scores={"judge": 1.0}))
    run.id = secret
    first, _ = run.records[0].collection.trajectories[0]
    tokens = [(text, -0.5) for text in ("it is ", "sk-embedded", "-01234", "56789", ".")]
    first.episode = [
        item("system", f"key {secret}", reasoning_content=secret, name=secret),
        sampled(*tokens, top_logprobs=[{}, {"sk-embedded": -0.5, secret: -2.0}, {}, {}, {}]),
        sampled(("fine", -0.1)),
    ]
    first.metadata |= {"reasonings": {"judge": secret}, "output": {"x": secret}, "reward_error": secret}
    part = embedded_browser(run)
    data = data_of(part)
    unpacked = inflated(data["epochs"]["0"]["index"])
    for body in data["epochs"]["0"]["bodies"].values():
        unpacked += inflated(body)
    assert secret not in part.html and secret not in str(unpacked)
    assert all(part_of not in str(unpacked) for part_of in ("embedded", "0123", "6789"))
    about, columns = unpacked[1]
    assert about["turns"][1]["stop"] - about["turns"][1]["start"] == 5
    assert columns[2] == b"it is **********.fine" and np.frombuffer(columns[4], "<f4").tolist()[5] == np.float32(-0.1)


@pytest.mark.slow
@pytest.mark.proof
def test_text_cannot_end_the_data(tmp_path):
    run = Views(make_epoch({"</script><!--<script>": [1, 0]}))
    text = run.export(tmp_path / "x.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "<!--" not in text


@pytest.mark.slow
def test_options_of_a_report_s_browser_are_checked(tmp_path):
    run = Views(*epochs(1))
    assert "<script" not in run.export(tmp_path / "x.html", browser=False).read_text()
    for name, options, said in [
        ("x.csv", {"browser": True}, "only an .html report has a browser"),
        ("x.csv", {"max_megabytes": 5}, "only an .html report has a browser"),
        ("x.html", {"max_megabytes": 0}, "found max_megabytes=0; expected a number above 0"),
        ("x.html", {"max_megabytes": "5"}, "found max_megabytes='5'"),
        ("x.html", {"browser": False, "max_megabytes": 5}, "a report without a browser"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(said)):
            run.export(tmp_path / name, **options)


def test_an_epoch_whose_file_is_gone_is_left_out_and_said(tmp_path):
    run = Views(*stored(tmp_path, *epochs()))
    (gone,) = (path for path in (tmp_path / "run").rglob("*.parquet") if "1" in path.stem)
    gone.unlink()
    part = embedded_browser(run)
    assert "1 epoch of 3 did not fit or could not be read" in part.html and list(data_of(part)["epochs"]) == ["2", "0"]
