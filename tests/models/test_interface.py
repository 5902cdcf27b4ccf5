"""What every method promises, whichever it is: states are values, inputs are moved and checked, the last logits are the last."""

from contextlib import nullcontext

import pytest
import torch
from other_device import OtherDevice, put_elsewhere
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

from lrmt.errors import UsageError
from lrmt.models import (
    ArmtForCausalLM,
    LandmarkForCausalLM,
    RecurrentConfig,
    RecurrentModel,
    RmtForCausalLM,
    RmtRetrievalForCausalLM,
    recurrent,
)
from lrmt.models.weights import behind_attention, layers_of

VOCAB = 50
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


class TreeConfig(RecurrentConfig):
    model_type = "tree-of-the-tests"


class TreeForCausalLM(RecurrentModel):
    """Memory of two parts: the mean of the tokens' hidden states, and how many segments there were."""

    config_class = TreeConfig
    memory_modules = ["first"]

    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        self.first = self.make_embedding(1, lambda weight, embeddings: weight.copy_(embeddings.mean(0, keepdim=True)))
        self.finish()

    def start(self, batch_size):
        weight = self.first(torch.zeros(batch_size, 1, dtype=torch.long, device=self.device))
        return {"mean": weight, "counts": [torch.zeros(batch_size, 1, device=self.device, dtype=weight.dtype)]}

    def prefix(self, memory):
        return memory["mean"] + 0.01 * memory["counts"][0][..., None]

    def write(self, memory, output):
        real = output.tokens.new_ones(output.tokens.shape[:2]) if output.mask is None else output.mask
        real = real[..., None].to(output.tokens)
        mean = (output.tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        return {"mean": mean, "counts": [memory["counts"][0] + 1]}


class PastConfig(RecurrentConfig):
    model_type = "past-of-the-tests"


class PastForCausalLM(RecurrentModel):
    """Memory that grows: the mean of each segment so far, and how many there are."""

    config_class = PastConfig
    memory_modules = ["first"]

    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        self.first = self.make_embedding(1, lambda weight, embeddings: weight.copy_(embeddings.mean(0, keepdim=True)))
        self.finish()

    def start(self, batch_size):
        zeros = torch.zeros(batch_size, 1, dtype=torch.long, device=self.device)
        return self.first(zeros), torch.ones(batch_size, dtype=torch.long, device=self.device)

    def prefix(self, memory):
        past, count = memory
        return past.sum(1, keepdim=True) / count[:, None, None]

    def write(self, memory, output):
        past, count = memory
        real = output.tokens.new_ones(output.tokens.shape[:2]) if output.mask is None else output.mask
        real = real[..., None].to(output.tokens)
        mean = (output.tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        grown = torch.cat([past, torch.zeros_like(mean)], dim=1)
        return grown.scatter(1, count[:, None, None].expand_as(mean), mean), count + 1


METHODS = {
    "rmt": (RmtForCausalLM, LlamaConfig(**SHAPE), {"num_memory_tokens": 3, "segment_length": 12}),
    "rmt-window": (RmtForCausalLM, MistralConfig(**SHAPE, sliding_window=7), {"num_memory_tokens": 3, "segment_length": 12}),
    "rmt_retrieval": (RmtRetrievalForCausalLM, LlamaConfig(**SHAPE), {"num_memory_tokens": 3, "segment_length": 12}),
    "rmt_retrieval-past-on-cpu": (
        RmtRetrievalForCausalLM, LlamaConfig(**SHAPE), {"num_memory_tokens": 3, "segment_length": 12, "retrieval_on_cpu": True},
    ),
    "armt": (ArmtForCausalLM, LlamaConfig(**SHAPE), {"num_memory_tokens": 3, "segment_length": 12, "association_dim": 4}),
    "past": (PastForCausalLM, LlamaConfig(**SHAPE), {"segment_length": 12}),
    "tree": (TreeForCausalLM, LlamaConfig(**SHAPE), {"segment_length": 12}),
    "landmark": (LandmarkForCausalLM, LlamaConfig(**SHAPE), {"block_length": 5, "top_k": 60, "context_length": 264}),
}  # fmt: skip
every_method = pytest.mark.parametrize("name", METHODS)


def build(name, **changes):
    model_class, config, settings = METHODS[name]
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).double().eval()
    return model_class.from_backbone(backbone, **settings | changes).eval()


def ids(rows, length, seed=1) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # rotary tables of landmarks are fp32


@pytest.mark.parametrize("name", [name for name, (model, *_) in METHODS.items() if issubclass(model, RecurrentModel)])
@torch.no_grad()
def test_rows_that_have_ended_are_not_computed(name, monkeypatch):
    """Without gradients; what is read of the others is what each row alone gives."""
    model, lengths, sizes = build(name), (41, 5, 29, 17), []
    run = model._segment
    monkeypatch.setattr(
        model, "_segment", lambda segment, memory: sizes.append(len(segment.ids)) or run(segment, memory)
    )
    text, mask = torch.zeros(4, 41, dtype=torch.long), torch.zeros(4, 41, dtype=torch.long)
    for i, n in enumerate(lengths):
        text[i, :n], mask[i, :n] = ids(1, n, seed=n)[0], 1
    state = model.read(text, attention_mask=mask)
    assert sizes == [3, 2, 1]  # the last segment of a row stays open
    sizes.clear()
    logits = model(text, attention_mask=mask, logits_to_keep=2).logits
    assert sizes == [4, 3, 2, 1]
    end = ids(1, 3, seed=8).expand(4, -1)
    after = model(end, state=state).logits
    for i, n in enumerate(lengths):
        alone = model(ids(1, n, seed=n), logits_to_keep=2).logits
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-9, atol=1e-9)
        whole = model(torch.cat([ids(1, n, seed=n), end[:1]], dim=1), logits_to_keep=3).logits
        torch.testing.assert_close(after[i : i + 1], whole, rtol=1e-9, atol=1e-9)


