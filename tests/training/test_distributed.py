"""NF4 QLoRA under real ZeRO-3: two CPU processes through `accelerate launch`, against one process.

The backbone is random: on a pretrained one of this size bf16 rounding alone moves the loss by more than the 2 % allowed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import train_with
from processes import free_port, run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import lrmt
from lrmt.adapters.adapter import audit_adapter
from lrmt.adapters.find import resolve_backbone

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
WORKER = "tests/training/distributed_worker.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
STAGE_STEPS, SAVED_STEP = (10, 6), 12
CURRICULUM = (
    f"--curriculum_stages 1 3 --stage_max_steps {STAGE_STEPS[0]} {STAGE_STEPS[1]} --promotion_accuracy 1.0 "
    f"--eval_samples 16 --eval_steps 10 --logging_steps 1 --save_steps {SAVED_STEP} --checkpoint_segments true "
    "--dtype bfloat16 --bf16 true --stage_lr_decay 1.0 --memory_noise 0 --state_passing 0 --memory_handover aligned --notes_weight 1 0.5 "
    "--memory_positions true"
).split()


def launch(config: str, script: str, *flags, timeout: int = 600) -> str:
    """What `accelerate launch` with a shipped config prints; ends the launcher, and so its ranks, after `timeout` seconds."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"ds_configs/{config}.yaml"]
    command += ["--main_process_port", str(free_port()), script, *map(str, flags)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{' '.join(command)} took more than {timeout} s")
    finally:
        if process.poll() is None:
            process.terminate()  # which the launcher hands on; killed, it would leave its ranks behind
            process.wait(60)
    assert process.returncode == 0, output[-6000:]
    return output


def batch(rows: int, accumulated: int = 1) -> list[str]:
    flags = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulated} "
    return (flags + f"--per_device_eval_batch_size {rows}").split()


def curve(log: list[dict], key: str = "loss") -> list[float]:
    return [entry[key] for entry in log if "loss" in entry]


