"""An adapter is opened as it was trained: its precision, its end of sequence, its LoRA variant; and refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import HfDeepSpeedConfig

import lrmt
from lrmt.adapters.adapter import check_savable, read_config, save_adapter
from lrmt.adapters.backbone import load_backbone, load_tokenizer, read_backbone_config
from lrmt.arguments import ModelArguments
from lrmt.cli import main
from lrmt.errors import UsageError
from lrmt.evaluation import run as evaluation
from lrmt.evaluation.settings import EvaluationSettings
from lrmt.models import RmtForCausalLM
from lrmt.publishing.merge import merge_adapter
from lrmt.training.build import build_empty_model, build_model

ASSETS = Path(lrmt.__file__).parent / "assets"
SETTINGS = {"num_memory_tokens": 4, "segment_length": 48}
FULL = {"load_in_4bit": False, "dtype": "float32"}


def ids(rows=2, length=110):
    return torch.randint(10, 900, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits.float()


def gap(got, want):
    return float((got - want).norm() / want.norm())


def build(backbone, **changes):
    """A model whose LoRA does something: what is zero before training is drawn at random."""
    torch.manual_seed(1)
    model = build_model(
        RmtForCausalLM, ModelArguments(model_name_or_path=str(backbone), lora_r=4, **changes), dict(SETTINGS)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return model


def save(backbone, folder, tokenizer=None, **changes):
    """The folder of such an adapter."""
    save_adapter(build(backbone, **changes), folder, tokenizer or load_tokenizer(str(backbone)))
    return folder


def spoil(folder, name, **changes):
    """Changes keys of a JSON file."""
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "qa1"
    merge_adapter(str(ASSETS / "rmt-qa1"), str(folder))
    return folder


@pytest.fixture
def tiny(tmp_path):
    """A copy of the tiny LLaMA, to be spoilt."""
    return shutil.copytree(ASSETS / "tiny-llama", tmp_path / "tiny")


# ---------------------------------------------------------------------- imports


def test_loading_imports_nothing_of_training(merged):
    code = (
        "import sys\nimport lrmt\n"
        f"lrmt.load({str(merged)!r})\n"
        "print(sorted({'peft', 'bitsandbytes'} & set(sys.modules)))\n"
        f"lrmt.load({str(ASSETS / 'rmt-qa1')!r})\n"
        "print(sorted({'trl', 'deepspeed', 'datasets', 'matplotlib'} & set(sys.modules)))\n"
        "print([name for name in sys.modules if name.startswith(('lrmt.training', 'lrmt.tasks', 'lrmt.evaluation'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "[]", "[]"], done.stderr[-2000:]


# ---------------------------------------------------------------------- merged checkpoints


@pytest.mark.parametrize("device_map", [{"": "meta"}, "meta"])
def test_device_map_reaches_a_merged_checkpoint(merged, device_map):
    assert {p.device.type for p in lrmt.load(merged, device_map=device_map).parameters()} == {"meta"}
    assert {p.device.type for p in lrmt.load(merged).parameters()} == {"cpu"}


@pytest.mark.parametrize("flag", [{"load_in_4bit": True}, {"dequantize": True}, {"model_name_or_path": "tiny-llama"}])
def test_a_merged_checkpoint_refuses_what_would_change_nothing(merged, flag):
    with pytest.raises(UsageError, match=f"--{next(iter(flag))}.*merged checkpoint.*leave the flag out"):
        lrmt.load(merged, **flag)


def test_merging_leaves_no_path_of_this_machine(merged):
    for path in merged.glob("*.json"):
        assert str(ASSETS) not in path.read_text(), path.name


def test_merging_into_what_cannot_be_written_stops_at_once(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="--output_dir.*cannot be written .Not a directory.; name another"):
        merge_adapter(str(ASSETS / "rmt-qa1"), str(tmp_path / "file" / "merged"))


# ---------------------------------------------------------------------- how it generates


def continuation(model, **settings):
    prompt = ids(1, 60)
    return model.generate(prompt, max_new_tokens=12, **settings)[0, 60:].tolist()


def test_generation_ends_as_training_answers_did(backbones, tmp_path):
    """The tokenizer's end of sequence is another token than the backbone's, as `eos` has it."""
    said = continuation(build(backbones["llama"], **FULL).eval(), do_sample=False, eos_token_id=-1)
    end = said[3]
    backbone = shutil.copytree(backbones["llama"], tmp_path / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(backbone)
    spoil(backbone, "generation_config.json", repetition_penalty=1.0, temperature=0.7, do_sample=False)
    folder = save(backbone, tmp_path / "adapter", **FULL)
    assert end != build(backbone, **FULL).generation_config.eos_token_id
    merge_adapter(str(folder), str(tmp_path / "merged"))
    for opened in (lrmt.load(folder), lrmt.load(tmp_path / "merged")):
        assert continuation(opened) == said[: said.index(end) + 1]
        assert opened.generation_config.temperature == 0.7  # of the backbone's own, nothing is lost
    (folder / "generation_config.json").unlink()  # as adapters were before
    opened = lrmt.load(folder)
    assert continuation(opened) == said[: said.index(end) + 1]
    assert opened.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_backbones_settings_are_kept_for_use_beside_measuring(tiny, tmp_path):
    spoil(tiny, "generation_config.json", repetition_penalty=1.3)
    folder = save(tiny, tmp_path / "adapter", **FULL)
    assert lrmt.load(folder).generation_config.repetition_penalty == 1.3


def test_generation_settings_that_are_no_json(tmp_path):
    folder = shutil.copytree(ASSETS / "rmt-qa1", tmp_path / "adapter")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UsageError, match="generation_config.json cannot be read"):
        lrmt.load(folder)


# ---------------------------------------------------------------------- variants of LoRA


@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_variants_are_saved_opened_and_merged(backbones, tmp_path, variant, in_4bit):
    model = build(backbones["llama"], load_in_4bit=in_4bit, dtype="float32", **{variant: True})
    check_savable(model)
    save_adapter(model, tmp_path / "adapter", load_tokenizer(str(backbones["llama"])))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == sum(p.requires_grad for p in model.parameters())
    assert any("magnitude" in name for name in weights) == (variant == "use_dora")
    want = logits(model)
    assert torch.equal(logits(lrmt.load(tmp_path / "adapter")), want)
    base = "nf4_roundtrip" if in_4bit else "original"
    assert merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"), base)["as_trained"] < 1e-4


def test_dora_trains_and_opens(train_small, fp32_flags):
    flags = ["--use_dora", "true", "--stage_max_steps", "1", "--save_steps", "1", "--learning_rate", "1e-2"]
    trainer = train_small(*fp32_flags, *flags)
    assert torch.equal(logits(lrmt.load(trainer.args.output_dir)), logits(trainer.model))


def test_dora_over_4_bits_under_zero3_is_refused_at_once():
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # noqa: F841 (on as long as it lives)
    with pytest.raises(UsageError, match="--use_dora.*ZeRO-3.*--load_in_4bit false"):
        build_empty_model(RmtForCausalLM, ModelArguments(use_dora=True), SETTINGS, sharded=True)


def test_what_would_train_and_not_be_saved_stops_before_training(backbones):
    model = build(backbones["llama"], **FULL)
    check_savable(model)
    model.get_base_model().backbone.model.norm.weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"backbone.model.norm.weight and 0 more would train.*does not save"):
        check_savable(model)


@pytest.mark.parametrize("in_4bit", [True, False])
def test_the_model_without_weights_trains_the_same(backbones, in_4bit):
    arguments = ModelArguments(model_name_or_path=str(backbones["llama"]), lora_r=4, load_in_4bit=in_4bit)
    empty, full = (make(RmtForCausalLM, arguments, SETTINGS) for make in (build_empty_model, build_model))
    shapes = [{n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in (empty, full)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in empty.parameters()} == {"meta"}


# ---------------------------------------------------------------------- 4 bits already


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def packed(request, backbones, tmp_path_factory):
    """A backbone that was published in 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / request.param
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        backbones[request.param], dtype=torch.float32, quantization_config=bits
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbones[request.param]).save_pretrained(folder)
    return folder


