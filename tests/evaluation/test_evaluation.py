"""From lengths to results.json and heatmap.png, with a model that knows the answer up to four segments back."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from evaluation_fakes import EOS, PAD, SEGMENT, FakeModel, FakeTask, FakeTokenizer
from safetensors.torch import save_file

import lrmt
from lrmt.errors import UsageError
from lrmt.evaluation import grid, run
from lrmt.evaluation.contenders import answer, build_contenders, pad_left
from lrmt.evaluation.plots import draw_heatmap
from lrmt.evaluation.results import ResultsFolder, build_record, format_table
from lrmt.evaluation.settings import EvaluationSettings
from lrmt.lengths import format_tokens, parse_segments

KEYS = ["model", "task", "length_tokens", "segments", "accuracy", "ci_low", "ci_high", "n"]


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """An adapter folder for `run_evaluation`, and the fake that is loaded from it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    save_file({"weights": torch.zeros(1)}, folder / "adapter_model.safetensors")
    model = FakeModel(reach=4)
    monkeypatch.setattr(lrmt, "load", lambda path, **options: model, raising=False)
    monkeypatch.setattr(run, "load_tokenizer", lambda *place: FakeTokenizer())
    monkeypatch.setattr(run, "read_segment_length", lambda path: SEGMENT)
    monkeypatch.setattr(run, "build_tasks", lambda settings, *_: {t: FakeTask() for t in settings.task})
    return folder, model


def evaluate(folder, *lengths, **options):
    settings = {"task": ("passkey",), "num_samples": 5, "batch_size": 2} | options
    return run.run_evaluation(EvaluationSettings(str(folder), lengths=lengths, **settings))


def accuracies(records, model):
    return {r["segments"]: r["accuracy"] for r in records if r["model"] == model}


def test_accuracy_by_length_beside_two_baselines(adapter, capsys):
    folder, _ = adapter
    records = evaluate(folder, "1", "2", "4", "8")
    assert accuracies(records, "rmt") == {1: 1.0, 2: 1.0, 4: 1.0, 8: 0.0}
    assert accuracies(records, "untrained") == {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0}
    assert accuracies(records, "backbone") == {1: 1.0, 2: 0.0, 4: 0.0, 8: 0.0}
    written = json.loads((folder / "evaluation" / "results.json").read_text())
    assert written == records
    assert all(list(record) == KEYS for record in written)
    assert [r["length_tokens"] for r in written[::3]] == [16, 32, 64, 128]
    assert written[0]["ci_low"] == pytest.approx(0.5655, abs=1e-4)
    assert written[0]["ci_high"] == 1.0
    assert sorted(p.name for p in (folder / "evaluation").iterdir()) == ["heatmap.png", "results.json", "settings.json"]
    table = capsys.readouterr().out
    assert "100.0 [56.6, 100.0]" in table


def test_the_backbone_sees_the_last_segment_and_batches_are_as_asked(adapter):
    folder, model = adapter
    evaluate(folder, "4")
    shapes = {who: [shape for name, shape in model.calls if name == who] for who in ("rmt", "untrained", "backbone")}
    assert shapes["rmt"] == shapes["untrained"] == [(2, 58), (2, 58), (1, 58)]
    assert shapes["backbone"] == [(2, 16), (2, 16), (1, 16)]


def test_long_texts_come_in_smaller_batches(adapter, monkeypatch):
    folder, model = adapter
    monkeypatch.setattr(grid, "MAX_BATCH_TOKENS", 3 * SEGMENT)
    evaluate(folder, "1", "2", "8", batch_size=4, num_samples=4)
    assert [shape[0] for name, shape in model.calls if name == "rmt"] == [3, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_finished_cells_are_kept_and_further_lengths_measured(adapter):
    folder, model = adapter
    evaluate(folder, "1", "2")
    model.calls.clear()
    records = evaluate(folder, "1", "2", "4", batch_size=5)
    assert {shape[1] for _, shape in model.calls} == {58, 16}  # four segments, and the backbone's window
    assert len(model.calls) == 3
    assert accuracies(records, "rmt") == {1: 1.0, 2: 1.0, 4: 1.0}


def test_a_killed_run_goes_on_where_it_was(adapter):
    folder, model = adapter
    generate, model.reach = model.generate, 9
    calls = []

    def killed(**arguments):
        calls.append(1)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return generate(**arguments)

    model.generate = killed
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, "1", "2")
    kept = json.loads((folder / "evaluation" / "results.json").read_text())
    assert [r["segments"] for r in kept] == [1, 1, 1]
    model.generate, model.enabled = generate, True
    model.calls.clear()
    assert len(evaluate(folder, "1", "2")) == 6
    assert {shape[1] for name, shape in model.calls if name == "rmt"} == {26}


