"""`lrmt evaluate` from a saved adapter to its files, with nothing faked but the training."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lrmt.adapters.adapter import save_adapter
from lrmt.cli import main
from lrmt.models import RmtForCausalLM
from lrmt.tasks.background import Background

SEGMENT = 384


def build_tokenizer():
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "</s>", "<pad>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    rmt = RmtForCausalLM.from_backbone(backbone, num_memory_tokens=4, segment_length=SEGMENT)
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["memory_embedding"], task_type="CAUSAL_LM")
    save_adapter(get_peft_model(rmt, lora), folder / "adapter", tokenizer)
    return folder / "adapter"


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    (folder / "book.txt").write_text("\n".join(f"The mill by the river stood idle for year {n}." for n in range(300)))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))


def evaluate(adapter, flags, *paths):
    try:
        return main(["evaluate", "--adapter_path", str(adapter), *flags.split(), *map(str, paths)])
    except SystemExit as stop:
        return stop.code


def test_generated_tasks(adapter, books, tmp_path, capsys):
    flags = "--task passkey qa1 --lengths 1 1k --num_samples 3 --batch_size 2"
    paths = ["--background_dir", books, "--output_dir", tmp_path / "out"]
    assert evaluate(adapter, flags, *paths) == 0
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["task"], r["length_tokens"]) for r in records[::3]] == [
        ("passkey", SEGMENT), ("passkey", 2 * SEGMENT), ("qa1", SEGMENT), ("qa1", 2 * SEGMENT)
    ]  # fmt: skip
    assert [r["model"] for r in records[:3]] == ["rmt", "untrained", "backbone"]
    assert {r["n"] for r in records} == {3}
    assert (tmp_path / "out" / "heatmap.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "passkey: accuracy in %" in out
    assert "qa1: accuracy in %" in out
    # again: nothing left to do, the same records
    assert evaluate(adapter, flags, *paths) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == records


def test_a_background_that_is_too_short_is_refused_unless_it_may_repeat(adapter, books, tmp_path, capsys):
    flags = "--task qa1 --lengths 0k 1 40 --num_samples 1 --baseline"
    paths = ["--background_dir", books / "book.txt", "--output_dir", tmp_path / "out"]
    assert evaluate(adapter, flags, *paths) == 2
    error = capsys.readouterr().err
    assert "fewer than the 15,360 of one sample" in error and "--repeat_background" in error
    assert not (tmp_path / "out").exists()
    assert evaluate(adapter, f"{flags} --repeat_background", *paths) == 0


def test_every_length_is_tried_before_the_model_is_loaded(adapter, books, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lrmt.load", lambda *given, **options: pytest.fail("the model was loaded"))
    monkeypatch.setattr("lrmt.evaluation.run.read_segment_length", lambda path: 56)
    assert evaluate(adapter, "--task qa1 --lengths 0k 1 8", "--output_dir", tmp_path / "out") == 2
    assert "no story of qa1 fits into 56 tokens" in capsys.readouterr().err


def test_the_background_is_opened_once_for_all_depths(adapter, books, tmp_path, monkeypatch):
    opened, init = [], Background.__init__
    monkeypatch.setattr(Background, "__init__", lambda self, *given: opened.append(given) or init(self, *given))
    flags = "--task qa1 memorize --lengths 1 --num_samples 1 --baseline"
    paths = ["--background_dir", books, "--output_dir", tmp_path / "out"]
    assert evaluate(adapter, f"{flags.replace('memorize', 'qa2')} --depths 0 0.5 1", *paths) == 0
    assert len(opened) == 1


def test_books_of_a_data_set_are_those_of_the_split(adapter, books, tmp_path, monkeypatch):
    splits, init = [], Background.from_dataset.__func__

    def from_dataset(cls, *given, **options):
        splits.append(options["split"])
        return init(cls, *given, **options)

    monkeypatch.setattr(Background, "from_dataset", classmethod(from_dataset))
    book = (books / "book.txt").read_text()
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": book}) + "\n" for _ in range(3)))
    paths = ["--background_dataset", tmp_path / "books.jsonl", "--output_dir", tmp_path / "out"]
    assert evaluate(adapter, "--task qa1 qa2 --lengths 1 --num_samples 1 --split validation --baseline", *paths) == 0
    assert splits == ["validation"]


def test_own_rows(adapter, tmp_path):
    rows = [{"input": "The cat sat. " * n, "question": "Who sat?", "target": "the cat"} for n in (1, 30, 90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(adapter, "--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out") == 0
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["model"], r["task"], r["n"]) for r in records] == [
        ("rmt", "dataset", 3), ("untrained", "dataset", 3), ("backbone", "dataset", 3)
    ]  # fmt: skip
    # " The cat sat. The cat sat." is 13 n bytes, the rest of a row 9 + 8 + 1
    assert records[0]["length_tokens"] == round(sum(13 * n + 18 for n in (1, 30, 90)) / 3)
    assert records[0]["segments"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task passkey --lengths 100k 0.3k", "--lengths 0.3k is less than one segment of 384"),
        ("--task passkey --num_digits 40", "--num_digits"),
        ("--task qa1 --question_position middle", "--question_position"),
        ("--task qa1 --babi_dir .", "--babi_dir . has no qa1_"),
        ("--dataset_name rows.jsonl", "target"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(adapter, books, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "question": "b"}\n')
    background = [] if "--dataset_name" in flags else ["--background_dir", books]  # which own rows have no use for
    assert evaluate(adapter, flags, *background) == 2
    error = capsys.readouterr().err
    assert error.startswith("lrmt: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (adapter / "evaluation").exists()


def test_files_missing_from_the_adapter_are_named(adapter, tmp_path, capsys):
    for name in ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    assert evaluate(tmp_path, "--task passkey") == 2
    assert "adapter_model.safetensors missing" in capsys.readouterr().err
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    assert evaluate(tmp_path, "--task passkey") == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()
