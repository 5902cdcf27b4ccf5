"""`kill -9` in the middle of a stage, then resume: the run is the one that was never interrupted."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import Program, run
from safetensors.torch import load_file

from lrmt.errors import UsageError
from lrmt.training.checkpoint import find_checkpoint
from lrmt.training.trainer import LongContextTrainer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "rmt_llama.py"
STAGE_STEPS, KILLED_AT = (6, 12), 12


def history(checkpoint: Path) -> list[dict]:
    """Everything logged, but how long it took."""
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    timings = ("runtime", "per_second", "flos", "epoch")
    return [{k: v for k, v in entry.items() if not any(t in k for t in timings)} for entry in log]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def flags(backbones, small_flags):
    """NF4, bf16, and LoRA dropout and noise, whose random numbers a resumed run must draw alike."""
    return [
        *small_flags, "--model_name_or_path", str(backbones["llama"]), "--lora_dropout", "0.2", "--memory_noise", "0.1",
        "--learning_rate", "3e-3", "--curriculum_stages", "1", "2", "--stage_max_steps", *map(str, STAGE_STEPS), "--eval_steps", "5",
        "--save_steps", "4", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def killed(flags, tmp_path_factory):
    """The folder of a run killed in stage 2, and a copy of it from before anything went on."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    program, deadline = Program(RECIPE, *flags, "--output_dir", folder), time.monotonic() + 240
    while not (folder / f"checkpoint-{KILLED_AT}" / "curriculum.json").exists():
        if not program.running or time.monotonic() > deadline:
            program.kill()
            pytest.fail(f"no checkpoint {KILLED_AT}: {program.stderr[-3000:]}")
        time.sleep(0.002)
    assert program.kill() == -signal.SIGKILL
    assert not (folder / "adapter_model.safetensors").exists()
    return folder


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of the same run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(RECIPE, *flags, "--output_dir", folder)
    return folder


def test_killed_and_resumed_equals_uninterrupted(killed, whole, flags):
    position = json.loads((killed / f"checkpoint-{KILLED_AT}" / "curriculum.json").read_text())
    assert (position["stage"], position["stage_step"]) == (1, KILLED_AT - STAGE_STEPS[0])
    # the newest checkpoint is one that was cut off while it was written
    for later in killed.glob("checkpoint-*"):
        if int(later.name.split("-")[1]) > KILLED_AT:
            shutil.rmtree(later)
    cut = killed / f"checkpoint-{KILLED_AT + 1}"
    shutil.copytree(killed / f"checkpoint-{KILLED_AT}", cut)
    (cut / "curriculum.json").unlink()
    (cut / "optimizer.pt").write_bytes((cut / "optimizer.pt").read_bytes()[:100])

    refused = Program(RECIPE, *flags, "--output_dir", killed, "--resume_from_checkpoint", cut)
    assert refused.wait() == 2
    assert refused.stderr.startswith("lrmt: error: `--resume_from_checkpoint`") and refused.stderr.count("\n") == 1
    assert "half-written, curriculum.json is missing" in refused.stderr

    output = run(RECIPE, *flags, "--output_dir", killed, "--resume_from_checkpoint", "true").stdout
    assert "stage 2 of 2" in output and "stage 1 of 2" not in output

    last = f"checkpoint-{sum(STAGE_STEPS)}"
    got, want = history(killed / last), history(whole / last)
    assert [e["step"] for e in want if "loss" in e] == list(range(1, sum(STAGE_STEPS) + 1))
    assert got == want  # every loss, gradient norm, memory norm, learning rate and accuracy, to the last bit
    losses = [e["loss"] for e in want if "loss" in e]
    assert len(set(losses)) == len(losses)
    assert weights(killed).keys() == weights(whole).keys()
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(killed)[name], tensor), name


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [5, 6, 7], ids=["before a promotion", "at a promotion", "after a promotion"])
def test_resumed_run_draws_the_same_samples(train_small, fp32_flags, tmp_path, monkeypatch, stop):
    """Also when the checkpoint was written in the very step that ended a stage; and with memories passed on from step to step."""
    drawn, limit = [], [None]
    draw = LongContextTrainer._draw

    def noting(self, task, number, rows, length):
        if task is self.train_task:
            if self.state.global_step == limit[0]:
                raise Interrupted
            drawn.append((self.state.global_step, number, rows, length))
        return draw(self, task, number, rows, length)

    monkeypatch.setattr(LongContextTrainer, "_draw", noting)
    flags = [
        *fp32_flags,
        "--stage_max_steps",
        "6",
        "3",
        "--lora_dropout",
        "0.2",
        "--save_steps",
        "1",
        "--warmup_steps",
        "2",
        *[
            "--curriculum_stages",
            "2",
            "3",
            "--min_segments",
            "2",
            "--state_passing",
            "0.7",
            "--notes_weight",
            "1",
            "--memory_shift",
            "true",
            "--memory_positions",
            "true",
        ],
    ]
    whole = train_small(*flags, "--output_dir", tmp_path / "whole")
    in_one_go, drawn[:] = list(drawn), []
    limit[0] = stop
    with pytest.raises(Interrupted):
        train_small(*flags, "--output_dir", tmp_path / "cut")
    limit[0] = None
    resumed = train_small(*flags, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "true")
    assert drawn == in_one_go
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_accuracy", "eval_loss")
    got, want = ([{k: e[k] for k in keys if k in e} for e in t.state.log_history] for t in (resumed, whole))
    assert got == want
    assert resumed.curriculum == whole.curriculum


