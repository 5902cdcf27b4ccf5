"""ARMT against a literal loop over tokens, layers and segments, and what it adds to a backbone."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_rmt import BACKBONES, LENGTH, assert_same_gradients, gradients, ids, llama, next_token_loss
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, FalconConfig

from lrmt.errors import UsageError
from lrmt.models import ArmtConfig, ArmtForCausalLM

M, DIM = 3, 4


def build(name="llama", trained=True, **settings):
    """With weights of which each matters: as made, nothing is ever remembered."""
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(BACKBONES[name]).double().eval()
    settings = {"num_memory_tokens": M, "segment_length": LENGTH, "association_dim": DIM} | settings
    model = ArmtForCausalLM.from_backbone(backbone, **settings).eval()
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def features(x):
    """DPFP-3 of one vector, as its definition has it."""
    y = [a if a > 0 else 0 * a for a in [*x, *-x]]
    return torch.stack([y[i] * y[(i - j) % len(y)] for j in (1, 2, 3) for i in range(len(y))])


def literal_loop(model, text):
    """Row by row, layer by layer, token by token: what each layer's matrix gives is added, and memory tokens write to it."""
    decoder, rows = model.backbone.model, []
    for row in text:
        p, d = 6 * DIM, model.config.hidden_size
        matrices = [torch.zeros(p, d, dtype=torch.double) for _ in decoder.layers]
        norms = [torch.zeros(p, dtype=torch.double) for _ in decoder.layers]
        logits = []
        for begin in range(0, len(row), LENGTH):
            tokens = decoder.embed_tokens(row[begin : begin + LENGTH])
            hidden = torch.cat([tokens, model.memory_embedding.weight])[None]
            rotary = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for n, layer in enumerate(decoder.layers):
                asked = [features(model.queries.maps[n].weight @ h) for h in hidden[0]]
                read = [matrices[n].T @ q / (norms[n] @ q + 1e-5) for q in asked]
                hidden = layer(hidden + torch.stack(read)[None], position_embeddings=rotary)
                matrix, norm = matrices[n], norms[n]
                for u in hidden[0, -M:]:  # all write to what was there before any of them
                    key = features(model.writers.keys[n].weight @ u)
                    value = model.writers.values[n].weight @ u
                    share = torch.sigmoid(model.writers.shares[n].weight @ u + model.writers.shares[n].bias)
                    there = matrices[n].T @ key / (norms[n] @ key + 1e-5)
                    new = (1 - norms[n] @ key / (key @ key).clamp(min=1e-5)).clamp(0, 1).detach()
                    matrix = matrix + share * torch.outer(key, value - there)
                    norm = norm + new * key
                matrices[n], norms[n] = matrix, norm
            logits.append(model.backbone.lm_head(decoder.norm(hidden))[0, : len(tokens)])
        rows.append(torch.cat(logits))
    return torch.stack(rows)


