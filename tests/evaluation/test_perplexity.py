"""Perplexity by context length: the same tokens at every length, and the figures that a hand computes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_fakes import EOS
from peft import LoraConfig, get_peft_model
from processes import run_ranks
from transformers import AutoModelForCausalLM, LlamaConfig

import lrmt
from lrmt.adapters.adapter import save_adapter
from lrmt.adapters.backbone import load_tokenizer
from lrmt.arguments import ModelArguments
from lrmt.cli import main
from lrmt.evaluation import grid
from lrmt.evaluation import perplexity as module
from lrmt.evaluation.contenders import Contender, build_contenders
from lrmt.evaluation.perplexity import build_record, measure_losses
from lrmt.evaluation.plots import draw_perplexity
from lrmt.models import LandmarkForCausalLM, RmtForCausalLM
from lrmt.tasks import prose
from lrmt.tasks.base import Example, Task, derive_rng
from lrmt.tasks.registry import build_task
from lrmt.training.build import build_model

SEGMENT, VOCAB = 12, 50
METHODS = {
    "rmt": (RmtForCausalLM, {"num_memory_tokens": 3, "segment_length": SEGMENT}),
    "landmark": (LandmarkForCausalLM, {"block_length": 3, "context_length": SEGMENT, "top_k": 1}),
}


class Numbers(Task):
    """Windows of a long random text whose every token is drawn from 16..49."""

    name, max_new_tokens = "text", 0
    tokens = np.random.default_rng(0).integers(16, VOCAB, size=500)

    def example(self, index, length):
        start = int(derive_rng(index, length).integers(len(self.tokens) - length + 1))
        ids = self.tokens[start : start + length]
        return Example(ids[:1], ids[1:], "", "", "text")


def build_backbone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    backbone = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone


@pytest.fixture(scope="module", params=METHODS)
def model(request):
    method, settings = METHODS[request.param]
    wrapper = method.from_backbone(build_backbone(), **settings)
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=method.memory_modules, task_type="CAUSAL_LM")
    peft = get_peft_model(wrapper, lora)
    with torch.no_grad():  # as if trained
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.1 if "lora" in name else 1.0) * torch.randn_like(parameter))
    return peft.eval()


def measure(contenders, segments, longest=4, num_samples=5, batch_size=2):
    options = {"longest": longest, "segment_length": SEGMENT, "num_samples": num_samples, "batch_size": batch_size}
    return measure_losses(contenders, Numbers(), segments, **options)


def text(index, segments, longest=4):
    """The tokens that sample `index` is given at a length, [1, T]."""
    example = Numbers().example(index, longest * SEGMENT)
    ids = np.concatenate([example.prompt_ids, example.answer_ids])
    return torch.tensor(ids[longest * SEGMENT - segments * SEGMENT :])[None]


def by_hand(logits, ids):
    """Mean of -log p of the last half segment, token by token."""
    total = 0.0
    for place in range(ids.shape[1] - SEGMENT // 2, ids.shape[1]):
        scores = logits[0, place - 1].double()
        total -= float(scores[ids[0, place]] - scores.exp().sum().log())
    return total / (SEGMENT // 2)


@pytest.mark.parametrize("segments", [1, 3, 4])
def test_losses_are_those_computed_by_hand(model, segments):
    measured = measure(build_contenders(model), segments)
    plain = build_backbone()
    with torch.no_grad():
        for index in range(5):
            ids = text(index, segments)
            expected = {model.config.model_type: by_hand(model(input_ids=ids).logits, ids)}
            with model.disable_adapter():
                expected["untrained"] = by_hand(model(input_ids=ids).logits, ids)
            end = ids[:, -SEGMENT:]
            expected["backbone"] = by_hand(plain(end).logits, end)
            assert {name: losses[index] for name, losses in measured.items()} == pytest.approx(expected, abs=1e-4)
            first, second, third = sorted(expected.values())
            assert min(second - first, third - second) > 1e-3  # taking one for another would show


def test_the_mean_is_the_model_s_own_loss(model):
    """On one batch; `loss` is a mean over rows of as many scored tokens."""
    ids = torch.cat([text(index, 3) for index in range(4)])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - SEGMENT // 2, -100)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=labels).loss)
    (losses,) = measure(build_contenders(model)[:1], 3, num_samples=4, batch_size=4).values()
    assert losses.mean() == pytest.approx(loss, abs=1e-5)
    record = build_record("rmt", 3 * SEGMENT, 3, losses)
    assert record["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_batches_do_not_matter(model):
    contenders = build_contenders(model)
    together, alone = measure(contenders, 2, batch_size=5), measure(contenders, 2, batch_size=1)
    for name in together:
        assert together[name] == pytest.approx(alone[name], abs=1e-4)


@pytest.mark.parametrize("num_samples", [1, 5, 6])
def test_ranks_share_the_texts(model, monkeypatch, num_samples):
    """Each text is measured by one of three, in the batches of one process, and all have the whole in the order of one."""
    contenders, measured = build_contenders(model), []
    alone = measure(contenders, 2, num_samples=num_samples)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(grid, "this_rank", lambda rank=rank: SimpleNamespace(process_index=rank, num_processes=3))
        monkeypatch.setattr(module, "gather_object", lambda share: measured.append(share) or share)
        measured.clear()
        measure(contenders, 2, num_samples=num_samples)
        shares.append(list(measured))
    for name, of_ranks in zip(alone, zip(*shares, strict=True), strict=True):
        pairs = sorted(pair for share in of_ranks for pair in share)
        assert [index for index, _ in pairs] == list(range(num_samples))
        assert [loss for _, loss in pairs] == alone[name].tolist()
        assert max(map(len, of_ranks)) <= -(-num_samples // 6) * 2  # batches of two


def test_the_same_tokens_are_scored_at_all_lengths():
    seen = {}

    def note(segments):
        def loss(ids, count):
            seen.setdefault(segments, []).extend((ids[row], count) for row in range(len(ids)))
            return torch.zeros(len(ids))

        return loss

    for segments in (1, 2, 4):
        measure([Contender("model", None, note(segments))], segments, num_samples=7)
    assert [len(rows) for rows in seen.values()] == [7, 7, 7]
    for segments, rows in seen.items():
        for (ids, count), (longest, _) in zip(rows, seen[4], strict=True):
            assert len(ids) == segments * SEGMENT
            assert count == SEGMENT // 2
            assert torch.equal(ids, longest[-len(ids) :])
    assert len({tuple(ids.tolist()) for ids, _ in seen[1]}) == 7  # places are drawn


def test_a_contender_with_a_window_sees_the_end(monkeypatch):
    shapes = []

    def loss(ids, count):
        shapes.append(tuple(ids.shape))
        return torch.zeros(len(ids))

    measure([Contender("all", None, loss), Contender("end", None, loss, window=SEGMENT)], 4, num_samples=3)
    assert shapes == [(2, 48), (2, 12), (1, 48), (1, 12)]
    shapes.clear()
    monkeypatch.setattr(grid, "MAX_BATCH_TOKENS", 3 * 2 * SEGMENT)  # long texts come in smaller batches
    measure([Contender("all", None, loss)], 2, num_samples=4, batch_size=4)
    assert shapes == [(3, 24), (1, 24)]


def test_a_record_has_the_standard_error_over_samples():
    record = build_record("rmt", 24, 2, np.array([1.0, 2.0, 3.0, 6.0]))
    assert list(record) == ["model", "task", "length_tokens", "segments", "perplexity", "nll", "nll_stderr", "n"]
    assert (record["task"], record["nll"], record["n"]) == ("perplexity", 3.0, 4)
    assert record["perplexity"] == pytest.approx(math.e**3)
    assert record["nll_stderr"] == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    alone = build_record("rmt", 24, 2, np.array([1.0]))
    assert json.loads(json.dumps(alone))["nll_stderr"] is None
    assert module.format_cell(alone) == "2.72"
    assert draw_perplexity([alone])[:4] == b"\x89PNG"


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def adapters(backbones, tmp_path_factory):
    """An adapter of each method that does something: LoRA's B, zero before training, is drawn at random."""
    settings = {
        "rmt": {"num_memory_tokens": 4, "segment_length": 48},
        "landmark": {"block_length": 8, "context_length": 64, "top_k": 2},
    }
    folders = {}
    for name, (method, _) in METHODS.items():
        arguments = ModelArguments(
            model_name_or_path=str(backbones["llama"]), lora_r=4, dtype="float32", load_in_4bit=False
        )
        torch.manual_seed(1)
        model = build_model(method, arguments, settings[name])
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.05)
        folders[name] = tmp_path_factory.mktemp("perplexity") / name
        save_adapter(model, folders[name], load_tokenizer(str(backbones["llama"])))
    return folders


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n".join(prose.write(200, 3)))
    return path


