"""A memory in words: what is recorded equals the same computed plainly, and what was lost is named where it was lost."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import lrmt
from lrmt.adapters.adapter import save_adapter
from lrmt.arguments import ModelArguments
from lrmt.cli import main
from lrmt.evaluation.inspect import SEGMENTS_AT_ONCE, answer_and_record
from lrmt.evaluation.readable import changes, follow, format_note, format_segments, tell_memory
from lrmt.models import RecurrentConfig, RecurrentModel, RmtForCausalLM
from lrmt.training.build import build_model

M, L = 4, 48


@pytest.fixture(scope="module")
def copiers(backbones, tmp_path_factory):
    """Adapters, without `--memory_shift` and with it, whose backbone says what it is given: no layer adds anything, so that a memory
    lasts for ever, and a token looks at what is the same. And their tokenizer.
    """
    folder = tmp_path_factory.mktemp("copier")
    tokenizer = AutoTokenizer.from_pretrained(backbones["llama"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        layer = backbone.model.layers[0]
        layer.self_attn.q_proj.weight.copy_(2 * torch.eye(64))
        layer.self_attn.k_proj.weight.copy_(2 * torch.eye(64))
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        backbone.model.embed_tokens.weight.normal_()
    backbone.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    arguments = ModelArguments(
        model_name_or_path=str(folder / "backbone"), lora_r=2, load_in_4bit=False, dtype="float32"
    )
    settings = {"num_memory_tokens": M, "segment_length": L, "memory_handover": "tokens"}
    for shift in (False, True):
        model = build_model(RmtForCausalLM, arguments, settings | {"memory_shift": shift})
        save_adapter(model, folder / f"adapter-{shift}", tokenizer)
    return [folder / f"adapter-{shift}" for shift in (False, True)], tokenizer


@pytest.fixture(scope="module")
def copier(copiers):
    return copiers[0][0], copiers[1]


@pytest.fixture(scope="module")
def shifting(copiers):
    return copiers[0][1], copiers[1]


def plant(monkeypatch, vectors: dict):
    """Overwrites the memory that the s-th segment has written, for each segment s."""
    write, calls = RmtForCausalLM.write, []

    def overwrite(self, memory, output):
        calls.append(1)
        written = write(self, memory, output)
        return vectors[len(calls)].expand_as(written) if len(calls) in vectors else written

    monkeypatch.setattr(RmtForCausalLM, "write", overwrite)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The grass is green. The sky is blue. " * 90)
    return path


def test_a_fact_that_is_lost_is_named_with_its_segment(copier, text, tmp_path, monkeypatch, capsys):
    adapter, tokenizer = copier
    embeddings = lrmt.load(adapter).get_input_embeddings().weight.detach()
    note = tokenizer(" 48", add_special_tokens=False).input_ids
    other = tokenizer(" 93", add_special_tokens=False).input_ids
    assert len(note) == len(other) == 3 < M
    after = {2: embeddings[[*note, 1]], 7: embeddings[[note[0], other[1], note[2], 1]], 9: embeddings[[1, *note]]}
    plant(monkeypatch, after)  # told before the 3rd segment, one digit turns before the 8th, told again before the 10th
    command = [
        "inspect",
        "--adapter_path",
        adapter,
        "--input",
        text,
        "--output_dir",
        tmp_path / "out",
        "--note",
        "48",
        "93",
    ]
    assert main([*map(str, command), "--question", "What?", "--max_new_tokens", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "out" / "memory.json").read_text())
    count = len(written["segments"])
    assert count > 10
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"memory.json", "memory.png", "attention.png"}
    assert (
        "note '48': said first after segment 3, lost in segment 8, said again after segment 10, kept to the end" in out
    )
    assert "note '93': never said" in out
    assert [n["said"] for n in written["notes"]] == [[[3, 7], [10, count]], []]
    digit = tokenizer.decode([note[1]])
    turned = written["segments"][7]
    assert (turned["lost"], turned["gained"]) == ([digit], [tokenizer.decode([other[1]])])
    (line,) = [line for line in out if line.split()[:1] == ["8-9"]]
    assert line.endswith(f"+{tokenizer.decode([other[1]])!r} -{digit!r}")
    for segment in written["segments"][2:7]:
        assert [v["says"] for v in segment["vectors"]] == [tokenizer.decode([i]) for i in [*note, 1]]
        assert all(v["probability"] > 0.9 for v in segment["vectors"])
    assert [s["start_token"] for s in written["segments"]] == [L * s for s in range(count)]
    assert len(written["answer"]) == 2
    assert all(len(part["looked"]) == M for part in written["answer"])


def test_with_a_shift_a_fact_is_lost_when_its_last_vector_drops_out(shifting, text, tmp_path, monkeypatch, capsys):
    """Each segment says what it reads, one place on: the note's last token is read by one segment more, and said to none."""
    adapter, tokenizer = shifting
    embeddings = lrmt.load(adapter).get_input_embeddings().weight.detach()
    note = tokenizer(" 48", add_special_tokens=False).input_ids
    plant(monkeypatch, {2: embeddings[[*note, 1]], 7: embeddings[[1, *note]]})
    command = ["inspect", "--adapter_path", adapter, "--input", text, "--output_dir", tmp_path / "out"]
    assert main([*map(str, command), "--note", "48", "48 and more", "--max_new_tokens", "1"]) == 0
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert "note '48': said first after segment 3, lost in segment 4\n" in out
    assert told["notes"][1]["said"] == [[3, 3]]  # of a longer one as many tokens as can be said
    says = [[vector["says"] for vector in segment["vectors"]] for segment in told["segments"]]
    first, *rest = [tokenizer.decode([token]) for token in note]
    assert says[2] == [None, first, *rest]
    assert says[3][2:] == [first, rest[0]] and told["segments"][3]["lost"] == [rest[1]]
    assert all(segment["vectors"][0] == {"says": None, "probability": 0, "looked": []} for segment in told["segments"])
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["3"]]
    assert line.split("   ")[-2].startswith(f"-  {first!r} 100  {rest[0]!r} 100")