def test_finished_run_has_nothing_to_resume(train_small, fp32_flags, tmp_path, monkeypatch):
    """Promotions by accuracy leave steps of the limit unused: they are not made up for."""
    from lrmt.training import trainer as module

    monkeypatch.setattr(module, "exact_matches", lambda logits, labels: torch.ones(len(labels), dtype=torch.bool))
    flags = [*fp32_flags, "--stage_max_steps", "6", "--eval_steps", "2", "--output_dir", tmp_path / "run"]
    train_small(*flags)
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    trainer = train_small(*flags, "--resume_from_checkpoint", "true")
    assert trainer.state.global_step == 2 + 6
    after = weights(tmp_path / "run")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--curriculum_stages", "1", "3"], "trained with stages = .1, 2., this run has .1, 3."),
        (["--seed", "5"], "trained with seed = 0"),
        (["--num_memory_tokens", "5"], "trained with num_memory_tokens 4; got `--num_memory_tokens` 5"),
        (["--segment_length", "90"], "trained with segment_length 80; got `--segment_length` 90"),
        (["--task", "passkey,qa1"], "trained with task passkey; got `--task` passkey,qa1"),
        (["--per_device_train_batch_size", "2"], "trained with per_device_train_batch_size × .* 4; got .* 2"),
        (["--early_facts_share", "0.5"], "trained with early_facts_share 0.0; got `--early_facts_share` 0.5"),
        (["--lora_target_modules", "q_proj"], "trained with lora_target_modules None; got"),
        (["--learning_rate", "1e-9"], "trained with learning_rate .*; got `--learning_rate` 1e-09"),
        (["--weight_decay", "0.5"], "trained with weight_decay 0.0; got `--weight_decay` 0.5"),
        (["--adam_beta2", "0.5"], "trained with adam_beta2 .*; got `--adam_beta2` 0.5"),
        (["--load_in_4bit", "CHANGED"], "trained with load_in_4bit .*; got `--load_in_4bit`"),
        (["--dtype", "float16"], "trained with dtype .*; got `--dtype` float16"),
        (["--lora_r", "3"], "trained with lora_r 4; got `--lora_r` 3"),
        (["--notes_weight", "1", "0"], "trained with notes_weight .0.0, 0.0.; got `--notes_weight` .1.0, 0.0."),
        (
            ["--model_name_or_path", "MISTRAL"],
            "trained on another backbone .*llama.* than `--model_name_or_path` .*mistral",
        ),
    ],
)
def test_checkpoint_of_another_run_is_refused(trained, train_small, backbones, changed, message):
    _, folder = trained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    was = yaml.safe_load((folder / "arguments.yaml").read_text())["load_in_4bit"]
    new = {"MISTRAL": str(backbones["mistral"]), "CHANGED": str(not was)}
    changed = [new.get(flag, flag) for flag in changed]
    with pytest.raises(UsageError, match=message):
        flags = ["--save_steps", "3", "--learning_rate", "1e-2"]
        train_small(*flags, "--output_dir", folder, "--resume_from_checkpoint", "true", *changed)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "content"), [("curriculum.json", "[]"), ("curriculum.json", "{}"), ("trainer_state.json", "{}")]
)
def test_a_checkpoint_that_says_nothing_is_half_written(trained, tmp_path, name, content):
    folder = shutil.copytree(sorted(trained[1].glob("checkpoint-*"))[-1], tmp_path / "checkpoint-9")
    (folder / name).write_text(content)
    with pytest.raises(UsageError, match=f"half-written, {name} does not say what it should"):
        find_checkpoint(tmp_path, str(folder))


