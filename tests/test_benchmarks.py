"""The benchmarks run and write what they promise; and constant-memory BPTT keeps the memory states alone, counted exactly."""

import itertools
import json
import math

import pytest
import torch
from processes import ROOT, run
from transformers import LlamaConfig, LlamaForCausalLM

from lrmt.models import RmtForCausalLM
from lrmt.tasks import prose

TOY = ["--hidden_size", "64", "--layers", "1", "--segment_length", "48", "--vocabulary", "64"]
WIDTH, LENGTH, MEMORY = 32, 24, 4


def run_benchmark(name, tmp_path, *flags):
    done = run(ROOT / "benchmarks" / f"{name}.py", *TOY, *flags, "--output_dir", tmp_path)
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert all(key in done.stdout for key in report["rows"][0])
    return report


def test_training_memory_runs(tmp_path):
    report = run_benchmark("training_memory", tmp_path, "--segments", "2", "8")
    rows = {(r["checkpoint_segments"], r["segments"]): r for r in report["rows"]}
    assert set(rows) == {(True, 2), (True, 8), (False, 2), (False, 8)}
    assert report["growth_checkpointed"] < 0.5 < 1 < report["growth_plain"]
    assert all(r["process_mib"] > r["tensor_mib"] > 0 for r in report["rows"])