def test_a_backbone_in_4_bits_is_told_recorded_and_merged(packed, tmp_path, capsys):
    folder = save(packed, tmp_path / "adapter", dtype="float32")
    assert f"{packed} is in 4 bits already (nf4)" in capsys.readouterr().out
    config = read_config(folder)
    assert (config.backbone_quantization, config.backbone_nested_quant) == ("nf4", False)
    want = logits(lrmt.load(folder))
    assert gap(logits(lrmt.load(folder, load_in_4bit=False)), want) < 1e-4
    for base in ("original", "nf4_roundtrip"):
        gaps = merge_adapter(str(folder), str(tmp_path / base), base)
        assert max(gaps.values()) < 1e-4
        assert gap(logits(lrmt.load(tmp_path / base)), want) < 1e-4
        assert "quantization_config" not in (tmp_path / base / "config.json").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_weights_of_the_values_of_4_bits_compute_the_same(backbones, tmp_path, dtype):
    folder = save(backbones["llama"], tmp_path / "adapter", dtype=dtype)
    packed, full = lrmt.load(folder, dtype=dtype), lrmt.load(folder, dtype=dtype, dequantize=True)
    assert any(p.dtype == torch.uint8 for p in packed.parameters())
    assert not any(p.dtype == torch.uint8 for p in full.parameters())
    want = logits(packed)
    assert gap(logits(full), want) < 1e-6
    assert gap(logits(lrmt.load(folder, dtype=dtype, load_in_4bit=False)), want) > 1e-2


