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
from lrmt.evaluation.readable import changes, follow, format_note
from lrmt.models import RmtForCausalLM
from lrmt.training.build import build_model

M, L = 4, 48


@pytest.fixture(scope="module")
def copier(backbones, tmp_path_factory):
    """An adapter whose backbone says what it is given: no layer adds anything, so that a memory lasts for ever. And its tokenizer."""
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
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        backbone.model.embed_tokens.weight.normal_()
    backbone.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    arguments = ModelArguments(
        model_name_or_path=str(folder / "backbone"), lora_r=2, load_in_4bit=False, dtype="float32"
    )
    model = build_model(
        RmtForCausalLM,
        arguments,
        {"num_memory_tokens": M, "segment_length": L, "memory_handover": "tokens"},
    )
    save_adapter(model, folder / "adapter", tokenizer)
    return folder / "adapter", tokenizer


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
    assert model.recording is not None
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
        assert written.ids.tolist() == logits.argmax(-1).tolist()
        torch.testing.assert_close(written.probability, logits.softmax(-1).amax(-1))
        torch.testing.assert_close(written.looked, shares[:, -M:, M : M + L])
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


def test_what_moves_is_neither_gained_nor_lost():
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