def test_read_memory_runs(tmp_path):
    report = run_benchmark("read_memory", tmp_path, "--tokens", "500", "5000")
    assert [(r["in_pieces"], r["tokens"]) for r in report["rows"]] == [
        (False, 500), (False, 5000), (True, 500), (True, 5000),
    ]  # fmt: skip
    if not torch.cuda.is_available():  # tensors are counted exactly: nothing may grow
        assert report["growth_rmt_whole"] == pytest.approx(0, abs=1e-3)
        assert report["growth_rmt_in_pieces"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("method", ["rmt_retrieval", "armt"])
def test_memory_of_reading_grows_with_the_state_alone(method, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from read_memory import measure_read

    size = {"hidden_size": 64, "layers": 1, "segment_length": 48, "vocabulary": 64}
    rows = [measure_read(method, tokens, True, **size) for tokens in (500, 5000)]
    grown = rows[1]["state_mib"] - rows[0]["state_mib"]
    assert (grown > 0) == (method == "rmt_retrieval")
    if not torch.cuda.is_available():  # keys and values have room for as much again, and are copied when it is used up
        assert 0 <= rows[1]["read_mib"] - rows[0]["read_mib"] <= 4 * grown + 1e-3


def test_throughput_runs(tmp_path):
    flags = ["--segments", "2", "4", "--batch_sizes", "1", "2", "--rounds", "1"]
    rows = run_benchmark("throughput", tmp_path, *flags)["rows"]
    variants = ["backbone", "rmt", "rmt, constant memory", "rmt, 4 bits", "rmt_retrieval", "armt", "landmark"]
    assert [(r["batch_size"], r["segments"], r["variant"]) for r in rows] == list(
        itertools.product((1, 2), (2, 4), variants)
    )
    by = {(r["batch_size"], r["segments"], r["variant"]): r for r in rows}
    for (*cell, _), row in by.items():
        plain = by[*cell, "backbone"]
        assert row["tokens_per_second_ratio"] == row["tokens_per_second"] / plain["tokens_per_second"] > 0
        assert row["mib_ratio"] == row["mib"] / plain["mib"]
    if not torch.cuda.is_available():  # tensors are counted exactly
        assert by[2, 4, "rmt, 4 bits"]["mib"] < by[2, 4, "rmt"]["mib"]
        assert by[2, 4, "rmt, constant memory"]["mib"] < by[2, 4, "rmt"]["mib"]
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_reading_speed_runs(tmp_path):
    run(ROOT / "benchmarks" / "reading_speed.py", "--shape", "small", "--tokens", "96", "--segment_length", "48", "--rounds", "1",
        "--output_dir", tmp_path)  # fmt: skip
    rows = json.loads((tmp_path / "reading_speed.json").read_text())["rows"]
    by = {row["variant"]: row for row in rows}
    assert len(by) == 7 and all(row["tokens_per_second"] > 0 for row in rows)
    assert by["products"]["of_products"] == by["wrapper"]["of_wrapper"] == by["full"]["of_full"] == 1
    assert by["rmt"]["peak_mib"] < by["wrapper"]["peak_mib"]


def test_babilong_generation_runs(tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(prose.write(900, 0)))
    flags = f"--lengths 2k 20k --plain_tokens 2000 --rounds 1 --background_dir {tmp_path} --output_dir {tmp_path}"
    run(ROOT / "benchmarks" / "babilong_generation.py", *flags.split())
    short, long = json.loads((tmp_path / "babilong_generation.json").read_text())["rows"]
    assert (short["tokens"], long["tokens"]) == (2000, 20000)
    assert short["plain_seconds"] > short["text_seconds"] > 0 and math.isnan(long["plain_seconds"])


def test_landmark_benchmarks_run(tmp_path):
    def measure(name, *flags):
        small = ["--hidden_size", "64", "--layers", "1", "--rounds", "1", "--output_dir", tmp_path]
        run(ROOT / "benchmarks" / f"{name}.py", *small, *flags)
        return json.loads((tmp_path / f"{name}.json").read_text())["rows"]

    rows = measure("landmark_throughput", "--tokens", "96", "--block_length", "8")
    assert [r["attention"] for r in rows] == ["full", "landmark"] and all(r["tokens_per_second"] > 0 for r in rows)
    rows = measure("landmark_read", "--tokens", "9000", "27000", "--block_length", "4", "--context_length", "128")
    if not torch.cuda.is_available():  # tensors are counted exactly: what is not stored may not grow
        assert rows[1]["near_ratio"] < 1.05 and rows[1]["blocks_mib"] >= 2 * rows[0]["blocks_mib"]


def test_the_checks_for_a_gpu_hold_on_a_cpu_too(tmp_path):
    run(ROOT / "benchmarks" / "gpu.py", "--tiny", "--output_dir", tmp_path)  # ends with 1 if a check fails
    checks = json.loads((tmp_path / "gpu_checks.json").read_text())["rows"]
    skipped = {r["check"] for r in checks if r["result"].startswith("skipped")}
    if not torch.cuda.is_available():
        assert skipped == {"landmark flex fp32", "landmark flex bf16"}
    assert all(r["result"] == "ok" and r["difference"] <= r["bound"] for r in checks if r["check"] not in skipped)
    figures = json.loads((tmp_path / "gpu_speed.json").read_text())["rows"]
    assert {r["figure"].split(",")[0] for r in figures} == {
        "bf16 matrix product", "reading", "one more token", "training step",
    }  # fmt: skip
    assert all(r["value"] > 0 and r["ratio"] > 0 for r in figures)


def test_what_fails_on_a_gpu_is_counted_and_written_as_json(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    def read(name):
        return json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)["rows"]

    def fail(*_):
        raise MemoryError

    for name in ("measure_reading", "measure_diagonals", "measure_decoding", "measure_training"):
        monkeypatch.setattr(
            gpu, name, lambda sizes: [{"figure": "one", "tokens": 1, "value": 1.0, "unit": "s", "ratio": 1.0}]
        )
    monkeypatch.setattr(gpu, "CHECKS", {"one": (lambda: 0.0, 1e-3)})
    assert gpu.main(["--tiny", "--output_dir", str(tmp_path)]) == 0
    monkeypatch.setattr(gpu, "measure_decoding", fail)
    fail.__name__ = "measure_decoding"
    assert gpu.main(["--tiny", "--output_dir", str(tmp_path)]) == 1
    assert [(r["value"], r["unit"]) for r in read("gpu_speed") if r["figure"] != "one"] == [
        (None, "FAILED: MemoryError")
    ]

    broken = torch.tensor([1.0, math.nan])
    checks = {"broken": lambda: gpu.compare([torch.ones(1), broken], [torch.ones(1), torch.ones(2)]), "raises": fail}
    monkeypatch.setattr(gpu, "CHECKS", {name: (check, 1e-3) for name, check in checks.items()})
    monkeypatch.setattr(gpu, "measure_decoding", gpu.measure_reading)
    assert gpu.main(["--tiny", "--output_dir", str(tmp_path)]) == 1
    assert [(r["difference"], r["result"]) for r in read("gpu_checks")] == [
        (None, "FAILED"),
        (None, "FAILED: MemoryError"),
    ]


def test_candidates_are_trained_and_measured_once_for_each_setting(tmp_path):
    def call(*lengths):
        flags = ["--variants", "map on M_0", "--seeds", "3", "--steps", "2", "1", "1", "--num_samples", "2"]
        flags += ["--lengths", *lengths, "--output_dir", tmp_path]
        done = run(ROOT / "benchmarks" / "memory_candidates.py", *flags)
        return done.stdout, json.loads((tmp_path / "memory_candidates.json").read_text())["rows"]

    folder = tmp_path / "map_on_M_0-3"
    folder.mkdir()
    (folder / "arguments.yaml").touch()  # all that a kill has left
    told, rows = call("2")
    assert "map on M_0, seed 3" in told and [*rows[0]] == ["changed", "seeds", "formed", "2"]
    kept = json.loads((folder / "settings.json").read_text())
    assert [end["eval_segments"] for end in kept["stages"]] == [2, 3, 5]
    assert all(0 <= end[name] <= 1 for end in kept["stages"] for name in ("eval_accuracy", "eval_notes_accuracy"))

    trained = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    told, rows = call("3", "1")  # other lengths are measured anew, the training stands
    assert "seed 3" in told and [*rows[0]] == ["changed", "seeds", "formed", "1", "3"]
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == trained

    kept = json.loads((folder / "settings.json").read_text())
    kept["training"]["seed"], kept["stages"][0]["eval_accuracy"] = 4, 0.9
    (tmp_path / "map_on_M_0-4").mkdir()
    (tmp_path / "map_on_M_0-4" / "settings.json").write_text(json.dumps(kept))
    told, rows = call("1", "3")  # nothing is left to do, and another call has made a second seed
    assert "seed 3" not in told and [(r["changed"], r["seeds"], r["formed"]) for r in rows] == [("map on M_0", 2, 1)]


def test_candidates_share_a_budget(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from memory_candidates import VARIANTS, training_of

    for variant in VARIANTS:
        training = training_of(variant, 3, [40, 20, 30])
        texts = sum(training["stage_max_steps"]) * training.get("per_device_train_batch_size", 8)
        assert texts == 8 * 90 and len(training["stage_max_steps"]) == len(training["curriculum_stages"])


@pytest.mark.parametrize("name", ["rmt_straight", "rmt_gated", "rmt_mapped", "rmt_varying"])
def test_methods_that_are_only_tried_train(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from memory_candidates import TRIED

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    settings = {"num_memory_tokens": MEMORY, "segment_length": LENGTH, "memory_handover": "tokens"}
    settings |= {"memory_shift": True, "memory_positions": True}
    model = TRIED[name].from_backbone(LlamaForCausalLM(config).requires_grad_(False), **settings)
    ids = torch.randint(0, 40, (2, 4 * LENGTH))
    labels = ids.masked_fill(torch.arange(4 * LENGTH) < 4 * LENGTH - 2, -100)
    model.train()(input_ids=ids, labels=labels).loss.backward()
    trained = {kind: getattr(model, kind).weight.grad for kind in model.memory_modules}
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in trained.values())
    assert model.config.segment_length == LENGTH


@pytest.mark.parametrize("name", ["rmt_gated", "rmt_mapped"])
def test_one_thing_is_changed(name, monkeypatch):
    """A gate that is open and a map that changes nothing are the plain method, positions and all."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from memory_candidates import TRIED

    config = LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    settings = {"num_memory_tokens": MEMORY, "segment_length": LENGTH, "memory_shift": True, "memory_positions": True}
    backbone = LlamaForCausalLM(config)
    plain, tried = (c.from_backbone(backbone, **settings).eval() for c in (RmtForCausalLM, TRIED[name]))
    tried.load_state_dict(plain.state_dict(), strict=False)
    if name == "rmt_gated":
        torch.nn.init.constant_(tried.gate.weight[2], 50.0)
    ids = torch.randint(0, 40, (2, 4 * LENGTH))
    with torch.no_grad():
        torch.testing.assert_close(tried(input_ids=ids).logits, plain(input_ids=ids).logits)


def bytes_saved_for_backward(segments, checkpoint_segments):
    """Bytes that autograd holds between forward and backward: every storage once, the weights aside."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    backbone = LlamaForCausalLM(config).requires_grad_(False)
    model = RmtForCausalLM.from_backbone(
        backbone, num_memory_tokens=MEMORY, segment_length=LENGTH, checkpoint_segments=checkpoint_segments
    )
    ids = torch.randint(0, 40, (1, segments * LENGTH))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    text = {ids.untyped_storage().data_ptr(), labels.untyped_storage().data_ptr()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | text:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return sum(saved.values())


def test_constant_memory_bptt_keeps_the_memory_states_alone():
    """Between 8 and 64 segments, 56 more states of m × d floats are kept, and not a byte more."""
    grown = bytes_saved_for_backward(64, True) - bytes_saved_for_backward(8, True)
    assert grown == 56 * MEMORY * WIDTH * 4


def test_plain_bptt_keeps_every_segment():
    per_segment = LENGTH * WIDTH * 4
    assert bytes_saved_for_backward(8, False) - bytes_saved_for_backward(4, False) > 4 * 10 * per_segment
