"""Stored rows, a user's own or those of a public set: columns input, question and target, from local files or the Hub."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lrmt.errors import UsageError, one_line
from lrmt.lengths import parse_tokens, spell_length
from lrmt.tasks.base import Example, Pieces, Task, check_segment, epoch_order, hold_out, join
from lrmt.tasks.names import LABELS, is_answer

COLUMNS = ("input", "question", "target")  # the public BABILong schema
CARD = "README.md"  # which says what is in a folder
_FILE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = (*_FILE_SUFFIXES, ".json")  # of a folder of files
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class DatasetTask(Task):
    """Stored rows, each of its own length.

    `dataset_path` is a .jsonl or .parquet file; or a Hub dataset id, or a folder, with a card as `lrmt data build` writes it
    or of files named after both, with `dataset_config` and `dataset_split`. Train leaves out the last tenth of the rows,
    which is validation; test is all of them. Train shuffles each epoch, other splits keep the order of the rows.

    A `length` asks for rows of as many segments, so that all ranks of a training step run equally many; where there are
    none, for the nearest shorter rows, or else the nearest longer ones. `length` 0 takes the rows as they come.
    Raises UsageError for anything missing or empty, and when a row's question and answer exceed `segment_length`.
    """

    name = "dataset"

    def __init__(
        self,
        tokenizer,
        dataset_path: str | Path | None,
        *,
        split: str = "train",
        seed: int = 0,
        segment_length: int | None = None,
        dataset_config: str | None = None,
        dataset_split: str | None = None,
    ):
        if not dataset_path:
            raise UsageError("task dataset needs --dataset_name: a .jsonl or .parquet file, or a Hub dataset id")
        source = str(dataset_path)
        path = Path(source).expanduser()
        if looks_local(source) and not (path / CARD).is_file():
            files = find_files(path, dataset_split, dataset_config) if dataset_config and path.is_dir() else []
            kind = "parquet" if files and files[0].endswith(".parquet") else "json"
            rows = _load(kind, None, "train", data_files=files) if files else _read_file(path)
        else:
            dataset_split = dataset_split or ("test" if split == "test" else "train")
            rows = _load(str(path) if path.is_dir() else source, dataset_config, dataset_split)
        rows = list(rows)
        if split != "test" and len(rows) > 1:
            rows = hold_out(rows, split)
        self.inputs, self.questions, self.targets = ([] for _ in COLUMNS)
        for number, row in enumerate(rows, start=1):
            for column, values in zip(COLUMNS, (self.inputs, self.questions, self.targets), strict=True):
                values.append(_text_of(row, column, f"{source} row {number}"))
        if not self.inputs:
            raise UsageError(f"{source} has no rows; give at least one with {', '.join(COLUMNS)}")
        self.split, self.seed, self.pieces, self.segment_length = split, seed, Pieces(tokenizer), segment_length
        self._buckets: dict[int, list[int]] = {}  # number of segments -> rows
        self.max_new_tokens = 0
        encoded = zip(self.pieces.encode(self.questions), self.pieces.encode(self.targets), strict=True)
        for number, (question, target) in enumerate(encoded, start=1):
            answer = [*target, tokenizer.eos_token_id]
            check_segment(question, answer, segment_length, f"{source} row {number}")
            self.max_new_tokens = max(self.max_new_tokens, len(answer))

    def num_examples(self, length: int) -> int:
        return len(self._rows(length))

    def example(self, index: int, length: int = 0) -> Example:
        rows = self._rows(length)
        place = epoch_order(len(rows), index, self.seed, self.name) if self.split == "train" else index % len(rows)
        row = rows[place]
        context, question = self.pieces.encode([self.inputs[row], self.questions[row]])
        question_text, target = self.questions[row].strip(), self.targets[row].strip()
        return Example(join([context, question]), self.pieces.answer(target), question_text, target, self.name)

    def _rows(self, length: int) -> Sequence[int]:
        if not length or not self.segment_length:
            return range(len(self.inputs))
        if not self._buckets:
            encoded = (self.pieces.encode(column) for column in (self.inputs, self.questions, self.targets))
            for row, parts in enumerate(zip(*encoded, strict=True)):
                segments = -(-(sum(map(len, parts)) + 1) // self.segment_length)
                self._buckets.setdefault(segments, []).append(row)
        wanted = -(-length // self.segment_length)
        shorter = [n for n in self._buckets if n <= wanted]
        return self._buckets[max(shorter) if shorter else min(self._buckets)]


class StoredTask(Task):
    """A task of a data set in the public BABILong schema: configuration = length, split = task.

    `lengths` are the names of configurations, "4k"; the `length` of an example is the tokens that such a name says, and the
    example as long as its row. One configuration is held at a time.
    Raises UsageError for anything missing, and for a target that can be no answer of the task.
    """

    def __init__(self, name: str, tokenizer, dataset_path: str | Path, lengths: Iterable[str], **options):
        self.name, self._tokenizer = name, tokenizer
        self._path, self._options = dataset_path, options
        self._lengths = {parse_tokens(length): spell_length(length) for length in lengths}
        self._opened: tuple[int, DatasetTask] | None = None
        self._sizes, self.max_new_tokens = {}, 0
        for tokens, length in self._lengths.items():
            rows = self._open(tokens)
            for number, target in enumerate(rows.targets, start=1):
                if not (is_answer(target.strip(), name) if name in LABELS else re.fullmatch(r"\s*\d+\s*", target)):
                    wanted = ", ".join(LABELS[name]) if name in LABELS else "a number"
                    raise UsageError(
                        f"--dataset_name {dataset_path} --task {name} --lengths {length} row {number}: target {target!r} is no "
                        f"answer of {name} ({wanted}); leave out --task and --lengths for rows of your own"
                    )
            self._sizes[tokens] = rows.num_examples(0)
            self.max_new_tokens = max(self.max_new_tokens, rows.max_new_tokens)

    def num_examples(self, length: int) -> int:
        return self._sizes[length]

    def example(self, index: int, length: int) -> Example:
        return replace(self._open(length).example(index), task=self.name)

    def _open(self, length: int) -> DatasetTask:
        if self._opened is None or self._opened[0] != length:
            self._opened = None  # before the next is read
            name = {"dataset_config": self._lengths[length], "dataset_split": self.name}
            self._opened = length, DatasetTask(self._tokenizer, self._path, **name, **self._options)
        return self._opened[1]


def find_files(folder: Path, key: str | None, label: str | None) -> list[str]:
    """The files of a task at a length: LABEL/KEY or KEY/LABEL, shards included; KEY alone without a label."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
    names = {path: (path.parent.name, path.stem.split("-")[0]) for path in found}
    return [
        str(path.resolve())
        for path, (parent, stem) in names.items()
        if (stem == key if label is None else {parent, stem} == {label, key})
    ]


