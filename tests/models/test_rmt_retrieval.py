"""RMT-R against a literal loop, and what it keeps of the past."""

import math

import pytest
import torch
from test_rmt import LENGTH, assert_same_gradients, gradients, ids, llama, next_token_loss
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lrmt.errors import UsageError
from lrmt.models import RmtRetrievalConfig, RmtRetrievalForCausalLM

M = 2


def build(**settings):
    """With retrieval weights of which each matters: as made, what is read is the memory itself."""
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(llama()).double().eval()
    settings = {"num_memory_tokens": M, "segment_length": LENGTH} | settings
    model = RmtRetrievalForCausalLM.from_backbone(backbone, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def retrieve(model, now, past, top_k):
    """What one row's memory `[m, d]` reads of its past, a list of `[m, d]`."""
    reader, width = model.past_reader, now.shape[-1]
    normed = [layer_norm(memory, model.past_keys.norm) for memory in past]
    query = layer_norm(now, reader.norm) @ reader.query.weight.T
    scores = [query @ (x @ model.past_keys.key.weight.T).T / math.sqrt(width) for x in normed]
    kept = sorted(range(len(past)), key=lambda i: -float(scores[i].detach().max()))[: top_k or len(past)]
    shares = torch.cat([scores[i] for i in sorted(kept)], dim=1).softmax(1)
    values = torch.cat([normed[i] @ model.past_keys.value.weight.T for i in sorted(kept)])
    read = now + shares @ values @ reader.out.weight.T
    hidden = F.gelu(layer_norm(read, reader.norm_mlp) @ reader.up.weight.T + reader.up.bias)
    return read + hidden @ reader.down.weight.T + reader.down.bias


def literal_loop(model, text, top_k=None):
    """Row by row: [M ; R ; E(x_s) ; M] through the backbone, logits of the tokens, M = the last m hidden states."""
    rows = []
    for row in text:
        now, past, logits = model.memory_embedding.weight, [], []
        for begin in range(0, len(row), LENGTH):
            read = retrieve(model, now, past, top_k) if past else model.retrieved_embedding.weight
            tokens = model.backbone.get_input_embeddings()(row[begin : begin + LENGTH])
            embeds = torch.cat([now, read, tokens, now])[None]
            out = model.backbone(inputs_embeds=embeds, output_hidden_states=True)
            logits.append(out.logits[0, 2 * M : 2 * M + len(tokens)])
            now = out.hidden_states[-1][0, -M:]
            past.append(now)
        rows.append(torch.cat(logits))
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("checkpoint_segments", [False, True])
def test_equals_the_literal_loop(checkpoint_segments, top_k):
    model = build(checkpoint_segments=checkpoint_segments, retrieval_top_k=top_k)
    text = ids(2, 4 * LENGTH + 5)
    labels = torch.where(torch.rand(text.shape, generator=torch.Generator().manual_seed(3)) < 0.5, text, -100)
    want = literal_loop(model, text, top_k)
    torch.testing.assert_close(model(text).logits, want, rtol=1e-9, atol=1e-9)
    want_loss = next_token_loss(want, labels)
    want_gradients = gradients(model, want_loss)
    out = model(text, labels=labels)
    torch.testing.assert_close(out.loss, want_loss, rtol=1e-9, atol=1e-9)
    # 1e-6: LLaMA's norm rounds gradients to fp32
    assert_same_gradients(gradients(model, out.loss), want_gradients, rtol=1e-6)
    trained = ("memory_embedding", "retrieved_embedding", "past_keys", "past_reader")
    assert {name.split(".")[0] for name in want_gradients} == {"backbone", *trained}


def test_padded_rows_and_pieces_equal_the_literal_loop():
    model = build()
    rows = [ids(1, n, seed=n) for n in (7, 3 * LENGTH + 4, LENGTH, 2 * LENGTH + 1)]
    width = max(row.shape[1] for row in rows)
    text, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for i, row in enumerate(rows):
        text[i, width - row.shape[1] :], mask[i, width - row.shape[1] :] = row[0], 1
    more = ids(4, 2 * LENGTH, seed=9)
    state = model.read(text, attention_mask=mask)
    for at in range(0, 2 * LENGTH, 7):
        state = model.read(more[:, at : at + 7], state=state)
    for i, row in enumerate(rows):
        want = literal_loop(model, torch.cat([row, more[i : i + 1], ids(1, 3)], dim=1))
        got = model(ids(1, 3).expand(4, -1), state=state).logits[i]
        torch.testing.assert_close(got, want[0, -3:], rtol=1e-9, atol=1e-9)


def test_a_state_that_two_texts_go_on_from(tmp_path):
    """Room behind what was read is written into once; saved, it is read the same."""
    model = build()
    begin, ends = ids(1, 3 * LENGTH), [ids(1, 2 * LENGTH + 3, seed=seed) for seed in (5, 6)]
    state = model.read(begin)
    state.save(tmp_path / "state.safetensors")
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    both = [model.read(end, state=state) for end in ends]
    for end, after in zip(ends, both, strict=True):
        whole = model.read(torch.cat([begin, end], dim=1))
        assert all(torch.equal(a, b) for a, b in zip(after.tensors().values(), whole.tensors().values(), strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())
    saved = model.load_state(tmp_path / "state.safetensors")
    assert (
        model.generate(ends[0], state=saved, max_new_tokens=2 * LENGTH, do_sample=False).tolist()
        == model.generate(torch.cat([begin, ends[0]], dim=1), max_new_tokens=2 * LENGTH, do_sample=False)[
            :, 3 * LENGTH :
        ].tolist()
    )


def test_past_states_are_copied_seldom_and_may_lie_elsewhere():
    model = build(retrieval_on_cpu=True)
    state, buffers = model.read(ids(1, LENGTH + 1)), set()
    for seed in range(40):
        state = model.read(ids(1, LENGTH, seed=seed), state=state)
        buffers.add(state.memory["keys"].untyped_storage().data_ptr())
    assert state.memory["keys"].shape[1] == 41 * M and len(buffers) < 8
    text = torch.cat([ids(1, LENGTH + 1), *(ids(1, LENGTH, seed=seed) for seed in range(40))], dim=1)
    torch.testing.assert_close(state.memory["keys"], model.read(text).memory["keys"])


def test_untrained_it_reads_its_own_memory():
    torch.manual_seed(0)
    model = RmtRetrievalForCausalLM.from_backbone(
        AutoModelForCausalLM.from_config(llama()), num_memory_tokens=M, segment_length=LENGTH
    )
    memory = model.read(ids(2, 3 * LENGTH)).memory
    before = model.prefix(memory)
    assert torch.equal(before[:, :M], memory["memory"]) and torch.equal(before[:, M:], memory["memory"])


def test_it_tells_which_segments_were_read():
    model = build(retrieval_top_k=2)
    with model.recording() as told:
        model.generate(ids(1, 4 * LENGTH + 3), max_new_tokens=2, do_sample=False)
    assert len(told.read) == 2 and len(told.written) == 4
    for (spans,) in told.read:
        assert [(span.number, span.start, span.end) for span in spans] == [
            (n, n * LENGTH, (n + 1) * LENGTH) for n in range(4)
        ]
        assert sum(span.weight for span in spans) == pytest.approx(1)
        assert sum(span.weight > 0 for span in spans) == 2


def test_passed_memories_leave_what_no_row_has(monkeypatch):
    """Half of the rows go on from the text before: its past is theirs, and of older texts nothing stays."""
    model = build(state_passing=0.5).train()
    kept = []
    for step in range(12):
        text = ids(4, 3 * LENGTH, seed=step)
        model(text, labels=text).loss.backward()
        there = model._passed.memory["there"]
        assert bool(there.any(0).all()) and bool(there[:, -2:].all())
        kept.append(there.shape[1])
    assert max(kept) > 3 and min(kept[1:]) < 6 and max(kept) < 40


def test_noise_is_on_what_was_written_last():
    model = build(memory_noise=0.5, retrieval_dropout=0.0).train()
    memory = model.eval().read(ids(1, 3 * LENGTH + 1)).memory
    shaken = model.train()._with_noise(memory)
    for name in ("keys", "values"):
        assert torch.equal(shaken[name][:, :-M], memory[name][:, :-M])
        assert not torch.equal(shaken[name][:, -M:], memory[name][:, -M:])
    assert not torch.equal(shaken["memory"], memory["memory"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"retrieval_top_k": 0}, "`--retrieval_top_k` must be 1 or more"),
        ({"retrieval_max_segments": -1}, "`--retrieval_max_segments` must be 1 or more"),
        ({"retrieval_dropout": 1.0}, "`--retrieval_dropout` must lie in"),
        ({"num_memory_tokens": 0}, "no past to read"),
        ({"segment_length": 60}, r"3 × `--num_memory_tokens` must fit into the backbone's window of 64.*58 or less"),
    ],
)
def test_what_cannot_work_is_refused(settings, told):
    with pytest.raises(UsageError, match=told):
        RmtRetrievalConfig(backbone_config=llama(), **{"num_memory_tokens": M, "segment_length": LENGTH} | settings)


