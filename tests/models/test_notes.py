"""Memory supervision against a literal loop, and the hand-over from a hidden state to something that can be read."""

import pytest
import torch
from test_rmt import LENGTH, MEMORY, VOCAB, assert_same_gradients, build, gradients, ids, next_token_loss
from torch.nn import functional as F

from lrmt.errors import UsageError
from lrmt.models import RmtForCausalLM
from lrmt.models.notes import Notes

NEVER = torch.iinfo(torch.long).max
KINDS = ("identity", "scaled", "aligned", "tokens")


def build_with(kind, **settings):
    model = build(memory_handover=kind, **settings)
    if kind == "aligned":
        model.fit(lambda: ids(16, 40, seed=9))
    return model.double()


def draw_notes(rows=2, events=3, length=4 * LENGTH, size=MEMORY):
    """Events in order, the first of a row after its beginning; a third of the places have nothing to say."""
    generator = torch.Generator().manual_seed(4)
    told = torch.randint(0, VOCAB, (rows, events, size), generator=generator)
    told[torch.rand(told.shape, generator=generator) < 0.3] = -100
    return Notes(told, torch.randint(3, length, (rows, events), generator=generator).sort(1).values)


def written_after(notes, row, read):
    """What should be written once so many tokens are read: the last event's, or nothing."""
    known = [e for e, end in enumerate(notes.ends[row].tolist()) if end <= read]
    return notes.ids[row, known[-1]] if known else torch.full_like(notes.ids[row, 0], -100)


def literal_loop(model, text, cuts, notes, handover, first=0, last=None):
    """Logits, and the summed loss of what segments `first` to `last` have written, through the backbone's own head."""
    memory = model.memory_embedding.weight.expand(len(text), -1, -1)
    memory = memory + (model.memory_positions.weight if model.config.memory_positions else 0)
    logits, cost, count = [], 0.0, 0
    for s, (a, b) in enumerate(zip([0, *cuts], [*cuts, text.shape[1]], strict=True)):
        memory = memory.detach() if s == first and s > 0 else memory
        tokens = model.backbone.get_input_embeddings()(text[:, a:b])
        out = model.backbone(inputs_embeds=torch.cat([memory, tokens, memory], 1), output_hidden_states=True)
        logits.append(out.logits[:, MEMORY : MEMORY + b - a])
        written = out.hidden_states[-1][:, -MEMORY:]
        if s < len(cuts):
            for row in range(len(text)):
                want = written_after(notes, row, b)
                if last is None or s == last:
                    said = model.backbone.get_output_embeddings()(written[row, : len(want)])
                    cost = cost + F.cross_entropy(said, want, reduction="sum", ignore_index=-100)
                    count += int((want != -100).sum())
        memory = handover(written)
    return torch.cat(logits, 1), cost, count


def literal_handover(model):
    """Each of the three in words, and the shift: what place i has written is read at place i + 1, after M_0's first vector; and what is
    added to each place.
    """
    plain, first = literal_map(model), model.memory_embedding.weight[:1]
    added = model.memory_positions.weight if model.config.memory_positions else 0
    if model.config.memory_shift:
        return lambda h: torch.cat([first.expand(len(h), 1, -1), plain(h)[:, :-1]], dim=1) + added
    return lambda h: plain(h) + added


def literal_map(model):
    embeddings = model.backbone.get_input_embeddings().weight.detach()
    if model.config.memory_handover == "tokens":

        def mean_of_the_likeliest(hidden):
            likely = model.backbone.get_output_embeddings()(hidden).softmax(-1)
            least = likely.topk(16).values[..., -1:]
            likely = likely * (likely >= least)
            return likely / likely.sum(-1, keepdim=True) @ model.backbone.get_input_embeddings().weight

        return mean_of_the_likeliest
    if model.config.memory_handover == "scaled":
        size = embeddings.float().pow(2).mean().sqrt().double()
        return lambda h: h / h.pow(2).mean(-1, keepdim=True).sqrt() * size
    if model.config.memory_handover == "aligned":
        return lambda h: h @ model.handover.weight.T + model.handover.bias
    return lambda h: h