def test_dequantising_what_is_not_in_4_bits_is_refused(backbones, tmp_path):
    folder = save(backbones["llama"], tmp_path / "adapter", **FULL)
    with pytest.raises(UsageError, match="--dequantize.*not in 4 bits; leave the flag out"):
        lrmt.load(folder, dequantize=True)


def test_full_weights_under_an_adapter_of_4_bits_are_told(backbones, tmp_path, capsys):
    folder = save(backbones["llama"], tmp_path / "adapter")
    evaluation.load_on_device(EvaluationSettings(str(folder), task=("passkey",), load_in_4bit=False))
    assert "was trained over 4 bits, and may forget over the full weights" in capsys.readouterr().err
    evaluation.load_on_device(EvaluationSettings(str(folder), task=("passkey",), dequantize=True))
    assert "trained over" not in capsys.readouterr().err


def test_values_of_a_backbone_in_4_bits_are_no_other_weights(packed, tmp_path, capsys):
    folder = save(packed, tmp_path / "adapter", dtype="float32")
    evaluation.load_on_device(EvaluationSettings(str(folder), task=("passkey",), load_in_4bit=False))
    assert "trained over" not in capsys.readouterr().err


@pytest.mark.parametrize("in_4bit", [True, False])
def test_of_a_backbone_in_4_bits_all_is_of_the_dtype_asked_for(packed, in_4bit):
    bits = BitsAndBytesConfig(load_in_4bit=True) if in_4bit else None
    backbone = load_backbone(str(packed), dtype="bfloat16", quantization_config=bits)
    assert {p.dtype for p in backbone.parameters()} == ({torch.bfloat16, torch.uint8} if in_4bit else {torch.bfloat16})
    computed = {module.compute_dtype for module in backbone.modules() if hasattr(module, "compute_dtype")}
    assert computed == ({torch.bfloat16} if in_4bit else set())


@pytest.mark.parametrize("make", [build_model, build_empty_model])
def test_a_backbone_in_4_bits_is_not_trained_as_if_it_were_not(packed, make):
    arguments = ModelArguments(model_name_or_path=str(packed), load_in_4bit=False)
    with pytest.raises(UsageError, match="--load_in_4bit false.*in 4 bits already .nf4.; leave the flag out"):
        make(RmtForCausalLM, arguments, SETTINGS)
    with pytest.raises(UsageError, match="stores its 4 bits as uint8.*beside bfloat16"):
        make(RmtForCausalLM, ModelArguments(model_name_or_path=str(packed)), SETTINGS, sharded=True)


def test_other_quantisation_is_refused(tiny):
    spoil(tiny, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match="quantised with gptq.*name the full weights"):
        read_backbone_config(str(tiny))


# ---------------------------------------------------------------------- tokenizers


def test_padding_has_a_row_in_the_embeddings(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tiny)
    rows = json.loads((tiny / "config.json").read_text())["vocab_size"]
    assert AutoTokenizer.from_pretrained(tiny).pad_token_id >= rows
    folder = save(tiny, tmp_path / "adapter", **FULL)
    shutil.copy(tiny / "tokenizer.json", folder)
    shutil.copy(tiny / "tokenizer_config.json", folder)  # as an older version stored it
    for opened in (load_tokenizer(str(tiny)), load_tokenizer(folder), evaluation.load_tokenizer(folder)):
        assert opened.pad_token_id == opened.eos_token_id < rows
    assert lrmt.load(folder).generation_config.pad_token_id < rows