@pytest.mark.parametrize("change", [{"seed": 1}, {"scoring": "strict"}, {"num_samples": 6}, {"split": "validation"}])
def test_another_evaluation_is_not_overwritten(adapter, change):
    folder, model = adapter
    evaluate(folder, "1")
    before = {p.name: p.read_bytes() for p in (folder / "evaluation").iterdir()}
    model.calls.clear()
    with pytest.raises(UsageError, match=f"--output_dir .*{next(iter(change))}.*--overwrite"):
        evaluate(folder, "1", **change)
    assert not model.calls
    assert {p.name: p.read_bytes() for p in (folder / "evaluation").iterdir()} == before
    assert len(evaluate(folder, "2", overwrite=True, **change)) == 3


def test_a_retrained_adapter_is_another_evaluation(adapter):
    folder, _ = adapter
    evaluate(folder, "1")
    save_file({"weights": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="adapter"):
        evaluate(folder, "1")


def test_lengths_that_were_named_keep_their_name(adapter, monkeypatch):
    folder, _ = adapter
    records = evaluate(folder, "2", "0.1k")
    assert [(r["length_tokens"], r.get("length")) for r in records[::3]] == [(32, None), (96, "100")]
    assert list(records[-1]) == [*KEYS, "length"]


def test_settings_from_before_a_flag_are_those_of_its_default(adapter):
    folder, _ = adapter
    evaluate(folder, "1")
    path = folder / "evaluation" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["max_n_facts"], settings["question_position"]
    path.write_text(json.dumps(settings))
    assert len(evaluate(folder, "1", "2")) == 6
    path.write_text(json.dumps(settings))
    with pytest.raises(UsageError, match='question_position "last", now "first"'):
        evaluate(folder, "1", question_position="first")
    del settings["adapter"]
    path.write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="adapter null, now"):
        evaluate(folder, "1")


def test_what_a_folder_of_texts_holds_counts_and_not_where_it_is(adapter, tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "book.txt").write_text(text)
        (tmp_path / name / "qa1_test.txt").write_text(text)

    def identity(**options):
        return EvaluationSettings(str(adapter[0]), task=("qa1",), **options).identity()

    for flag in ("babi_dir", "background_dir"):
        first, same, other = (identity(**{flag: str(tmp_path / name)}) for name in "abc")
        assert first == same and first[flag] != other[flag]
    (tmp_path / "a" / "deep" / "book.txt").write_text("six")
    assert identity(background_dir=str(tmp_path / "a")) != identity(background_dir=str(tmp_path / "b"))
    assert identity(background_dir=str(tmp_path / "b" / "qa1_test.txt"))["background_dir"]


def test_over_another_backbone_it_is_another_evaluation(adapter, backbones, tmp_path):
    """Told by its weights, not by its place."""
    same = shutil.copytree(backbones["llama"], tmp_path / "same")
    places = (None, backbones["llama"], same, backbones["mistral"])
    first, one, copy, other = (
        EvaluationSettings(str(adapter[0]), task=("qa1",), model_name_or_path=place and str(place)).identity()
        for place in places
    )
    assert first != one == copy != other


def test_the_model_is_opened_as_was_asked(adapter, monkeypatch):
    folder, model = adapter
    opened = []
    monkeypatch.setattr(lrmt, "load", lambda path, **options: opened.append(options) or model)
    reading = {"top_k": 3, "offload_blocks": True}
    evaluate(folder, "1", reading=reading, load_in_4bit=False, model_name_or_path="elsewhere/llama")
    asked = {"load_in_4bit": False, "dequantize": False, "model_name_or_path": "elsewhere/llama", "device_map": None}
    assert [options | {"device_map": None} for options in opened] == [reading | asked]


def test_a_second_endpoint_is_a_column_of_its_own(adapter):
    api = {"task": ("passkey",), "baseline": ("api",)}
    one, two = (EvaluationSettings(str(adapter[0]), api_model=name, **api).identity() for name in ("a/x", "b/y"))
    assert one == two


