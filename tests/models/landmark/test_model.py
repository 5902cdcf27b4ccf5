"""Landmark attention on stock decoders: what is read in pieces is what is read at once, whatever the pieces."""

import copy
import logging

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lrmt.errors import UsageError
from lrmt.models import LandmarkForCausalLM
from lrmt.models.landmark.cache import Blocks, Chunk
from lrmt.models.landmark.naive import naive_landmark_attention
from lrmt.models.rotary import rotate

K, VOCAB = 5, 60
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.4,
}  # fmt: skip
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}
#: 20 positions a chunk, and room for every block of the tests' texts
ALL = {"top_k": 60, "context_length": 66 * (K - 1)}
FEW = {"top_k": 2, "context_length": 8 * (K - 1)}


def build(name="llama", dtype=torch.float64, **settings):
    torch.manual_seed(0)
    backbone = MAKERS[name]().to(dtype).eval()
    model = LandmarkForCausalLM.from_backbone(backbone, block_length=K, **(ALL | settings)).eval()
    assert model.config.chunk_length == 20
    if dtype == torch.float64:  # transformers makes rotary tables in fp32; what is compared here is ours
        rotary = backbone.base_model.rotary_emb

        def tables(x, position_ids):
            angle = position_ids[..., None].double() * rotary.inv_freq.double()
            return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

        rotary.forward = tables
    return model


def ids(rows, length, seed=1):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def whole(model, *args, **kwargs):
    """All logits with all blocks: the path of training."""
    return model(*args, **kwargs).logits.detach()


@torch.no_grad()
def in_pieces(model, text, cuts, mask=None):
    state, begin, logits = None, 0, []
    mask = torch.ones_like(text) if mask is None else mask
    for cut in [*cuts, text.shape[1]]:
        part, real = text[:, begin:cut], mask[:, begin:cut]
        logits.append(model(part, attention_mask=real, state=state).logits)
        state, begin = model.read(part, attention_mask=real, state=state), cut
    return torch.cat(logits, dim=1)


def assert_close(got, want, tolerance=1e-8):
    assert float((got - want).abs().max() / want.abs().max()) < tolerance


# ---------------------------------------------------------------------- the definition


@pytest.mark.parametrize("name", MAKERS)
def test_a_whole_text_is_the_backbone_under_the_literal_attention(name):
    model, text = build(name), ids(2, 23)
    rows = []
    for row in text:
        embeds, places = [], []
        for number, token in enumerate(row):
            if number and number % (K - 1) == 0:
                embeds.append(model.landmark_embedding.weight[0])
            places.append(len(embeds))
            embeds.append(model.get_input_embeddings()(token))

        def attend(layer, query, key, value, scaling):
            return naive_landmark_attention(query, key, value, block_length=K, scaling=scaling)

        hidden = model.backbone.base_model(
            inputs_embeds=torch.stack(embeds)[None], attention_mask=torch.ones(1, len(embeds)), landmark_attend=attend
        ).last_hidden_state
        rows.append(model.get_output_embeddings()(hidden[0, places]))
    assert_close(whole(model, text), torch.stack(rows).detach(), 1e-10)


def test_labels_and_gradients():
    """The loss is the next-token loss of the user's tokens; the landmark learns, the backbone's embeddings need not."""
    model, text = build(), ids(2, 33)
    labels = text.masked_fill(torch.rand(text.shape, generator=torch.Generator().manual_seed(2)) < 0.5, -100)
    out = model(text, labels=labels)
    logits, targets = model(text).logits[:, :-1], labels[:, 1:]
    want = torch.nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100])
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.logits, logits[targets != -100])
    out.loss.backward()
    assert float(model.landmark_embedding.weight.grad.norm()) > 0


def test_nothing_scored_has_a_zero_loss():
    model, text = build(), ids(1, 9)
    out = model(text, labels=torch.full_like(text, -100))
    out.loss.backward()
    assert out.loss.item() == 0 and float(model.landmark_embedding.weight.grad.abs().max()) == 0


# ---------------------------------------------------------------------- reading in pieces