def test_with_a_shift_the_answer_looks_at_the_vector_that_says_the_word(shifting, text, tmp_path, monkeypatch, capsys):
    adapter, tokenizer = shifting
    embeddings = lrmt.load(adapter).get_input_embeddings().weight.detach()
    words = tokenizer(" 48", add_special_tokens=False).input_ids
    count = len(tokenizer(" " + text.read_text().strip(), add_special_tokens=False).input_ids) // L
    command = ["inspect", "--adapter_path", adapter, "--input", text, "--output_dir", tmp_path / "out"]
    for place, word in enumerate(words[1:], start=3):  # the last token of the question looks at its like
        plant(monkeypatch, {count - 1: embeddings[[*words, 1]]})
        question = ["--question", f"What? {tokenizer.decode([word])}", "--max_new_tokens", "1", "--overwrite"]
        assert main([*map(str, command), *question]) == 0
        told = json.loads((tmp_path / "out" / "memory.json").read_text())
        (looked,) = [answered["looked"] for answered in told["answer"]]
        assert len(told["segments"]) == count and looked.index(max(looked)) == place - 1
        assert told["segments"][-1]["vectors"][place - 1]["says"] == tokenizer.decode([word])
        line = capsys.readouterr().out.split("how each answer token looked")[1].splitlines()[1]
        assert line.split("   ")[2].startswith(f"{place}: ")


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("handover", ["identity", "tokens"])
def test_what_is_recorded_equals_the_same_computed_plainly(backbones, handover, shift):
    backbone = AutoModelForCausalLM.from_pretrained(backbones["llama"], attn_implementation="sdpa")
    settings = {"num_memory_tokens": M, "segment_length": L, "memory_handover": handover, "memory_shift": shift}
    torch.manual_seed(0)
    model = RmtForCausalLM.from_backbone(backbone, **settings).eval()
    ids = torch.randint(5, 200, (1, 3 * L + 5))
    quiet = model.read(ids)
    with model.recording() as told:
        state = model.read(ids)
        model(ids[:, :3], state=state, logits_to_keep=1)
    torch.testing.assert_close(state.memory, quiet.memory)
    assert model.backbone.config._attn_implementation == "sdpa"
    model.read(ids)
    assert len(told.written) == 3  # what comes later is not recorded

    plain = AutoModelForCausalLM.from_pretrained(backbones["llama"], attn_implementation="eager").eval()
    memory = model.start(1)
    for s in range(3):
        before, embeds = memory, plain.get_input_embeddings()(ids[:, s * L : (s + 1) * L])
        out = plain.base_model(inputs_embeds=torch.cat([before, embeds, before], 1), output_attentions=True)
        logits = plain.get_output_embeddings()(out.last_hidden_state[:, -M:])
        shares = sum(layer.mean(1) for layer in out.attentions) / len(out.attentions)
        written = told.written[s]
        becomes, wrote = (
            slice(shift, None),
            slice(0, M - shift),
        )  # a position writes the vector at its place, or the next
        assert written.ids[:, becomes].tolist() == logits.argmax(-1)[:, wrote].tolist()
        torch.testing.assert_close(written.probability[:, becomes], logits.softmax(-1).amax(-1)[:, wrote])
        torch.testing.assert_close(written.looked[:, becomes], shares[:, -M:, M : M + L][:, wrote])
        if shift:
            assert (int(written.ids[0, 0]), float(written.probability[0, 0])) == (-1, 0)
            assert not written.looked[:, 0].any()
            torch.testing.assert_close(memory[:, 0], model.start(1)[:, 0])  # and so it is of each later memory
        memory = model._segment(
            type(model._grid(ids, None, None, None)[0])(ids[:, s * L : (s + 1) * L], None, None), memory
        )[1]
    asked = torch.cat([ids[:, 3 * L :], ids[:, :3]], 1)
    out = plain.base_model(
        inputs_embeds=torch.cat([memory, plain.get_input_embeddings()(asked)], 1), output_attentions=True
    )
    shares = sum(layer.mean(1) for layer in out.attentions) / len(out.attentions)
    torch.testing.assert_close(told.looked[0], shares[:, -1, :M])