def test_overwriting_removes_the_predictions_of_what_is_replaced_alone(adapter, tmp_path):
    folder, _ = adapter
    kept, gone = tmp_path / "out" / "babilong_evals", []
    for place in ("adapter/rmt", "of_before/backbone", "microsoft/phi"):
        stem = "qa1_4k_instruction_no_examples_no_post_prompt_no_chat_template_no"
        for name in (f"{stem}.csv", f"{stem}.json", "notes.csv", f"{stem}.txt"):
            (kept / place).mkdir(parents=True, exist_ok=True)
            (kept / place / name).write_text("x")
            gone += [kept / place / name] if name in (f"{stem}.csv", f"{stem}.json") and place[0] != "m" else []
    (tmp_path / "out" / "results.json").write_text(json.dumps(RECORDS))
    before = {path for path in kept.rglob("*") if path.is_file()}
    evaluate(folder, "1", output_dir=str(tmp_path / "out"), overwrite=True)
    assert {path for path in kept.rglob("*") if path.is_file()} == before - set(gone) and len(gone) == 4


@pytest.mark.parametrize(
    ("flag", "value"),
    [("api_concurrency", 0), ("api_max_retries", -1), ("api_timeout", 0.0), ("api_timeout", float("nan"))],
)
def test_what_an_endpoint_cannot_work_with_is_refused(adapter, flag, value):
    with pytest.raises(UsageError, match=f"--{flag} must be .*; got {value}"):
        EvaluationSettings(str(adapter[0]), task=("passkey",), **{flag: value})


def test_a_folder_of_other_files_is_refused_and_never_emptied(adapter, tmp_path):
    folder, _ = adapter
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        evaluate(folder, "1", output_dir=str(other))
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    evaluate(folder, "1", output_dir=str(other), overwrite=True)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_length_that_nothing_fits_into_writes_nothing(adapter, monkeypatch):
    folder, model = adapter
    monkeypatch.setattr(run, "read_segment_length", lambda path: 4)
    with pytest.raises(UsageError, match="fits"):
        evaluate(folder, "1", "4")
    assert not (folder / "evaluation").exists()
    assert not model.calls


def test_too_little_memory_fails_one_contender_and_the_others_go_on(adapter, capsys):
    folder, model = adapter
    generate = model.generate

    def exhausted(**arguments):
        if model.enabled:
            raise torch.OutOfMemoryError
        return generate(**arguments)

    model.generate = exhausted
    records = evaluate(folder, "1", "2")
    failed = [(r["segments"], r["error"]) for r in records if r["model"] == "rmt"]
    assert failed == [(1, "out of memory, one text at a time"), (2, "out of memory, one text at a time")]
    assert accuracies(records, "backbone") == {1: 1.0, 2: 0.0}
    assert accuracies(records, "untrained") == {1: 0.0, 2: 0.0}
    assert "rmt failed on passkey, 1 segments: out of memory" in capsys.readouterr().out
    model.generate = generate  # on another machine
    assert accuracies(evaluate(folder, "1", "2"), "rmt") == {1: 1.0, 2: 1.0}


def test_a_batch_too_large_is_halved(adapter):
    folder, model = adapter
    generate, sizes = model.generate, []

    def small(input_ids, **arguments):
        if model.enabled:
            sizes.append(len(input_ids))
            if len(input_ids) > 2:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory")
        return generate(input_ids=input_ids, **arguments)

    model.generate = small
    records = evaluate(folder, "1", batch_size=9, num_samples=11, output_dir=str(folder / "small"))
    assert sizes == [9, 4, 2, 2, 2, 2, 1, 2]  # 2 fit, and the second batch has no more
    assert accuracies(records, "rmt") == {1: 1.0}

    def broken(**arguments):
        raise RuntimeError("a device-side assert")

    model.generate = broken
    with pytest.raises(RuntimeError, match="device-side"):
        evaluate(folder, "2")


def test_a_merged_model_has_one_column(adapter, monkeypatch):
    class Merged:
        config, generate = FakeModel.config, FakeModel().generate

    assert [c.name for c in build_contenders(Merged())] == ["rmt"]
    assert [c.name for c in build_contenders(FakeModel())] == ["rmt", "untrained", "backbone"]