def watch(module, sizes):
    return module.register_forward_hook(lambda _, args, output: sizes.append(args[0].shape[1]))


@pytest.mark.parametrize("name", [name for name, (model, *_) in METHODS.items() if issubclass(model, RecurrentModel)])
def test_the_last_layer_computes_what_is_written_alone(name, monkeypatch):
    """Of segments that are read only: the same states, losses and gradients as with all of it; how many positions its parts see tells."""
    model, seen = build(name, checkpoint_segments=True), []
    last = layers_of(model.backbone)[-1]
    for part in (last.mlp.up_proj, last.self_attn.o_proj):
        watch(part, seen)
    hooks = {module: (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in last.modules()}
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[1, :9] = 0
    labels = ids(2, 41).masked_fill(torch.arange(41) < 38, -100)

    def run():
        model.zero_grad()
        read = tree_leaves(model.read(ids(2, 41), attention_mask=mask).memory)
        sizes, loss = [*seen], model(ids(2, 41), attention_mask=mask, labels=labels).loss
        loss.backward()
        seen.clear()
        return sizes, [*read, loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    sizes, results = run()
    assert {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in last.modules()} == hooks
    monkeypatch.setattr(recurrent, "narrowed", lambda *_: nullcontext())
    whole, want = run()
    assert len(sizes) == len(whole) == 6
    if model.config.written_positions is None:
        assert sizes == whole  # whoever looks at more is given more
    else:
        assert sizes == [model.config.written_positions] * 6 and all(n > 12 for n in whole)
    for got, wanted in zip(results, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("checkpoint_segments", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_run_again_are_left_whole(checkpoint_segments, reentrant):
    gradients = []
    for again in (False, True):
        model = build("rmt", checkpoint_segments=checkpoint_segments).train()
        if again:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
        labels = ids(2, 41).masked_fill(torch.arange(41) < 38, -100)
        model(ids(2, 41), labels=labels).loss.backward()
        gradients.append(model.memory_embedding.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "parts"), [("gpt2", 2), ("bloom", 0), ("gpt_oss", 2), ("mixtral", 2)])
def test_decoders_whose_layers_have_other_parts(kind, parts, monkeypatch):
    """One that is not known stays whole; whatever comes out beside hidden states comes out."""
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {
        "gpt2": {"n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
        "bloom": {},
        "gpt_oss": {"intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8},
        "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_key_value_heads": 2},
    }
    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **own[kind], **ends))
    model = RmtForCausalLM.from_backbone(backbone.float().eval(), num_memory_tokens=3, segment_length=12).eval()
    assert len(behind_attention(layers_of(model.backbone)[-1])) == parts
    got = model.read(ids(2, 41)).memory
    monkeypatch.setattr(recurrent, "narrowed", lambda *_: nullcontext())
    torch.testing.assert_close(got, model.read(ids(2, 41)).memory, rtol=1e-4, atol=1e-5)


def test_a_method_that_looks_at_more_than_it_says_is_told(monkeypatch):
    model = build("rmt")
    monkeypatch.setattr(model, "write", lambda memory, output: output.after + output.tokens.mean(1, keepdim=True))
    with pytest.raises(AttributeError):
        model.read(ids(1, 41))


# ---------------------------------------------------------------------- states are values


@every_method
@torch.no_grad()
def test_any_continuation_of_a_generating_state_equals_that_of_the_saved_one(name, tmp_path):
    """Of one token or many, within the running segment or beyond it, again and again, and of what these leave."""
    model, prompt = build(name), ids(2, 17)
    state = model(prompt, logits_to_keep=1).state
    state.save(tmp_path / "state.safetensors")
    saved = model.load_state(tmp_path / "state.safetensors")
    assert state.num_tokens.tolist() == saved.num_tokens.tolist() == [17, 17]
    want, left = {}, {}
    for length in (1, 2, 5, 9, 30):
        more = ids(2, length, seed=length)
        want[length] = model(torch.cat([prompt, more], 1)).logits[:, -length:]
        close(model(more, state=saved).logits, want[length])
    for length in (5, 1, 30, 1, 2, 9, 5, 1):
        more = ids(2, length, seed=length)
        last = model(more, state=state, logits_to_keep=1)
        close(last.logits, want[length][:, -1:])
        close(model(more, state=state).logits, want[length])
        assert last.state.num_tokens.tolist() == [17 + length] * 2
        left.setdefault(length, last.state)
    more = ids(2, 3, seed=9)
    for length, after in left.items():
        whole = torch.cat([prompt, ids(2, length, seed=length), more], 1)
        for _ in range(2):
            close(model(more, state=after).logits, model(whole).logits[:, -3:])
            close(model(more[:, :1], state=after, logits_to_keep=1).logits, model(whole).logits[:, -3:-2])


@every_method
@torch.no_grad()
def test_generation_goes_on_twice_from_one_state(name):
    model, prompt = build(name), ids(2, 17)
    out = model(prompt, logits_to_keep=1)
    token = out.logits.argmax(-1)
    whole = model.generate(prompt, max_new_tokens=20, do_sample=False)
    for _ in range(2):
        got = model.generate(token, state=out.state, max_new_tokens=19, do_sample=False)
        assert torch.cat([prompt, got], 1).tolist() == whole.tolist()


@every_method
@torch.no_grad()
def test_a_state_of_less_than_a_block_grows_for_several_rows_and_is_saved(name, tmp_path):
    model, document, more = build(name), ids(1, 2), ids(3, 20, seed=2)
    state = model.read(more, state=model.read(document))
    state.save(tmp_path / "state.safetensors")
    loaded, question = model.load_state(tmp_path / "state.safetensors"), ids(3, 4, seed=3)
    whole = torch.cat([document.expand(3, -1), more, question], 1)
    for each in (state, loaded):
        close(model(question, state=each).logits, model(whole).logits[:, -4:])


@every_method
@torch.no_grad()
def test_rows_of_different_lengths_equal_each_alone(name):
    """Rows that have ended beside rows that go on, scored, read and generated from."""
    model, lengths, question = build(name), (50, 3, 26, 14), ids(4, 3, seed=4)
    text = ids(4, 50)
    mask = torch.stack([torch.arange(50) < n for n in lengths]).long()
    out, state = model(text, attention_mask=mask).logits, model.read(text, attention_mask=mask)
    after = model(question, state=state).logits
    generated = model.generate(question, state=state, max_new_tokens=15, do_sample=False)
    for i, n in enumerate(lengths):
        alone = text[i : i + 1, :n]
        close(out[i, :n], model(alone).logits[0])
        whole = torch.cat([alone, question[i : i + 1]], 1)
        close(after[i], model(whole).logits[0, -3:])
        want = model.generate(whole, max_new_tokens=15, do_sample=False)[0, n:]
        assert generated[i].tolist() == want.tolist()


@every_method
@torch.no_grad()
def test_generating_needs_no_evaluation_mode(name):
    model, prompt = build(name), ids(2, 17)
    want = model.generate(prompt, max_new_tokens=3, do_sample=False)
    model.train()
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).tolist() == want.tolist()
    assert model(prompt, logits_to_keep=1).state is not None


def test_the_memory_may_be_a_tree(tmp_path):
    model = build("tree")
    state = model.read(ids(2, 40))
    state.save(tmp_path / "state.safetensors")
    loaded = model.load_state(tmp_path / "state.safetensors")
    assert state.memory.keys() == loaded.memory.keys() == {"mean", "counts"}
    assert loaded.memory["counts"][0].tolist() == [[3.0], [3.0]]
    assert state.tensors().keys() == {"memory.mean", "memory.counts.0", "pending_ids", "pending_length", "num_tokens"}
    assert state.expand(4).memory["mean"].shape == (4, 1, 32)
    out = model(ids(2, 40), labels=ids(2, 40))
    out.loss.backward()
    assert float(model.first.weight.grad.norm()) > 0


# ---------------------------------------------------------------------- devices


@every_method
@torch.no_grad()
def test_what_is_given_is_moved_to_where_the_model_is(name):
    """Ids, mask, labels and states of the CPU, for a model that is elsewhere."""
    model, text, question = build(name), ids(2, 41), ids(2, 6, seed=2)
    mask = torch.ones_like(text)
    mask[1, :9] = 0
    settings = {"max_new_tokens": 15, "do_sample": False}
    want = [
        model(text, attention_mask=mask).logits,
        model(text, attention_mask=mask, labels=text.masked_fill(mask == 0, -100)).loss,
        model(question, state=model.read(text, attention_mask=mask)).logits,
        model.generate(text, attention_mask=mask, **settings),
    ]
    here = model.read(text, attention_mask=mask)
    put_elsewhere(model)
    with OtherDevice():
        read = model.read(text, attention_mask=mask)
        got = [
            model(text, attention_mask=mask).logits,
            model(text, attention_mask=mask, labels=text.masked_fill(mask == 0, -100)).loss,
            model(question, state=read).logits,
            model.generate(text, attention_mask=mask, **settings),
        ]
        moved = model(question, state=here).logits
        calls = model.num_backbone_calls(text, mask)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(moved, want[2]) and calls > 0


def test_the_other_device_refuses_a_mixture():
    linear = torch.nn.Linear(2, 2)
    put_elsewhere(linear)
    with OtherDevice():
        with pytest.raises(RuntimeError, match="same device"):
            linear(torch.ones(1, 2))
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([linear.weight, torch.ones(1, 2)])
        assert linear(torch.ones(1, 2).to(linear.weight.device)).device == linear.weight.device
        assert torch.ones(1, 2).device == torch.device("cpu")


# ---------------------------------------------------------------------- what is asked for, what is given


@every_method
def test_the_last_logits_are_the_last(name):
    """Of each row, padded or not, with gradients allowed or not; and with one the state comes along, read as ever."""
    model, text = build(name), ids(3, 30)
    mask = torch.ones_like(text)
    mask[1, :11], mask[2, 2:] = 0, 0
    with torch.no_grad():
        want = [model(text[i][mask[i].bool()][None]).logits[0] for i in range(3)]
    for count in (1, 2, 7):
        out = model(text, attention_mask=mask, logits_to_keep=count)
        assert out.logits.shape == (3, count, VOCAB)
        for i in range(3):
            n = min(count, len(want[i]))
            close(out.logits[i, count - n :], want[i][-n:])
            assert float(out.logits[i, : count - n].abs().sum()) == 0
        assert (out.state is not None) == (count == 1)
    state = model(text, attention_mask=mask, logits_to_keep=1).state
    with torch.no_grad():
        question = ids(3, 4, seed=5)
        close(
            model(question, state=state).logits,
            model(question, state=model.read(text, attention_mask=mask)).logits,
        )
    for wrong in (-1, 1.5, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="`logits_to_keep` must be a whole number"):
            model(text, logits_to_keep=wrong)


@torch.no_grad()
def test_landmarks_read_beyond_training_by_retrieval_whatever_gradients_say():
    """Two blocks are less than all of them: the last logits are those of inference, not of full attention."""
    model, text = build("landmark", top_k=2, context_length=32), ids(1, 100)
    want = model(text).logits[:, -1:]
    with torch.enable_grad():
        out = model(text, logits_to_keep=1)
        whole = model(text).logits[:, -1:]  # with gradients all blocks are read
    close(out.logits, want)
    assert float((whole - want).abs().max()) > 0.1 and out.state.num_tokens.tolist() == [100]


@every_method
@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_ids_outside_the_vocabulary_are_refused(name, wrong):
    model, text = build(name), ids(2, 9)
    text[1, 3] = wrong
    for call in (model, model.read, lambda x: model(x, labels=x), lambda x: model.generate(x, max_new_tokens=1)):
        with pytest.raises(UsageError, match=rf"0..{VOCAB - 1}, the backbone's vocabulary; got .*{wrong}"):
            call(text)


@every_method
@torch.no_grad()
def test_padding_may_have_any_id(name):
    model, text = build(name), ids(2, 20)
    mask = torch.ones_like(text)
    mask[0, 15:] = 0
    want = model(text, attention_mask=mask).logits
    assert torch.equal(model(text.masked_fill(mask == 0, VOCAB + 7), attention_mask=mask).logits, want)


@every_method
def test_a_fault_is_found_in_the_segment_where_it_begins(name):
    model = build(name, **({"context_length": 32, "top_k": 2} if name == "landmark" else {})).train()
    length = model.config.segment_length
    text = ids(2, 3 * length).clamp(min=1)
    text[1, length + 2] = 0
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")
    assert "segment 2" in model.find_fault(text)
    text = text.clamp(min=1)
    text[0, 2 * length + 1] = 0
    assert "segment 3" in model.find_fault(text) or "last segment, 3" in model.find_fault(text)
    mask = torch.ones_like(text)
    mask[:, : length + 1] = 0  # one segment less, since padding is none
    assert "segment 2" in model.find_fault(text, mask) or "last segment, 2" in model.find_fault(text, mask)


@every_method
def test_beams_of_the_backbone_are_refused_in_one_line(name):
    model, text = build(name), ids(1, 5)
    model.generation_config.num_beams = 2
    with pytest.raises(UsageError, match="`num_beams` must be 1.*got 2.*generation_config.json"):
        model.generate(text, max_new_tokens=2)
    assert model.generate(text, max_new_tokens=2, num_beams=1).shape == (1, 7)