@pytest.mark.parametrize("checkpoint_segments", [False, True])
@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("shift", [False, True], ids=["in place", "shifted"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_literal_loop(kind, shift, alignment, checkpoint_segments):
    model = build_with(kind, memory_shift=shift, segment_alignment=alignment, checkpoint_segments=checkpoint_segments)
    text, notes = ids(2, 3 * LENGTH + 5), draw_notes(size=MEMORY - shift)
    cuts = [LENGTH, 2 * LENGTH, 3 * LENGTH] if alignment == "left" else [5, 5 + LENGTH, 5 + 2 * LENGTH]
    labels = torch.where(torch.rand(text.shape, generator=torch.Generator().manual_seed(3)) < 0.5, text, -100)
    logits, cost, count = literal_loop(model, text, cuts, notes, literal_handover(model))
    want = gradients(model, next_token_loss(logits, labels) + 0.5 * cost / count)
    out = model(text, labels=labels, notes=notes)
    torch.testing.assert_close(out.notes.loss, cost, rtol=1e-10, atol=1e-10)
    assert out.notes.count == count == model.num_notes(notes, text) > 0
    assert_same_gradients(gradients(model, out.loss + 0.5 * out.notes.loss / out.notes.count), want)


@pytest.mark.parametrize("shift", [False, True], ids=["in place", "shifted"])
def test_positions_are_added_and_trained(shift, tmp_path):
    model = build_with("tokens", memory_shift=shift, memory_positions=True)
    text, notes, cuts = ids(2, 3 * LENGTH + 5), draw_notes(size=MEMORY - shift), [LENGTH, 2 * LENGTH, 3 * LENGTH]
    torch.nn.init.normal_(model.memory_positions.weight)
    logits, cost, count = literal_loop(model, text, cuts, notes, literal_handover(model))
    want = gradients(model, next_token_loss(logits, text) + 0.5 * cost / count)
    assert float(want["memory_positions.weight"].abs().sum()) > 0
    out = model(text, labels=text, notes=notes)
    assert_same_gradients(gradients(model, out.loss + 0.5 * out.notes.loss / out.notes.count), want)
    model.float().save_pretrained(tmp_path)
    again = RmtForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(text).logits, model(text).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpoint_segments", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_truncation_counts_each_segment_once(k, kind, checkpoint_segments):
    model = build_with(kind, bptt_segments=k, checkpoint_segments=checkpoint_segments)
    text, notes, cuts = ids(2, 4 * LENGTH), draw_notes(), [LENGTH, 2 * LENGTH, 3 * LENGTH]
    labels = torch.full_like(text, -100)
    labels[:, -2:] = text[:, -2:]
    total, scored = 0.0, 0
    for s in range(3):
        _, cost, count = literal_loop(model, text, cuts, notes, literal_handover(model), max(0, s - k + 1), s)
        total, scored = total + cost, scored + count
    logits, *_ = literal_loop(model, text, cuts, notes, literal_handover(model), 4 - k)
    want = gradients(model, next_token_loss(logits, labels) + total)
    out = model(text, labels=labels, notes=notes)
    assert out.notes.count == scored
    torch.testing.assert_close(out.notes.loss, torch.as_tensor(total), rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients(model, out.loss + out.notes.loss), want)
    calls = []
    model.backbone.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    model(text, labels=labels, notes=notes)
    assert len(calls) == model.num_backbone_calls(text, labels=labels, notes=notes)


def test_rows_of_different_lengths_equal_each_alone():
    model, notes = build_with("aligned"), draw_notes(3)
    lengths, width = [3 * LENGTH + 4, 7, 2 * LENGTH], 3 * LENGTH + 4
    text, mask = ids(3, width), torch.arange(width) < torch.tensor(lengths)[:, None]
    labels = torch.where(mask, text, -100)
    out = model(text, attention_mask=mask, labels=labels, notes=notes)
    alone = [
        model(
            text[row : row + 1, :n], labels=labels[row : row + 1, :n], notes=Notes(*(x[row : row + 1] for x in notes))
        )
        for row, n in enumerate(lengths)
    ]
    torch.testing.assert_close(out.notes.loss, sum(a.notes.loss for a in alone if a.notes is not None))
    assert out.notes.count == sum(a.notes.count for a in alone if a.notes is not None)
    assert (
        alone[1].notes is None and model.num_notes(notes, text, mask) == out.notes.count
    )  # one segment writes nothing


def test_ages_are_hand_overs_since_the_note_was_told():
    model, text = build_with("identity"), ids(1, 5 * LENGTH)
    first, second = [1, 2, 3], [1, 2, 9]  # the last place changes in the third segment
    notes = Notes(torch.tensor([[first, second, second]]), torch.tensor([[4, 2 * LENGTH + 1, NEVER]]))
    out = model(text, labels=text, notes=notes)
    assert out.notes.age.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 0, 3, 3, 1]
    before = Notes(
        torch.tensor([[first, second]]), torch.tensor([[0, 2 * LENGTH + 1]])
    )  # two stay as they were before the text
    out = model(text, labels=text, notes=before)
    assert out.notes.age.tolist() == [-1, -1, -1, -1, -1, -1, -1, -1, 0, -1, -1, 1] and out.notes.count == 12


def test_what_is_said_is_right():
    """Notes that are what the head says of the memory are all right, and of other tokens all wrong."""
    model, text = build_with("aligned"), ids(2, 2 * LENGTH)
    written = []
    model.handover.register_forward_hook(lambda _, args, __: written.append(args[0]))
    model(text, labels=text)
    says = model.get_output_embeddings()(written[0]).argmax(-1)
    for ids_, right in ((says, 1.0), ((says + 1) % VOCAB, 0.0)):
        notes = Notes(ids_[:, None], torch.zeros(2, 1, dtype=torch.long))
        assert float(model(text, labels=text, notes=notes).notes.right.float().mean()) == right


def test_notes_change_nothing_else():
    """With a weight of 0 and the identity, losses, logits and gradients are those of a run without notes, to the bit."""
    model, text, notes = build_with("identity"), ids(2, 3 * LENGTH), draw_notes()
    without = model(text, labels=text)
    want = gradients(model, without.loss)
    out = model(text, labels=text, notes=notes)
    got = gradients(model, out.loss)
    assert torch.equal(out.loss, without.loss) and torch.equal(out.logits, without.logits)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert "handover.weight" not in model.state_dict()


def test_nothing_to_say_costs_nothing_and_calls_the_head_all_the_same():
    """So that ranks of which one has notes make the same module calls."""
    model, text = build_with("identity"), ids(2, 3 * LENGTH)
    calls = []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    for notes in (draw_notes(), Notes(torch.full((2, 1, MEMORY), -100), torch.full((2, 1), NEVER))):
        out = model(text, labels=text, notes=notes)
        assert len(calls) == 3  # two memories and the loss
        calls.clear()
    assert float(out.notes.loss) == 0 and out.notes.count == 0


# ---------------------------------------------------------------------- the hand-over


def test_an_aligned_state_is_near_the_embedding_of_what_is_said():
    torch.manual_seed(0)
    model = build_with("aligned")
    text = ids(8, 30, seed=9)
    hidden = model.backbone.base_model(text).last_hidden_state
    said = model.get_input_embeddings()(model.get_output_embeddings()(hidden).argmax(-1))
    apart = (model.handover(hidden, None, None) - said).pow(2).mean() / said.var()
    assert apart < 0.5 * (hidden - said).pow(2).mean() / said.var() and apart < 0.9


def test_a_scaled_state_has_the_size_of_embeddings():
    model = build_with("scaled")
    size = model.get_input_embeddings().weight.pow(2).mean().sqrt()
    vectors = model.handover(torch.randn(3, 2, 32, dtype=torch.float64) * 40, None, None)
    torch.testing.assert_close(vectors.pow(2).mean(-1).sqrt(), size.expand(3, 2), rtol=1e-6, atol=0)
    assert not model.handover(torch.zeros(1, 32), None, None).isnan().any()


def test_what_is_sure_is_handed_over_as_its_embedding():
    model = build_with("tokens")
    embed, sure = model.get_input_embeddings(), torch.full((1, 2, VOCAB), -50.0)
    sure[0, 0, 7] = sure[0, 1, 9] = 50
    hidden = torch.zeros(1, 2, 32, dtype=torch.float64)
    torch.testing.assert_close(model.handover(hidden, sure, embed)[0], embed.weight[[7, 9]])
    sure[0, 1, 4] = 50  # as sure of another
    torch.testing.assert_close(model.handover(hidden, sure, embed)[0, 1], embed.weight[[4, 9]].mean(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_keeps_the_map(kind, tmp_path):
    model = build_with(kind).float()
    model.save_pretrained(tmp_path)
    again = RmtForCausalLM.from_pretrained(tmp_path)
    text = ids(1, 3 * LENGTH)
    torch.testing.assert_close(again(text).logits, model(text).logits, rtol=1e-5, atol=1e-5)


def test_a_state_of_another_hand_over_is_refused(tmp_path):
    models = {kind: build_with(kind) for kind in KINDS}
    models |= {"shifted": build_with("identity", memory_shift=True)}
    models |= {"in places": build_with("identity", memory_positions=True)}
    text = ids(1, 2 * LENGTH)
    for kind, model in models.items():
        state = model.read(text)
        state.save(tmp_path / kind)
        for other, judge in models.items():
            if other == kind:
                judge.load_state(tmp_path / kind)
                continue
            with pytest.raises(UsageError, match="made by another model"):
                judge.load_state(tmp_path / kind)
            with pytest.raises(UsageError, match="made by another model"):
                judge(text, state=state)


def test_maps_of_other_texts_make_other_states():
    one, other = build_with("aligned"), build_with("aligned")
    other.fit(lambda: ids(16, 40, seed=10))
    with pytest.raises(UsageError, match="made by another model"):
        other(ids(1, 5), state=one.read(ids(1, 2 * LENGTH)))


def test_notes_are_refused_where_nothing_can_say_them():
    model, text, notes = build(), ids(2, 2 * LENGTH), draw_notes()
    for wrong in ({"state": model.read(text), "labels": text}, {}):
        with pytest.raises(UsageError, match="notes are for training on whole texts with labels"):
            model(text, notes=notes, **wrong)


def test_unknown_hand_over():
    with pytest.raises(
        UsageError, match="`--memory_handover` must be one of identity, scaled, aligned, tokens; got mapped"
    ):
        build(memory_handover="mapped")


# ---------------------------------------------------------------------- state passing


def test_passed_memories_and_what_they_should_say():
    """The next texts begin from the memories that were left, and say what those said until they tell something themselves."""
    model = build_with("identity", state_passing=1.0).train()
    begun = []
    begin = model.prefix
    model.prefix = lambda memory: begun.append(memory) or begin(memory)
    text, notes = ids(2, 3 * LENGTH), draw_notes(events=1, length=LENGTH)
    model(text, labels=text, notes=notes)
    left = begun[2].detach()  # what the last segment has read
    assert torch.equal(begun[0], model.start(2))
    begun.clear()
    later = Notes(draw_notes(events=1).ids.flip(0), torch.full((2, 1), 2 * LENGTH - 1))
    told, first = model(text, labels=text, notes=later).notes, begun[0]
    assert torch.equal(first.detach(), left)
    says = torch.cat(
        [notes.ids[:, 0], later.ids[:, 0]]
    )  # after the first segment still the text before, after the second this one
    assert told.count == int((says != -100).sum()) and model.num_notes(later, text) == int((later.ids != -100).sum())
    begun.clear()
    nothing = Notes(torch.cat([torch.full_like(later.ids, 7), later.ids], 1), F.pad(later.ends, (1, 0)))
    told = model(
        text, labels=text, notes=nothing
    ).notes  # what a text says before it tells anything is said of the text before
    assert told.count == 2 * int((later.ids != -100).sum())
    begun.clear()
    model.eval()
    model(text, labels=text)
    assert torch.equal(begun[0], model.start(2))  # in training alone
    begun.clear()
    model.train()(text[:1], labels=text[:1])
    assert torch.equal(begun[0], model.start(1))  # of as many rows alone


@pytest.mark.parametrize("alignment", ["left", "right"])
def test_what_a_passed_memory_says_is_noted_of_each_row(alignment):
    """At the row's last hand-over, however long the others are; a text of one segment hands on what it began from."""
    model = build_with("identity", state_passing=1.0, segment_alignment=alignment).train()
    text, notes = ids(3, 4 * LENGTH - 2), draw_notes(rows=3, events=2, length=2 * LENGTH)
    notes.ends[:, 0], notes.ends[0, 1] = 0, 3 * LENGTH - 1
    mask = torch.ones_like(text)
    mask[1, 2 * LENGTH :] = mask[2, LENGTH - 1 :] = 0
    model(text, attention_mask=mask, labels=text, notes=notes)
    read = [3 * LENGTH if alignment == "left" else 3 * LENGTH - 2, LENGTH, 0]
    said = torch.stack([written_after(notes, row, tokens) for row, tokens in enumerate(read)])
    assert torch.equal(model._passed.said, said)
    short, memory = ids(3, LENGTH, seed=5), model._passed.memory
    model(short, labels=short, notes=Notes(draw_notes(rows=3, events=1).ids, torch.zeros(3, 1).long()))
    assert torch.equal(model._passed.memory, memory) and torch.equal(model._passed.said, said)
    model(short, labels=short, notes=Notes(draw_notes(rows=3, events=1).ids, torch.full((3, 1), LENGTH - 1)))
    assert torch.equal(model._passed.said, said)  # what this text tells it has not handed on


def test_what_all_rows_begin_from_hangs_on_the_first_memory_all_the_same():
    """Or ranks that draw differently would have different gradients."""
    model, text = build_with("identity", state_passing=1.0).train(), ids(2, 2 * LENGTH)
    for _ in range(2):
        model.zero_grad()
        model(text, labels=text).loss.backward()
        assert model.memory_embedding.weight.grad is not None
    assert float(model.memory_embedding.weight.grad.abs().max()) == 0


@pytest.mark.parametrize("shift", [False, True])
def test_the_memory_begins_with_what_it_should_say(shift):
    model = build(memory_handover="tokens", memory_shift=shift)
    before, embed = model.memory_embedding.weight.clone(), model.get_input_embeddings().weight
    free = model.config.note_length - 2
    model.begin_with(torch.tensor([5, 3, *[-100] * free]))
    now = model.memory_embedding.weight
    assert torch.equal(now[shift : shift + 2], embed[[5, 3]])
    others = [place for place in range(MEMORY) if place not in range(shift, shift + 2)]
    assert torch.equal(now[others], before[others])


def test_a_shifted_memory_of_one_token_is_refused():
    with pytest.raises(UsageError, match="`--memory_shift` leaves nothing of one memory token"):
        build(num_memory_tokens=1, memory_shift=True)
    with pytest.raises(UsageError, match="`--state_passing` must lie in .0, 1.; got 1.5"):
        build(state_passing=1.5)
