"""Sliding window and cached segment against one pass over the whole text under the mask that they stand for."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GPT2Config, LlamaConfig, MistralConfig, StableLmConfig

from lrmt.errors import UsageError
from lrmt.models import LandmarkForCausalLM
from lrmt.models.streaming import StreamedBackbone, attending_by_mask

VOCAB, SEGMENT, EOS = 50, 8, 49
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": EOS, "bos_token_id": None,
}  # fmt: skip
BACKBONES = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=5),
    "partly-rotary": StableLmConfig(**SHAPE, partial_rotary_factor=0.5),
}


def build(name):
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(BACKBONES[name]).double().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rotary = backbone.base_model.rotary_emb  # transformers makes rotary tables in fp32; what is compared here is ours

    def tables(x, position_ids):
        places.append(position_ids)
        angle = position_ids[..., None].double() * rotary.inv_freq.double()
        return tuple(torch.cat([f, f], dim=-1) for f in (angle.cos(), angle.sin()))

    places, rotary.forward = [], tables
    backbone.places = places  # that were asked for
    return backbone


def visible(length, recurrence, window):
    """`[T, T]`: may token i (row) see token j?"""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    near = i - j < SEGMENT if recurrence == "window" else i // SEGMENT - j // SEGMENT <= 1
    return (j <= i) & near & (i - j < (window or length))


@pytest.mark.parametrize("recurrence", ["window", "segment"])
@pytest.mark.parametrize("name", BACKBONES)
def test_equals_one_pass_under_the_mask(name, recurrence):
    backbone = build(name)
    text = torch.randint(0, EOS, (2, 5 * SEGMENT), generator=torch.Generator().manual_seed(1))
    mask = visible(text.shape[1], recurrence, BACKBONES[name].to_dict().get("sliding_window"))
    mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    with torch.no_grad():
        whole = backbone(text, attention_mask=mask.expand(2, 1, -1, -1), use_cache=False).logits
        stream = StreamedBackbone(backbone, SEGMENT, recurrence)
        stream._begin(2, text.device)
        cuts = [*range(0, 4 * SEGMENT, SEGMENT), *range(4 * SEGMENT, 5 * SEGMENT + 1)]  # segments, then token by token
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
            logits = stream._read(text[:, begin:end], torch.ones(2, end - begin, dtype=torch.bool))
            torch.testing.assert_close(logits[:, 0], whole[:, end - 1], rtol=1e-9, atol=1e-9)


def test_the_two_recurrences_differ():
    assert not torch.equal(visible(20, "window", None), visible(20, "segment", None))


@pytest.mark.parametrize("recurrence", ["window", "segment"])
def test_padded_batch_equals_its_rows(recurrence):
    backbone = build("llama")
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, EOS, (n,), generator=generator) for n in (3, 8, 21, 40)]

    def answer(rows):
        width = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
        mask = torch.stack([torch.nn.functional.pad(torch.ones(len(row)), (width - len(row), 0)) for row in rows])
        stream = StreamedBackbone(backbone, SEGMENT, recurrence)
        output = stream.generate(ids, mask, max_new_tokens=11, eos_token_id=EOS)
        assert torch.equal(output[:, :width], ids)
        return [row.tolist() for row in output[:, width:]]

    def until_the_end(ids):
        return ids[: ids.index(EOS) + 1] if EOS in ids else ids

    together = [until_the_end(ids) for ids in answer(rows)]
    assert together == [until_the_end(answer([row])[0]) for row in rows]
    assert len({tuple(ids) for ids in together}) > 1


@pytest.mark.parametrize("recurrence", ["window", "segment"])
def test_what_is_kept_and_its_positions_do_not_grow(recurrence):
    backbone = build("llama")
    stream, ids = StreamedBackbone(backbone, SEGMENT, recurrence), torch.zeros(1, 20 * SEGMENT, dtype=torch.long)
    stream.generate(ids, torch.ones_like(ids), max_new_tokens=2 * SEGMENT, eos_token_id=EOS)
    assert stream.cache.layers[0].keys.shape[2] == stream.seen.shape[1] <= 2 * SEGMENT
    assert 0 <= min(int(p.min()) for p in backbone.places) <= max(int(p.max()) for p in backbone.places) < 2 * SEGMENT


def test_keys_that_cannot_be_turned_back_are_refused():
    factors = {"rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for rope in ("dynamic", "longrope"):
        config = LlamaConfig(**SHAPE, rope_parameters={"rope_type": rope, **factors})
        backbone = AutoModelForCausalLM.from_config(config)
        with pytest.raises(UsageError, match=f"--baseline: rotary type {rope} of LlamaForCausalLM"):
            StreamedBackbone(backbone, SEGMENT, "window")
    pairwise = AutoModelForCausalLM.from_config(CohereConfig(**SHAPE, pad_token_id=0))  # turns neighbours, not halves
    with pytest.raises(UsageError, match="--baseline: the keys of CohereForCausalLM cannot be turned"):
        StreamedBackbone(pairwise, SEGMENT, "window")


def test_the_backbone_has_its_own_attention_again():
    backbone = build("llama")
    backbone.config._attn_implementation = "eager"
    with attending_by_mask(backbone):
        assert backbone.config._attn_implementation == "eager"
    LandmarkForCausalLM.from_backbone(backbone, block_length=4, context_length=40, top_k=2)
    with pytest.raises(KeyboardInterrupt), attending_by_mask(backbone):
        assert backbone.config._attn_implementation == "sdpa"
        raise KeyboardInterrupt
    assert backbone.config._attn_implementation == "landmark"


def test_learned_positions_are_refused():
    backbone = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="--baseline: GPT2LMHeadModel has no rotary positions"):
        StreamedBackbone(backbone, SEGMENT, "window")