def test_an_older_checkpoint_does_not_say_what_notes_weighed(train_small, fp32_flags, tmp_path):
    flags = [*fp32_flags, "--stage_max_steps", "1", "--save_steps", "1", "--output_dir", tmp_path / "run"]
    train_small(*flags)
    (tmp_path / "run" / "checkpoint-2" / "curriculum.json").unlink()
    position = tmp_path / "run" / "checkpoint-1" / "curriculum.json"
    told = json.loads(position.read_text())
    del told["identity"]["notes_weight"]
    position.write_text(json.dumps(told))
    trainer = train_small(*flags, "--notes_weight", "1", "0", "--resume_from_checkpoint", "true")
    assert trainer.state.global_step == 2 and trainer.notes_weight == [1, 0]


def test_overwriting_begins_without_old_checkpoints(train_small, fp32_flags, tmp_path):
    flags = [*fp32_flags, "--save_steps", "1", "--save_total_limit", "20", "--output_dir", tmp_path / "run"]
    train_small(*flags, "--stage_max_steps", "3")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        train_small(*flags, "--stage_max_steps", "2")
    with pytest.raises(UsageError):  # a check that fails late: nothing is gone
        train_small(*flags, "--overwrite_output_dir", "--segment_length", "8")
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 6
    train_small(*flags, "--stage_max_steps", "2", "--overwrite_output_dir")
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(1, 5)}
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_overwriting_while_resuming_from_elsewhere_leaves_no_checkpoint_of_another_run(
    trained, train_small, fp32_flags, tmp_path
):
    flags = [*fp32_flags, "--save_steps", "2"]
    train_small(*flags, "--output_dir", tmp_path / "first")
    other = [*flags, "--num_digits", "3", "--stage_max_steps", "20"]
    train_small(*other, "--output_dir", tmp_path / "other")
    source = tmp_path / "first" / "checkpoint-6"
    train_small(
        *flags, "--output_dir", tmp_path / "other", "--overwrite_output_dir", "--resume_from_checkpoint", source
    )
    assert {p.name for p in (tmp_path / "other").glob("checkpoint-*")} == {"checkpoint-8"}
    assert (source / "adapter_model.safetensors").is_file()


