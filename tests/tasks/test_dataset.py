import json

import pytest

from lrmt.errors import UsageError
from lrmt.tasks.dataset import DatasetTask, looks_local

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
    task = DatasetTask(tokenizer, write(tmp_path / f"rows{suffix}", ROWS), split="test", segment_length=64)
    assert task.num_examples(999) == 5
    for index in (0, 3, 5):
        example = task.example(index, 999)
        row = ROWS[index % 5]
        assert tokenizer.decode(example.prompt_ids) == f" {row['input']} {row['question'].strip()}"
        assert tokenizer.decode(example.answer_ids) == " chest</s>"
        assert (example.question, example.target) == (row["question"].strip(), "chest")
        assert len(example.answer_ids) <= task.max_new_tokens


def test_training_shuffles_each_epoch(tokenizer, tmp_path):
    task = DatasetTask(tokenizer, write(tmp_path / "rows.jsonl", ROWS))
    epochs = [[task.example(5 * e + i).question for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == sorted(r["question"].strip() for r in ROWS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_line_separators_inside_a_row_are_text(tokenizer, tmp_path):
    rows = [{**ROWS[0], "input": "One line\u2028and another\u0085here"}]
    assert DatasetTask(tokenizer, write(tmp_path / "rows.jsonl", rows)).num_examples(0) == 1


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
        DatasetTask(tokenizer, path, segment_length=32)
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
        (None, "needs --dataset_path"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            DatasetTask(tokenizer, path)
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
        DatasetTask(tokenizer, "runs/rows")


def test_hub_datasets_use_config_and_split(tokenizer, monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if name == "org/gone":
            raise FileNotFoundError("no such\ndataset")
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load)
    task = DatasetTask(tokenizer, "org/rows", dataset_config="4k", dataset_split="qa1")
    assert task.num_examples(0) == 5
    DatasetTask(tokenizer, "org/rows", split="validation")
    assert asked == [("org/rows", "4k", "qa1"), ("org/rows", None, "validation")]
    with pytest.raises(UsageError, match="cannot load --dataset_path org/gone --dataset_split train: no such dataset"):
        DatasetTask(tokenizer, "org/gone")
