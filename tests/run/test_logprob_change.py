"""What training made of a recorded rollout: its tokens' log probabilities under later weights, loaded beside the run."""

import shutil
import time

import pytest
from hostile import text_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import finetune_nb as ft  # noqa: E402
from finetune_nb.errors import BackendError, ConfigError, RunError  # noqa: E402
from finetune_nb.rollouts.episodes import SampledTurn  # noqa: E402
from finetune_nb.run import epoch_weights  # noqa: E402
from finetune_nb.store.checkpoints import weights_of_epochs  # noqa: E402
from finetune_nb.store.folder import checkpoints  # noqa: E402
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums  # noqa: E402


async def ask_twice(question, llm):
    asked = [{"role": "user", "content": question}]
    first = await llm.chat(asked)
    again = [*asked, {"role": "assistant", "content": first.content}, {"role": "user", "content": "sure?"}]
    if question.startswith("6"):
        again = [{"role": "user", "content": "something else"}]
    return (await llm.chat(again)).content


def differs(output):
    """A reward with a spread in nearly every group, so that every epoch trains."""
    return float(sum(map(ord, output)) % 7)


def new_run(folder, epochs, reward=differs, **options):
    options = dict(generations=3, name="run", sampling={"max_tokens": 6, "temperature": 0.7}, **options)
    run = ft.Run(ask_twice, reward, sums(3), output_dir=folder, deterministic=True, **options)
    for _ in range(epochs):
        ft.run_sync(run.next_epoch())
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = new_run(tmp_path_factory.mktemp("runs"), 2)
    yield run
    run.close()


def by_transformers(model, trajectory):
    """The log probabilities of the sampled tokens, one pass a turn and nothing of ours."""
    found = []
    for item in trajectory.episode:
        turn = SampledTurn.of(item)
        if turn is None:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([[*turn.prompt_ids, *turn.ids]])).logits[0, len(turn.prompt_ids) - 1 : -1]
        found.append(
            (logits / turn.temperature).log_softmax(-1).gather(1, torch.tensor(turn.ids)[:, None])[:, 0].tolist()
        )
    return found


def test_under_the_weights_that_sampled_it_nothing_has_changed(run):
    names = run.trajectories(epoch=1).trajectory
    assert len(names) == 9
    for name in names:
        frame = run.logprob_change(name, epoch=0)
        assert frame.change.abs().max() < 1e-5 and (frame.trajectory == name).all()