@pytest.mark.parametrize("checkpoint_segments", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2"])
def test_equals_the_literal_loop(name, checkpoint_segments):
    model = build(name, checkpoint_segments=checkpoint_segments)
    text = ids(2, 3 * LENGTH + 5)
    labels = torch.where(torch.rand(text.shape, generator=torch.Generator().manual_seed(3)) < 0.5, text, -100)
    want = literal_loop(model, text)
    torch.testing.assert_close(model(text).logits, want, rtol=1e-9, atol=1e-9)
    want_loss = next_token_loss(want, labels)
    want_gradients = gradients(model, want_loss)
    out = model(text, labels=labels)
    torch.testing.assert_close(out.loss, want_loss, rtol=1e-9, atol=1e-9)
    # 1e-6: LLaMA's norm rounds gradients to fp32
    assert_same_gradients(gradients(model, out.loss), want_gradients, rtol=1e-6)
    assert {"memory_embedding", "queries", "writers"} <= {n.split(".")[0] for n in want_gradients}


def test_padded_rows_pieces_and_saved_states_equal_the_literal_loop(tmp_path):
    model = build()
    rows = [ids(1, n, seed=n) for n in (7, 3 * LENGTH + 4, LENGTH, 2 * LENGTH + 1)]
    width = max(row.shape[1] for row in rows)
    text, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for i, row in enumerate(rows):
        text[i, : row.shape[1]], mask[i, : row.shape[1]] = row[0], 1
    more, end = ids(4, 2 * LENGTH, seed=9), ids(4, 3, seed=4)
    state = model.read(text, attention_mask=mask)
    for at in range(0, 2 * LENGTH, 7):
        state = model.read(more[:, at : at + 7], state=state)
    state.save(tmp_path / "state.safetensors")
    got = model(end, state=model.load_state(tmp_path / "state.safetensors")).logits
    for i, row in enumerate(rows):
        want = literal_loop(model, torch.cat([row, more[i : i + 1], end[i : i + 1]], dim=1))
        torch.testing.assert_close(got[i], want[0, -3:], rtol=1e-9, atol=1e-9)


def test_untrained_it_is_its_backbone():
    model = build(trained=False)
    text = ids(2, 3 * LENGTH + 5)
    want = torch.cat([model.backbone(part).logits for part in text.split(LENGTH, dim=1)], dim=1)
    assert torch.equal(model(text).logits, want)
    out = model.generate(text, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, text.shape[1] + 3)


def test_the_bare_backbone_has_no_memory():
    model = build()
    text = ids(1, 2 * LENGTH)
    before = model.backbone(text).logits
    model.read(text)
    assert torch.equal(model.backbone(text).logits, before)


def test_the_state_is_of_one_size():
    model = build()
    sizes = {sum(t.numel() for t in model.read(ids(1, n * LENGTH + 1)).memory[0]) for n in (1, 2, 9)}
    assert sizes == {6 * DIM * (model.config.hidden_size + 1)}
    assert model.read(ids(1, 30)).memory[0].matrix.dtype == torch.float64
    assert model.to(torch.bfloat16).read(ids(1, 30)).memory[0].matrix.dtype == torch.float32


def test_noise_leaves_what_is_empty_empty():
    model = build(memory_noise=0.5).train()
    (memory,) = model.eval().read(ids(1, LENGTH + 1)).memory[:1]
    matrix, norm = memory.matrix.clone(), memory.norm
    matrix[:, ::2] = 0
    (shaken,) = model.train()._with_noise([memory._replace(matrix=matrix)])
    assert torch.equal(shaken.norm, norm) and torch.equal(shaken.matrix == 0, matrix == 0)
    share = (shaken.matrix / matrix)[matrix != 0]
    assert float(share.std()) == pytest.approx(0.5, rel=0.2) and float(share.mean()) == pytest.approx(1, abs=0.1)


def test_association_is_in_fp32_under_autocast():
    model = build().float()
    text = ids(1, 3 * LENGTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        memory = model.read(text).memory
        read = memory[0].read(torch.rand(1, 5, 6 * DIM))
    assert {leaf.dtype for one in memory for leaf in one} == {torch.float32} == {read.dtype}


def test_a_copy_has_its_own_memory():
    model, text = build(), ids(2, 3 * LENGTH)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.memory_embedding.weight.zero_()
        assert torch.equal(copy.deepcopy(model)(text).logits, model(text).logits)
        assert not torch.equal(twin(text).logits, model(text).logits)


def test_layers_that_give_a_tuple():
    config = FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    backbone = AutoModelForCausalLM.from_config(config).double().eval()
    model = ArmtForCausalLM.from_backbone(
        backbone, num_memory_tokens=M, segment_length=LENGTH, association_dim=DIM
    ).eval()
    text = ids(2, 2 * LENGTH)
    want = torch.cat([backbone(part).logits for part in text.split(LENGTH, dim=1)], dim=1)
    torch.testing.assert_close(model(text).logits, want)
    assert float(model.read(text).memory[1].norm.abs().sum()) > 0


def test_gradient_checkpointing_of_layers_is_refused():
    model = build().train()
    model.backbone.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="`--checkpoint_segments true` instead"):
        model(ids(1, LENGTH), labels=ids(1, LENGTH))
    with pytest.raises(UsageError, match="`--checkpoint_segments true` instead"):
        model.config.check_training(3, gradient_checkpointing=True)  # in a dry run too


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_memory_tokens": 0}, "`--num_memory_tokens` must be 1 or more; got 0. 16 is usual"),
        ({"association_dim": -4}, "`--association_dim` must be 1 or more; got -4. 64 is usual"),
        ({"memory_handover": "tokens"}, "ARMT hands on the matrices"),
        ({"memory_shift": True}, "Leave them out"),
        ({"segment_length": 62}, "window of 64 positions"),
    ],
)
def test_what_cannot_work_is_refused(settings, told):
    with pytest.raises(UsageError, match=told):
        ArmtConfig(backbone_config=llama(), **{"num_memory_tokens": M, "segment_length": LENGTH} | settings)


