import json

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from lrmt.errors import UsageError
from lrmt.tasks.dataset import StoredTask, looks_local
from lrmt.tasks.names import ROOMS
from lrmt.tasks.options import TaskOptions
from lrmt.tasks.registry import build_task

ROWS = [
    {
        "input": f"Clara hid key {i} in the old chest.\nNobody saw it.",
        "question": f"Where is key {i}? ",
        "target": "chest",
    }
    for i in range(5)
]


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_become_examples_in_order(tokenizer, tmp_path, suffix):
    task = build_task(
        "dataset", tokenizer, dataset_name=write(tmp_path / f"rows{suffix}", ROWS), split="test", segment_length=64
    )
    assert task.num_examples(999) == 5
    for index in (0, 3, 5):
        example = task.example(index, 999)
        row = ROWS[index % 5]
        assert tokenizer.decode(example.prompt_ids) == f" {row['input']} {row['question'].strip()}"
        assert tokenizer.decode(example.answer_ids) == " chest</s>"
        assert (example.question, example.target) == (row["question"].strip(), "chest")
        assert len(example.answer_ids) <= task.max_new_tokens


def test_training_shuffles_each_epoch(tokenizer, tmp_path):
    task = build_task("dataset", tokenizer, dataset_name=write(tmp_path / "rows.jsonl", ROWS))
    epochs = [[task.example(4 * e + i).question for i in range(4)] for e in range(4)]
    assert all(sorted(epoch) == sorted(r["question"].strip() for r in ROWS[:4]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_the_last_tenth_of_the_rows_is_held_out_of_training(tokenizer, tmp_path):
    rows = [{"input": f"Text {i}.", "question": f"Which {i}?", "target": str(i)} for i in range(25)]
    path = write(tmp_path / "rows.jsonl", rows)
    seen = {}
    for split in ("train", "validation", "test"):
        task = build_task("dataset", tokenizer, dataset_name=path, split=split)
        seen[split] = {task.example(i).target for i in range(task.num_examples(0))}
    assert seen["validation"] == {"23", "24"}
    assert seen["train"] == {str(i) for i in range(23)}
    assert seen["test"] == {str(i) for i in range(25)}


def test_a_length_asks_for_rows_of_as_many_segments(tokenizer, tmp_path):
    def row(words):
        return {"input": "and " * words, "question": f"How many {words}?", "target": "many"}

    sizes = [10, 12, 14, 70, 75, 130, 135, 140]
    task = build_task(
        "dataset",
        tokenizer,
        dataset_name=write(tmp_path / "rows.jsonl", map(row, sizes)),
        split="test",
        segment_length=64,
    )

    def lengths(segments):
        examples = [task.example(i, segments * 64) for i in range(task.num_examples(segments * 64))]
        return {-(-(len(e.prompt_ids) + len(e.answer_ids)) // 64) for e in examples}

    assert [lengths(n) for n in (1, 2, 3, 4, 9)] == [{1}, {2}, {3}, {3}, {3}]
    assert task.num_examples(64) == 3 and task.num_examples(0) == 8
    alone = build_task(
        "dataset", tokenizer, dataset_name=write(tmp_path / "long.jsonl", [row(130)]), split="test", segment_length=64
    )
    assert alone.num_examples(64) == 1  # none as short: the nearest longer


def test_line_separators_inside_a_row_are_text(tokenizer, tmp_path):
    rows = [{**ROWS[0], "input": "One line\u2028and another\u0085here"}]
    assert build_task("dataset", tokenizer, dataset_name=write(tmp_path / "rows.jsonl", rows)).num_examples(0) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows.jsonl has no rows"),
        ("\n\n", "rows.jsonl has no rows"),
        ('{"input": "a", "question": "b"}', "row 1 has no column 'target'; needed: .*; found: input, question"),
        ('{"input": "a", "question": " ", "target": "c"}', "row 1 has no text in 'question'"),
        ('{"input": "a", "question": "b", "target": 7}', r"row 1 has no text in 'target' \(got 7\)"),
        ('{"input": "a", "question": "b", "target": null}', "row 1 has no text in 'target'"),
        ('{"input": "a",', "rows.jsonl:1 is not JSON"),
        ('["a", "b", "c"]', "rows.jsonl:1 is no JSON object"),
        ('{"input": "a", "question": "' + "why " * 40 + '?", "target": "c"}', "--segment_length 32 .* row 1 take"),
    ],
)
def test_bad_rows_are_refused_in_one_line(tokenizer, tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        build_task("dataset", tokenizer, dataset_name=path, segment_length=32)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused_in_one_line(tokenizer, tmp_path):
    write(tmp_path / "there.jsonl", ROWS)
    (tmp_path / "rows.csv").write_text("input,question,target\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (
            tmp_path / "gone.jsonl",
            "gone.jsonl does not exist; .* holds: bad.parquet, binary.jsonl, rows.csv, there.jsonl",
        ),
        (tmp_path, "is a folder; .* holds: "),
        (tmp_path / "rows.csv", "neither .jsonl nor .parquet"),
        (tmp_path / "bad.parquet", "no readable parquet file"),
        (tmp_path / "binary.jsonl", "is not UTF-8 text"),
        (None, "needs --dataset_name"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            build_task("dataset", tokenizer, dataset_name=path)
        assert "\n" not in str(caught.value)


def test_what_looks_like_a_path_is_never_looked_up(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for local in ("rows.jsonl", "./rows", "../rows", "~/rows", "/data/rows", "runs/rows", "a/b/c", "data.csv", "a b"):
        assert looks_local(local), local
    for hub in ("RMT-team/babilong", "squad", "org/my.data-set_2"):
        assert not looks_local(hub), hub

    def look_up(*args, **kwargs):
        raise AssertionError("looked up on the Hub")

    monkeypatch.setattr("datasets.load_dataset", look_up)
    with pytest.raises(UsageError, match="does not exist"):
        build_task("dataset", tokenizer, dataset_name="runs/rows")


def test_hub_datasets_use_config_and_split(tokenizer, monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if name == "org/gone":
            raise FileNotFoundError("no such\ndataset")
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load)
    task = build_task(
        "dataset", tokenizer, dataset_name="org/rows", split="test", dataset_config="4k", dataset_split="qa1"
    )
    assert task.num_examples(0) == 5
    build_task("dataset", tokenizer, dataset_name="org/rows", split="validation")
    assert asked == [("org/rows", "4k", "qa1"), ("org/rows", None, "train")]
    with pytest.raises(UsageError, match="cannot load --dataset_name org/gone --dataset_split train: no such dataset"):
        build_task("dataset", tokenizer, dataset_name="org/gone")


def test_a_folder_of_files_has_the_splits_of_the_hub(tokenizer, tmp_path):
    """Without --dataset_split: train for training, test for evaluation."""
    (tmp_path / "4k").mkdir()
    for split, count in (("train", 5), ("test", 3)):
        text = "".join(json.dumps(row) + "\n" for row in ROWS[:count])
        (tmp_path / "4k" / f"{split}.jsonl").write_text(text)
    for split, count in (("train", 4), ("validation", 1), ("test", 3)):  # a tenth of train is validation
        task = build_task("dataset", tokenizer, dataset_name=str(tmp_path), split=split, dataset_config="4k")
        assert task.num_examples(0) == count


def test_a_public_set_has_its_tasks_at_each_length(tokenizer, monkeypatch):
    rows = [{"input": f"Mary went to the {room}.", "question": "Where is Mary?", "target": room} for room in ROOMS]
    sets, asked = {"0k": rows[:2], "4k": rows}, []

    def load(name, config, split):
        asked.append(config)
        return sets[config]

    monkeypatch.setattr("datasets.load_dataset", load)
    task = StoredTask(
        "qa1", tokenizer, TaskOptions(dataset_name="org/rows"), ("4K", "0k"), split="test", segment_length=64
    )
    assert [task.num_examples(length) for length in (0, 4000)] == [2, 6] and asked == ["4k", "0k"]
    examples = [task.example(index, 4000) for index in range(6)]
    assert asked == ["4k", "0k", "4k"]  # one is held
    assert [(example.task, example.target) for example in examples] == [("qa1", room) for room in ROOMS]
    assert task.example(1, 0).target == ROOMS[1]
    with pytest.raises(UsageError, match="--task qa6 --lengths 0k row 1: target 'bathroom' is no answer of qa6"):
        StoredTask("qa6", tokenizer, TaskOptions(dataset_name="org/rows"), ("0k",), split="test")
    with pytest.raises(UsageError, match=r"no answer of passkey \(a number\)"):
        StoredTask("passkey", tokenizer, TaskOptions(dataset_name="org/rows"), ("0k",), split="test")


@pytest.fixture(scope="module")
def composing(shipped):
    """A tokenizer that normalises (NFC)."""
    backend = Tokenizer.from_str(shipped.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", bos_token="<s>")


@pytest.mark.parametrize(
    "target",
    ["with <s>old</s> tags", "</s>", "<pad>", "apples\nmilk", "open , closed ?", "two  blanks\n\n  and a line"],
)
def test_targets_are_text_to_the_letter(shipped, composing, tmp_path, target):
    path = write(
        tmp_path / "rows.jsonl", [{"input": f"It said {target} there.", "question": "What?", "target": target}]
    )
    for each in (shipped, composing):
        task = build_task("dataset", each, dataset_name=path, split="test")
        example = task.example(0)
        assert example.target == target
        assert each.decode(example.answer_ids[:-1], skip_special_tokens=True).strip() == target  # what is scored
        assert each.decode(example.prompt_ids, skip_special_tokens=True) == f" It said {target} there. What?"
        assert example.answer_ids.tolist().index(each.eos_token_id) == len(example.answer_ids) - 1
        assert not set(each.all_special_ids) & set(example.prompt_ids.tolist())


def test_a_target_is_what_the_tokenizer_can_say(shipped, composing, tmp_path):
    rows = [{"input": "She left.", "question": "Where is she?", "target": " in the cafe\u0301 "}]
    path = write(tmp_path / "rows.jsonl", rows)
    targets = [build_task("dataset", each, dataset_name=path).example(0).target for each in (shipped, composing)]
    assert targets == ["in the cafe\u0301", "in the caf\u00e9"]


def test_a_target_that_no_token_says_is_refused(shipped, tmp_path):
    model = json.loads(shipped.backend_tokenizer.to_str())
    model["model"]["byte_fallback"] = False
    backend = Tokenizer.from_str(json.dumps(model))
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    path = write(tmp_path / "rows.jsonl", [ROWS[0], ROWS[0] | {"target": "厨房"}])
    with pytest.raises(UsageError, match="rows.jsonl row 2: the tokenizer has no tokens for target '厨房'"):
        build_task("dataset", bare, dataset_name=path, split="test")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_numbered_as_in_the_file(tokenizer, tmp_path, split, suffix):
    many = [{"input": "A lantern.", "question": f"Where is number {i}?", "target": "here"} for i in range(40)]
    at = 4 if split == "train" else 37
    for change, message in (
        ({"question": "Where " * 200}, f"rows{suffix} row {at + 1} take"),
        ({"target": None}, f"rows{suffix} row {at + 1} has no text in 'target'"),
    ):
        rows = [row | change if i == at else row for i, row in enumerate(many)]
        path = write(tmp_path / f"rows{suffix}", rows)
        with pytest.raises(UsageError, match=message):
            build_task("dataset", tokenizer, dataset_name=path, split=split, segment_length=64)


def test_blank_lines_count_as_lines(tokenizer, tmp_path):
    lines = [json.dumps(ROWS[0]), "", "  ", json.dumps(ROWS[0] | {"target": ""})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="rows.jsonl row 4 has no text in 'target'"):
        build_task("dataset", tokenizer, dataset_name=tmp_path / "rows.jsonl", split="test")


def test_rows_of_a_public_set_are_numbered_before_the_split(tokenizer, monkeypatch):
    rows = [{"input": "Mary went away.", "question": "Where is Mary?", "target": room} for room in [*ROOMS] * 4]
    rows[-2] |= {"target": "cellar"}
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: rows)
    with pytest.raises(UsageError, match="--lengths 0k row 23: target 'cellar' is no answer of qa1"):
        StoredTask("qa1", tokenizer, TaskOptions(dataset_name="org/rows"), ("0k",), split="validation")


def test_the_target_of_a_public_task_stays_a_label(shipped, monkeypatch):
    backend = Tokenizer.from_str(shipped.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace(",", " , ")
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    rows = [{"input": "Mary got both.", "question": "What has Mary?", "target": " apple,milk "}]
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: rows)
    example = StoredTask("qa8", spaced, TaskOptions(dataset_name="org/rows"), ("0k",), split="test").example(0, 0)
    assert example.target == "apple,milk" and spaced.decode(example.answer_ids).split() == ["apple", ",", "milk</s>"]


@pytest.mark.parametrize("column", ["input", "question", "target"])
def test_half_a_character_is_refused_in_one_line(tokenizer, tmp_path, column):
    rows = [ROWS[0], ROWS[0] | {column: "here \ud83d"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        UsageError, match=rf"rows.jsonl row 2, '{column}', has half a character, '\\ud83d', as its letter 6"
    ):
        build_task("dataset", tokenizer, dataset_name=tmp_path / "rows.jsonl", split="test")
    rows[1][column] = "here \ud83d\ude00"  # both halves
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert build_task("dataset", tokenizer, dataset_name=tmp_path / "rows.jsonl", split="test").num_examples(0) == 2


def test_what_a_reader_raises_is_one_line(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"input": ' + "9" * 5000 + "}")
    with pytest.raises(UsageError, match="rows.jsonl:1 is not JSON"):
        build_task("dataset", tokenizer, dataset_name=tmp_path / "rows.jsonl")
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array([b"caf\xe9"], type=pa.binary()).view(pa.string())  # Latin-1, said to be UTF-8
    pq.write_table(pa.table(dict.fromkeys(ROWS[0], text)), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="rows.parquet is no readable parquet file"):
        build_task("dataset", tokenizer, dataset_name=tmp_path / "rows.parquet")

    def rows(name, config, split):
        yield ROWS[0]
        raise ConnectionError("gone\naway")

    monkeypatch.setattr("datasets.load_dataset", rows)
    with pytest.raises(UsageError, match="cannot load --dataset_name org/rows .*: gone away"):
        build_task("dataset", tokenizer, dataset_name="org/rows")