@pytest.mark.parametrize("offload", [False, True], ids=["here", "offloaded"])
@pytest.mark.parametrize("retrieval", ["token", "chunk"])
@pytest.mark.parametrize("name", MAKERS)
def test_pieces_with_every_block_equal_one_forward(name, retrieval, offload, monkeypatch):
    """Irregular chunks, then token by token across block ends, a batch of two with grouped heads."""
    monkeypatch.setattr("lrmt.models.landmark.model.TOKENS_LAID_OUT_AT_ONCE", 20)
    monkeypatch.setattr("lrmt.models.landmark.cache.GATHERED_AT_ONCE", 10_000)  # a few queries at a time
    model, text = build(name, retrieval=retrieval, offload_blocks=offload), ids(2, 90)
    want = whole(model, text)
    assert_close(in_pieces(model, text, [3, 4, 9, 40, 41, 63, *range(70, 90)]), want)
    with torch.no_grad():
        assert_close(model(text).logits, want)


@pytest.mark.parametrize("settings", [ALL, FEW], ids=["all blocks", "2 blocks"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(side, settings, monkeypatch):
    monkeypatch.setattr("lrmt.models.landmark.model.TOKENS_LAID_OUT_AT_ONCE", 20)
    model, text = build(**settings), ids(3, 70)
    lengths = [70, 41, 4]
    mask = torch.stack([torch.arange(70) >= 70 - n if side == "left" else torch.arange(70) < n for n in lengths])
    rows = [text[i][mask[i]][None] for i in range(3)]
    with torch.no_grad():
        got = model(text, attention_mask=mask.long()).logits
        for i, row in enumerate(rows):
            assert_close(got[i][mask[i]], model(row).logits[0])
        state = model.read(text, attention_mask=mask.long())
        token = ids(3, 1, seed=5)
        for _ in range(K + 1):  # rows fill their blocks at different steps
            out = model(token, state=state, logits_to_keep=1)
            rows = [torch.cat([row, token[i : i + 1]], 1) for i, row in enumerate(rows)]
            state, token = out.state, out.logits.argmax(-1)
        if settings is ALL:
            for i, row in enumerate(rows):
                assert_close(out.logits[i], model(row).logits[0, -1:])
    whole_text = whole(model, text, attention_mask=mask.long())
    for i, n in enumerate(lengths):
        assert_close(whole_text[i][mask[i]], whole(model, text[i][mask[i]][None])[0])
        assert n == int(mask[i].sum())


def test_generation_equals_rerunning_the_whole_text():
    model, prompt = build(), ids(2, 31)
    got = model.generate(prompt, max_new_tokens=2 * K, do_sample=False, eos_token_id=VOCAB + 1)
    text = prompt
    for _ in range(2 * K):
        text = torch.cat([text, whole(model, text)[:, -1:].argmax(-1)], dim=1)
    assert got.tolist() == text.tolist()


@torch.no_grad()
def test_positions_never_exceed_those_of_training():
    model, seen = build(**FEW), []
    model.backbone.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    model.generate(ids(1, 700), max_new_tokens=12, do_sample=False, eos_token_id=VOCAB + 1)
    assert len(seen) > 40 and max(seen) < model.config.max_positions
    seen.clear()
    model.train()
    with torch.enable_grad():
        model(ids(1, model.config.context_length))
    assert seen == [model.config.max_positions - 2]  # the last landmark is never read


# ---------------------------------------------------------------------- choosing blocks, literally


def literal_far_attention(query, keys, values, tail, k, scaling, inv_freq):
    """One query over n stored blocks `[n, K, D]` and the tokens `tail` (keys, values `[t, D]`); all keys without rotation."""
    n, window = len(keys), min(len(keys), k + 1)

    def at(x, position):
        return rotate(x[None, None, None], torch.tensor([[position]]), inv_freq)[0, 0, 0]

    turned = at(query, window * K + len(tail[0]) - 1)

    def score(key, position):
        return float(scaling * turned @ at(key, position))

    recent = range(max(0, n - k), n)
    place = {c: window - (n - c) if c in recent else 0 for c in range(n)}
    best = sorted(range(n), key=lambda c: score(keys[c][-1], place[c] * K + K - 1))[-k:]
    weights, vectors = [], []
    for r, c in enumerate(sorted(best)):
        slot = r + (1 if c in recent and n > k else 0)
        inside = torch.tensor([score(keys[c][p], slot * K + p) for p in range(K - 1)]).double()
        gate = torch.tensor(score(keys[c][-1], slot * K + K - 1)).double().exp()
        weights += (gate * inside.softmax(0)).tolist()
        vectors += list(values[c][:-1])
    for j, (key, value) in enumerate(zip(*tail, strict=True)):
        weights.append(float(torch.tensor(score(key, window * K + j)).double().exp()))
        vectors.append(value)
    weights = torch.tensor(weights).double()
    return (weights / weights.sum()) @ torch.stack(vectors)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("tail_length", [0, 3])
def test_chosen_blocks_and_their_slots_are_the_definition(num_blocks, tail_length):
    """k = 2: fewer blocks than slots, as many, one older, many older; grouped heads."""
    k, heads, kv_heads, width = 2, 4, 2, 8
    inv_freq = 100.0 ** (-torch.arange(0, width, 2).double() / width)
    generator = torch.Generator().manual_seed(num_blocks)
    length = num_blocks * K + tail_length + 1
    raw_key, raw_value = (torch.randn(1, kv_heads, length, width, generator=generator).double() for _ in range(2))
    raw_query = 2 * torch.randn(1, heads, 1, width, generator=generator).double()
    blocks, tails, tail = Blocks([], torch.zeros(1, dtype=torch.long)), None, torch.zeros(1, dtype=torch.long)
    for begin, end in ((0, length - 1), (length - 1, length)):
        chunk = Chunk(
            blocks, tails, tail, torch.ones(1, end - begin, dtype=torch.bool), block_length=K, top_k=k, inv_freq=inv_freq,
            num_layers=1, offload=False, per_token=True,
        )  # fmt: skip
        key = rotate(raw_key[:, :, begin:end], chunk.position_ids, inv_freq)
        query = rotate(raw_query.expand(-1, -1, end - begin, -1), chunk.position_ids, inv_freq)
        got = chunk.attend(0, query, key, raw_value[:, :, begin:end], 0.5)
        blocks, tails, tail = chunk.finish()
    stored = num_blocks * K
    for h in range(heads):
        key, value = raw_key[0, h // 2], raw_value[0, h // 2]
        want = literal_far_attention(
            raw_query[0, h, 0], key[:stored].view(-1, K, width), value[:stored].view(-1, K, width),
            (key[stored:], value[stored:]), k, 0.5, inv_freq,
        )  # fmt: skip
        torch.testing.assert_close(got[0, h, 0], want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_few_blocks_are_not_all_blocks_and_chunks_choose_together():
    text = ids(1, 201)  # the next token comes without a landmark, so that it is a chunk by itself
    every, few, together = (build(**s) for s in (ALL, FEW, FEW | {"retrieval": "chunk"}))
    logits = [model(text).logits for model in (every, few, together)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((logits[one] - logits[other]).abs().max()) > 0.1
    state = few.read(text)
    for model in (few, together):  # a single token chooses alike either way
        state.fingerprint = model.fingerprint()
        got = model(ids(1, 1), state=state).logits
        assert_close(got, few(ids(1, 1), state=dataclass_with(state, few.fingerprint())).logits)


def dataclass_with(state, fingerprint):
    state = copy.copy(state)
    state.fingerprint = fingerprint
    return state


# ---------------------------------------------------------------------- states


@pytest.mark.parametrize("offload", [False, True], ids=["here", "offloaded"])
@torch.no_grad()
def test_a_document_is_read_once_saved_and_asked_often(tmp_path, offload):
    model = build(**FEW, offload_blocks=offload)
    document, questions = ids(2, 93), [ids(2, 17, seed=s) for s in range(3)]
    state = model.read(document)
    state.save(tmp_path / "state.safetensors")
    loaded = model.load_state(tmp_path / "state.safetensors")
    assert loaded.num_tokens.tolist() == [93, 93] and loaded.blocks.count.tolist() == [23, 23]
    for question in [*questions, questions[0]]:  # answers do not depend on what was asked before
        fresh = model(question, state=model.read(document)).logits
        assert torch.equal(model(question, state=state).logits, fresh)
        assert torch.equal(model(question, state=loaded).logits, fresh)
    first = model.generate(questions[0], state=state, max_new_tokens=2 * K, do_sample=False)
    assert first.tolist() == model.generate(questions[0], state=loaded, max_new_tokens=2 * K, do_sample=False).tolist()


@torch.no_grad()
def test_one_document_answers_a_batch_without_a_copy():
    model, document, questions = build(**FEW), ids(1, 93), ids(3, 9, seed=4)
    state = model.read(document)
    level = state.blocks.levels[0][0]
    together = model.generate(questions, state=state, max_new_tokens=2 * K, do_sample=False)
    for i in range(3):
        alone = model.generate(questions[i : i + 1], state=state, max_new_tokens=2 * K, do_sample=False)
        assert together[i].tolist() == alone[0].tolist()
    assert state.expand(3).blocks.levels[0][0] is level and level.keys[0].shape[0] == 1


@torch.no_grad()
def test_states_expand_again_and_again():
    """A document, two texts that go on from it, two questions to each."""
    model, document, texts, questions = build(**FEW), ids(1, 93), ids(2, 41, seed=4), ids(4, 9, seed=5)
    both = model.read(texts, state=model.read(document))
    together = model(questions, state=both).logits
    for i in range(4):
        alone = model.read(texts[i // 2 : i // 2 + 1], state=model.read(document))
        assert_close(together[i], model(questions[i : i + 1], state=alone).logits[0])


@pytest.mark.parametrize("retrieval", ["token", "chunk"])
@torch.no_grad()
def test_what_was_never_written_is_never_read(retrieval, monkeypatch):
    """A row without any block beside one with many."""
    model, text = build(**FEW, retrieval=retrieval), ids(2, 70)
    mask = torch.arange(70) < torch.tensor([[70], [2]])
    state = model.read(text, attention_mask=mask.long())
    logits = model(ids(2, 1), state=state).logits
    assert_close(logits[1], model(ids(2, 1)[1:], state=model.read(text[1:, :2])).logits[0])


def test_questions_with_gradients_leave_the_state_alone():
    model, question = build(**FEW), ids(1, 9)
    state = model.read(ids(1, 93))
    first = model(question, labels=question, state=state).loss
    assert not any(t.requires_grad for level, _, _ in state.blocks.levels for t in level.keys)
    assert model(question, labels=question, state=state).loss.item() == first.item()


@torch.no_grad()
def test_backbone_calls_are_counted_as_they_are_made():
    model, calls = build(**FEW), []
    model.backbone.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    for length in (1, 4, 5, 16, 17, 81, 82, 200):
        calls.clear()
        model(ids(1, length))
        assert len(calls) == model.num_backbone_calls(ids(1, length))
    model.train()
    assert model.num_backbone_calls(ids(1, 32)) == 1


@torch.no_grad()
def test_states_of_others_are_refused(tmp_path):
    model, text = build(), ids(1, 20)
    model.read(text).save(tmp_path / "a.safetensors")
    other = LandmarkForCausalLM.from_backbone(model.backbone, block_length=K + 1, context_length=400, top_k=2)
    with pytest.raises(UsageError, match="another model"):
        other.load_state(tmp_path / "a.safetensors")
    changed = build()
    changed.landmark_embedding.weight[0, 0] += 1
    with pytest.raises(UsageError, match="another model"):
        changed(text, state=model.read(text))


@torch.no_grad()
def test_which_blocks_were_read():
    model, prompt = build(**FEW), ids(2, 60)
    text, steps = model.generate(
        prompt, max_new_tokens=7, do_sample=False, return_retrieval=True, eos_token_id=VOCAB + 1
    )
    assert text.tolist() == model.generate(prompt, max_new_tokens=7, do_sample=False, eos_token_id=VOCAB + 1).tolist()
    assert len(steps) == 7
    for number, step in enumerate(steps):
        assert set(step) == {(row, layer) for row in range(2) for layer in range(2)}
        for blocks, shares in step.values():
            assert blocks.shape == shares.shape == (4, 2)
            assert int(blocks.min()) >= 0 and int(blocks.max()) < (60 + number) // (K - 1)
            assert float(shares.min()) >= 0 and float(shares.sum(-1).max()) <= 1 + 1e-6
    assert model._record is None
    # a row that ends in an earlier chunk, and one that has no block yet
    mask = torch.arange(60) < torch.tensor([[60], [2]])
    _, steps = model.generate(
        prompt[:, :60].where(mask, 0), attention_mask=mask.flip(1).long(), max_new_tokens=3, do_sample=False,
        return_retrieval=True, eos_token_id=VOCAB + 1,
    )  # fmt: skip
    assert [set(step) >= {(0, 0), (0, 1)} for step in steps] == [True] * 3
    _, steps = model.generate(
        prompt[:1, :2], max_new_tokens=8, do_sample=False, return_retrieval=True, eos_token_id=VOCAB + 1
    )
    assert [bool(step) for step in steps] == [False] * 4 + [True] * 4


# ---------------------------------------------------------------------- the backbone


@pytest.mark.parametrize("name", MAKERS)
def test_outside_the_wrapper_the_backbone_attends_as_ever(name):
    torch.manual_seed(0)
    plain = MAKERS[name]().eval()
    if name == "mistral":
        plain.config.sliding_window = None
    text = ids(2, 30)
    mask = torch.ones_like(text)
    mask[1, :6] = 0
    with torch.no_grad():
        want = plain(text, attention_mask=mask).logits
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": VOCAB + 1}
    generated = plain.generate(text, **settings)
    model = LandmarkForCausalLM.from_backbone(plain, block_length=K, **ALL).eval()
    with torch.no_grad():
        got = model.backbone(text, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
    model.backbone.config.use_cache = True
    assert model.backbone.generate(text, **settings).tolist() == generated.tolist()


def test_mistral_loses_its_sliding_window_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        model = build("mistral")
    assert model.backbone.config.sliding_window is None
    assert "sliding window of 7 tokens switched off" in caplog.text


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_saves_and_loads_like_any_transformers_model(name, tmp_path):
    model, text = build(name, dtype=torch.float32), ids(1, 44)
    model.save_pretrained(tmp_path)
    loaded = LandmarkForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.block_length == K and loaded.config.top_k == ALL["top_k"]
    assert torch.equal(whole(loaded, text), whole(model, text))
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_length": 1}, "`--block_length` must be 2 or more.*got 1"),
        ({"top_k": 0}, "`--top_k` must be 1 or more; got 0"),
        ({"retrieval": "row"}, "`--retrieval` must be token or chunk; got row"),
        ({"landmark_embedding": "mean"}, "`--landmark_embedding` must be trained or frozen_mean; got mean"),
        ({"implementation": "fast"}, "`--implementation` must be auto, sdpa, flex or naive; got fast"),
        ({"context_length": 20}, "`--context_length` 20 leaves no room for 60 blocks of 5"),
        ({"context_length": 2000}, "window of 2048; got 2500. Lower it to 1638 or less"),
    ],
)
def test_bad_settings_say_what_to_do(settings, message):
    with pytest.raises(UsageError, match=message):
        LandmarkForCausalLM.from_backbone(MAKERS["llama"](), **({"block_length": K, **ALL} | settings))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=2048)), "GPT2LMHeadModel cannot be"),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})),
            "rotary type dynamic has frequencies that depend on length",
        ),
        (
            lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
            "sliding-window attention that cannot be switched off",
        ),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)), "attention dropout 0.1"),
    ],
    ids=["not pluggable", "rotary", "sliding", "dropout"],
)  # fmt: skip
def test_backbones_that_cannot_have_landmarks(backbone, message):
    with pytest.raises(UsageError, match=f"`--model_name_or_path`: .*{message}"):
        LandmarkForCausalLM.from_backbone(backbone(), block_length=K, **ALL)


def test_bad_input():
    model = build()
    with pytest.raises(UsageError, match=f"0..{VOCAB - 1}, the backbone's vocabulary; got .*Landmarks .* have no id"):
        model(torch.tensor([[1, VOCAB]]))
    with pytest.raises(ValueError, match="empty"):
        model.read(torch.zeros(1, 0, dtype=torch.long))


@torch.no_grad()
def test_adapted_frequencies():
    """YaRN scales its tables; distances between stored blocks must not be scaled twice."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    backbone = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval()
    model = LandmarkForCausalLM.from_backbone(backbone, block_length=K, **ALL).eval()
    text = ids(1, 90)
    with torch.enable_grad():
        want = whole(model, text)
    assert_close(model(text).logits, want, 1e-4)