# --- all layers at once --------------------------------------------------------------------------------------------------


def assert_same_memory(got, want, tolerance):
    for one, other in zip(tree_leaves(got.memory), tree_leaves(want.memory), strict=True):
        assert one.shape == other.shape and float(other.norm()) > 0
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("segments", [2, 3, 5, 9])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "deep"])
def test_diagonal_batching_equals_one_layer_after_the_other(name, segments, alignment, monkeypatch):
    """More segments than layers, as many, and fewer; in fp64, but for LLaMA's norm, which rounds to fp32."""
    monkeypatch.setitem(BACKBONES, "deep", llama(num_hidden_layers=5))
    model = build(name, segment_alignment=alignment)
    text = ids(2, segments * LENGTH + 3)
    want = model.read(text)
    model.config.diagonal_batching = True
    assert_same_memory(model.read(text), want, 1e-9)


def test_diagonal_batching_in_single_precision_under_lora():
    model = build().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.3 if "norm" not in name else 1)
    peft = get_peft_model(
        model,
        LoraConfig(
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            modules_to_save=ArmtForCausalLM.memory_modules,
        ),
    )
    text = ids(3, 7 * LENGTH)
    want = model.read(text)
    model.config.diagonal_batching = True
    assert_same_memory(peft.get_base_model().read(text), want, 1e-6)


def test_diagonal_batching_of_padded_rows_pieces_and_answers():
    model = build()
    rows = [ids(1, n, seed=n)[0] for n in (5 * LENGTH + 2, 3 * LENGTH, 7 * LENGTH + 1)]
    text = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(text.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    want = model(ids(3, 4), state=model.read(text, attention_mask=mask)).logits
    model.config.diagonal_batching = True
    whole = model.read(text, attention_mask=mask)
    torch.testing.assert_close(model(ids(3, 4), state=whole).logits, want, rtol=1e-9, atol=1e-9)
    first = model.read(text[2:, : 3 * LENGTH + 5])
    before = [one.matrix.clone() for one in first.memory]
    last = model.read(text[2:, 3 * LENGTH + 5 :], state=first)
    torch.testing.assert_close(model(ids(3, 4)[2:], state=last).logits, want[2:], rtol=1e-9, atol=1e-9)
    assert all(
        torch.equal(one.matrix, was) for one, was in zip(first.memory, before, strict=True)
    )  # a state is a value


def test_diagonal_batching_is_refused_where_it_cannot_be():
    model = build(diagonal_batching=True)
    for layer in model.backbone.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    model.backbone.model.layers[0].mlp.forward = lambda hidden: hidden
    model.backbone.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(UsageError, match="--dequantize true"):
        model.read(ids(1, 4 * LENGTH))


def test_the_layer_whose_association_breaks_is_named():
    model = build()
    with torch.no_grad():
        model.writers.values[1].weight.fill_(torch.inf)
    assert model.find_fault(ids(1, 3 * LENGTH)) == "memory first breaks in segment 1, layer 2 of 2"