def test_rows_of_unlike_length_are_padded_on_the_left():
    ids, mask = pad_left([np.array([1, 2, 3]), np.array([4])], PAD)
    assert ids.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_answer_ends_at_the_end_of_sequence():
    class Echo:
        window = None

        def generate(self, input_ids, **kwargs):
            assert kwargs["do_sample"] is False
            assert kwargs["eos_token_id"] == EOS
            return torch.cat([input_ids, torch.tensor([[1, 2, EOS, 3], [4, 5, 6, 7]])], dim=1)

    assert answer(Echo(), [np.array([1]), np.array([2, 3])], FakeTokenizer(), 4) == ["12", "4567"]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("1", 1),
        ("32", 32),
        ("1k", 1),
        ("4k", 7),
        ("4K", 7),
        ("1M", 1953),
        ("0.5M", 976),
        ("1.5k", 2),
        ("512k", 1000),
        ("0k", 0),
    ],
)
def test_lengths_are_segments_or_tokens_rounded_down(text, segments):
    assert parse_segments(text, 512) == segments


@pytest.mark.parametrize("text", ["0", "-1", "x", "4kb", "1.5", "", "k", "1e3"])
def test_other_lengths_are_refused(text):
    with pytest.raises(UsageError, match="--lengths"):
        parse_segments(text)
    with pytest.raises(UsageError, match="--lengths"):
        parse_segments(text, 512)


def test_fewer_tokens_than_a_segment_are_refused():
    with pytest.raises(UsageError, match="--lengths 1k .* 1024"):
        parse_segments("1k", 1024)


def test_cells_are_sorted_and_told_once(adapter):
    settings = EvaluationSettings(str(adapter[0]), task=("qa2", "qa1", "qa2"), lengths=("4", "64", "1", "1"))
    assert [cell[:2] for cell in settings.cells(SEGMENT)] == [
        ("qa2", 1), ("qa2", 4), ("qa2", 64), ("qa1", 1), ("qa1", 4), ("qa1", 64),
    ]  # fmt: skip
    settings = EvaluationSettings(str(adapter[0]), task=("qa1",), lengths=("4", "1k"), depths=(0.5, 0.0))
    assert settings.cells(SEGMENT) == [
        ("qa1", 4, 0.5, "64", 64), ("qa1", 62, 0.5, "1k", 992), ("qa1", 4, 0.0, "64", 64), ("qa1", 62, 0.0, "1k", 992),
    ]  # fmt: skip


RECORDS = [
    build_record(model, task, 1024 * n, n, right, 50)
    for task in ("qa1", "qa2")
    for n in (1, 2, 16)
    for model, right in (("rmt", 50 - n), ("untrained", 7), ("backbone", 25))
]


def test_table_has_a_block_a_task_and_a_row_a_length():
    lines = format_table(RECORDS[:-1]).splitlines()
    assert lines[0] == "qa1: accuracy in %, 95 % interval, n = 50"
    assert lines[1].split() == ["segments", "tokens", "rmt", "untrained", "backbone"]
    assert lines[3].split() == [
        "1",
        "1,024",
        "98.0",
        "[89.5,",
        "99.6]",
        "14.0",
        "[",
        "7.0,",
        "26.2]",
        "50.0",
        "[36.6,",
        "63.4]",
    ]
    assert len({len(line) for line in lines[1:6]}) == 1
    assert lines[-1].endswith(" -")  # not measured


def png_size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_heatmap_is_a_png_that_grows_with_the_grid():
    width, height = png_size(draw_heatmap(RECORDS))
    assert 500 < width < 1500
    assert 400 < height < 1500
    wide, low = png_size(
        draw_heatmap([r | {"segments": n, "length_tokens": n} for n in range(12) for r in RECORDS[:3]])
    )
    assert wide > width
    assert low < height
    assert min(png_size(draw_heatmap(RECORDS[:1]))) > 200


@pytest.mark.parametrize(
    ("tokens", "label"),
    [(512, "512"), (1000, "1k"), (1024, "1k"), (8192, "8.2k"), (9960, "10k"), (16384, "16k"), (998_400, "998k")]
    + [(999_936, "1M"), (1_048_576, "1M"), (2_500_000, "2.5M"), (10_000_000, "10M")],
)
def test_context_sizes_are_short(tokens, label):
    assert format_tokens(tokens) == label


def test_a_damaged_result_file_is_refused(tmp_path):
    folder = ResultsFolder(tmp_path / "out", {"seed": 0})
    folder.prepare()
    folder.add(RECORDS[:1])
    assert ResultsFolder(tmp_path / "out", {"seed": 0}).records == RECORDS[:1]
    (tmp_path / "out" / "results.json").write_text("[{")
    with pytest.raises(UsageError, match="holds no evaluation"):
        ResultsFolder(tmp_path / "out", {"seed": 0})