def test_padded_rows_record_what_they_record_alone(backbones):
    backbone = AutoModelForCausalLM.from_pretrained(backbones["llama"])
    torch.manual_seed(0)
    model = RmtForCausalLM.from_backbone(backbone, num_memory_tokens=M, segment_length=L).eval()
    ids = torch.randint(5, 200, (2, 2 * L + 7))
    mask = torch.ones_like(ids)
    mask[1, : L + 2] = 0
    question = torch.randint(5, 200, (2, 4))
    asked = torch.ones_like(question)
    asked[1, 2:] = 0
    with model.recording() as both:
        model(question, asked, state=model.read(ids, mask), logits_to_keep=1)
    with model.recording() as alone:
        model(question[1:, :2], state=model.read(ids[1:, L + 2 :]), logits_to_keep=1)
    assert len(both.written) == 2
    assert len(alone.written) == 1
    torch.testing.assert_close(both.written[0].looked[1:], alone.written[0].looked)
    torch.testing.assert_close(both.written[0].probability[1:], alone.written[0].probability)
    torch.testing.assert_close(both.looked[0][1:], alone.looked[0])


def test_a_memory_that_says_nothing_is_said_to(backbones, text, tmp_path, capsys):
    arguments = ModelArguments(
        model_name_or_path=str(backbones["llama"]), lora_r=2, load_in_4bit=False, dtype="float32"
    )
    model = build_model(RmtForCausalLM, arguments, {"num_memory_tokens": M, "segment_length": L})
    save_adapter(model, tmp_path / "adapter", AutoTokenizer.from_pretrained(backbones["llama"]))
    command = ["inspect", "--adapter_path", tmp_path / "adapter", "--input", text, "--output_dir", tmp_path / "out"]
    assert main([*map(str, command), "--max_new_tokens", "1"]) == 0
    assert "no vector ever says anything surely" in capsys.readouterr().out
    assert not any(s["gained"] for s in json.loads((tmp_path / "out" / "memory.json").read_text())["segments"])


@pytest.mark.parametrize("digits", [5, 3])
def test_a_sample_of_a_task_is_asked_and_its_notes_followed(copier, tmp_path, capsys, digits):
    command = ["inspect", "--adapter_path", copier[0], "--task", "passkey", "--output_dir", tmp_path / "out"]
    flags = [] if digits == 5 else ["--num_digits", str(digits)]
    assert main([*map(str, command), "--max_new_tokens", "1", "--length", "30", *flags]) == 0
    first, *_ = out = capsys.readouterr().out.splitlines()
    target = first.split("target: '")[1].split("'")[0]
    assert len(target) == digits
    assert first.startswith("question: 'What is the pass key?")
    assert f"note {target!r}: never said" in out
    told = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert len(told["segments"]) == 29


