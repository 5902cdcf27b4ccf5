"""Data sets on disk: the public schema, exact lengths, the same bytes whatever the workers, resuming, refusals."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys

import datasets
import pytest
from transformers import AutoTokenizer

from lrmt.data import write as module
from lrmt.data.samples import TINY_TOKENIZER, open_tasks
from lrmt.data.settings import BuildSettings, ShowSettings
from lrmt.data.show import highlight, show
from lrmt.data.write import build, chat
from lrmt.errors import UsageError
from lrmt.lengths import parse_tokens, spell_length
from lrmt.tasks import babi, prose
from lrmt.tasks.registry import build_task

TASKS, LENGTHS = ("qa1", "qa3", "niah_single"), ("0k", "1k", "4k")
FACT = re.compile(rf"(?:{'|'.join(babi.PEOPLE)}) (?:{'|'.join(babi.GO + babi.GET + babi.DROP)}) the \w+(?: there)?\.")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Caches of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("LRMT_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="module")
def books(home):
    folder = home / "books"
    folder.mkdir()
    for seed in (1, 2):
        (folder / f"{seed}.txt").write_text("\n".join(prose.write(300, seed)))
    return folder


def settings(books, folder, **options):
    given = {"task": TASKS, "lengths": LENGTHS, "num_samples": 3, "background_dir": str(books)}
    return BuildSettings(output_dir=str(folder), **given | options)


@pytest.fixture(scope="module")
def built(books, home):
    folder = home / "built"
    build(settings(books, folder))
    return folder


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(TINY_TOKENIZER)


def digests(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def load(folder, length, task):
    return datasets.load_dataset(str(folder), length, split=task)


@pytest.mark.parametrize("length", LENGTHS)
def test_read_back_it_has_the_public_schema_and_exact_lengths(built, tiny, length):
    for task in TASKS:
        rows = load(built, length, task)
        assert rows.column_names == ["input", "question", "target"] and len(rows) == 3
        for row in rows:
            tokens = len(tiny(f" {row['input']}", add_special_tokens=False)["input_ids"])
            facts = FACT.findall(row["input"])
            assert row["input"] == row["input"].strip()
            if task == "niah_single":
                assert f" is: {row['target']}." in row["input"]
            else:
                assert babi.solve(facts, row["question"], task)[0] == row["target"]
                assert row["question"].endswith("? ")  # the space of the bAbI files
            if length == "0k":
                assert task == "niah_single" or row["input"] == " ".join(facts)
            else:
                assert tokens == parse_tokens(length) - 300


def test_its_rows_are_those_of_the_task(built, books, tiny):
    task = build_task("qa1", tiny, split="test", background_dir=books)
    for index, row in enumerate(load(built, "4k", "qa1")):
        made = task.row(index, 3700)
        assert row == {"input": made.input, "question": made.question, "target": made.target}


def test_four_workers_write_the_same_bytes(built, books, tmp_path):
    build(settings(books, tmp_path / "four", num_workers=4))
    assert digests(tmp_path / "four") == digests(built)


def test_a_build_goes_on_where_it_was_and_takes_in_more(built, books, tmp_path, monkeypatch):
    folder, written = tmp_path / "part", []
    write = module._write_shard
    monkeypatch.setattr(module, "_write_shard", lambda *given: written.append(given[2].path.name) or write(*given))
    build(settings(books, folder, task=("qa1",), lengths=("1k",)))
    build(settings(books, folder, task=("qa1",), lengths=("1k",)))
    assert written == ["qa1-00000-of-00001.parquet"]
    build(settings(books, folder))
    assert len(written) == 9 and digests(folder) == digests(built)


def test_an_interrupted_build_leaves_only_whole_files(built, books, tmp_path, monkeypatch):
    folder, write, done = tmp_path / "cut", module._write_parquet, []

    def interrupted(path, records):
        if len(done) == 4:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(path)
        write(path, records)

    monkeypatch.setattr(module, "_write_parquet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(settings(books, folder))
    kept = digests(folder)
    assert len(kept) == 5 and kept.items() <= digests(built).items()  # four files and the identity
    monkeypatch.undo()
    build(settings(books, folder))
    assert digests(folder) == digests(built)


def test_long_cells_are_several_files_of_the_same_rows(built, books, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TOKENS", 7400)
    build(settings(books, tmp_path / "shards", task=("qa1",)))
    files = sorted(p.name for p in (tmp_path / "shards" / "4k").iterdir())
    assert files == ["qa1-00000-of-00002.parquet", "qa1-00001-of-00002.parquet"]
    assert load(tmp_path / "shards", "4k", "qa1").to_list() == load(built, "4k", "qa1").to_list()


def test_jsonl_and_chats(built, books, tmp_path):
    build(settings(books, tmp_path / "jsonl", format="jsonl", lengths=("1k",)))
    assert load(tmp_path / "jsonl", "1k", "qa3").to_list() == load(built, "1k", "qa3").to_list()
    build(settings(books, tmp_path / "chat", format="chat", lengths=("1k",), question_position="first"))
    lines = (tmp_path / "chat" / "1k" / "qa1-00000-of-00001.jsonl").read_text().splitlines()
    row = load(built, "1k", "qa1")[2]
    user, assistant = json.loads(lines[2])["messages"]
    assert assistant == {"role": "assistant", "content": row["target"]}
    assert user["role"] == "user" and row["input"] in user["content"]
    assert user["content"].startswith(f"Question: {row['question'].strip()}\n")


def test_chat_has_the_question_where_it_is_asked_for(tiny, books):
    row = build_task("qa1", tiny, background_dir=books).row(0, 200)
    for position, counts in (("last", (0, 1)), ("first", (1, 0)), ("both", (1, 1))):
        before, after = chat(row, position)[0]["content"].split(row.input)
        assert (before.count("Question: "), after.count("Question: ")) == counts


def test_a_built_folder_is_a_data_set_to_read(built, tiny):
    task = build_task(
        "dataset", tiny, split="test", dataset_name=built, dataset_config="4k", dataset_split="niah_single"
    )
    example, row = task.example(1), load(built, "4k", "niah_single")[1]
    assert (task.num_examples(0), example.target) == (3, row["target"])
    question = len(tiny(f" {row['question']}", add_special_tokens=False)["input_ids"])
    assert len(example.prompt_ids) == 3700 + question
    with pytest.raises(UsageError, match="cannot load --dataset_name .* --dataset_config 8k"):
        build_task("dataset", tiny, split="test", dataset_name=built, dataset_config="8k", dataset_split="qa1")


def test_a_bab_i_file_gives_no_more_than_it_has_and_its_facts_must_fit(books, tmp_path):
    lines = []
    for number in range(4):  # the last story is long
        facts = [f"{i + 1} John went to the {babi.ROOMS[i % 6]}." for i in range(2 if number < 3 else 60)]
        lines += [*facts, f"{len(facts) + 1} Where is John? \t{babi.ROOMS[(len(facts) - 1) % 6]}\t1"]
    (tmp_path / "qa1_test.txt").write_text("\n".join(lines))
    options = {"task": ("qa1",), "lengths": ("0k", "600"), "babi_dir": str(tmp_path), "num_samples": 100}
    folder = tmp_path / "out"
    build(settings(books, folder, **options))
    assert (len(load(folder, "0k", "qa1")), len(load(folder, "600", "qa1"))) == (4, 3)
    with pytest.raises(UsageError, match="no sample of qa1 fits into 10 tokens"):
        build(settings(books, tmp_path / "none", **options | {"lengths": ("310",)}))
    (tmp_path / "qa1_test.txt").write_text("1 John went to the cellar.\n2 Where is John? \tcellar\t1\n")
    with pytest.raises(UsageError, match="qa1_test.txt answers .* 'cellar', which is no label of qa1 .*another task"):
        build(settings(books, tmp_path / "none", **options))
    assert not (tmp_path / "none").exists()


def test_background_that_is_too_short_is_refused_unless_it_may_repeat(books, tmp_path):
    long = {"task": ("qa1",), "lengths": ("100k",), "num_samples": 1}
    with pytest.raises(UsageError, match="fewer than the 99,700 of one sample; .* --repeat_background"):
        build(settings(books, tmp_path / "out", **long))
    assert not (tmp_path / "out").exists()
    build(settings(books, tmp_path / "out", repeat_background=True, **long))
    assert len(load(tmp_path / "out", "100k", "qa1")) == 1


def test_folders_of_something_else_are_refused_and_kept(built, books, tmp_path):
    before = digests(built)
    for change, message in (
        ({"seed": 1}, "holds another build: seed 0 instead of 1; name another folder, or the same settings"),
        ({"num_samples": 4}, "num_samples 3 instead of 4"),
        ({"background_dir": str(books / "1.txt")}, "background .* instead of"),
    ):
        with pytest.raises(UsageError, match=message):
            build(settings(books, built, **change))
    assert digests(built) == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no build"):
        build(settings(books, tmp_path))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(books, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_tasks", lambda settings: pytest.fail("read"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="--output_dir .*file/deep/er cannot be written, for .*file cannot; name"):
        build(settings(books, tmp_path / "file" / "deep" / "er"))
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UsageError, match="--output_dir .*new cannot be written"):
        build(settings(books, tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_is_told_in_one_line(books, tmp_path, monkeypatch):
    def full(path, records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_parquet", full)
    for workers in (1, 2):
        with pytest.raises(UsageError, match=r"--output_dir .* cannot be written \(No space left on device\)"):
            build(settings(books, tmp_path / "out", num_workers=workers))


@pytest.mark.parametrize(
    "content", ["version https://git-lfs.github.com/spec/v1\noid sha256:0\n", '{"version": "1.0", "model": {', "{}"]
)
def test_a_tokenizer_that_is_no_whole_file_is_told_in_one_line(books, tmp_path, content):
    shutil.copytree(TINY_TOKENIZER, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match="--tokenizer .*tokenizer cannot be loaded .*; name a folder or a Hub id"):
        build(settings(books, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer")))


def test_a_build_knows_its_files_by_their_bytes(books, tmp_path):
    """Notes beside the stories may be in any encoding, and the locale says nothing."""
    story = "1 Zoë went to the office.\n2 Where is Zoë? \toffice\t1\n"
    (tmp_path / "babi").mkdir()
    (tmp_path / "babi" / "qa1_test.txt").write_text(story, encoding="utf-8")
    (tmp_path / "babi" / "notes.txt").write_bytes("café".encode("latin-1"))
    given = {"task": ("qa1",), "lengths": ("0k",), "babi_dir": str(tmp_path / "babi"), "format": "jsonl"}
    (path,) = build(settings(books, tmp_path / "out", **given))
    assert "Zoë went" in path.read_text(encoding="utf-8")
    (tmp_path / "babi" / "qa1_test.txt").write_text(story.replace("Zoë", "Zoe"), encoding="utf-8")
    with pytest.raises(UsageError, match="holds another build: babi_dir"):
        build(settings(books, tmp_path / "out", **given))


def test_settings_are_light():
    code = (
        "import sys, lrmt.data.settings, lrmt.tasks.options\n"
        "print(sorted({'numpy', 'torch', 'transformers', 'pyarrow', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_flag_of_a_sample_changes_it_alone(built, books, tmp_path):
    base = settings(books, tmp_path, task=("qa1",))

    def first(**change):
        return next(iter(open_tasks(dataclasses.replace(base, **change)).values())).row(0, 2000)

    changes = ({"seed": 1}, {"split": "train"}, {"task_start_pct": 0.9}, {"task_end_pct": 0.1}, {"depth": 0.5})
    texts = {first(**change).input for change in ({}, *changes)}
    assert len(texts) == 6
    assert first(depth=0.5).places[0] == pytest.approx(1000, abs=40)
    assert first(task_start_pct=0.9).places[0] > 1700
    assert len(first(max_n_facts=2).facts) == 2


def test_lengths_are_spelled_one_way():
    assert [parse_tokens(x) for x in ("0k", "1k", "4K", "0.5M", "10M", "1500")] == [0, 1000, 4000, 500_000, 10**7, 1500]
    assert [spell_length(x) for x in ("0", "4000", "0.5M", "1000k", "10M", "1500")] == [
        "0k", "4k", "500k", "1M", "10M", "1500",
    ]  # fmt: skip


def test_show_prints_facts_places_and_answer(books, capsys):
    given = {"task": ("qa2",), "lengths": ("4k",), "background_dir": str(books), "index": 1}
    show(ShowSettings(**given))
    out = capsys.readouterr().out
    (task,) = open_tasks(ShowSettings(**given)).values()
    row = task.row(1, 3700)
    assert re.findall(r"\[\[(.*?)\]\]", out) == list(row.facts)
    assert f"target    {row.target}" in out and f"{row.places[-1]:,}" in out and "characters …" in out
    assert re.sub(r"\[\[|\]\]", "", highlight(row, full=True)) == row.input
    assert highlight(row, full=True, colour=True).count("\033[1;33m") == len(row.facts)


def test_places_are_where_the_facts_are(books, tiny):
    for name in ("qa1", "niah_single", "reasoning"):
        row = build_task(name, tiny, background_dir=books).row(5, 1500)
        ids = tiny(f" {row.input}", add_special_tokens=False)["input_ids"]
        for place, fact in zip(row.places, row.facts, strict=True):
            assert tiny.decode(ids[place:]).startswith(f" {fact}")


@pytest.mark.realdata
def test_official_files_are_written(data_dir, tiny, tmp_path):
    names = ("qa1", "qa3", "qa8", "qa19")
    options = {"babi_dir": str(data_dir / "babi"), "task": names, "lengths": ("0k", "4k"), "num_samples": 2}
    build(settings(data_dir / "books" / "moby_dick.txt", tmp_path / "out", **options))
    for name in names:
        assert (
            load(tmp_path / "out", "0k", name)[0]["target"] == babi.read(data_dir / f"babi/{name}_valid.txt")[0].answer
        )
        for row in load(tmp_path / "out", "4k", name):
            assert len(tiny(f" {row['input']}", add_special_tokens=False)["input_ids"]) == 3700
