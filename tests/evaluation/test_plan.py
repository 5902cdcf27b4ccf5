"""`lrmt plan`: a table of costs, from a config alone."""

import json
import re

import pytest
from transformers import MixtralConfig

from lrmt.cli import main
from lrmt.models import METHODS


def plan(*words) -> int:
    try:
        return main(["plan", *map(str, words)])
    except SystemExit as stop:
        return stop.code


def test_a_table_for_each_method_and_length(backbones, tmp_path, capsys):
    flags = ["--segment_length", "64", "--num_memory_tokens", "4", "--context_length", "240", "--block_length", "16"]
    assert (
        plan(
            "--model",
            backbones["llama"],
            *flags,
            "--length",
            "1M",
            "256",
            "--rate",
            "0.5",
            "--output_dir",
            tmp_path / "cost",
        )
        == 0
    )
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.strip().startswith(("256", "1M"))]
    methods = ["full", "rmt", "rmt_retrieval", "armt", "landmark"]
    assert [line[:2] for line in lines] == [[n, method] for n in ("256", "1M") for method in methods]
    records = json.loads((tmp_path / "cost" / "cost.json").read_text())
    by = {(r["method"], r["tokens"]): r for r in records}
    assert by["rmt", 256]["state"] == by["rmt", 10**6]["state"] == 4 * 64 * 2  # whatever was read
    assert by["armt", 10**6]["state"] == 4 * 2 * 384 * 65
    assert by["full", 10**6]["state"] == 2 * 2 * 32 * 10**6 * 2  # two layers, keys and values of two heads of 16
    assert (
        by["rmt", 10**6]["less"] == pytest.approx(by["full", 10**6]["flops"] / by["rmt", 10**6]["flops"])
        and by["rmt", 10**6]["less"] > 100
    )
    assert by["rmt", 10**6]["seconds"] == pytest.approx(by["rmt", 10**6]["flops"] / 0.5e12)
    assert (tmp_path / "cost" / "cost.png").read_bytes()[:4] == b"\x89PNG"


def test_training_goes_forward_twice_and_back(backbones, tmp_path):
    records = {}
    for name, flags in (("read", []), ("train", ["--training"])):
        assert plan("--model", backbones["llama"], "--segment_length", "100", "--method", "full", "rmt", "--length", "400", *flags,
                    "--output_dir", tmp_path / name) == 0  # fmt: skip
        records[name] = {r["method"]: r for r in json.loads((tmp_path / name / "cost.json").read_text())}
    for method, least, most in (("full", 2, 3), ("rmt", 3, 4)):
        times = records["train"][method]["flops"] / records["read"][method]["flops"]
        assert least < times < most  # matrices once more, attention twice
        assert records["train"][method]["activations"] == 2 * records["read"][method]["activations"]  # of both layers


def test_what_nobody_named_is_left_out_where_it_cannot_be(backbones, capsys):
    """By default: what the window holds, and each method at the lengths that it can be trained at."""
    assert plan("--model", backbones["llama"], "--block_length", "16", "--training", "--length", "200", "8k") == 0
    out = capsys.readouterr().out
    rows = [line.split()[:2] for line in out.splitlines() if line.split()[:1] in (["200"], ["8k"])]
    assert rows == [
        [n, method] for n in ("200", "8k") for method in ("full", *METHODS) if (n, method) != ("8k", "landmark")
    ]
    assert "landmark is left out from 8k tokens on: " in out and "window of 256" in out


def test_what_a_training_step_keeps_is_what_a_dry_run_says(backbones, tmp_path, run_recipe, capsys):
    stages = ["--curriculum_stages", "5", "--stage_max_steps", "9", "--per_device_train_batch_size", "1"]
    for method, more in (("rmt", "--memory_handover tokens"), ("rmt_retrieval", ""), ("armt", "--association_dim 32")):
        flags = f"--segment_length 40 --num_memory_tokens 4 --checkpoint_segments false {more}".split()
        asked = ["--method", method, "--length", "200", "--training", "--output_dir", tmp_path / method]
        plan("--model", backbones["llama"], *asked, *flags)
        (told,) = json.loads((tmp_path / method / "cost.json").read_text())
        given = ["--model_name_or_path", backbones["llama"], "--dtype", "bfloat16", *stages, *flags, "--dry_run"]
        run_recipe(f"{method}_llama", *given)
        out = capsys.readouterr().out
        for name, size in (("activations of 5", told["activations"]), ("memory states of 5", told["state"])):
            assert re.search(rf"{name} segment\S+ +(\S+) GiB", out)[1] == f"{size / 2**30:.3f}"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "rmtt"], "--method must be of full, rmt, rmt_retrieval, armt, landmark; got 'rmtt'; did you mean rmt"),
        (["--length", "0k"], "--length must be 1 token or more; got 0k"),
        (["--length", "many"], "--length takes"),
        (["--training", "--method", "landmark", "--block_length", "16", "--length", "1M"], "window of 256"),
        (["--rate", "0"], "--rate must be more than 0; got 0"),
        (["--method", "rmt", "--segment_length", "250"], "window of 256"),
        (["--top_k", "0"], "--top_k must be at least 1; got 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(backbones, capsys, flags, told):
    assert plan("--model", backbones["llama"], *flags) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_an_unknown_architecture(tmp_path, capsys):
    MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
    ).save_pretrained(tmp_path)
    assert plan("--model", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--model {tmp_path}: MixtralForCausalLM" in err
