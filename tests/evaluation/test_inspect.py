"""`lrmt inspect`: what it tells is what `generate` says was read, and a passage is the text of its block."""

import json
import struct
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import lrmt
from lrmt.adapters.adapter import save_adapter
from lrmt.adapters.backbone import load_tokenizer
from lrmt.arguments import ModelArguments
from lrmt.cli import main
from lrmt.evaluation.inspect import answer_and_record, build_records, shorten
from lrmt.evaluation.plots import draw_retrieval
from lrmt.models import LandmarkForCausalLM, Recording, RmtForCausalLM, Span
from lrmt.training.build import build_model

K, LAYERS, HEADS, TOP_K = 8, 2, 4, 2
TEXT = " ".join(f"Mary went to the garden and saw {n} birds." for n in range(30, 52))
QUESTION = "Where did Mary go?"


def save_random_adapter(backbone, folder, model_class, settings):
    """An adapter that does something: LoRA's B, zero before training, is drawn at random."""
    arguments = ModelArguments(model_name_or_path=str(backbone), lora_r=4, load_in_4bit=False, dtype="float32")
    torch.manual_seed(1)
    model = build_model(model_class, arguments, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_adapter(model, folder, load_tokenizer(str(backbone)))
    return folder


@pytest.fixture(scope="module")
def adapter(backbones, tmp_path_factory):
    settings = {"block_length": K, "context_length": 64, "top_k": TOP_K}
    folder = tmp_path_factory.mktemp("inspect") / "adapter"
    return save_random_adapter(backbones["llama"], folder, LandmarkForCausalLM, settings)


@pytest.fixture(scope="module")
def tokenizer(adapter):
    return AutoTokenizer.from_pretrained(adapter)


@pytest.fixture(scope="module")
def model(adapter):
    return lrmt.load(adapter)


def encode(tokenizer, text):
    return tokenizer(f" {text}", add_special_tokens=False).input_ids


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT + "\n")
    return path


@pytest.fixture
def inspect(adapter, text, tmp_path):
    def run(*flags, adapter=adapter, input=text, output_dir=tmp_path / "out"):
        paths = ["--adapter_path", adapter, "--input", input, "--output_dir", output_dir]
        try:
            return main(["inspect", *map(str, paths), *flags])
        except SystemExit as stop:
            return stop.code

    return run


def generate(model, tokenizer, document, prompt, num_tokens):
    """A call of `generate` made by hand: `(new ids, steps)`."""
    ids, steps = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        state=model.read(torch.tensor([document])),
        return_retrieval=True,
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ids[0, len(prompt) :].tolist(), steps


def expected_records(steps):
    """`{(answer token, layer, block): share}`, head by head."""
    shares = defaultdict(float)
    for number, step in enumerate(steps):
        for (row, layer), (blocks, parts) in step.items():
            assert (row, blocks.shape) == (0, (HEADS, TOP_K))
            for head in range(HEADS):
                for place in range(TOP_K):
                    if blocks[head, place] >= 0:
                        shares[number, layer, int(blocks[head, place])] += float(parts[head, place]) / HEADS
    return shares


@pytest.mark.parametrize("question", [QUESTION, None])
def test_command(inspect, model, tokenizer, tmp_path, capsys, question):
    flags = ["--max_new_tokens", "10", "--top", "3", *(["--question", question] if question else [])]
    assert inspect(*flags) == 0
    out = capsys.readouterr().out
    written = tmp_path / "out"
    assert sorted(path.name for path in written.iterdir()) == ["retrieval.json", "retrieval.png"]
    records = json.loads((written / "retrieval.json").read_text())

    document = encode(tokenizer, TEXT)
    document, prompt = (document, encode(tokenizer, question)) if question else (document[:-1], document[-1:])
    answer, steps = generate(model, tokenizer, document, prompt, 10)
    want = expected_records(steps)
    got = {(r["answer_token"], r["layer"], r["block"]): r["share"] for r in records}
    assert len(got) == len(records)
    assert got == pytest.approx(dict(want), rel=1e-4, abs=1e-7)
    assert {number for number, _, _ in got} == set(range(len(answer)))
    assert {layer for _, layer, _ in got} == set(range(LAYERS))
    assert [r["text"] for r in records] == [tokenizer.decode([answer[r["answer_token"]]]) for r in records]
    assert all(r["start_token"] == r["block"] * (K - 1) for r in records)

    per_token, total = defaultdict(float), defaultdict(float)
    for (number, _, block), share in want.items():
        per_token[number, block] += 100 * share / LAYERS
        total[block] += 100 * share / LAYERS
    answer_line, _, _, *token_lines, _, _, first, second, third, _, last = out.splitlines()
    assert answer_line == f"answer: {tokenizer.decode(answer, skip_special_tokens=True)!r}"
    assert last == f"retrieval.json and retrieval.png are in {written}"
    assert len(token_lines) == len(answer)
    for number, line in enumerate(token_lines):
        shown = line.strip().removeprefix(repr(tokenizer.decode([answer[number]]))).split("   ")
        best = sorted((score for (n, _), score in per_token.items() if n == number), reverse=True)[:3]
        pairs = [pair.split(": ") for pair in shown if pair.strip()]
        assert [float(score) for _, score in pairs] == pytest.approx(best, abs=0.051)
        for block, score in pairs:
            assert per_token[number, int(block)] == pytest.approx(float(score), abs=0.051)
    ids = document + prompt + answer
    for line, score in zip((first, second, third), sorted(total.values(), reverse=True), strict=False):
        block, rest = line.split(": ", 1)
        shown, passage = rest.split(maxsplit=1)
        assert float(shown) == pytest.approx(score, abs=0.051)
        assert total[int(block)] == pytest.approx(score, abs=0.051)
        tokens = ids[int(block) * (K - 1) :][: K - 1]
        assert passage == " ".join(tokenizer.decode(tokens).split())
        assert passage in f"{TEXT} {question}"
    width, height = png_size((written / "retrieval.png").read_bytes())
    assert min(width, height) > 200


