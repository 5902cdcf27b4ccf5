"""RMT-R and ARMT through the same commands as RMT: train, die and resume, under ZeRO-3, merge, evaluate, look inside."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Program, run, run_ranks
from safetensors.torch import load_file

import lrmt
from lrmt.cli import main
from lrmt.models import METHODS
from lrmt.publishing.merge import merge_adapter

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "training" / "distributed_worker.py"
TRAINED = {
    "rmt_retrieval": ["memory_embedding", "memory_positions", "retrieved_embedding", "past_keys", "past_reader"],
    "armt": ["memory_embedding", "queries", "writers"],
}
SETTINGS = {
    "rmt_retrieval": [
        "--memory_handover",
        "tokens",
        "--memory_shift",
        "true",
        "--memory_positions",
        "true",
        "--retrieval_top_k",
        "3",
    ],
    "armt": ["--association_dim", "4"],
}
each_method = pytest.mark.parametrize("method", TRAINED)


def flags_of(method: str, backbone: Path) -> list[str]:
    return [
        *SETTINGS[method], "--model_name_or_path", str(backbone), "--notes_weight", "1", "--memory_noise", "0.1", "--checkpoint_segments",
        "true", "--curriculum_stages", "1", "3", "--stage_max_steps", "4", "8", "--eval_steps", "4", "--save_steps", "2",
    ]  # fmt: skip


def recipe_of(method: str) -> Path:
    return ROOT / "recipes" / f"{method}_llama.py"


@pytest.fixture(scope="module")
def folders(small_flags, backbones, tmp_path_factory):
    """By method the folder of a run of both stages, in one process, never interrupted."""
    folders = {}
    for method in TRAINED:
        folders[method] = tmp_path_factory.mktemp(method) / "run"
        flags = [*small_flags, *flags_of(method, backbones["llama"]), "--lora_dropout", "0.2"]
        run(recipe_of(method), *flags, "--save_total_limit", "9", "--output_dir", folders[method])
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@each_method
def test_memory_and_lora_train_and_nothing_else(folders, method):
    names = [name for name in weights(folders[method]) if "lora_" not in name]
    assert {name.split("base_model.model.")[1].split(".")[0] for name in names} == {
        *TRAINED[method],
        "memory_positions",
    } - ({"memory_positions"} if method == "armt" else set())
    adapted = {name.split(".lora_")[0] for name in weights(folders[method]) if "lora_" in name}
    assert len(adapted) == 14 and all(".backbone." in name for name in adapted)
    before, after = (weights(folders[method] / f"checkpoint-{step}") for step in (2, 12))
    assert all(not torch.equal(before[name], after[name]) for name in names)


@each_method
def test_killed_and_resumed_equals_uninterrupted(folders, method, small_flags, backbones, tmp_path):
    """The past of memories that texts begin from, where a method has one, lives in the checkpoint."""
    flags = [
        *small_flags,
        *flags_of(method, backbones["llama"]),
        "--lora_dropout",
        "0.2",
        "--output_dir",
        tmp_path / "run",
    ]
    program, deadline = Program(recipe_of(method), *flags), time.monotonic() + 240
    while not (tmp_path / "run" / "checkpoint-6" / "curriculum.json").exists():
        if not program.running or time.monotonic() > deadline:
            program.kill()
            pytest.fail(f"no checkpoint: {program.stderr[-3000:]}")
        time.sleep(0.002)
    assert program.kill() == -signal.SIGKILL
    for later in (tmp_path / "run").glob("checkpoint-*"):
        if int(later.name.split("-")[1]) > 6:
            shutil.rmtree(later)
    run(recipe_of(method), *flags, "--resume_from_checkpoint", "true")
    got, want = weights(tmp_path / "run"), weights(folders[method])
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@each_method
def test_merged_equals_unmerged(folders, method, tmp_path):
    gaps = merge_adapter(str(folders[method]), str(tmp_path / "merged"))
    assert gaps["same_base"] < 1e-4
    merged, unmerged = lrmt.load(tmp_path / "merged"), lrmt.load(folders[method], load_in_4bit=False, dtype="float32")
    assert type(merged) is METHODS[method]
    text = torch.randint(10, 900, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = unmerged(text).logits
        assert float((merged(text).logits - want).norm() / want.norm()) < 1e-4  # required: 1e-3
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(merged.generate(text, **settings), unmerged.generate(text, **settings))


@each_method
def test_evaluates_and_looks_inside(folders, method, tmp_path):
    at = ["--adapter_path", str(folders[method]), "--task", "passkey", "--num_digits", "2"]
    flags = [*at, "--lengths", "1", "3", "--num_samples", "3", "--output_dir", str(tmp_path / "e")]
    assert main(["evaluate", *flags]) == 0
    records = json.loads((tmp_path / "e" / "results.json").read_text())
    assert [(r["model"], r["segments"]) for r in records] == [
        (model, n) for n in (1, 3) for model in (method, "untrained", "backbone")
    ]
    assert main(["inspect", *at, "--length", "5", "--max_new_tokens", "2", "--output_dir", str(tmp_path / "i")]) == 0
    memory = json.loads((tmp_path / "i" / "memory.json").read_text())
    assert len(memory["segments"]) == 4
    if method == "rmt_retrieval":
        read = json.loads((tmp_path / "i" / "retrieval.json").read_text())
        assert {record["start_token"] for record in read} <= {0, 80, 160, 240} and {
            record["layer"] for record in read
        } == {0}
        assert sum(record["share"] for record in read) == pytest.approx(
            len({record["answer_token"] for record in read}), abs=0.01
        )


@pytest.mark.distributed
@pytest.mark.slow
@each_method
def test_two_ranks_under_zero3_equal_one_process(method, backbones, tmp_path):
    """NF4 under ZeRO-3, checkpointed segments, notes on ranks that have unequally many.

    In small steps: large ones multiply what bf16 rounds away, which differs from CPU to CPU.
    """
    told = (
        "--state_passing 0 --memory_noise 0 --num_memory_tokens 4 --segment_length 80 --dtype bfloat16 --bf16 true --logging_steps 1 "
        "--save_strategy no --promotion_accuracy 1.0 --eval_samples 8 --lora_r 4 --num_digits 2 --stage_lr_decay 1 --learning_rate 3e-4"
    )
    flags = [*flags_of(method, backbones["llama"]), *told.split()]
    flags += ["--retrieval_dropout", "0"] * (method == "rmt_retrieval")
    runs = {}
    for ranks, rows in ((2, 4), (1, 8)):
        folder = tmp_path / str(ranks)
        sizes = ["--per_device_train_batch_size", rows, "--per_device_eval_batch_size", rows, "--output_dir", folder]
        if ranks == 2:
            run_ranks(WORKER, *flags, *sizes, config="zero3_2cpu", METHOD=method)
        else:
            run(WORKER, *flags, *sizes, METHOD=method)
        runs[ranks] = torch.load(folder / "rank0.pt", weights_only=False)
    assert runs[2]["engine"] == "DeepSpeedEngine" and runs[2]["stage"] == 3 and len(runs[2]["quantised"]) == 14
    assert {p["dtype"] for p in runs[2]["parameters"].values()} == {torch.bfloat16}
    for key, most in (("loss", 0.02), ("notes_loss", 0.02), ("grad_norm", 0.05)):
        got, want = ([entry[key] for entry in runs[n]["log"] if "grad_norm" in entry and key in entry] for n in (2, 1))
        assert len(want) == (8 if key == "notes_loss" else 12) and got == pytest.approx(want, rel=most), key
    assert os.path.exists(tmp_path / "2" / "adapter_model.safetensors")
