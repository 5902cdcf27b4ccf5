"""Data sets in the public schema, by task and length: the official rule, predictions and records of the nominal length."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrmt.adapters.adapter import save_adapter
from lrmt.cli import main
from lrmt.evaluation.babilong.rescoring import score_folder
from lrmt.models import RmtForCausalLM

TINY = Path(__file__).parents[2] / "lrmt" / "assets" / "tiny-llama"
SEGMENT, ROWS = 80, 10


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Caches of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("LRMT_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="module")
def adapter(home):
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rmt = RmtForCausalLM.from_backbone(backbone, num_memory_tokens=2, segment_length=SEGMENT)
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["memory_embedding"], task_type="CAUSAL_LM")
    save_adapter(get_peft_model(rmt, lora), home / "adapter", AutoTokenizer.from_pretrained(TINY))
    return home / "adapter"


@pytest.fixture(scope="module")
def built(home):
    what = f"--task qa1 memorize --lengths 0k 500 1k --num_samples {ROWS} --max_n_facts 3 --output_dir {home / 'built'}"
    assert main(["data", "build", *what.split()]) == 0
    return home / "built"


def evaluate(adapter, data, out, flags):
    given = ["--adapter_path", adapter, "--dataset_name", data, "--output_dir", out, *flags.split()]
    assert main(["evaluate", *map(str, given)]) == 0
    return json.loads((out / "results.json").read_text())


def test_what_data_build_wrote_is_scored_by_the_official_rule(adapter, built, tmp_path):
    out = tmp_path / "out"
    records = evaluate(adapter, built, out, "--task qa1 memorize --lengths 1k 0k --baseline full --batch_size 4")
    cells = [(r["model"], r["task"], r["length_tokens"], r["segments"], r.get("length"), r["n"]) for r in records]
    assert cells == [
        (model, task, tokens, -(-tokens // SEGMENT), length, ROWS)
        for task in ("qa1", "memorize")
        for tokens, length in ((0, "0k"), (1000, "1k"))
        for model in ("rmt", "full")
    ]
    assert list(records[0])[:8] == [
        "model", "task", "length_tokens", "segments", "accuracy", "ci_low", "ci_high", "n",
    ]  # fmt: skip
    written = sorted(
        path.name.split("_instr")[0] for path in (out / "babilong_evals" / "adapter" / "full").glob("*.csv")
    )
    assert written == ["qa1_0k", "qa1_1k"]
    rescored = {
        (r["model"], r["length_tokens"]): r["accuracy"]
        for r in score_folder(out / "babilong_evals")
        if r["rule"] == "official"
    }
    measured = {(f"adapter/{r['model']}", r["length_tokens"]): r["accuracy"] for r in records if r["task"] == "qa1"}
    assert rescored == measured and max(measured.values()) > 0
    row = datasets.load_dataset(str(built), "1k", split="qa1")[0]
    (file,) = (out / "babilong_evals" / "adapter" / "full").glob("qa1_1k_*.csv")
    assert row["target"] in file.read_text().splitlines()[1] and row["question"].strip() in file.read_text()


def test_further_lengths_join_and_two_within_a_segment_are_two(adapter, built, tmp_path, monkeypatch):
    first = evaluate(adapter, built, tmp_path, "--task qa1 --lengths 1k --baseline --num_samples 2")
    assert [r["n"] for r in first] == [2]
    again = evaluate(adapter, built, tmp_path, "--task qa1 --lengths 0k 500 1000 --baseline --num_samples 2")
    assert again[0] == first[0] and [r["length_tokens"] for r in again] == [1000, 0, 500]


def test_a_folder_of_files_and_a_hub_id_give_the_same(adapter, built, tmp_path, monkeypatch):
    flags = "--task qa1 --lengths 0k 1k --baseline"
    wanted = evaluate(adapter, built, tmp_path / "built", flags)
    for length in ("0k", "1k"):  # as the public sets lay them out
        (tmp_path / "files" / "qa1").mkdir(parents=True, exist_ok=True)
        rows = datasets.load_dataset(str(built), length, split="qa1").to_list()
        (tmp_path / "files" / "qa1" / f"{length}.json").write_text(json.dumps(rows))
    assert evaluate(adapter, tmp_path / "files", tmp_path / "of_files", flags) == wanted
    load, asked = datasets.load_dataset, []

    def of_hub(name, config, split):
        asked.append((name, config, split))
        return load(str(built), config, split=split)

    monkeypatch.setattr("datasets.load_dataset", of_hub)
    assert evaluate(adapter, "RMT-team/babilong", tmp_path / "of_hub", flags) == wanted
    assert {("RMT-team/babilong", "0k", "qa1"), ("RMT-team/babilong", "1k", "qa1")} == set(asked)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task qa1", "--task alone. Give both"),
        ("--lengths 4k", "--lengths alone. Give both"),
        ("--task qa2 --lengths 1k", "--dataset_config 1k --dataset_split qa2"),
        ("--task qa1 --lengths 8k", "--dataset_config 8k"),
        ("--task qa1 --lengths 4q", "--lengths"),
        ("--task qa0 --lengths 1k", "did you mean"),
        ("--task qa1 --lengths 1k --dataset_split qa1", "--dataset_split too"),
        ("--dataset_config 1k --dataset_split qa1", "give --task qa1 --lengths 1k instead"),
        ("--task qa1 --lengths 1k --depths 0", "--depths"),
    ],
)
def test_bad_input_is_one_line(adapter, built, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        evaluate(adapter, built, tmp_path / "out", flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("lrmt: error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_targets_that_are_no_answers_are_refused(adapter, built, tmp_path, capsys):
    shutil.copytree(built / "1k", tmp_path / "data" / "1k")
    (file,) = (tmp_path / "data" / "1k").glob("memorize-*")
    file.rename(file.with_name(file.name.replace("memorize", "qa7")))
    with pytest.raises(SystemExit):
        evaluate(adapter, tmp_path / "data", tmp_path / "out", "--task qa7 --lengths 1k")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--task qa7 --lengths 1k row 1: target" in error and "none, one, two, three" in error