def test_arguments_file_gives_the_same_run(train_small, fp32_flags, tmp_path):
    """Also settings of transformers that no file of ours mentions."""
    flags = [*fp32_flags, "--optim", "sgd", "--lr_scheduler_type", "cosine_with_min_lr"]
    one = train_small(*flags, "--lr_scheduler_kwargs", '{"min_lr": 1e-3}', "--output_dir", tmp_path / "one")
    saved = tmp_path / "one" / "arguments.yaml"
    two = train_small("--config", saved, "--output_dir", tmp_path / "two")
    assert (tmp_path / "two" / "arguments.yaml").read_text() == saved.read_text()
    assert "hub_token" not in saved.read_text() and "min_lr" in saved.read_text()
    assert [e.get("loss") for e in one.state.log_history] == [e.get("loss") for e in two.state.log_history]


def test_training_starts_from_another_adapter(train_small, fp32_flags, tmp_path):
    train_small(*fp32_flags, "--output_dir", tmp_path / "easy")
    start = ["--init_adapter_path", tmp_path / "easy"]
    flags = [*fp32_flags, *start, "--learning_rate", "0", "--num_digits", "3", "--segment_length", "90"]
    train_small(*flags, "--output_dir", tmp_path / "hard")
    before, after = weights(tmp_path / "easy"), weights(tmp_path / "hard")
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    for changed, message in (
        (
            ["--lora_r", "3"],
            "`--init_adapter_path` .* was trained with lora_r 4; got `--lora_r` 3; give that of the adapter",
        ),
        (["--lora_alpha", "16"], "was trained with lora_alpha 8; got `--lora_alpha` 16; give that of the adapter"),
        (["--use_rslora", "true"], "was trained with use_rslora False; got `--use_rslora` True"),
        (["--use_dora", "true"], "was trained with use_dora False; got `--use_dora` True"),
        (["--use_peft", "false"], "was trained with use_peft True; got `--use_peft` False"),
        (
            ["--lora_target_modules", "q_proj"],
            "lora_target_modules down_proj .* v_proj; got `--lora_target_modules` q_proj; give",
        ),
        (["--num_memory_tokens", "3"], r"of shape \[4, \d+\], this run \[3, \d+\]"),
        (["--init_adapter_path", tmp_path], "no adapter that training wrote"),
    ):
        with pytest.raises(UsageError, match=message):
            train_small(*fp32_flags, *start, *changed, "--output_dir", tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
    layers = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]  # all that are linear
    same = train_small(*flags, "--lora_target_modules", *layers, "--output_dir", tmp_path / "same")
    assert same.state.global_step > 0


def test_training_starts_from_a_memory_without_lora(train_small, fp32_flags, tmp_path):
    flags = [*fp32_flags, "--stage_max_steps", "1"]
    train_small(*flags, "--use_peft", "false", "--output_dir", tmp_path / "easy")
    flags += ["--init_adapter_path", tmp_path / "easy", "--learning_rate", "0"]
    train_small(*flags, "--use_peft", "false", "--output_dir", tmp_path / "hard")
    before, after = weights(tmp_path / "easy"), weights(tmp_path / "hard")
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(UsageError, match="was trained with use_peft False; got `--use_peft` True"):
        train_small(*flags, "--output_dir", tmp_path / "refused")


def test_a_larger_memory_goes_on_from_a_smaller_one(train_small, fp32_flags, tmp_path):
    """Whose vectors come first; the others are as they were drawn."""
    places = ["--memory_positions", "true"]
    for name, flags in (
        ("small", []),
        ("fresh", ["--num_memory_tokens", "6"]),
        ("large", ["--num_memory_tokens", "6", "--init_adapter_path", tmp_path / "small"]),
    ):
        rate = [] if name == "small" else ["--learning_rate", "0"]
        train_small(*fp32_flags, *places, *flags, *rate, "--output_dir", tmp_path / name)
    small, fresh, large = (weights(tmp_path / name) for name in ("small", "fresh", "large"))
    assert small.keys() == large.keys()
    for name, tensor in large.items():
        assert torch.equal(tensor[: len(small[name])], small[name])
        assert torch.equal(tensor[len(small[name]) :], fresh[name][len(small[name]) :])
    assert sum(len(large[name]) > len(small[name]) for name in small) == 2
