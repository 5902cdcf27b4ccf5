"""What trains and in which dtype: LoRA and the memory, by exact names, and nothing else."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from lrmt.adapters.backbone import backbone_fingerprint, load_tokenizer
from lrmt.adapters.find import resolve_backbone, shipped_backbones
from lrmt.arguments import ModelArguments
from lrmt.errors import UsageError
from lrmt.models import RmtForCausalLM
from lrmt.training.build import build_model

SETTINGS = {"num_memory_tokens": 3, "segment_length": 16}
MEMORY = "base_model.model.memory_embedding.modules_to_save.default.weight"
DECODER = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
LINEAR = {
    "llama": [f"model.layers.{i}.{name}" for i in range(2) for name in DECODER],
    "gpt2": [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
}


def build(folder, *, sharded=False, **changes):
    changes = {"lora_r": 2, "dtype": "bfloat16" if changes.get("load_in_4bit", True) else "float32"} | changes
    return build_model(
        RmtForCausalLM, ModelArguments(model_name_or_path=str(folder), **changes), SETTINGS, sharded=sharded
    )


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model, rows=2):
    ids = torch.randint(10, 900, (rows, 40), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("in_4bit", [True, False], ids=["nf4", "fp32"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "gpt2"])
def test_exactly_lora_and_memory_train(backbones, name, in_4bit):
    model = build(backbones[name], load_in_4bit=in_4bit)
    linear = LINEAR.get(name, LINEAR["llama"])
    lora = {f"base_model.model.backbone.{layer}.lora_{x}.default.weight" for layer in linear for x in "AB"}
    assert set(trainable(model)) == lora | {MEMORY}
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    quantised = {n.split(".backbone.")[1] for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert quantised == ({f"{layer}.base_layer" for layer in linear} if in_4bit else set())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):  # LoRA's A has no gradient until B has moved
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in before:
            assert parameter.grad is None, parameter_name
            assert torch.equal(parameter, before[parameter_name]), parameter_name
        else:
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("in_4bit", [True, False], ids=["nf4", "fp32"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_peft_the_memory_alone_trains(backbones, name, in_4bit):
    model = build(backbones[name], load_in_4bit=in_4bit, use_peft=False)
    assert list(trainable(model)) == [MEMORY]
    loss_of(model).backward()
    assert trainable(model)[MEMORY].grad.abs().max() > 0


def test_under_deepspeed_everything_gathered_is_of_one_dtype(backbones):
    model = build(backbones["llama"], sharded=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # packed 4-bit weights are stored in it too
    packed = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(packed) == 14 and {w.quant_storage for w in packed} == {torch.bfloat16}


def test_named_targets(backbones):
    model = build(backbones["llama"], lora_target_modules=["q_proj"])
    assert len(trainable(model)) == 2 * 2 + 1
    assert all("q_proj" in name or name == MEMORY for name in trainable(model))


def test_targets_that_match_nothing(backbones):
    with pytest.raises(UsageError, match="--lora_target_modules.*qkv.*LlamaForCausalLM"):
        build(backbones["llama"], lora_target_modules=["qkv"])


def test_untrained_lora_changes_nothing(backbones):
    model = build(backbones["llama"], load_in_4bit=False)
    with torch.no_grad():
        on = loss_of(model)
        with model.disable_adapter():
            assert torch.equal(loss_of(model), on)


def test_fingerprint_ignores_quantisation_and_tells_backbones_apart(backbones):
    full, packed = build(backbones["llama"], load_in_4bit=False), build(backbones["llama"])
    prints = {m.get_base_model().config.backbone_fingerprint for m in (full, packed)}
    assert len(prints) == 1
    other = AutoModelForCausalLM.from_pretrained(backbones["mistral"])
    assert backbone_fingerprint(other) not in prints


def test_config_keeps_the_name_as_given():
    config = build("tiny-llama", load_in_4bit=False).get_base_model().config
    assert config.backbone_name == config.backbone_config._name_or_path == "tiny-llama"
    assert "/" not in config._name_or_path


def test_shipped_backbones_and_their_padding_token(backbones):
    assert shipped_backbones() == ["tiny-llama", "tiny-mistral"]
    assert load_tokenizer("tiny-mistral").pad_token_id is not None
    assert resolve_backbone(str(backbones["llama"])) == str(backbones["llama"])
    assert resolve_backbone("organisation/model") == "organisation/model"


def test_missing_folder_names_what_ships(tmp_path):
    with pytest.raises(UsageError, match="no such folder.*tiny-llama, tiny-mistral"):
        resolve_backbone(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="no config.json there .found: nothing"):
        resolve_backbone(str(tmp_path))
