"""Merging: the merged folder is the adapter over its backbone, to rounding, and needs no PEFT."""

import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel

import lrmt
from lrmt.adapters.adapter import save_adapter
from lrmt.adapters.backbone import copy_dequantised_, load_tokenizer
from lrmt.arguments import ModelArguments
from lrmt.cli import main
from lrmt.errors import UsageError
from lrmt.models import RmtForCausalLM
from lrmt.models.handover import HandOver
from lrmt.publishing.merge import merge_adapter
from lrmt.training.build import build_model

ARCHITECTURES = ["llama", "llama-tied", "mistral", "qwen2", "gpt2"]


def ids(rows=2, length=150):
    return torch.randint(10, 900, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits.float()


def gap(got, want):
    return float((got - want).norm() / want.norm())


def save_random_adapter(backbone, folder, dtype="bfloat16", handover="identity", **changes):
    """An adapter that does something: LoRA's B, zero before training, is drawn at random."""
    arguments = ModelArguments(model_name_or_path=str(backbone), lora_r=4, dtype=dtype, **changes)
    torch.manual_seed(1)
    settings = {"num_memory_tokens": 4, "segment_length": 48, "memory_handover": handover}
    model = build_model(RmtForCausalLM, arguments, settings)
    model.get_base_model().fit(ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_adapter(model, folder, load_tokenizer(str(backbone)))
    return folder


@pytest.mark.parametrize("handover", ["scaled", "aligned", "tokens"])
def test_what_is_handed_over_is_merged_with_it(backbones, tmp_path, handover):
    folder = save_random_adapter(backbones["llama"], tmp_path / "adapter", handover=handover)
    gaps = merge_adapter(str(folder), str(tmp_path / "merged"))
    merged, unmerged = lrmt.load(tmp_path / "merged"), lrmt.load(folder, load_in_4bit=False, dtype="float32")
    assert merged.config.memory_handover == handover and gaps["same_base"] < 1e-4
    want = logits(unmerged)
    assert gap(logits(merged), want) < 1e-4
    merged.config.memory_handover = "identity"
    merged.handover = HandOver("identity", merged.get_input_embeddings().weight)
    assert gap(logits(merged), want) > 1e-2  # it matters which


@pytest.fixture(scope="module")
def adapter(backbones, tmp_path_factory):
    return save_random_adapter(backbones["llama"], tmp_path_factory.mktemp("merge") / "adapter")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_equals_unmerged_over_the_original_weights(backbones, tmp_path, name):
    folder = save_random_adapter(backbones[name], tmp_path / "adapter")
    gaps = merge_adapter(str(folder), str(tmp_path / "merged"))
    merged, unmerged = lrmt.load(tmp_path / "merged"), lrmt.load(folder, load_in_4bit=False, dtype="float32")
    assert isinstance(merged, RmtForCausalLM) and not isinstance(merged, PeftModel)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not [n for n, _ in merged.named_parameters() if "lora" in n or "modules_to_save" in n]
    want = logits(unmerged)
    assert gap(logits(merged), want) < 1e-4  # required: 1e-3
    assert gaps["same_base"] < 1e-4
    with unmerged.disable_adapter():
        assert gap(logits(unmerged), want) > 0.05  # merging nothing would not pass
    prompt = ids(1, 60)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(merged.generate(prompt, **settings), unmerged.generate(prompt, **settings))
    tied = merged.backbone.get_output_embeddings().weight is merged.backbone.get_input_embeddings().weight
    assert tied == (name in ("llama-tied", "gpt2"))
    assert load_tokenizer(str(tmp_path / "merged")).eos_token_id == load_tokenizer(str(folder)).eos_token_id


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_roundtrip_merge_is_what_was_trained(backbones, tmp_path, name):
    """Over NF4 values in fp32 the merged model is the 4-bit one; over the originals it is off by what NF4 rounds."""
    nested = name != "llama-tied"  # one of them without double quantisation
    folder = save_random_adapter(backbones[name], tmp_path / "adapter", dtype="float32", use_bnb_nested_quant=nested)
    trained = logits(lrmt.load(folder))
    gaps = {}
    for base in ("original", "nf4_roundtrip"):
        gaps[base] = merge_adapter(str(folder), str(tmp_path / base), merge_base=base)
        measured = gap(logits(lrmt.load(tmp_path / base)), trained)
        assert measured == pytest.approx(gaps[base]["as_trained"], rel=0.5, abs=1e-6)
    assert gaps["nf4_roundtrip"]["as_trained"] < 1e-4
    assert gaps["nf4_roundtrip"]["same_base"] < 1e-4
    assert gaps["original"]["as_trained"] > 100 * gaps["nf4_roundtrip"]["as_trained"]


def test_bf16_4bit_adapter_is_merged_to_bf16_rounding(adapter, tmp_path):
    gaps = merge_adapter(str(adapter), str(tmp_path / "merged"), merge_base="nf4_roundtrip")
    assert gaps["as_trained"] < 0.05


@pytest.mark.parametrize(("name", "layers"), [("llama", 14), ("gpt2", 8)])
def test_roundtrip_equals_what_bitsandbytes_computes_with(backbones, name, layers):
    arguments = ModelArguments(model_name_or_path=str(backbones[name]), lora_r=2, dtype="float32")
    settings = {"num_memory_tokens": 4, "segment_length": 48}
    packed = build_model(RmtForCausalLM, arguments, settings).get_base_model().backbone
    arguments.load_in_4bit = False
    full = build_model(RmtForCausalLM, arguments, settings).get_base_model().backbone
    head, embeddings = full.get_output_embeddings().weight.clone(), full.get_input_embeddings().weight.clone()
    lora = {n: p.clone() for n, p in full.named_parameters() if "lora" in n}
    copy_dequantised_(full, packed)
    packed.train()
    assert torch.equal(full.get_output_embeddings().weight, head)
    assert torch.equal(full.get_input_embeddings().weight, embeddings)
    assert all(torch.equal(p, lora[n]) for n, p in full.named_parameters() if "lora" in n)
    count = 0
    for path, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            x = torch.eye(module.in_features)
            assert torch.allclose(module(x), full.get_submodule(path)(x), atol=1e-6), path
            count += 1
    assert count == layers


def test_merged_folder_opens_without_peft(adapter, tmp_path):
    merge_adapter(str(adapter), str(tmp_path / "merged"))
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\nimport lrmt.models\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        "print(type(model).__name__, model.config.num_memory_tokens, 'peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["RmtForCausalLM", "4", "False"], done.stderr[-2000:]


def test_command_prints_the_gaps(adapter, tmp_path, capsys):
    out = tmp_path / "merged"
    assert (
        main(["merge", "--adapter_path", str(adapter), "--output_dir", str(out), "--merge_base", "nf4_roundtrip"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith(f"merged into {out} over nf4_roundtrip weights")
    assert float(lines[1].split()[0]) < 1e-3 and "same weights" in lines[1]
    assert float(lines[2].split()[0]) < 0.1 and "as it was trained" in lines[2]
    assert (out / "model.safetensors").is_file() and not (out / "adapter_config.json").exists()


def test_memory_alone_merges(backbones, tmp_path):
    folder = save_random_adapter(backbones["llama"], tmp_path / "adapter", use_peft=False)
    assert merge_adapter(str(folder), str(tmp_path / "merged"))["same_base"] == 0.0


def test_merging_leaves_nothing_half_done(adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for arguments, message in [
        ((str(adapter), str(tmp_path / "full")), "is not empty"),
        ((str(adapter), str(tmp_path / "new"), "nf4"), "--merge_base"),
        ((str(tmp_path / "nowhere"), str(tmp_path / "new")), "no such folder"),
    ]:
        with pytest.raises(UsageError, match=message):
            merge_adapter(*arguments)
    merge_adapter(str(adapter), str(tmp_path / "merged"))
    with pytest.raises(UsageError, match="merged checkpoint already"):
        merge_adapter(str(tmp_path / "merged"), str(tmp_path / "new"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "merged"]


def test_merging_into_the_present_folder_beside_other_files(adapter, tmp_path, monkeypatch):
    (tmp_path / "here.tmp").mkdir()
    (tmp_path / "here.tmp" / "mine.txt").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge_adapter(str(adapter), ".")
    assert isinstance(lrmt.load("."), RmtForCausalLM)
    assert (tmp_path / "here.tmp" / "mine.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"here", "here.tmp"}