def test_a_block_holds_the_tokens_that_its_passage_shows(model, tokenizer):
    """The first layer's values depend on nothing but the token: a block read alone has those of the block in the text."""
    ids = encode(tokenizer, TEXT)
    whole = model.read(torch.tensor([ids])).tensors()["values"][0, 0]  # [H_kv, N, K, D]
    assert whole.shape[1] == len(ids) // (K - 1) > 20
    for block in (0, 1, 7, 20):
        tokens = ids[block * (K - 1) : (block + 1) * (K - 1)]
        alone = model.read(torch.tensor([[*tokens, 1]])).tensors()["values"][0, 0]
        torch.testing.assert_close(whole[:, block], alone[:, 0])
        assert not torch.allclose(whole[:, block + 1], alone[:, 0], atol=1e-3)


def test_shares_of_a_head_are_at_most_one(model, tokenizer, inspect, tmp_path):
    _, steps = generate(model, tokenizer, encode(tokenizer, TEXT), encode(tokenizer, QUESTION), 10)
    sums = torch.stack([shares.sum(-1) for step in steps for _, shares in step.values()])
    assert sums.max() <= 1 + 1e-5
    assert sums.min() > 0
    assert inspect("--question", QUESTION, "--max_new_tokens", "10") == 0
    totals = defaultdict(float)
    for record in json.loads((tmp_path / "out" / "retrieval.json").read_text()):
        totals[record["answer_token"], record["layer"]] += record["share"]
    assert len(totals) == len(steps) * LAYERS
    assert max(totals.values()) <= 1 + 1e-5
    assert sorted(totals.values()) == pytest.approx(sorted(sums.mean(-1).tolist()), rel=1e-4)


def test_places_without_a_block_are_no_records():
    blocks, shares = torch.tensor([[3, -1], [5, 3]]), torch.tensor([[0.5, 0.0], [0.25, 0.125]])
    teller = SimpleNamespace(config=SimpleNamespace(block_length=K))
    steps = [LandmarkForCausalLM._spans(teller, step) for step in ({}, {(0, 1): (blocks, shares)})]
    assert build_records(steps, ["a", "b"]) == [
        {"answer_token": 1, "text": "b", "layer": 1, "block": 3, "share": 0.3125, "start_token": 21},
        {"answer_token": 1, "text": "b", "layer": 1, "block": 5, "share": 0.125, "start_token": 35},
    ]


def save_one_block(tokenizer, path):
    """A text of exactly one block, whose landmark comes with the next token only."""
    ids = encode(tokenizer, TEXT)[: K - 1]
    path.write_text(tokenizer.decode(ids))
    assert encode(tokenizer, path.read_text().strip()) == ids
    return path


def test_an_answer_that_outgrows_what_is_near(inspect, tokenizer, tmp_path):
    """The first answer token follows the block, the second completes it by its landmark, from the third on it is read."""
    assert inspect("--max_new_tokens", "5", input=save_one_block(tokenizer, tmp_path / "short.txt")) == 0
    records = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert {record["answer_token"] for record in records} == {2, 3, 4}


def test_a_text_that_is_all_near_says_so(inspect, tokenizer, tmp_path, capsys):
    path = save_one_block(tokenizer, tmp_path / "short.txt")
    assert inspect() == 0  # leaves a drawing behind, which would be of another text
    capsys.readouterr()
    assert inspect("--max_new_tokens", "1", "--overwrite", input=path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"no block was retrieved: the text, {K - 1} tokens, is shorter than what is near")
    assert [*filter(None, lines[3:])] == [f"retrieval.json is in {tmp_path / 'out'}"]
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text()) == []
    assert not (tmp_path / "out" / "retrieval.png").exists()