@pytest.mark.parametrize(("token", "message"), [(None, "is not set"), ("<new>", "<new>. has no embedding")])
def test_answers_need_an_end(tiny, token, message):
    spoil(tiny, "tokenizer_config.json", eos_token=token)
    with pytest.raises(UsageError, match=f"--model_name_or_path.*end-of-sequence.*{message}.*set `eos_token`"):
        load_tokenizer(str(tiny))


# ---------------------------------------------------------------------- refused in one line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "128"}, "hidden_size"),
        ({"hidden_act": "none_such"}, "KeyError: 'none_such'"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"model_type": "none_such"}, "none_such"),
        ({"vocab_size": 2000}, "ignore_mismatched_sizes"),
        ({"num_hidden_layers": 6}, "lack model.layers.4.* and 17 more"),  # transformers draws them at random
        ({"model_type": "rmt"}, "rmt model already|cannot be loaded"),
    ],
)
def test_configs_of_a_backbone_that_cannot_be(tiny, change, message):
    spoil(tiny, "config.json", **change)
    with pytest.raises(UsageError, match=message) as told:
        load_backbone(str(tiny))
    assert "\n" not in str(told.value) and "`--model_name_or_path`" in str(told.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"model_type": "none_such"}, "config.json cannot be read"),
        ("config.json", {"model_type": "llama"}, "is a llama, not an lrmt model"),
        ("config.json", {"backbone_config": None}, "config.json cannot be read"),
        ("config.json", {"backbone_name": None}, "names no backbone; say where it is with `--model_name_or_path`"),
        ("config.json", {"backbone_name": "models/gone"}, "its backbone models/gone.*say where it is with"),
        ("config.json", {"backbone_fingerprint": "0"}, "another backbone.*name that one"),
        ("config.json", {"num_memory_tokens": 9}, "size mismatch for .*memory_embedding"),
        ("adapter_config.json", {"peft_type": "NONE"}, "adapter cannot be opened"),
        ("adapter_config.json", {"target_modules": ["q_proj"]}, "down_proj.lora_A.weight, and 47 more"),
    ],
)
def test_configs_of_an_adapter_that_cannot_be(tmp_path, name, change, message):
    folder = spoil(shutil.copytree(ASSETS / "rmt-qa1", tmp_path / "adapter"), name, **change)
    with pytest.raises(UsageError, match=message) as told:
        lrmt.load(folder)
    assert "\n" not in str(told.value) and "--adapter_path" in str(told.value)


@pytest.mark.parametrize("name", ["memory_embedding", "backbone.model.layers.0.mlp.up_proj.lora_B"])
def test_an_adapter_that_lacks_a_tensor(tmp_path, name):
    folder = shutil.copytree(ASSETS / "rmt-qa1", tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(f"base_model.model.{name}.weight")
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=f"--adapter_path.*{name}.weight"):
        lrmt.load(folder)


@pytest.mark.parametrize("able", [True, False])
def test_bf16_where_the_cpu_computes_in_it(tmp_path, monkeypatch, able):
    monkeypatch.setattr("lrmt.adapters.adapter.computes_bf16", lambda: able)
    folder = shutil.copytree(ASSETS / "rmt-qa1", tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    assert lrmt.load(folder).get_input_embeddings().weight.dtype == (torch.bfloat16 if able else torch.float32)
    assert lrmt.load(folder, dtype="bfloat16").get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "none_such", "save"])
def test_dtypes_that_nothing_computes_in(dtype):
    with pytest.raises(UsageError, match=f"`dtype` must be bfloat16, float32 or float16; got {dtype}"):
        lrmt.load(ASSETS / "rmt-qa1", dtype=dtype)