def evaluate(adapter, flags, *paths):
    try:
        return main(["evaluate", "--adapter_path", str(adapter), *flags.split(), *map(str, paths)])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(("name", "segment"), [("rmt", 48), ("landmark", 64)])
def test_from_an_adapter_to_its_files(adapters, book, tmp_path, capsys, monkeypatch, name, segment):
    out = tmp_path / "out"
    paths = ["--text_path", book, "--output_dir", out]
    flags = "--task perplexity --lengths 1 3 --num_samples 3 --batch_size 2"
    assert evaluate(adapters[name], flags, *paths) == 0
    records = json.loads((out / "perplexity.json").read_text())
    cells = [(n, model) for n in (1, 3) for model in (name, "untrained", "backbone")]
    assert [(r["segments"], r["model"]) for r in records] == cells
    assert [r["length_tokens"] for r in records] == [segment] * 3 + [3 * segment] * 3
    assert {(r["task"], r["n"]) for r in records} == {("perplexity", 3)}
    assert all(r["perplexity"] == pytest.approx(math.exp(r["nll"])) for r in records)
    assert sorted(p.name for p in out.iterdir()) == ["perplexity.json", "perplexity.png", "settings.json"]
    assert (out / "perplexity.png").read_bytes()[:4] == b"\x89PNG"
    # by hand: the model as it is loaded, the places as the task draws them
    model = lrmt.load(adapters[name])
    task = build_task("text", load_tokenizer(str(adapters[name])), split="test", text_path=book)
    losses = []
    for index in range(3):
        example = task.example(index, 3 * segment)
        ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.answer_ids]))[None]
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
        at = torch.arange(3 * segment - segment // 2, 3 * segment)
        losses.append(-float(scores[at - 1, ids[0, at]].mean()))
    assert records[3]["nll"] == pytest.approx(np.mean(losses), abs=1e-4)
    # the backbone is shown one segment at every length, and the scored tokens are the same
    assert records[2]["nll"] == pytest.approx(records[5]["nll"], abs=1e-6)
    assert records[0]["nll"] != pytest.approx(records[3]["nll"], abs=1e-3)
    table = capsys.readouterr().out
    assert f"perplexity: of the last {segment // 2} tokens of a text, ± standard error, n = 3" in table
    assert f"{records[0]['perplexity']:.2f} ± {records[0]['perplexity'] * records[0]['nll_stderr']:.2f}" in table

    # again: only the further length is measured; another longest text scores other tokens, which is refused
    monkeypatch.setattr(module, "measure_losses", recorder := Recorder(module.measure_losses))
    assert evaluate(adapters[name], flags.replace("1 3", "1 2 3"), *paths) == 0
    assert recorder.segments == [2]
    assert json.loads((out / "perplexity.json").read_text())[:6] == records
    capsys.readouterr()
    assert evaluate(adapters[name], flags.replace("1 3", "1 4"), *paths) == 2
    assert "longest of --lengths 3, now 4" in capsys.readouterr().err
    assert evaluate(adapters[name], flags.replace("1 3", "1 4"), *paths, "--overwrite") == 0
    assert [r["segments"] for r in json.loads((out / "perplexity.json").read_text())] == [1, 1, 1, 4, 4, 4]


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(adapters, book, tmp_path):
    flags = "--task perplexity --lengths 1 2 --num_samples 5 --batch_size 2"
    assert evaluate(adapters["rmt"], flags, "--text_path", book, "--output_dir", tmp_path / "one") == 0
    command = ["evaluate", "--adapter_path", adapters["rmt"], *flags.split(), "--text_path", book]
    ranks = run_ranks("lrmt.cli", *command, "--output_dir", tmp_path / "two", cwd=tmp_path)
    told = [rank.stdout.count("perplexity.json and") for rank in ranks]
    assert told == [1, 0]  # one of them writes, and tells
    one, two = ((tmp_path / name / "perplexity.json").read_text() for name in ("one", "two"))
    assert json.loads(two) == json.loads(one)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        "perplexity.json",
        "perplexity.png",
        "settings.json",
    ]


