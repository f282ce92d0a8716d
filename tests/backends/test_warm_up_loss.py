"""The loss and the gradients of a warm-up, equal to TRL's SFTTrainer and to transformers' own cross entropy."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from trl_oracle import gradient, trl_module  # noqa: E402

from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.local.training import DemonstrationReport, Learner  # noqa: E402
from finetune_nb.rollouts.demonstrations import read_demonstrations  # noqa: E402
from finetune_nb.training.warm_up import lesson_of  # noqa: E402
from finetune_nb.types import WarmUpSettings  # noqa: E402

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{a}+{b}"},
            {"role": "assistant", "content": f"={a + b}" + "0" * (a % 3)},
        ]
    }
    for a in range(2, 6)
    for b in (3, 40)
]
MARKED = (
    "{%- for message in messages %}{{- '<|' + message.role + '|>' }}{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content + '<|end|>' }}{% endgeneration %}{%- else %}{{- message.content + '<|end|>' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RATE, PASSES = 1e-3, 3


def learner_of(model, tokenizer, **config):
    policy = LocalPolicy(model, tokenizer, threads=1, device="cpu")
    return Learner(policy, LocalGRPOConfig(**config))


def learned(learner, rows=ROWS, **settings):
    settings = WarmUpSettings(**{"learning_rate": RATE, "batch_size": len(rows), "epochs": PASSES} | settings)
    lesson = lesson_of(read_demonstrations(rows), learner.policy, settings, learner.policy.longest)
    report = DemonstrationReport()
    learner.learn(lesson.rows, [], settings, np.random.default_rng(0), report)
    return report


@pytest.fixture(scope="module")
def embedded():
    policy = LocalPolicy.load("embedded", device="cpu")
    return policy.model, policy.tokenizer


def test_the_gradient_is_that_of_transformers_own_loss(embedded):
    model, tokenizer = copy.deepcopy(embedded[0]), embedded[1]
    theirs = copy.deepcopy(model).eval()
    learner = learner_of(model, tokenizer)
    lesson = lesson_of(read_demonstrations(ROWS), learner.policy, WarmUpSettings(), None)
    sequences = [sequence for row in lesson.rows for sequence in row]
    learner._supervised, learner._scale = True, 1.0
    learner.config.max_grad_norm = 1e9
    loss, statistics, norm = learner._gradient(sequences, lambda: False)
    ours = gradient(model)

    width = max(map(len, sequences))
    ids = torch.tensor([s.ids + [0] * (width - len(s)) for s in sequences])
    attention = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    labels = torch.tensor(
        [
            [i if on else -100 for i, on in zip(s.ids, s.sampled, strict=True)] + [-100] * (width - len(s))
            for s in sequences
        ]
    )
    expected = theirs(input_ids=ids, attention_mask=attention, labels=labels).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(ours, gradient(theirs), atol=1e-6, rtol=1e-5)
    assert norm > 0.1 and statistics.tokens == sum(map(sum, (s.sampled for s in sequences)))


@pytest.mark.slow
@pytest.mark.proof
def test_loss_gradient_and_steps_are_those_of_trls_trainer(embedded, tmp_path):
    trl = trl_module()
    datasets = pytest.importorskip("datasets")
    model, tokenizer = copy.deepcopy(embedded[0]), embedded[1]
    other, marked = copy.deepcopy(model), copy.deepcopy(tokenizer)
    marked.chat_template = MARKED
    config = trl.SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, learning_rate=RATE, lr_scheduler_type="constant",
        num_train_epochs=PASSES, per_device_train_batch_size=len(ROWS), weight_decay=0.0, max_grad_norm=1.0, adam_beta1=0.9,
        adam_beta2=0.95, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        activation_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=other, args=config, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=marked
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    tokens = (inputs["labels"] != -100).sum()
    expected = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=tokens)
    expected.backward()
    theirs = gradient(other)
    other.zero_grad()

    learner = learner_of(model, tokenizer)
    lesson = lesson_of(read_demonstrations(ROWS), learner.policy, WarmUpSettings(), None)
    learner._supervised, learner.config.max_grad_norm = True, 1e9
    loss, statistics, _ = learner._gradient([s for row in lesson.rows for s in row], lambda: False)
    assert statistics.tokens == tokens and loss == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(gradient(model), theirs, atol=1e-6, rtol=1e-5)
    model.zero_grad()

    trainer.train()
    logged = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    report = learned(learner_of(model, tokenizer))
    assert report.losses == pytest.approx(logged, rel=1e-3)  # TRL rounds what it logs
    assert report.losses[-1] < report.losses[0]


def test_batch_size_passes_rate_and_length_take_effect(embedded):
    model, tokenizer = embedded
    whole = learned(learner_of(copy.deepcopy(model), tokenizer))
    assert len(whole.losses) == PASSES and whole.learning_rate == RATE
    assert len(learned(learner_of(copy.deepcopy(model), tokenizer), batch_size=3, epochs=2).losses) == 6
    assert learned(learner_of(copy.deepcopy(model), tokenizer), learning_rate=None).learning_rate == 5e-4
    learner = learner_of(copy.deepcopy(model), tokenizer)
    settings = WarmUpSettings(max_length=7)
    cut = lesson_of(read_demonstrations(ROWS), learner.policy, settings, learner.policy.longest)
    assert cut.truncated and max(len(sequence) for row in cut.rows for sequence in row) == 7
    assert not lesson_of(read_demonstrations(ROWS), learner.policy, WarmUpSettings(), 1000).truncated
    assert [error.row for error in lesson_of(read_demonstrations(ROWS), learner.policy, settings, 2).errors] == [
        *range(8)
    ]


def test_the_optimizer_of_other_jobs_is_left_as_it_was(embedded):
    learner = learner_of(copy.deepcopy(embedded[0]), embedded[1])
    optimizer = learner.optimizer
    learned(learner)
    assert learner.optimizer is optimizer and not optimizer.state and learner.moved


def test_a_warm_up_that_is_stopped_leaves_the_weights_as_they_were(embedded):
    model = copy.deepcopy(embedded[0])
    before = [parameter.clone() for parameter in model.parameters()]
    learner = learner_of(model, embedded[1])
    settings = WarmUpSettings(learning_rate=RATE, batch_size=2, epochs=PASSES)
    lesson = lesson_of(read_demonstrations(ROWS), learner.policy, settings, None)
    report, steps = DemonstrationReport(), []
    learner.learn(
        lesson.rows, [], settings, np.random.default_rng(0), report, lambda: steps.append(1), lambda: len(steps) == 3
    )
    assert len(steps) == 3 and report.steps == 0 and not learner.moved
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_the_exact_weights_of_half_precision_are_in_a_checkpoint(embedded, tmp_path):
    from finetune_nb.backends.local.checkpoint import Checkpoints

    learner = learner_of(copy.deepcopy(embedded[0]).bfloat16(), embedded[1])
    learned(learner, learning_rate=1e-4)
    Checkpoints(learner).save(tmp_path / "checkpoint", 1)
    again = learner_of(copy.deepcopy(embedded[0]).bfloat16(), embedded[1])
    Checkpoints(again).load(tmp_path / "checkpoint")
    for name, master in learner.trained.masters.items():
        assert torch.equal(master, again.trained.masters[name])
