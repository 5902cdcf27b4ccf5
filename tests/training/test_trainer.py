"""The trainer: what a step trains on, its loss and learning rate, and what an evaluation must leave alone."""

import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import TrainerCallback

from lrmt.errors import TrainingFault, UsageError, exit_on_error
from lrmt.training import trainer as module
from lrmt.training.trainer import LongContextTrainer, exact_matches


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def watch(monkeypatch):
    """Calls the functions in `watch.calls` at the beginning of every step with `(trainer, optimizer)`."""

    class Watcher(TrainerCallback):
        calls, trainer = [], None

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            for call in self.calls:
                call(self.trainer, optimizer)

    watcher = Watcher()
    watcher.calls = []
    begin = LongContextTrainer.__init__

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        watcher.trainer = self
        self.add_callback(watcher)

    monkeypatch.setattr(LongContextTrainer, "__init__", init)
    return watcher


# ---------------------------------------------------------------------- samples


def test_samples_of_a_step_do_not_depend_on_how_the_batch_is_cut(train_small, fp32_flags, watch, monkeypatch):
    """Passkey answers are of one length, so that the loss of 2 × 4 rows is that of 8, to rounding."""
    drawn, runs = [], []
    draw = LongContextTrainer._draw

    def noting(self, task, number, batch_size, length):
        if task is self.train_task:
            drawn[-1] += [(self.state.global_step, number * batch_size + i, length) for i in range(batch_size)]
        return draw(self, task, number, batch_size, length)

    monkeypatch.setattr(LongContextTrainer, "_draw", noting)
    for rows, accumulated in ((8, 1), (2, 4)):
        drawn.append([])
        flags = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", accumulated]
        runs.append(train_small(*fp32_flags, *flags, "--lora_dropout", "0"))
    assert drawn[0] == drawn[1]
    assert [index for _, index, _ in drawn[0]] == list(range(8 * 8))  # nothing twice, nothing left out
    for key in ("loss", "grad_norm"):
        assert losses(runs[1], key) == pytest.approx(losses(runs[0], key), rel=1e-4)
    assert losses(runs[0])[0] == pytest.approx(math.log(1024), rel=0.5)  # and not four times that