def test_a_text_or_a_sample_but_not_both_nor_none(copier, text, tmp_path, capsys):
    command = [*map(str, ["inspect", "--adapter_path", copier[0], "--output_dir", tmp_path / "out"])]
    for flags, message in [
        ([], "give either --input, a text, or --task, of which a sample is made; got None and None"),
        (["--input", text, "--task", "passkey"], "give either --input"),
        (["--task", "passkee"], "passkee"),
        (["--task", "passkey", "--question", "Who?"], "--question 'Who?' is of a text"),
        (["--task", "qa1", "--length", "1"], "--length 1 leaves"),
        (["--task", "passkey", "--length", "1"], "passkey does not fit into 48 tokens"),
        (["--task", "passkey", "--length", "many"], "many"),
        (["--task", "passkey", "--seed", "-1"], "--seed"),
        (["--task", "passkey", "--num_digits", "19"], "--num_digits"),
        (
            ["--input", text, "--length", "100k", "--seed", "7", "--babi_dir", "/x", "--num_digits", "3"],
            "is a text, and no sample of a task; leave out --babi_dir, --length, --num_digits, --seed\n",
        ),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([*command, *map(str, flags)])
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1), error
        assert message in error
    assert not (tmp_path / "out").exists()


class ToyConfig(RecurrentConfig):
    model_type = "toy"


class Toy(RecurrentModel):
    """A memory that starts from M vectors."""

    config_class = ToyConfig
    memory_modules = ["first_memory"]

    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        self.first_memory = self.make_embedding(M, lambda weight, embeddings: weight.copy_(embeddings[:M]))
        self.finish()

    def start(self, batch_size):
        return self.first_memory.weight.expand(batch_size, -1, -1)


class SuffixOnly(Toy):
    def suffix(self, memory):
        return memory

    def write(self, memory, output):
        return output.after.clone()


class PrefixOnly(Toy):
    def prefix(self, memory):
        return memory

    def write(self, memory, output):
        return output.tokens[:, -M:].clone()


class Growing(SuffixOnly):
    def prefix(self, memory):
        return memory

    def write(self, memory, output):
        return torch.cat([output.after, output.tokens.mean(1, keepdim=True)], dim=1)


@pytest.mark.parametrize(
    ("method", "vectors", "looked", "files"),
    [
        (SuffixOnly, [M] * 3, [0] * 5, {"memory.json", "memory.png"}),
        (PrefixOnly, [], [M] * 5, {"memory.json", "attention.png"}),
        (Growing, [M, M + 1, M + 2], [M + 2] * 3 + [M + 3] * 2, {"memory.json", "memory.png", "attention.png"}),
    ],
)
def test_any_recurrent_memory_is_told(backbones, capsys, method, vectors, looked, files):
    """Whatever stands before the tokens or after them, and however many; the third segment ends within the answer."""
    tokenizer = AutoTokenizer.from_pretrained(backbones["llama"])
    backbone = AutoModelForCausalLM.from_pretrained(backbones["llama"])
    model = method.from_backbone(backbone, segment_length=L).eval()
    ids = torch.randint(5, 200, (3 * L - 3,), generator=torch.Generator().manual_seed(0)).tolist()
    answer, told = answer_and_record(model, tokenizer, ids, [7], 5)
    written = tell_memory(told, [*ids, 7, *answer], answer, tokenizer, ["48"], 3)
    out = capsys.readouterr().out
    assert written.keys() == files
    assert all(content.startswith(b"\x89PNG") for name, content in written.items() if name.endswith("png"))
    told = json.loads(written["memory.json"])
    assert [len(segment["vectors"]) for segment in told["segments"]] == vectors
    assert [len(part["looked"]) for part in told["answer"]] == looked
    assert ("this memory is not made of vectors" in out) == (not vectors)
    assert ("note '48': never said" in out) == bool(vectors)
    assert ("how each answer token looked at the memory" in out) == any(looked)