def test_another_place_of_the_backbone(tiny, tmp_path):
    folder = spoil(shutil.copytree(ASSETS / "rmt-qa1", tmp_path / "adapter"), "config.json", backbone_name="no/where/x")
    with pytest.raises(UsageError, match="its backbone no/where/x is not here; say where it is"):
        merge_adapter(str(folder), str(tmp_path / "merged"))
    assert merge_adapter(str(folder), str(tmp_path / "merged"), model_name_or_path=str(tiny))["same_base"] < 1e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attn_implementation", "flash_attention_2"], "--attn_implementation` flash_attention_2.*leave it out"),
        (["--model_name_or_path", "LFS"], "model.safetensors is a pointer of git-lfs"),
        (["--lora_r", "0"], "--lora_r.*1 or more; got 0"),
        (["--lora_dropout", "2"], "--lora_dropout"),
        (["--init_adapter_path", "models/gone"], "--init_adapter_path` models/gone is no adapter: no such folder"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_training_refuses_before_texts_are_made(run_recipe, small_flags, tiny, tmp_path, flags, message, dry_run):
    """Another mistake, in the texts, goes unnoticed."""
    (tiny / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    flags = [str(tiny) if flag == "LFS" else flag for flag in flags]
    flags += ["--dataset_name", "nowhere.jsonl", *(["--dry_run"] if dry_run else [])]
    with pytest.raises(UsageError, match=message):
        run_recipe("rmt_llama", *small_flags, "--output_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_training_goes_on_from_an_adapter_of_the_hub(train_small, trained, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **options: str(trained[1]))
    flags = ["--init_adapter_path", "people/small", "--stage_max_steps", "1", "--learning_rate", "0"]
    trainer = train_small(*flags, "--output_dir", tmp_path / "run")
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "run", trained[1]))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs) and trainer.state.global_step == 2


def test_an_adapter_without_a_tokenizer_has_that_of_its_backbone(trained, tmp_path):
    _, folder = trained
    copy = shutil.copytree(folder, tmp_path / "adapter", ignore=shutil.ignore_patterns("tokenizer*", "checkpoint*"))
    assert not list(copy.glob("tokenizer*"))
    mine, theirs = load_tokenizer(copy), load_tokenizer(folder)
    assert mine.get_vocab() == theirs.get_vocab()
    assert (mine.pad_token_id, mine.eos_token_id) == (theirs.pad_token_id, theirs.eos_token_id)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "nowhere/to.be/found"}))
    with pytest.raises(UsageError, match="its backbone nowhere/to.be/found is not here") as error:
        load_tokenizer(copy)
    assert "\n" not in str(error.value)


@pytest.fixture
def stripped(tmp_path):
    """An adapter without a tokenizer, whose backbone, the tiny LLaMA, has moved."""
    without = shutil.ignore_patterns("tokenizer*")
    folder = shutil.copytree(ASSETS / "rmt-qa1", tmp_path / "adapter", ignore=without)
    spoil(folder, "adapter_config.json", base_model_name_or_path="/gone/backbone")
    return spoil(folder, "config.json", backbone_name="/gone/backbone", backbone_revision="v2")


def test_another_place_of_the_backbone_gives_the_tokenizer_too(stripped, tmp_path, monkeypatch):
    """In the revision that training used."""
    folder = stripped
    with pytest.raises(UsageError, match="its backbone /gone/backbone is not here; say where it is with"):
        evaluation.load_tokenizer(folder)
    with pytest.raises(UsageError, match="`--model_name_or_path` nowhere: no such folder"):
        evaluation.load_tokenizer(folder, "nowhere")
    theirs = load_tokenizer("tiny-llama")
    assert evaluation.load_tokenizer(folder, "tiny-llama").get_vocab() == theirs.get_vocab()
    assert merge_adapter(str(folder), str(tmp_path / "merged"), model_name_or_path="tiny-llama")["same_base"] < 1e-4
    asked = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda place, revision=None: asked.append(revision) or theirs)
    evaluation.load_tokenizer(folder, "tiny-llama")
    assert asked == ["v2"]


@pytest.mark.parametrize(
    "command",
    [
        "inspect --input TEXT --max_new_tokens 1",
        "evaluate --task qa1 --lengths 1 --num_samples 1 --baseline",
        "evaluate --task perplexity --text_path TEXT --lengths 1 --num_samples 1 --baseline",
        "evaluate --harness babilong_qa1 --harness_data DATA --num_samples 1",
    ],
)
def test_every_command_finds_the_tokenizer_there(stripped, tmp_path, command, monkeypatch):
    monkeypatch.setenv("LRMT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("The lantern stands beside the window. " * 60)
    row = {"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "0k.json").write_text(json.dumps([row]))
    if "--harness" in command:
        pytest.importorskip("lm_eval")
    words = command.replace("TEXT", f"{tmp_path / 'text.txt'}").replace("DATA", f"{tmp_path}").split()
    places = ["--adapter_path", f"{stripped}", "--model_name_or_path", "tiny-llama"]
    assert main([*words, *places, "--output_dir", f"{tmp_path / 'out'}"]) == 0
    assert any((tmp_path / "out").glob("*.json"))