def ranks_of(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"))


def save_backbone(folder, **settings):
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone("tiny-llama"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(backbone, tmp_path_factory):
    """The folder and the two ranks' records of a ZeRO-3 run."""
    folder = tmp_path_factory.mktemp("zero3") / "run"
    flags = [*CURRICULUM, *batch(8), "--model_name_or_path", backbone, "--output_dir", folder]
    told = "".join(rank.stdout + rank.stderr for rank in run_ranks(WORKER, *flags, config="zero3_2cpu"))
    assert "`torch.distributed" not in told  # one deprecation warning per collective
    return folder, ranks_of(folder)


@pytest.fixture(scope="module")
def single(backbone, tmp_path_factory):
    """The trainer of the same run in one process: 16 rows a step instead of 2 × 8."""
    folder = tmp_path_factory.mktemp("single") / "run"
    return train_with([*CURRICULUM, *batch(16), "--model_name_or_path", str(backbone), "--output_dir", str(folder)])


def test_loss_falls(sharded):
    for record in sharded[1]:
        losses = curve(record["log"])[: STAGE_STEPS[0]]
        assert losses[-1] < losses[0] - 0.3 and losses[1] < losses[0], losses


def test_every_weight_is_sharded(sharded):
    first, second = (record["parameters"] for record in sharded[1])
    assert sharded[1][0]["engine"] == "DeepSpeedEngine" and sharded[1][0]["stage"] == 3
    assert len(sharded[1][0]["quantised"]) == 2 * 7  # every linear layer of the two decoder layers
    for name, whole in first.items():
        assert whole["kept"] == second[name]["kept"] == -(-whole["numel"] // 2), name


def test_one_dtype_is_gathered(sharded, single):
    parameters = sharded[1][0]["parameters"]
    assert {p["dtype"] for p in parameters.values()} == {torch.bfloat16}  # 4-bit storage and trainables alike
    trains = {name for name, p in parameters.items() if p["trains"]}
    assert trains == {name for name, p in single.model.named_parameters() if p.requires_grad}
    assert all(any(part in name for part in ("lora_", "memory_embedding", "memory_positions")) for name in trains)


def test_loss_curve_equals_one_process(sharded, single):
    """Measured: 0.007 % apart, and gradient norms 0.25 %, the rounding of trainables to bf16; allowed: 2 %."""
    log = sharded[1][0]["log"]
    assert curve(log) == pytest.approx(curve(single.state.log_history), rel=0.02)
    # a gradient summed over ranks instead of averaged would leave Adam's curve alone, but not this
    assert curve(log, "grad_norm") == pytest.approx(curve(single.state.log_history, "grad_norm"), rel=0.05)
    assert curve(log, "learning_rate") == pytest.approx(curve(single.state.log_history, "learning_rate"))


def test_tokens_are_handed_over_through_a_tied_head(tmp_path):
    """As the recipes do: embedding and head, one sharded weight, are called in every segment, checkpointed ones too."""
    backbone = save_backbone(tmp_path / "backbone", tie_word_embeddings=True)
    flags = [*CURRICULUM, "--memory_handover", "tokens", "--memory_shift", "true", "--stage_max_steps", "2", "3"]
    flags += ["--save_strategy", "no", "--model_name_or_path", str(backbone)]
    run_ranks(WORKER, *flags, *batch(8), "--output_dir", tmp_path / "two", config="zero3_2cpu")
    records = ranks_of(tmp_path / "two")
    log = train_with([*flags, *batch(16), "--output_dir", str(tmp_path / "one")]).state.log_history
    assert records[0]["stage"] == 3
    assert curve(records[0]["log"]) == pytest.approx(curve(log), rel=0.02)
    told, alone = ([e["notes_loss"] for e in of if "notes_loss" in e] for of in (records[0]["log"], log))
    assert told == pytest.approx(alone, rel=0.02) and told
    assert curve(records[0]["log"], "grad_norm") == pytest.approx(curve(log, "grad_norm"), rel=0.05)


def test_loss_of_a_known_batch_is_pinned(sharded, single, backbone, tmp_path):
    """Logged losses are the mean of the losses of the parts: for one rank, two ranks, and accumulation."""
    flags = ["--curriculum_stages", "1", "--stage_max_steps", "1", "--eval_samples", "8", "--logging_steps", "1"]
    flags += ["--notes_weight", "0", "--model_name_or_path", str(backbone), "--output_dir", str(tmp_path / "run")]
    accumulated = train_with([*flags, *batch(8, 2)])
    with torch.no_grad(), single.model.disable_adapter():  # LoRA off and the memory as drawn: the first step's model
        parts = [
            float(single.model(**single._draw(single.train_task, number, 4, single._segment_length)).loss)
            for number in range(4)
        ]
    expected = sum(parts) / len(parts)
    for log in (single.state.log_history, sharded[1][0]["log"], accumulated.state.log_history):
        assert curve(log)[0] == pytest.approx(expected, rel=1e-3)


def test_adapter_opens_in_one_process(sharded):
    """bf16 keeps 8 bits: the logits of two orders of computation are about 2^-8 apart (measured 0.0044); allowed: 0.02."""
    folder, (record, other) = sharded
    audit_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    trained = [p for p in record["parameters"].values() if p["trains"]]
    width = next(t.shape[1] for name, t in tensors.items() if "memory_embedding" in name)
    fitted = [tensors.pop(f"base_model.model.handover.{name}") for name in ("weight", "bias")]
    assert fitted[0].shape == (width, width) and not torch.equal(fitted[0], torch.eye(width, dtype=fitted[0].dtype))
    assert sum(t.numel() for t in tensors.values()) == sum(p["numel"] for p in trained)
    assert len(tensors) == len(trained)
    assert torch.equal(record["logits"], other["logits"])  # both ranks gathered the same weights
    with torch.no_grad():
        model = lrmt.load(folder)
        logits = model(**record["inputs"]).logits.float()
        with model.disable_adapter():
            untrained = model(**record["inputs"]).logits.float()
    assert relative_error(logits, record["logits"]) < 0.02 < relative_error(untrained, record["logits"])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_checkpoint_holds_no_frozen_weight(sharded):
    folder, (record, _) = sharded
    state = folder / f"checkpoint-{SAVED_STEP}" / f"global_step{SAVED_STEP}"
    parameters = record["parameters"]
    trainable = sum(p["numel"] for p in parameters.values() if p["trains"])
    trained = {name for name, p in parameters.items() if p["trains"]}
    for rank in range(2):
        saved = torch.load(state / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", weights_only=False)
        assert {name for name in saved["module"] if name in parameters} == trained
        assert not saved["frozen_param_fragments"]
    # fp32 master weights and Adam's two moments over the ranks, bf16 weights and 4-bit constants on each, and some names
    constants = len(record["quantised"]) * 4096
    assert folder_size(state) < trainable * (12 + 2 * 2) + 2 * constants + 2**16


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def test_resumes_with_the_recipe(sharded, backbone, tmp_path):
    """The recipe itself goes on from the middle of the second stage, with the losses of the run that never stopped."""
    folder, (record, _) = sharded
    run = tmp_path / "run"
    shutil.copytree(folder / f"checkpoint-{SAVED_STEP}", run / f"checkpoint-{SAVED_STEP}")
    flags = [*CURRICULUM, *batch(8), "--model_name_or_path", backbone, "--output_dir", run, "--report_to", "none"]
    output = launch("zero3_2cpu", "recipes/rmt_llama.py", *flags, "--resume_from_checkpoint", "true")
    assert "stage 1 of 2" not in output and "stage 2 of 2" in output
    log = json.loads((run / f"checkpoint-{sum(STAGE_STEPS)}" / "trainer_state.json").read_text())["log_history"]
    assert curve(log) == pytest.approx(curve(record["log"]), rel=1e-3)  # measured: equal to the last bit
    once, again = (load_file(path / "adapter_model.safetensors") for path in (folder, run))
    assert once.keys() == again.keys()
    for name in once:
        assert relative_error(again[name].float(), once[name].float()) < 1e-3, name


def test_landmark_attention_trains_saves_and_reloads(backbone, tmp_path):
    """Sharded like RMT, with no segments; the landmark learns, and one process opens what two saved."""
    flags = "--block_length 16 --context_length 200 --top_k 2 --train_top_k 2 --stage_max_steps 8 --eval_samples 16 --eval_steps 8 "
    flags += "--logging_steps 1 --dtype bfloat16 --bf16 true --learning_rate 2.5e-3 --warmup_steps 2"
    flags = [*flags.split(), *batch(8), "--model_name_or_path", backbone, "--output_dir", tmp_path / "run"]
    run_ranks(WORKER, *flags, config="zero3_2cpu", METHOD="landmark")
    record, other = ranks_of(tmp_path / "run")
    assert record["engine"] == "DeepSpeedEngine" and record["stage"] == 3
    losses = curve(record["log"])
    assert losses[-1] < losses[0] - 0.3
    for name, whole in record["parameters"].items():
        assert whole["kept"] == other["parameters"][name]["kept"] == -(-whole["numel"] // 2), name
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    landmark = next(tensor for name, tensor in saved.items() if "landmark_embedding" in name)
    mean = AutoModelForCausalLM.from_pretrained(backbone).get_input_embeddings().weight.float().mean(0)
    assert float((landmark.float() - mean).abs().max()) > 1e-3
    model = lrmt.load(tmp_path / "run")
    with torch.no_grad():
        logits = model(**record["inputs"]).logits.float()
        with model.disable_adapter():
            untrained = model(**record["inputs"]).logits.float()
    assert torch.equal(record["logits"], other["logits"])
    assert relative_error(logits, record["logits"]) < 0.02 < relative_error(untrained, record["logits"])


def test_dry_run_under_zero3(tmp_path):
    flags = ["--dry_run", "true", "--output_dir", tmp_path / "run"]
    told, silent = (rank.stdout for rank in run_ranks("recipes/rmt_llama.py", *flags, config="zero3_2cpu"))
    assert told.count("ZeRO stage 3, 2 ranks") == 1 and "every rank holds the whole backbone" in told
    assert "ZeRO" not in silent
    assert not (tmp_path / "run").exists()


def test_zero2_accumulates(backbone, tmp_path):
    """In fp32 the curve of 2 ranks × 2 accumulated × 4 rows is that of 16 rows, to rounding."""
    flags = ["--curriculum_stages", "2", "--stage_max_steps", "3", "--eval_samples", "8", "--logging_steps", "1"]
    flags += ["--vary_lengths", "false", "--dtype", "float32", "--bf16", "false", "--model_name_or_path", str(backbone)]
    flags += ["--memory_noise", "0", "--state_passing", "0"]  # which depend on how a batch is cut
    run_ranks(WORKER, *flags, *batch(4, 2), "--output_dir", tmp_path / "two", config="zero2_2cpu")
    records = ranks_of(tmp_path / "two")
    assert records[0]["stage"] == 2
    log = train_with([*flags, *batch(16), "--output_dir", str(tmp_path / "one")]).state.log_history
    for key in ("loss", "grad_norm"):
        assert curve(records[0]["log"], key) == pytest.approx(curve(log, key), rel=1e-3)


def test_a_step_takes_one_collective(sharded):
    """Of the loss and the next step's number of segments, of its notes, and whether any was cut; a promotion, which changes the length,
    takes one more.
    """
    first, stages, evaluation = [3], [[4] * (steps - 1) for steps in STAGE_STEPS], [3 + 14]  # with the notes' own
    promoted = [*first, *stages[0], 4, *evaluation, *first, *stages[1], 1, *evaluation]
    by_chance = [*first, *stages[0], 4, *evaluation, *stages[1], 1, *evaluation]  # drawn in both stages
    for record in sharded[1]:
        assert record["collectives"] in (promoted, by_chance)


def test_guard_speaks_on_every_rank_of_an_engine(sharded):
    for message, seconds in (record["guard"] for record in sharded[1]):
        assert "different numbers of segments (rank 0: 1, rank 1: 2)" in message
        assert seconds < 10


def test_nan_is_explained_on_every_rank(sharded):
    for record in sharded[1]:
        assert "3 segments, rank [1]" in record["nan"]


GUARD = """
import time
import torch.distributed as dist
from lrmt.training.ranks import check_same_segments
dist.init_process_group("gloo")
check_same_segments(3, "cpu")
print("in step", flush=True)
began = time.perf_counter()
try:
    check_same_segments(3 + dist.get_rank(), "cpu")
finally:
    print(time.perf_counter() - began, flush=True)
    dist.destroy_process_group()  # or its threads may abort the process as it ends
"""


def test_guard_ends_every_rank(tmp_path):
    environment = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GUARD], env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            output, errors = rank.communicate(timeout=200)  # most of which would be imports
            assert rank.returncode == 1 and output.startswith("in step")
            assert float(output.split()[-1]) < 10
            assert "different numbers of segments (rank 0: 3, rank 1: 4)" in errors
    finally:
        for rank in ranks:
            rank.kill()