def test_after_training_it_is_the_difference_that_a_plain_forward_pass_gives(run, tmp_path):
    saved = run.save_model(tmp_path / "model", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    moved = 0.0
    for name in ("e0/sum-0/0", "e0/sum-1/2", "e1/sum-2/1"):
        trajectory = run.show(name).trajectory
        expected = [value for turn in by_transformers(model, trajectory) for value in turn]
        frame = run.logprob_change(name)
        assert frame.message.nunique() == 2 and frame.columns[-1] == "change"
        assert (frame.logprob + frame.change).tolist() == pytest.approx(expected, abs=1e-5)
        assert run.logprob_change(name, epoch=1).change.tolist() == frame.change.tolist()
        assert [value for turn in run.token_changes(trajectory, -1) for value in turn] == frame.change.tolist()
        moved = max(moved, frame.change.abs().max())
    assert moved > 0.01


@pytest.mark.slow
@pytest.mark.proof
def test_a_run_that_is_asked_goes_on_as_if_it_was_not(run, tmp_path):
    asked = new_run(tmp_path, 1)
    asked.logprob_change("e0/sum-1/0")
    ft.run_sync(asked.next_epoch())
    logprobs = [each.tokens(epoch=1).logprob.tolist() for each in (run, asked)]
    assert logprobs[0] == logprobs[1]
    asked.close()


def test_a_run_that_is_only_read_can_be_asked(run):
    expected = run.logprob_change("e0/sum-1/0").change.tolist()
    assert run.kept_weights() == [0, 1]
    copy = run.folder.with_name("copy")
    shutil.copytree(run.folder, copy)
    with (copy / "config.yml").open("a") as file:
        file.write("# edited\n")
    with pytest.raises(RunError, match="trust=True"):  # nothing that it names is loaded
        ft.Run.open(copy).logprob_change("e0/sum-1/0")
    opened = ft.Run.open(copy, trust=True)
    assert opened.logprob_change("e0/sum-1/0").change.tolist() == expected
    opened.close()


def test_weights_that_are_not_kept_are_said_and_the_newest_that_are_count(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    shutil.rmtree(checkpoints(copy)[1])
    opened = ft.Run.open(copy, trust=True)
    assert opened.kept_weights() == [0]
    assert opened.logprob_change("e1/sum-1/0").change.abs().max() < 1e-5
    with pytest.raises(RunError, match="weights after epoch 1 .*not kept. Those after epochs 0 are"):
        opened.logprob_change("e1/sum-1/0", epoch=1)
    shutil.rmtree(checkpoints(copy)[0])
    with pytest.raises(RunError, match="no weights of an epoch yet"):
        opened.logprob_change("e1/sum-1/0")
    opened.close()


def test_the_weights_that_a_run_began_with_are_loaded_anew_after_others(tmp_path):
    run = new_run(tmp_path, 1, reward=lambda output: 1.0)  # nothing is learned
    assert weights_of_epochs(run._stored()) == {0: None}
    assert run.logprob_change("e0/sum-1/0", epoch=0).change.abs().max() < 1e-5
    ft.run_sync(run.train_on(["e0/sum-1/0"]))
    assert run.logprob_change("e0/sum-1/0").change.abs().max() > 0.01
    assert run.logprob_change("e0/sum-1/0", epoch=0).change.abs().max() < 1e-5
    run.close()


def test_a_checkpoint_that_was_written_again_is_read_again(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    opened = ft.Run.open(copy, trust=True)
    after = opened.logprob_change("e1/sum-1/0", epoch=1).change
    assert after.abs().max() > 1e-3
    kept = checkpoints(copy)
    shutil.rmtree(kept[1])
    shutil.copytree(kept[0], kept[1])
    assert opened.logprob_change("e1/sum-1/0", epoch=1).change.abs().max() < 1e-5
    opened.close()


def test_the_model_is_released_when_nobody_asks(run, monkeypatch):
    monkeypatch.setattr(epoch_weights, "KEPT_SECONDS", 0.05)
    run.logprob_change("e0/sum-1/0")
    until = time.monotonic() + 10
    while run._epoch_weights._builder is not None and time.monotonic() < until:
        time.sleep(0.02)
    assert run._epoch_weights._builder is None
    assert len(run.logprob_change("e0/sum-1/0"))


def test_what_cannot_be_had_is_said(run, tmp_path):
    trajectory = run.show("e0/sum-1/0").trajectory.model_copy(deep=True)
    trajectory.episode[1].metadata["prompt_token_ids"] = None
    with pytest.raises(BackendError, match="no metadata\\['prompt_token_ids'\\].*not tokenized again"):
        run.token_changes(trajectory)
    with pytest.raises(IndexError):
        run.logprob_change("e0/sum-1/0", epoch=7)
    with pytest.raises(RunError, match="names no rollout"):
        run.logprob_change("e0/sum-1/9")
    with pytest.raises(ConfigError, match="weights=1"):
        run.show("e0/sum-1/0", weights=1)


def test_other_backends_are_told_which_ones_can(tmp_path):
    policy = ScriptedPolicy(lambda messages, seed: f"reply {seed % 7}")

    class Saves(FakeAdapter):
        async def save_checkpoint(self, directory):
            directory.mkdir(parents=True)

    run = ft.Run(ask_twice, differs, sums(2), generations=3, output_dir=tmp_path, adapter=Saves(policy=policy))
    ft.run_sync(run.next_epoch())
    assert run.kept_weights() == [0]
    with pytest.raises(ConfigError, match="Saves as an object"):
        run.logprob_change("e0/sum-1/0")
    run.close()


def test_a_view_is_tinted_by_the_change_and_says_so_without_colours(run):
    view = run.show("e0/sum-1/0", heat="change", weights=1)
    html = view._repr_html_()
    said = text_of(html)
    assert "under the weights after epoch 1" in said and "less likely" in said and "more likely" in said
    frame = run.logprob_change("e0/sum-1/0", epoch=1)
    first = frame[frame.message == 1].change
    assert f"changed by {ft.text.signed(first.mean())}" in said
    assert f"changed by {ft.text.signed(first.iloc[0])}" in html.split('class="ft-turn')[2]
    with pytest.raises(ConfigError, match="found heat='colour'"):
        run.show("e0/sum-1/0", heat="colour")
