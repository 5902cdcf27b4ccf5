"""RMT against a literal loop, and the promises of its interface."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from lrmt.errors import UsageError
from lrmt.models import RmtForCausalLM
from lrmt.models.rmt import RmtConfig

VOCAB, LENGTH, MEMORY = 50, 12, 3


def llama(**changes):
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None,
    } | changes  # fmt: skip
    return LlamaConfig(**settings)


def mistral(**changes):
    return MistralConfig(**{k: v for k, v in llama().to_dict().items() if k != "model_type"} | changes)


BACKBONES = {
    "llama": llama(),
    "llama-tied": llama(tie_word_embeddings=True),
    "mistral": mistral(sliding_window=None),
    "mistral-window": mistral(sliding_window=7),
    "qwen2": Qwen2Config(**{k: v for k, v in llama().to_dict().items() if k != "model_type"}),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        eos_token_id=None, bos_token_id=None,
    ),
}  # fmt: skip


def build(name="llama", **settings):
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(BACKBONES[name]).double().eval()
    with torch.no_grad():  # break the symmetry of the default initialisation, so that errors show
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    settings = {"num_memory_tokens": MEMORY, "segment_length": LENGTH} | settings
    return RmtForCausalLM.from_backbone(backbone, **settings).eval()


def ids(rows, length, seed=1):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def literal_loop(model, text, cuts, memory=None, grad_from=0):
    """The whole method: [M ; E(x_s) ; M] through the backbone, logits of the tokens, M = the last m hidden states."""
    m, d = MEMORY, model.memory_embedding.weight.shape[1]
    memory = model.memory_embedding.weight.expand(len(text), m, d) if memory is None else memory
    logits = []
    for s, (a, b) in enumerate(zip([0, *cuts], [*cuts, text.shape[1]], strict=True)):
        if s == grad_from and s > 0:
            memory = memory.detach()
        tokens = model.backbone.get_input_embeddings()(text[:, a:b])
        out = model.backbone(inputs_embeds=torch.cat([memory, tokens, memory], 1), output_hidden_states=True)
        logits.append(out.logits[:, m : m + b - a])
        memory = out.hidden_states[-1][:, -m:]
    return torch.cat(logits, 1), memory


def next_token_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, rtol=1e-10):
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-12)
        assert error < rtol, (name, float(error))


@pytest.mark.parametrize("checkpoint_segments", [False, True])
@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("name", BACKBONES)
def test_equals_the_literal_loop(name, alignment, checkpoint_segments):
    model = build(name, segment_alignment=alignment, checkpoint_segments=checkpoint_segments)
    text = ids(2, 3 * LENGTH + 5)
    cuts = [LENGTH, 2 * LENGTH, 3 * LENGTH] if alignment == "left" else [5, 5 + LENGTH, 5 + 2 * LENGTH]
    labels = torch.where(torch.rand(text.shape, generator=torch.Generator().manual_seed(3)) < 0.5, text, -100)
    want, _ = literal_loop(model, text, cuts)
    torch.testing.assert_close(model(text).logits, want, rtol=1e-10, atol=1e-10)
    want_loss = next_token_loss(want, labels)
    want_gradients = gradients(model, want_loss)
    out = model(text, labels=labels)
    torch.testing.assert_close(out.loss, want_loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.logits, want[:, :-1][labels[:, 1:] != -100], rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients(model, out.loss), want_gradients)
    assert "memory_embedding.weight" in want_gradients


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_truncated_gradients_reach_exactly_k_segments(k):
    model = build(bptt_segments=k)
    text = ids(2, 4 * LENGTH)
    cuts = [LENGTH, 2 * LENGTH, 3 * LENGTH]
    # each segment's loss by its own literal window, then summed: exact truncation
    total, count = 0.0, 0
    for s in range(4):
        logits, _ = literal_loop(model, text, cuts, grad_from=max(0, s - k + 1))
        own = slice(s * LENGTH, min((s + 1) * LENGTH, 4 * LENGTH - 1))
        target = text[:, own.start + 1 : own.stop + 1]
        total = total + F.cross_entropy(logits[:, own].reshape(-1, VOCAB), target.reshape(-1), reduction="sum")
        count += target.numel()
    want = gradients(model, total / count)
    out = model(text, labels=text)
    # 1e-6: LLaMA's norm rounds gradients to fp32, and here they are summed in another order
    assert_same_gradients(gradients(model, out.loss), want, rtol=1e-6)
    memory_trained = model(text, labels=torch.where(torch.arange(4 * LENGTH) > 3 * LENGTH, text, -100))
    assert ("memory_embedding.weight" in gradients(model, memory_trained.loss)) == (k >= 4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("name", BACKBONES)
def test_padded_batch_equals_its_rows(name, alignment, side):
    model = build(name, segment_alignment=alignment)
    rows = [ids(1, n, seed=n) for n in (7, 3 * LENGTH + 4, LENGTH, 2 * LENGTH + 1)]
    width = max(row.shape[1] for row in rows)
    text, mask, labels = (torch.full((4, width), fill) for fill in (0, 0, -100))
    for i, row in enumerate(rows):
        n = row.shape[1]
        where = slice(width - n, width) if side == "left" else slice(0, n)
        text[i, where], mask[i, where], labels[i, where] = row[0], 1, row[0]
    batch = model(text, attention_mask=mask)
    scored = model(text, attention_mask=mask, labels=labels)
    alone = [model(row) for row in rows]
    for i, out in enumerate(alone):
        torch.testing.assert_close(batch.logits[i][mask[i].bool()], out.logits[0], rtol=1e-10, atol=1e-10)
    want = torch.cat([out.logits[0, :-1] for out in alone])
    torch.testing.assert_close(scored.logits, want, rtol=1e-10, atol=1e-10)
    generated = model.generate(text, attention_mask=mask, max_new_tokens=2 * LENGTH + 3, do_sample=False)
    for i, row in enumerate(rows):
        single = model.generate(row, max_new_tokens=2 * LENGTH + 3, do_sample=False)
        assert generated[i, width:].tolist() == single[0, row.shape[1] :].tolist()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("prompt_length", [1, LENGTH - 1, LENGTH, 2 * LENGTH + 5])
def test_generation_across_segment_ends_equals_rerunning_the_whole_text(name, prompt_length):
    model = build(name)
    text = ids(2, prompt_length)
    generated = model.generate(text, max_new_tokens=2 * LENGTH + 3, do_sample=False)
    for _ in range(2 * LENGTH + 3):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert generated.tolist() == text.tolist()


@pytest.mark.parametrize("cut", [1, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH + 2])
def test_reading_in_pieces_equals_reading_at_once(cut, tmp_path):
    model = build()
    text, question = ids(2, 2 * LENGTH + 7), ids(2, 6, seed=4)
    whole = torch.cat([text, question], 1)
    state = model.read(text[:, cut:], state=model.read(text[:, :cut])) if cut < text.shape[1] else model.read(text)
    state.save(tmp_path / "state.safetensors")
    state = model.load_state(tmp_path / "state.safetensors")
    assert state.num_tokens.tolist() == [text.shape[1]] * 2
    want = model(whole)
    torch.testing.assert_close(model(question, state=state).logits, want.logits[:, -6:], rtol=1e-10, atol=1e-10)
    labels = torch.cat([torch.full_like(text, -100), question], 1)
    with_state, at_once = model(question, labels=question, state=state), model(whole, labels=labels)
    torch.testing.assert_close(with_state.logits, at_once.logits, rtol=1e-10, atol=1e-10)
    got = model.generate(question, state=state, max_new_tokens=LENGTH + 2, do_sample=False)[:, 6:]
    want = model.generate(whole, max_new_tokens=LENGTH + 2, do_sample=False)[:, whole.shape[1] :]
    assert got.tolist() == want.tolist()
    # the state is not used up: a second question gets the same answer
    assert (
        got.tolist()
        == model.generate(question, state=state, max_new_tokens=LENGTH + 2, do_sample=False)[:, 6:].tolist()
    )


def test_one_document_answers_a_batch_of_questions():
    model = build()
    document, questions = ids(1, 30), ids(3, 5, seed=2)
    state = model.read(document)
    together = model(questions, state=state).logits
    for i in range(3):
        torch.testing.assert_close(together[i], model(questions[i : i + 1], state=state).logits[0])


def test_state_of_another_model_is_refused(tmp_path):
    model, other = build(), build(segment_length=LENGTH + 1)
    model.read(ids(1, 20)).save(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="another model"):
        other.load_state(tmp_path / "a.safetensors")
    with torch.no_grad():
        other = build()
        other.memory_embedding.weight[0, 0] += 0.1
    with pytest.raises(UsageError, match="another model"):
        other(ids(1, 3), state=model.read(ids(1, 20)))
    for_lora = get_peft_model(build(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    before = for_lora.get_base_model().fingerprint()
    with torch.no_grad():
        next(p for n, p in for_lora.named_parameters() if "lora_B" in n).mul_(2)
    assert for_lora.get_base_model().fingerprint() != before != model.fingerprint()
    twins = copy.deepcopy(for_lora), copy.deepcopy(for_lora)
    twins[1].get_base_model().get_submodule("backbone.model.layers.0.self_attn.q_proj").set_scale("default", 4)
    with pytest.raises(UsageError, match="another model"):  # the same weights, that do something else
        twins[1](ids(1, 3), state=twins[0].get_base_model().read(ids(1, 20)))
    with torch.no_grad():  # of a backbone whose embeddings are the same
        other = build()
        other.backbone.model.layers[-1].mlp.down_proj.weight[0, 0] += 0.1
    with pytest.raises(UsageError, match="another model"):
        other(ids(1, 3), state=model.read(ids(1, 20)))
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        model.load_state(tmp_path / "half.safetensors")


@pytest.mark.parametrize("name", BACKBONES)
def test_without_memory_tokens_it_is_the_plain_backbone_on_each_segment(name):
    model = build(name, num_memory_tokens=0)
    text = ids(2, 2 * LENGTH + 4)
    want = torch.cat([model.backbone(piece).logits for piece in text.split(LENGTH, 1)], 1)
    torch.testing.assert_close(model(text).logits, want, rtol=1e-10, atol=1e-10)
    assert model.generate(text, max_new_tokens=LENGTH, do_sample=False).shape[1] == 3 * LENGTH + 4


def test_wrapping_leaves_the_backbone_alone():
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(llama())
    before = copy.deepcopy(backbone.state_dict())
    model = RmtForCausalLM.from_backbone(backbone, num_memory_tokens=MEMORY, segment_length=LENGTH)
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    std = backbone.get_input_embeddings().weight.std()
    assert 0.5 < float(model.memory_embedding.weight.detach().std() / std.detach()) < 1.5


@pytest.mark.parametrize("name", BACKBONES)
def test_saves_and_loads_like_any_transformers_model(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert isinstance(again, RmtForCausalLM)
    text = ids(1, 30)
    torch.testing.assert_close(again(text).logits, model(text).logits, rtol=1e-10, atol=1e-10)


def test_logits_are_computed_only_where_scored():
    model = build()
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    text = ids(2, 5 * LENGTH)
    labels = torch.full_like(text, -100)
    labels[:, -2:] = text[:, -2:]
    model(text, labels=labels)
    assert seen == [4]


def test_a_batch_with_nothing_scored_has_a_zero_loss_and_zero_gradients():
    model = build()
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    text = ids(2, 2 * LENGTH)
    out = model(text, labels=torch.full_like(text, -100))
    got = gradients(model, out.loss)
    assert float(out.loss) == 0 and float(got["memory_embedding.weight"].abs().max()) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_length": 6, "num_memory_tokens": 3}, "must exceed 2 × `--num_memory_tokens`; got 6 and 3"),
        ({"segment_length": 59, "num_memory_tokens": 3}, "window of 64"),
        ({"num_memory_tokens": -1}, "got -1"),
        ({"bptt_segments": 0}, "got 0"),
        ({"segment_alignment": "middle"}, "middle"),
    ],
)
def test_bad_settings_say_what_to_do(settings, message):
    with pytest.raises((UsageError, Exception), match=message):
        RmtConfig(**{"backbone_config": llama(), "segment_length": LENGTH, "num_memory_tokens": MEMORY} | settings)


def test_beams_are_refused():
    with pytest.raises(UsageError, match="num_beams"):
        build().generate(ids(1, 4), num_beams=2, max_new_tokens=2)


def test_memory_noise_is_of_the_size_asked_for_and_in_training_only():
    model, text = build(memory_noise=0.5), ids(64, 2 * LENGTH)
    plain = build()(input_ids=text).logits
    assert torch.equal(model(input_ids=text).logits, plain)  # in evaluation
    model.train()
    noisy = model(input_ids=text).logits
    assert torch.equal(noisy[:, :LENGTH], plain[:, :LENGTH]) and not torch.allclose(
        noisy[:, LENGTH:], plain[:, LENGTH:]
    )
    memory = torch.randn(400, MEMORY, 32, dtype=torch.float64) * torch.tensor([[[1.0], [5.0], [0.1]]])
    model.noise_share = 0.4
    noise = model._with_noise(memory) - memory
    rms = [x.pow(2).mean(-1).sqrt() for x in (noise, memory)]
    assert torch.allclose((rms[0] / rms[1]).mean(0), torch.tensor(0.2, dtype=torch.float64), rtol=0.02)
    assert model.noise_share * model.config.memory_noise == 0.2


def test_memory_noise_leaves_recomputed_gradients_exact():
    """Noise is drawn outside what constant-memory BPTT runs twice."""
    text, gradients = ids(2, 4 * LENGTH), []
    for checkpoint_segments in (False, True):
        model = build(memory_noise=0.3, checkpoint_segments=checkpoint_segments).train()
        torch.manual_seed(7)
        model(input_ids=text, labels=text).loss.backward()
        gradients.append(model.memory_embedding.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-10, atol=0)