def test_a_past_beyond_its_limit_is_refused():
    model = build(retrieval_max_segments=2)
    model(ids(1, 3 * LENGTH), labels=ids(1, 3 * LENGTH))  # of three segments the last reads two
    state = model.read(ids(1, 2 * LENGTH + 3))
    model.generate(ids(1, 3), state=state, max_new_tokens=2, do_sample=False)
    told = "`--retrieval_max_segments` 2: the text has more past segments of 12 tokens"
    with pytest.raises(UsageError, match=told):
        model.read(ids(1, 2 * LENGTH), state=state)
    with pytest.raises(UsageError, match=told):
        model(ids(1, 4 * LENGTH), labels=ids(1, 4 * LENGTH))
    with pytest.raises(UsageError, match="passed memories"):
        build(retrieval_max_segments=2, state_passing=0.5).config.check_training(3)
    build(retrieval_max_segments=2).config.check_training(3)
    with pytest.raises(
        UsageError, match="`--retrieval_max_segments` 2: texts of `--curriculum_stages` 4 have 3 past segments"
    ):
        build(retrieval_max_segments=2).config.check_training(4)


def test_how_much_of_the_past_is_read_is_part_of_a_state_and_a_run():
    state = build().read(ids(1, 3 * LENGTH))
    with pytest.raises(UsageError, match="made by another model"):
        build(retrieval_top_k=1).read(ids(1, LENGTH), state=state)
    assert build(retrieval_on_cpu=True).read(ids(1, LENGTH), state=state)
    assert build(retrieval_top_k=1).config.matters_to_training()["retrieval_top_k"] == 1