class Recorder:
    def __init__(self, function):
        self.function, self.segments = function, []

    def __call__(self, contenders, task, segments, **options):
        self.segments.append(segments)
        return self.function(contenders, task, segments, **options)


def test_defaults(adapters, book, capsys):
    assert evaluate(adapters["rmt"], "--task perplexity --text_path", book) == 0
    records = json.loads((adapters["rmt"] / "perplexity" / "perplexity.json").read_text())
    assert [r["segments"] for r in records[::3]] == [1, 2, 4, 8]
    assert {r["n"] for r in records} == {20}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task perplexity", "--task perplexity needs --text_path; got none"),
        ("--task perplexity qa1 --text_path BOOK", "--task perplexity stands alone; got qa1 too"),
        ("--task perplexity --text_path BOOK --dataset_name r.jsonl", "stands alone; got --dataset_name too"),
        ("--task passkey --text_path BOOK", "--text_path is of --task perplexity; got --task passkey"),
        ("--text_path BOOK", "--text_path is of --task perplexity; got no --task"),
        ("--task perplexty --text_path BOOK", "got --task perplexty"),
        ("--task perplexty", "did you mean perplexity?"),
        ("--task perplexity --text_path nowhere.txt", "--text_path nowhere.txt does not exist"),
        ("--task perplexity --text_path BOOK --lengths x", "--lengths"),
        ("--task perplexity --text_path BOOK --lengths 1 1M", "tokens for split test, fewer than one text of 999984"),
        ("--task perplexity --text_path BOOK --num_samples 0", "--num_samples must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(adapters, book, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert evaluate(adapters["rmt"], flags.replace("BOOK", str(book)), "--output_dir", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("lrmt: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


def test_too_little_memory_is_one_line(adapters, book, tmp_path, capsys, monkeypatch):
    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "measure_losses", exhausted)
    flags = "--task perplexity --batch_size 3 --text_path"
    assert evaluate(adapters["rmt"], flags, book, "--output_dir", tmp_path / "out") == 2
    assert "--batch_size 3 is too large" in capsys.readouterr().err


def test_perplexity_does_not_mix_with_an_accuracy_evaluation(adapters, book, tmp_path, capsys):
    flags = "--task passkey --lengths 2 --num_samples 1 --output_dir"
    assert evaluate(adapters["rmt"], flags, tmp_path / "out") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert evaluate(adapters["rmt"], "--task perplexity --text_path", book, "--output_dir", tmp_path / "out") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
