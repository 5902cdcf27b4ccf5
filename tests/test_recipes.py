"""Recipes and their YAML files: every one parses, says how it is launched, and plans without touching the disk."""

import re
from pathlib import Path

import pytest
import yaml
from processes import Program
from transformers import LlamaConfig

from lrmt.models import METHODS, RecurrentModel
from lrmt.training.curriculum import Curriculum
from lrmt.training.recipe import parse_recipe, run_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
PUBLISHED = {  # but for the 16 memory tokens, into which the notes of qa3 do not fit
    "segment_length": 1024, "curriculum_stages": [1, 2, 4, 8, 16, 32], "lora_r": 8, "lora_alpha": 32,
    "lora_dropout": 0.1, "learning_rate": 3e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.1, "max_grad_norm": 1.0,
    "bf16": True, "dtype": "bfloat16", "load_in_4bit": True, "task": "qa1,qa2,qa3,qa4,qa5", "max_n_facts": 102,
}  # fmt: skip
PUBLISHED_LANDMARK = {
    "lora_r": 64, "lora_alpha": 16, "learning_rate": 1.5e-4, "top_k": 4, "bf16": True, "dtype": "bfloat16", "load_in_4bit": True,
    "task": "text",
}  # fmt: skip
by_name = {"ids": lambda path: path.name}


def parse(*flags, default=ROOT / "recipes" / "configs" / "rmt_tiny_llama.yaml", method="rmt"):
    return parse_recipe(method, default_config=default, args=list(map(str, flags)))


def named_files(text: str) -> set[str]:
    return set(re.findall(r"\b(?:recipes|ds_configs)/[\w./]+\.(?:py|yaml|json)\b", text))


def test_there_is_one_for_each_backbone():
    backbones = ("tiny_llama", "tiny_mistral", "llama3.2_1b", "llama3.1_8b", "mistral_7b")
    there = {path.name for path in CONFIGS}
    recurrent = [method for method, model in METHODS.items() if issubclass(model, RecurrentModel)]
    of_tasks = {"rmt_smollm2_passkey.yaml", *(f"{method}_smollm2_babilong.yaml" for method in recurrent)}
    assert there == of_tasks | {f"{method}_{name}.yaml" for method in METHODS for name in backbones}


def method_of(name: str) -> str:
    """Of a recipe or a config, by its name."""
    return max((method for method in METHODS if name.startswith(f"{method}_")), key=len)


@pytest.mark.parametrize("path", CONFIGS, **by_name)
def test_config_parses_to_a_run(path):
    method = method_of(path.name)
    flags = ["--text_path", "books"] if "text_path" in path.read_text() else []
    model_class, settings, model, task, curriculum, training = parse("--config", path, *flags, method=method)
    assert model.model_name_or_path == yaml.safe_load(path.read_text())["model_name_or_path"]
    model_class.config_class(**settings)
    Curriculum(curriculum.curriculum_stages, curriculum.stage_max_steps, curriculum.promotion_accuracy)
    assert (model.dtype == "bfloat16") == training.bf16  # DeepSpeed wants them to agree


@pytest.mark.parametrize("path", CONFIGS, **by_name)
def test_config_opens_with_its_launch_lines_and_explains_every_key(path):
    lines = path.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3])
    assert lines[1].startswith("# accelerate launch ") and "--" in lines[2]
    recipe = f"{method_of(path.name)}_{'mistral' if 'mistral' in path.name else 'llama'}.py"
    assert f"recipes/{recipe}" in lines[1]
    assert all((ROOT / name).is_file() for name in named_files(path.read_text()))
    if "tiny" not in path.name:
        assert f"recipes/configs/{path.name}" in lines[1]
    keys = [line.split(":")[0] for line in lines if re.match(r"\w+:", line)]
    assert len(keys) == len(set(keys)) == len(yaml.safe_load(path.read_text()))
    if "tiny" not in path.name:
        bare = [line for line in lines if re.match(r"\w+:", line) and " # " not in line]
        assert [line.split(":")[0] for line in bare] == ["output_dir"]


@pytest.mark.parametrize("path", [p for p in CONFIGS if not re.search("tiny|smollm2", p.name)], **by_name)
def test_published_settings(path):
    config = yaml.safe_load(path.read_text())
    recurrent = issubclass(METHODS[method_of(path.name)], RecurrentModel)
    published = PUBLISHED if recurrent else PUBLISHED_LANDMARK
    assert {key: config[key] for key in published} == published
    ranks = 8 if "8gpu" in path.read_text().splitlines()[1] else 1
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * ranks == 64
    if not recurrent:
        assert (config["block_length"], config["context_length"]) in ((64, 2048), (51, 512))