def test_bad_input_is_one_line_and_writes_nothing(inspect, backbones, tmp_path, capsys):
    files = {"empty": b" \n", "latin": "Ein B\xe4r".encode("latin-1"), "short": b"Mary went."}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    settings = {"num_memory_tokens": 4, "segment_length": 48}
    rmt = save_random_adapter(backbones["llama"], tmp_path / "rmt", RmtForCausalLM, settings)
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("precious")
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for flags, paths, message in [
        ([], {"input": tmp_path / "missing.txt"}, "missing.txt cannot be read (No such file"),
        ([], {"input": tmp_path}, "cannot be read (Is a directory)"),
        ([], {"input": tmp_path / "empty.txt"}, "empty.txt is empty"),
        ([], {"input": tmp_path / "latin.txt"}, "latin.txt is not UTF-8 text (byte 5)"),
        ([], {"input": tmp_path / "short.txt"}, "short.txt is shorter than one block or segment: "),
        ([], {"input": tmp_path / "short.txt", "adapter": rmt}, "short.txt is shorter than one block or segment: "),
        (["--note", "7", " "], {}, "--note is empty"),
        ([], {"adapter": tmp_path / "nowhere"}, "--adapter_path must be a folder"),
        ([], {"output_dir": used}, "is not empty; name another, or give --overwrite"),
        ([], {"output_dir": used / "thesis.txt"}, "--output_dir must be a folder"),
        (["--max_new_tokens", "0"], {}, "--max_new_tokens must be at least 1; got 0"),
        (["--top", "0"], {}, "--top must be at least 1; got 0"),
        (["--question", " "], {}, "--question is empty"),
    ]:
        assert inspect(*flags, **paths) == 2, message
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("lrmt: error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_text_is_read_at_once_where_pieces_would_change_the_answer(model, tokenizer):
    """Landmark attention reads in chunks from where it goes on: where those end decides what is near."""
    length = 17 * 64 + 50
    ids = torch.randint(5, 200, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    told = answer_and_record(model, tokenizer, ids, [7], 1)[1]
    with model.recording() as whole:
        model(torch.tensor([[7]]), state=model.read(torch.tensor([ids])), logits_to_keep=1)
    assert told.read == whole.read[-1:]


def test_the_backbone_s_generation_settings_change_nothing(model, tokenizer):
    ask = model, tokenizer, encode(tokenizer, TEXT), encode(tokenizer, QUESTION), 8
    plain, owner = answer_and_record(*ask)[0], model.get_base_model()
    own, owner.generation_config = owner.generation_config, GenerationConfig(repetition_penalty=9.0, num_beams=2)
    try:
        assert answer_and_record(*ask)[0] == plain
    finally:
        owner.generation_config = own


def test_any_method_that_tells_what_it_reads(inspect, backbones, tmp_path, monkeypatch, capsys):
    """Segments of a recurrent memory, as well as blocks: the spans say where their text begins and ends."""
    segment = 48
    settings = {"num_memory_tokens": 4, "segment_length": segment}
    rmt = save_random_adapter(backbones["llama"], tmp_path / "rmt", RmtForCausalLM, settings)
    forward = RmtForCausalLM.forward

    @contextmanager
    def recording(self):
        told = Recording()

        def record(self, *arguments, **named):
            told.read.append([[Span(0, 0, 0, segment, 0.25), Span(1, 2, 2 * segment, 3 * segment, 0.75)]])
            return forward(self, *arguments, **named)

        with monkeypatch.context() as patched:
            patched.setattr(RmtForCausalLM, "forward", record)
            yield told

    monkeypatch.setattr(RmtForCausalLM, "recording", recording)
    assert inspect("--max_new_tokens", "3", "--question", QUESTION, adapter=rmt) == 0
    records = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert {(r["layer"], r["block"], r["share"], r["start_token"]) for r in records} == {
        (0, 0, 0.25, 0), (1, 2, 0.75, 2 * segment),
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(rmt)
    passage = " ".join(tokenizer.decode(encode(tokenizer, TEXT)[2 * segment : 3 * segment]).split())
    assert f"       2: {100 * 0.75 / LAYERS * len({r['answer_token'] for r in records}):<6.1f}" in (
        out := capsys.readouterr().out
    )
    assert passage[:80] in out


def test_overwrite_leaves_other_files_alone(inspect, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert inspect("--max_new_tokens", "1", "--overwrite") == 0
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    assert len(json.loads((tmp_path / "out" / "retrieval.json").read_text())) > 0


def test_passages_are_one_line_and_short():
    assert shorten(" a\n\n b\tc ") == "a b c"
    assert shorten("x" * 100) == "x" * 100
    assert shorten("x" * 101) == "x" * 99 + "…"


def png_size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_drawing_grows_with_blocks_and_layers_up_to_a_page():
    sizes = [png_size(draw_retrieval(np.random.rand(*shape), list(range(shape[1])))) for shape in ((2, 1), (12, 40))]
    assert sizes[0][0] > 300
    assert sizes[1][0] > 2 * sizes[0][0]
    assert sizes[1][1] > 2 * sizes[0][1]
    assert max(png_size(draw_retrieval(np.random.rand(80, 3000), list(range(3000))))) < 5000