def test_a_text_of_one_segment_has_no_memory_and_is_told_so(copier, tmp_path, capsys):
    adapter, tokenizer = copier
    (tmp_path / "text.txt").write_text(" the" * L)
    command = ["inspect", "--adapter_path", adapter, "--input", tmp_path / "text.txt", "--output_dir", tmp_path / "out"]
    assert main([*map(str, command), "--max_new_tokens", "1"]) == 0
    assert f"nothing was written to memory: the text, {L} tokens, is but one segment" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert told["segments"] == [] and [len(part["looked"]) for part in told["answer"]] == [M]
    assert main([*map(str, command), "--max_new_tokens", "2", "--overwrite"]) == 0
    assert "nothing was written" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "memory.json").read_text())["segments"]) == 1


def test_files_of_an_older_inspection_go(copier, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mine = {"memory.json", "attention.png"}
    for name in mine | {"memory.png", "retrieval.json", "retrieval.png", "thesis.txt"}:
        (out / name).write_text("old")
    (tmp_path / "text.txt").write_text(" the" * L)
    command = ["inspect", "--adapter_path", copier[0], "--input", tmp_path / "text.txt", "--output_dir", out]
    assert main([*map(str, command), "--max_new_tokens", "1", "--overwrite"]) == 0
    assert {path.name: path.read_bytes() == b"old" for path in out.iterdir()} == {
        "thesis.txt": True,
        **dict.fromkeys(mine, False),
    }


def test_what_moves_is_neither_gained_nor_lost():
    assert changes([1, 2, 3, 4], [3, 4, 1, 2]) == ([], [])
    assert changes([1, 2, 3, 4], [5, 4, 6, 1, 2, 3]) == ([[5], [6]], [])
    assert changes([1, 2, 1], [2, 1, 3]) == ([[3]], [[1]])
    assert changes([None, 7, 8, None], [7, 8, None, None]) == ([], [])
    assert changes([1, 2, 3, 4], [5, 6, 1, 2]) == ([[5, 6]], [[3, 4]])
    assert changes([1, 2, 3], [1, None, 3]) == ([], [[2]])
    assert changes([], [None, 4]) == ([[4]], [])


def test_a_note_longer_than_the_memory_is_followed_as_far_as_it_fits(copier):
    tokenizer = copier[1]
    ids = tokenizer(" 12345", add_special_tokens=False).input_ids
    told = follow("12345", [[None] * M, ids[:M], ids[:M]], tokenizer)
    assert told["said"] == [[2, 3]]
    assert format_note(told) == "note '12345': said first after segment 2, kept to the end"


def test_a_line_tells_of_several_segments_what_is_true_of_all():
    def segment(number, *vectors, gained=()):
        told = [{"says": says, "probability": probability, "looked": []} for says, probability in vectors]
        return {"segment": number, "gained": list(gained), "lost": [], "vectors": told}

    segments = [
        segment(1, ("a", 0.9), ("x", 0.3), ("z", 0.2), gained=["a"]),
        segment(2, ("a", 0.7), ("y", 0.1), ("z", 0.4)),
        segment(3, ("z", 0.1), ("a", 0.9), (None, 0.0)),  # moved: neither gained nor lost
        segment(4, ("z", 0.2), ("a", 0.8), (None, 0.0)),
    ]
    assert [line.split(maxsplit=1) for line in format_segments(segments).splitlines()[1:]] == [
        ["1-2", "'a' 70  -  'z' 20   +'a'"],
        ["3-4", "'z' 10  'a' 80  -"],
    ]


@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("length", [SEGMENTS_AT_ONCE * L, 2 * SEGMENTS_AT_ONCE * L + 5, 3])
def test_reading_in_pieces_records_what_reading_at_once_does(backbones, alignment, length):
    backbone = AutoModelForCausalLM.from_pretrained(backbones["llama"])
    tokenizer = AutoTokenizer.from_pretrained(backbones["llama"])
    torch.manual_seed(0)
    settings = {"num_memory_tokens": M, "segment_length": L, "segment_alignment": alignment}
    model = RmtForCausalLM.from_backbone(backbone, **settings).eval()
    ids = torch.randint(5, 200, (length,)).tolist()
    told = answer_and_record(model, tokenizer, ids, [7], 1)[1]
    with model.recording() as whole:
        model(torch.tensor([[7]]), state=model.read(torch.tensor([ids])), logits_to_keep=1)
    assert len(told.written) == len(whole.written)
    for one, other in zip(told.written, whole.written, strict=True):
        assert one.looked.shape == other.looked.shape
        torch.testing.assert_close(one.probability, other.probability)
    torch.testing.assert_close(told.looked[0], whole.looked[0])
