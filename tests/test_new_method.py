"""A new method is a class, its config and a line in METHODS: here a third one, of this file alone, is used in every way there is."""

import json

import pytest
import torch
import yaml

import lrmt
from lrmt.cli import main
from lrmt.flags import flag
from lrmt.models import METHODS, RecurrentConfig, RecurrentModel, Span
from lrmt.training.recipe import run_recipe


class MeanConfig(RecurrentConfig):
    """Memory is the mean of the hidden states of a segment's tokens."""

    model_type = "mean"
    reading_settings = ("gain",)

    gain: float = flag(1.0, "Size of the memory, as a multiple of the mean.")
    prefix_tokens: int = flag(2, "How often the memory stands before a segment.")

    @property
    def positions(self) -> int:
        return self.segment_length + self.prefix_tokens


class MeanForCausalLM(RecurrentModel):
    """What the tests' method adds to the recurrence."""

    config_class = MeanConfig
    memory_modules = ["first_memory"]

    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        self.first_memory = self.make_embedding(1, lambda weight, embeddings: weight.copy_(embeddings.mean(0)[None]))
        self.finish()

    def start(self, batch_size):
        return self.first_memory(torch.zeros(batch_size, 1, dtype=torch.long, device=self.device))

    def prefix(self, memory):
        return self.config.gain * memory.expand(-1, self.config.prefix_tokens, -1)

    def write(self, memory, output):
        mask = torch.ones_like(output.tokens[..., 0]) if output.mask is None else output.mask.to(output.tokens)
        return (output.tokens * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp(min=1)

    def log_values(self):
        return super().log_values() | {"gain_now": self.config.gain}

    def go_on(self, text):
        hidden, state = super().go_on(text)
        if self._record is not None:  # the memory is that of the segment before
            size, past = (
                self.config.segment_length,
                [(int(n) - 1) // self.config.segment_length for n in state.num_tokens],
            )
            self._record.read.append([[Span(0, n - 1, (n - 1) * size, n * size, 1.0)] if n else [] for n in past])
        return hidden, state


@pytest.fixture(scope="module", autouse=True)
def known():
    METHODS["mean"] = MeanForCausalLM
    yield
    del METHODS["mean"]


@pytest.fixture(scope="module")
def recipe(backbones, tmp_path_factory):
    """`recipe(*flags)`: a recipe of its own, 20 steps over two stages."""
    config = tmp_path_factory.mktemp("recipe") / "mean.yaml"
    settings = {
        "model_name_or_path": str(backbones["llama"]), "segment_length": 80, "prefix_tokens": 3, "task": "passkey",
        "num_digits": 2, "curriculum_stages": [1, 2], "stage_max_steps": [10], "promotion_accuracy": 1.0, "eval_samples": 4,
        "eval_steps": 100, "learning_rate": 3e-3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4,
        "lora_r": 4, "bf16": True, "save_steps": 10, "logging_steps": 5, "disable_tqdm": True,
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))

    def run(*flags):
        return run_recipe("mean", default_config=config, description="A recipe.", args=[*map(str, flags)])

    return run


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A trained adapter, in parts: stopped after ten steps, and resumed."""
    whole, folder = tmp_path_factory.mktemp("mean") / "whole", tmp_path_factory.mktemp("mean") / "resumed"
    recipe("--output_dir", whole)
    recipe("--output_dir", folder, "--resume_from_checkpoint", whole / "checkpoint-10")
    return whole, folder


def lrmt_command(*words) -> int:
    try:
        return main([*map(str, words)])
    except SystemExit as stop:
        return stop.code


def test_flags_and_plan(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe("--help")
    assert stop.value.code == 0
    assert "How often the memory stands before a segment" in " ".join(capsys.readouterr().out.split())
    assert recipe("--prefix_tokens", "5", "--output_dir", tmp_path / "out", "--dry_run") is None
    plan = capsys.readouterr().out
    assert "method     mean: gain 1.0, prefix_tokens 5, segment_length 80" in plan and "memory 64" in plan
    with pytest.raises(SystemExit) as stop:
        recipe("--prefix_token", "5")
    assert stop.value.code == 2 and "did you mean `--prefix_tokens`" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        recipe("--segment_length", "254", "--output_dir", tmp_path / "out")
    assert stop.value.code == 2 and "window of 256" in capsys.readouterr().err


def test_its_values_stand_in_the_log(recipe, tmp_path, capfd):
    recipe(
        "--curriculum_stages", "1", "--stage_max_steps", "5", "--save_strategy", "no", "--output_dir", tmp_path / "out"
    )
    assert "gain_now 1" in "".join(capfd.readouterr())


def test_training_and_resuming(run):
    whole, resumed = run
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (
        whole / "checkpoint-20", resumed / "checkpoint-20")]  # fmt: skip
    losses = [[(row["step"], row["loss"], row["memory_norm"]) for row in log if "loss" in row] for log in logs]
    assert [step for step, *_ in losses[0]] == [5, 10, 15, 20] and losses[0] == losses[1]
    settings = yaml.safe_load((whole / "arguments.yaml").read_text())
    assert settings["prefix_tokens"] == 3


def test_resuming_with_another_memory_is_refused(recipe, run, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe("--output_dir", run[0], "--resume_from_checkpoint", "true", "--prefix_tokens", "2")
    assert stop.value.code == 2 and "prefix_tokens 3" in capsys.readouterr().err


def test_loading_reading_and_generating(run):
    model = lrmt.load(run[0], gain=0.5)
    assert isinstance(model.get_base_model(), MeanForCausalLM)
    assert (model.config.prefix_tokens, model.config.gain) == (3, 0.5)
    text = torch.randint(0, 1000, (2, 200), generator=torch.Generator().manual_seed(0))
    state = model.read(text[:, :150])
    after = model.generate(text[:, 150:], state=state, max_new_tokens=5, do_sample=False)[:, 50:]
    assert after.tolist() == model.generate(text, max_new_tokens=5, do_sample=False)[:, 200:].tolist()


def test_evaluation(run, tmp_path, capsys):
    flags = ["--task", "passkey", "--num_digits", "2", "--lengths", "1", "2", "--num_samples", "4", "--gain", "0.5"]
    assert lrmt_command("evaluate", "--adapter_path", run[0], *flags, "--output_dir", tmp_path / "out") == 0
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(r["model"], r["segments"]) for r in records} >= {("mean", 1), ("mean", 2), ("untrained", 2)}
    assert lrmt_command("evaluate", "--adapter_path", run[0], *flags[:-1], "0.7", "--output_dir", tmp_path / "out") == 2
    assert "gain 0.5, now 0.7" in capsys.readouterr().err
    assert lrmt_command("evaluate", "--adapter_path", run[0], "--task", "passkey", "--gains", "1") == 2
    assert "did you mean --gain" in capsys.readouterr().err
    assert lrmt_command("evaluate", "--adapter_path", run[0], "--help") == 0
    assert "Size of the memory, as a multiple of the mean" in " ".join(capsys.readouterr().out.split())


def test_inspection(run, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("The lantern stands beside the window. " * 60)
    flags = ["--input", tmp_path / "book.txt", "--max_new_tokens", "3", "--output_dir", tmp_path / "out"]
    assert lrmt_command("inspect", "--adapter_path", run[0], *flags) == 0
    records = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert [r["start_token"] % 80 for r in records] == [0] * len(records) and len(records) >= 1
    assert all(r["share"] == 1.0 for r in records)
    assert (tmp_path / "out" / "retrieval.png").is_file()
    memory = json.loads((tmp_path / "out" / "memory.json").read_text())  # written without a suffix, and looked at
    assert memory["segments"] == [] and [len(part["looked"]) for part in memory["answer"]] == [3] * len(
        memory["answer"]
    )
    assert memory["answer"] and (tmp_path / "out" / "attention.png").is_file()


def test_merging(run, tmp_path, capsys):
    assert lrmt_command("merge", "--adapter_path", run[0], "--output_dir", tmp_path / "merged") == 0
    merged, adapter = lrmt.load(tmp_path / "merged"), lrmt.load(run[0], load_in_4bit=False, dtype="float32")
    assert isinstance(merged, MeanForCausalLM)
    text = torch.randint(0, 1000, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(text).logits, adapter(text).logits, rtol=1e-3, atol=1e-3)