def looks_local(source: str) -> bool:
    """Whether a name means a file here rather than a Hub dataset id; nothing is looked up for such a name."""
    parent = os.path.dirname(source)
    return (
        os.path.exists(os.path.expanduser(source))
        or (parent != "" and os.path.isdir(parent))
        or source.startswith((".", "~", os.sep))
        or source.lower().endswith((*_FILE_SUFFIXES, ".json", ".csv", ".txt", ".gz"))
        or _HUB_ID.fullmatch(source) is None
    )


def _read_file(path: Path) -> list[dict]:
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) if folder.is_dir() else ""
        fact = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"--dataset_name {path} {fact}; {folder} holds: {there or 'nothing'}")
    if path.suffix.lower() not in _FILE_SUFFIXES:
        raise UsageError(f"--dataset_name {path} is neither .jsonl nor .parquet; convert it to one of them")
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"--dataset_name {path} is no readable parquet file: {one_line(error)}") from error
    return read_jsonl(path, "--dataset_name", COLUMNS)


def read_jsonl(path: Path, flag: str, columns: Sequence[str]) -> list[dict]:
    """The rows of a JSONL file, blank lines skipped; `flag` and `columns` are what errors name."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON strings may hold U+2028
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path} is not UTF-8 text: {one_line(error)}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number} is not JSON ({error.msg}); give one object per line") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number} is no JSON object; give {{{', '.join(columns)}}} on each line")
        rows.append(row)
    return rows


def _load(name: str, config: str | None, split: str, **options):
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, **options)
    except Exception as error:  # the Hub client raises many kinds; the user needs one line
        at = f"--dataset_name {name}" + (f" --dataset_config {config}" if config else "") + f" --dataset_split {split}"
        raise UsageError(f"cannot load {at}: {one_line(error)}") from error


def _text_of(row: dict, column: str, where: str) -> str:
    if column not in row:
        raise UsageError(f"{where} has no column {column!r}; needed: {', '.join(COLUMNS)}; found: {', '.join(row)}")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where} has no text in {column!r} (got {value!r}); fill it in or remove the row")
    return value
