"""The three columns on a real, tiny, random model: who sees what, and that padding and adapters do not leak."""

import numpy as np
import pytest
import torch
from evaluation_fakes import EOS, FakeTokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig

from lrmt.errors import UsageError
from lrmt.evaluation.contenders import BUILDERS, answer, build_contenders
from lrmt.evaluation.settings import BASELINES
from lrmt.models import RmtForCausalLM
from lrmt.tasks.base import Example

SEGMENT, NEW = 12, 6


class Digits(FakeTokenizer):
    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def build_backbone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    backbone = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone


@pytest.fixture(scope="module")
def model():
    rmt = RmtForCausalLM.from_backbone(build_backbone(), num_memory_tokens=3, segment_length=SEGMENT)
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["memory_embedding"], task_type="CAUSAL_LM")
    peft = get_peft_model(rmt, lora)
    with torch.no_grad():  # as if trained
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.1 if "lora" in name else 1.0) * torch.randn_like(parameter))
    return peft.eval()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(16, 50, size=length) for length in (7, 12, 23, 30, 41)]


def answers(contender, prompts):
    return answer(contender, prompts, Digits(), NEW)


def test_columns_differ_and_repeat(model, prompts):
    columns = {c.name: answers(c, prompts) for c in build_contenders(model)}
    assert list(columns) == ["rmt", "untrained", "backbone"]
    assert len({tuple(column) for column in columns.values()}) == 3
    # disabling the adapter for a column leaves nothing behind
    assert {c.name: answers(c, prompts) for c in reversed(build_contenders(model))} == columns


def test_the_untrained_memory_is_the_wrapper_as_it_was_built(model, prompts):
    torch.manual_seed(0)
    fresh = RmtForCausalLM.from_backbone(build_backbone(), num_memory_tokens=3, segment_length=SEGMENT).eval()
    memory = model.get_base_model().memory_embedding.original_module.weight
    fresh.memory_embedding.weight.data.copy_(memory.data)
    untrained = build_contenders(model)[1]
    assert answers(untrained, prompts) == answers(build_contenders(fresh)[0], prompts)


def test_the_backbone_is_the_plain_model_on_the_end_of_the_text(model, prompts):
    plain = build_backbone()
    expected = []
    for ids in prompts:
        end = torch.as_tensor(ids[-SEGMENT:])[None]
        new = plain.generate(end, max_new_tokens=NEW, do_sample=False, pad_token_id=EOS)[0, end.shape[1] :].tolist()
        expected.append(Digits().decode(new[: new.index(EOS)] if EOS in new else new))
    assert answers(build_contenders(model)[2], prompts) == expected


def test_learned_positions_have_an_end():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=SEGMENT + 4, eos_token_id=EOS)
    rmt = RmtForCausalLM.from_backbone(
        AutoModelForCausalLM.from_config(config), num_memory_tokens=2, segment_length=SEGMENT
    )
    model = get_peft_model(rmt, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")).eval()
    with pytest.raises(UsageError, match="GPT2LMHeadModel has no rotary positions .*; leave full out"):
        build_contenders(model, ["full"])
    backbone = build_contenders(model, ["backbone"])[1]
    ids = np.arange(16, 46)
    shown = backbone.show(Example(ids, ids[:1], "", "", "qa1"), NEW)
    assert shown.tolist() == ids[-(SEGMENT + 4 - NEW) :].tolist()  # the answer has a place too


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.9},
        {"num_beams": 2},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(16, 33)), "begin_suppress_tokens": list(range(33, 50))},
        {"forced_eos_token_id": 20, "min_new_tokens": NEW, "bad_words_ids": [[n] for n in range(16, 30)]},
        {"do_sample": True, "temperature": 9.0, "top_k": 3, "eos_token_id": list(range(16, 50))},
        {"return_dict_in_generate": True, "sequence_bias": [[[17], 99.0]]},
    ],
)
def test_the_backbone_s_generation_settings_change_nothing(model, prompts, settings):
    """All columns are measured alike, as the streaming ones always were, whatever generation_config.json says."""
    names = [name for name in BASELINES if name not in ("rag", "api")]
    plain = {c.name: answers(c, prompts) for c in build_contenders(model, names)}
    owners = (model.get_base_model(), model.get_base_model().backbone)
    before, leaking = [owner.generation_config for owner in owners], GenerationConfig(**settings)
    try:
        for owner in owners:
            owner.generation_config = leaking
        assert {c.name: answers(c, prompts) for c in build_contenders(model, names)} == plain
        assert all(owner.generation_config is leaking for owner in owners)  # nor does measuring change them
    finally:
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config


def test_every_baseline_has_somebody_who_answers():
    assert BUILDERS.keys() | {"api"} == BASELINES.keys()


def test_a_padded_batch_answers_as_its_rows_alone(model, prompts):
    for contender in build_contenders(model):
        alone = [answers(contender, [ids])[0] for ids in prompts]
        assert answers(contender, prompts) == alone, contender.name