def test_a_graph_is_not_written_into():
    """Of a state that another text goes on from before the gradients are taken; and of truncated windows behind a read part."""
    model = build(checkpoint_segments=False)
    state = model.read(ids(1, 3 * LENGTH))
    text = ids(1, 2 * LENGTH, seed=3)
    loss = model(text, labels=text, state=state).loss
    want = gradients(model, model(text, labels=text, state=state).loss)
    model.read(ids(1, 4 * LENGTH), state=state)
    assert_same_gradients(gradients(model, loss), want)
    truncated = build(checkpoint_segments=False, bptt_segments=1)
    text = ids(1, 4 * LENGTH)
    truncated(text, labels=text).loss.backward()
    assert float(truncated.past_reader.query.weight.grad.abs().sum()) > 0


def test_a_past_read_in_inference_mode_is_gone_on_from_outside():
    model = build()
    with torch.inference_mode():
        state = model.read(ids(1, 3 * LENGTH + 1))
    with torch.no_grad():
        after = model.read(ids(1, 3 * LENGTH), state=state)
    with torch.inference_mode():
        again = model.read(ids(1, 3 * LENGTH), state=after)
    assert again.memory["there"].shape[1] == 9 and state.memory["there"].shape[1] == 3


def test_generation_retrieves_once_a_segment(monkeypatch):
    model, calls = build(), []
    state = model.read(ids(1, 3 * LENGTH + 1))
    forward = model.past_reader.forward
    monkeypatch.setattr(model.past_reader, "forward", lambda *args: calls.append(1) or forward(*args))
    model.generate(ids(1, 1), state=state, max_new_tokens=8, do_sample=False)
    assert len(calls) == 1


def test_a_row_that_has_ended_keeps_its_past():
    """Columns that no row has any more are dropped where memories are passed on, of all rows alike."""
    model = build(state_passing=1.0).train()
    left = model.eval().read(ids(2, 4 * LENGTH + 1)).memory
    left["there"] = torch.tensor([[False, False, True, True], [False, True, True, True]])
    passed = model.to_pass_on(left)
    assert passed["there"].tolist() == [[False, True, True], [True, True, True]]
    assert torch.equal(passed["keys"], left["keys"][:, M:]) and torch.equal(passed["values"], left["values"][:, M:])


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_passed_on_every_rank_looks_back_as_often(seed):
    """After texts of one segment, too, which leave nothing to look back to but on ranks whose rows went on from other texts."""
    model = build(state_passing=0.5).train()
    calls = []
    model.past_reader.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(seed)
    counts = []
    for length in (2 * LENGTH, LENGTH, 2 * LENGTH, LENGTH, LENGTH, 2 * LENGTH):
        calls.clear()
        text = ids(1, length)
        model(text, labels=text)
        counts.append(len(calls))
    assert counts == [1, 1, 2, 1, 1, 2]