def test_stage_decides_the_length(train_small, fp32_flags, watch, monkeypatch):
    seen = []
    draw = LongContextTrainer._draw
    monkeypatch.setattr(
        LongContextTrainer,
        "_draw",
        lambda self, task, number, rows, length: (
            seen.append((task.split, length)) or draw(self, task, number, rows, length)
        ),
    )
    flags = ["--curriculum_stages", "1", "3", "--stage_max_steps", "2", "3", "--vary_lengths", "false"]
    trainer = train_small(*fp32_flags, *flags)
    train, held_out = ([n // 80 for split, n in seen if split == name] for name in ("train", "validation"))
    assert train == [1, 1, 3, 3, 3]
    assert held_out == [1, 3]
    assert [e["eval_segments"] for e in trainer.state.log_history if "eval_segments" in e] == [1, 3]


# ---------------------------------------------------------------------- curriculum


def test_accuracy_promotes_before_the_limit(train_small, fp32_flags, monkeypatch, capsys):
    monkeypatch.setattr(module, "exact_matches", lambda logits, labels: torch.ones(len(labels), dtype=torch.bool))
    trainer = train_small(*fp32_flags, "--stage_max_steps", "6", "--eval_steps", "2")
    assert trainer.state.global_step == 2 + 6  # two steps of six, but the last stage goes to its end
    assert trainer.curriculum.finished
    out = capsys.readouterr().out
    assert "stage 1 of 2 (1 segments) ends: accuracy 1.000 reached 1.000 after 2 steps; next: up to 2 segments" in out
    assert "stage 2 of 2 (2 segments) ends: step limit 6 reached with accuracy 1.000; curriculum finished" in out


def test_limit_promotes_with_a_reason(train_small, fp32_flags, monkeypatch, capsys):
    monkeypatch.setattr(module, "exact_matches", lambda logits, labels: torch.zeros(len(labels), dtype=torch.bool))
    trainer = train_small(*fp32_flags, "--stage_max_steps", "2")
    assert trainer.state.global_step == 4
    assert capsys.readouterr().out.count("step limit 2 reached with accuracy 0.000") == 2


@pytest.mark.parametrize("limit", [4, 10], ids=["by limit", "by accuracy"])
def test_learning_rate_begins_anew_in_each_stage_from_a_lower_peak(train_small, fp32_flags, watch, monkeypatch, limit):
    monkeypatch.setattr(module, "exact_matches", lambda logits, labels: torch.full([len(labels)], limit == 10))
    rates = []
    watch.calls.append(lambda trainer, optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    flags = ["--stage_max_steps", limit, "--eval_steps", "4", "--warmup_steps", "2", "--learning_rate", "1e-3"]
    trainer = train_small(*fp32_flags, *flags, "--stage_lr_decay", "0.25")
    assert len(rates) == 4 + limit
    assert rates[4:8] == [0.25 * rate for rate in rates[:4]]
    assert rates[0] == rates[1] == pytest.approx(0.5e-3)  # a first step at rate 0 would be wasted
    assert rates[2] == pytest.approx(1e-3) and rates[3] == pytest.approx(1e-3 * (limit - 3) / (limit - 2))
    assert losses(trainer, "learning_rate") == pytest.approx(rates)


def test_memory_noise_grows_from_stage_to_stage(train_small, fp32_flags, watch):
    shares = []
    watch.calls.append(lambda trainer, optimizer: shares.append(trainer.model.get_base_model().noise_share))
    train_small(*fp32_flags, "--memory_noise", "0.3", "--stage_max_steps", "2", "--promotion_accuracy", "1.0")
    assert shares == [0.0, 0.0, 1.0, 1.0]


# ---------------------------------------------------------------------- evaluation


def gradients(trainer):
    trainer.model.zero_grad()
    inputs = trainer._prepare_inputs(trainer._draw(trainer.train_task, 0, 4, 2 * trainer._segment_length))
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model, inputs).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_an_evaluation_leaves_gradients_alone(train_small, watch, monkeypatch):
    """bitsandbytes repacks a 4-bit layer that runs in evaluation mode on CPUs with bf16; its gradients are then wrong."""
    compared = []

    def compare(trainer, optimizer):
        before = gradients(trainer)
        repacks = [m.support_avx512bf16_for_cpu for m in trainer.model.modules() if isinstance(m, Linear4bit)]
        trainer.curriculum.report = lambda accuracy: None
        trainer.evaluate()
        del trainer.curriculum.report
        after = gradients(trainer)
        trainer.model.zero_grad()
        compared.append((before, after, repacks))

    watch.calls.append(compare)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    train_small("--lora_dropout", "0", "--stage_max_steps", "2", "--learning_rate", "1e-2")
    assert len(compared) == 4
    for before, after, repacks in compared:
        assert repacks and not any(repacks)  # on a CPU without bf16 the gradients would not tell
        assert before.keys() == after.keys() and len(before) == 2 * 14 + 1
        for name in before:
            assert torch.equal(before[name], after[name]), name
    assert all(g.abs().max() > 0 for g in compared[-1][0].values())


def test_evaluation_counts_rows_whose_every_answer_token_is_right():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, 8, -100], [-100, -100, -100, 9]])
    logits = torch.nn.functional.one_hot(torch.tensor([5, 6, 7, 1, 9]), 10).float()
    assert exact_matches(logits, labels).tolist() == [True, False, True]


# ---------------------------------------------------------------------- failure


def test_a_fault_is_one_line_and_exit_code_1(capfd):
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise TrainingFault("loss is not finite")
    assert stop.value.code == 1
    assert capfd.readouterr().err == "lrmt: error: loss is not finite\n"


def test_answers_that_may_straddle_are_refused_under_truncated_bptt_on_several_ranks(
    train_small, tmp_path, monkeypatch
):
    from lrmt.arguments import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "A key.", "question": "What?", "target": "A key."}\n')
    with pytest.raises(UsageError, match="`--bptt_segments` 2 .* `--segment_alignment right`; got left"):
        train_small("--bptt_segments", "2", "--dataset_name", rows)