@pytest.mark.parametrize("path", RECIPES, **by_name)
def test_recipe_is_short_and_launches_what_exists(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    docstring = text.split('"""')[1]
    assert "accelerate launch recipes/" + path.name in docstring and "--dry_run" in docstring
    for name in named_files(docstring):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", RECIPES, **by_name)
def test_help(run_recipe, path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_recipe(path.stem, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    recurrent = issubclass(METHODS[method_of(path.name)], RecurrentModel)
    unit = "--segment_length" if recurrent else "--context_length"
    assert "accelerate launch" in out and unit in out and "--curriculum_stages" in out


# ---------------------------------------------------------------------- plans


def plan_of(out: str) -> dict:
    trainable = re.search(r"trainable +([\d,]+) parameters: LoRA ([\d,]+) in (\d+) tensors, memory ([\d,]+)", out)
    total, lora, tensors, memory = (int(n.replace(",", "")) for n in trainable.groups())
    gib = {name.strip(): float(n) for name, n in re.findall(r"^  (\S.*?) +([\d.]+) GiB$", out, re.M)}
    return {"trainable": total, "lora": lora, "tensors": tensors, "memory": memory, "gib": gib}


@pytest.mark.parametrize("flags", [[], ["--use_peft", "false"], ["--load_in_4bit", "false", "--lora_r", "7"]])
@pytest.mark.parametrize("recipe", ["rmt_llama", "rmt_mistral", "rmt_retrieval_llama", "armt_mistral"])
def test_dry_run_counts_what_trains_and_writes_nothing(
    run_recipe, small_flags, recipe, flags, tmp_path, monkeypatch, capsys
):
    from lrmt.training.build import build_model

    monkeypatch.chdir(tmp_path)
    method = method_of(recipe)
    flags = [*small_flags, *flags, "--model_name_or_path", recipe.replace(f"{method}_", "tiny-")]
    assert run_recipe(recipe, *flags, "--dry_run") is None
    plan = plan_of(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    arguments = parse(*flags)[2]
    model = build_model(METHODS[method], arguments, {"num_memory_tokens": 4, "segment_length": 80})
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert plan["trainable"] == sum(trainable.values())
    lora = {name: n for name, n in trainable.items() if ".lora_" in name}
    assert plan["memory"] == sum(trainable.values()) - sum(lora.values()) and plan["tensors"] == len(lora)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad) / 2**30
    assert plan["gib"]["frozen backbone"] == pytest.approx(frozen, rel=0.15, abs=2e-3)


def test_dry_run_of_a_model_whose_weights_are_elsewhere(run_recipe, tmp_path, monkeypatch, capsys):
    """Llama-3.2-1B's shape: 1,235,814,400 parameters, of which 973,078,528 are quantised."""
    LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "llama-1b")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = ROOT / "recipes" / "configs" / "rmt_llama3.2_1b.yaml"
    run_recipe("rmt_llama", "--config", config, "--model_name_or_path", tmp_path / "llama-1b", "--dry_run")
    out = capsys.readouterr().out
    plan = plan_of(out)
    assert "1,235,814,400 parameters, nf4 4-bit" in out
    assert (plan["lora"], plan["tensors"], plan["memory"]) == (
        5_636_096,
        2 * 7 * 16,
        2 * 32 * 2048,
    )  # M_0 and positions
    assert "up to 32 segments × 2000 steps" in out and "at most 12000 of batch 64" in out
    nf4, tied = 973_078_528 * 0.516, (1_235_814_400 - 973_078_528) * 2
    assert plan["gib"]["frozen backbone"] == pytest.approx((nf4 + tied) / 2**30, rel=0.01)
    assert 1 < plan["gib"]["total"] < 24
    assert [p.name for p in tmp_path.iterdir()] == ["llama-1b"]


def test_recipe_is_runnable_from_anywhere(tmp_path):
    """And a mistake is told in seconds, by exit code 2, in one line."""
    done = Program(ROOT / "recipes" / "rmt_mistral.py", "--segment_lenght", "64", cwd=tmp_path)
    assert done.wait() == 2
    assert done.stderr == "lrmt: error: unknown flag `--segment_lenght`; did you mean `--segment_length`?\n"
    assert list(tmp_path.iterdir()) == []


def test_interrupting_is_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lrmt.training.recipe.train", interrupt)
    with pytest.raises(SystemExit) as end:
        run_recipe("rmt", default_config=ROOT / "recipes" / "configs" / "rmt_tiny_llama.yaml", description="", args=[])
    error = capsys.readouterr().err
    assert end.value.code == 130 and "--resume_from_checkpoint true" in error and "Traceback" not in error