@pytest.mark.parametrize(("segments", "where"), [(1, "last segment, 1"), (3, "memory first breaks in segment 1")])
def test_nan_stops_training_with_segment_and_step(train_small, fp32_flags, watch, segments, where):
    def poison(trainer, optimizer):
        if trainer.state.global_step == 3:
            with torch.no_grad():
                trainer.model.get_base_model().memory_embedding.modules_to_save.default.weight[0, 0] = math.nan

    watch.calls.append(poison)
    flags = ["--curriculum_stages", segments, "--vary_lengths", "false", "--save_steps", "2"]
    with pytest.raises(TrainingFault) as caught:
        train_small(*fp32_flags, *flags)
    message = str(caught.value)
    assert f"at step 4 (stage 1, {segments} segments, rank [0])" in message and where in message
    assert "--learning_rate" in message and "\n" not in message
    folder = Path(watch.trainer.args.output_dir)
    assert sorted(p.name for p in folder.iterdir()) == [
        "arguments.yaml",
        "checkpoint-2",
    ]  # no adapter, no later checkpoint


def test_nan_weights_are_never_saved(train_small, fp32_flags, watch, monkeypatch):
    """A last step may break the weights with no loss to show it."""

    def poison(trainer, optimizer):
        if trainer.state.global_step == 3:
            monkeypatch.setattr(trainer.optimizer, "step", lambda *_: weights(trainer).fill_(math.nan))

    def weights(trainer):
        return trainer.model.get_base_model().memory_embedding.modules_to_save.default.weight.data

    watch.calls.append(poison)
    with pytest.raises(RuntimeError, match="memory_embedding.weight is not finite"):
        train_small(*fp32_flags, "--curriculum_stages", "1", "--save_steps", "2")
    folder = Path(watch.trainer.args.output_dir)
    assert not list(folder.rglob("*.tmp"))
    assert [p.parent.name for p in folder.rglob("adapter_model.safetensors")] == ["checkpoint-2"]


def test_old_checkpoints_go_only_when_the_new_one_is_whole(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from transformers import Trainer

    from lrmt.training import trainer as module

    steps = []
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, *_: steps.append(self.args.save_total_limit))
    monkeypatch.setattr(
        module,
        "rotate_checkpoints",
        lambda save_total_limit, **_: steps.append(
            ((tmp_path / "checkpoint-7" / "curriculum.json").exists(), save_total_limit)
        ),
    )
    (tmp_path / "checkpoint-7").mkdir()
    fake = object.__new__(module.LongContextTrainer)
    fake.args = SimpleNamespace(save_total_limit=1, should_save=True, output_dir=str(tmp_path))
    fake.accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
    fake.state = SimpleNamespace(global_step=7, best_model_checkpoint=None)
    fake.model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(training_state=dict))
    fake.identity = {"task": "passkey"}
    fake.curriculum = module.Curriculum(stages=[1], max_steps=[1])
    fake._save_checkpoint(None, None)
    assert steps == [None, (True, 1)] and fake.args.save_total_limit == 1


def test_a_promotion_tells_what_is_kept_at_shorter_lengths(train_small, fp32_flags, capsys):
    """Measured with the model of that moment, and of the same held-out texts."""
    flags = ["--curriculum_stages", "1", "2", "3", "--stage_max_steps", "1", "--learning_rate", "0"]
    trainer = train_small(*fp32_flags, *flags)
    told = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert [entry["eval_segments"] for entry in told] == [1, 2, 3]
    kept = [{k: v for k, v in entry.items() if k.endswith("_segments") and k != "eval_segments"} for entry in told]
    assert kept == [{}, {"eval_accuracy_1_segments": told[0]["eval_accuracy"]}, {}]
    assert f"next: up to 3 segments; {told[0]['eval_accuracy']:.3f} at 1" in capsys.readouterr().out
