"""Stored rows, a user's own or those of a public set: columns input, question and target, from local files or the Hub."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lrmt.errors import UsageError, one_line
from lrmt.files import listing, read_text
from lrmt.lengths import parse_tokens, spell_length
from lrmt.tasks.base import Example, Note, Pieces, Task, check_segment, epoch_order, hold_out, join
from lrmt.tasks.names import LABELS, is_answer
from lrmt.tasks.options import TaskOptions
from lrmt.tasks.words import find_words

COLUMNS = ("input", "question", "target")  # the public BABILong schema
CARD = "README.md"  # which says what is in a folder
_FILE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = (*_FILE_SUFFIXES, ".json")  # of a folder of files
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class DatasetTask(Task):
    """Stored rows, each of its own length.

    `dataset_name` is a .jsonl or .parquet file; or a Hub dataset id, or a folder, with a card as `lrmt data build` writes it
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
        options: TaskOptions,
        *,
        split: str = "train",
        seed: int = 0,
        segment_length: int | None = None,
    ):
        if not options.dataset_name:
            raise UsageError("task dataset needs --dataset_name: a .jsonl or .parquet file, or a Hub dataset id")
        source, config = str(options.dataset_name), options.dataset_config
        path = Path(source).expanduser()
        wanted = options.dataset_split or ("test" if split == "test" else "train")
        if looks_local(source) and not (path / CARD).is_file():
            files = find_files(path, wanted, config) if config and path.is_dir() else []
            kind = "parquet" if files and files[0].endswith(".parquet") else "json"
            if files and all(file.endswith(".jsonl") for file in files):
                rows = [(f"{n} of {file}", row) for file in files for n, row in _read_file(Path(file))]
            else:
                rows = _load(kind, None, "train", data_files=files) if files else _read_file(path)
        else:
            rows = _load(str(path) if path.is_dir() else source, config, wanted)
        if split != "test" and len(rows) > 1:
            rows = hold_out(rows, split)
        if not rows:
            raise UsageError(f"{source} has no rows; give at least one with {', '.join(COLUMNS)}")
        self.numbers = [number for number, _ in rows]  # of the file
        texts = [[_text_of(row, column, f"{source} row {number}") for column in COLUMNS] for number, row in rows]
        self.inputs, self.questions, self.targets = map(list, zip(*texts, strict=True))
        self.wrong_notes: UsageError | None = None  # which matters where notes are scored
        self._notes = (
            [self._read_notes(row, f"{source} row {number}") for number, row in rows] if split != "test" else []
        )
        self.split, self.seed, self.pieces, self.segment_length = split, seed, Pieces(tokenizer), segment_length
        self._buckets: dict[int, list[int]] = {}  # number of segments -> rows
        self.max_new_tokens = 0
        encoded = zip(self.pieces.encode(self.questions), self.pieces.encode(self.targets), strict=True)
        for number, text, (question, target) in zip(self.numbers, self.targets, encoded, strict=True):
            answer = [*target, tokenizer.eos_token_id]
            check_segment(question, answer, segment_length, f"{source} row {number}")
            self.max_new_tokens = max(self.max_new_tokens, len(answer))
            if not self.pieces.said(text):
                raise UsageError(
                    f"{source} row {number}: the tokenizer has no tokens for target {text!r}; remove the row"
                )

    def num_examples(self, length: int) -> int:
        return len(self._rows(length))

    def example(self, index: int, length: int = 0) -> Example:
        row = self.choose(index, length)
        context, question = self.pieces.encode([self.inputs[row], self.questions[row]])
        answer, target = self.pieces.answer(self.targets[row]), self.pieces.said(self.targets[row])
        take_notes = partial(self._take_notes, row) if self._notes else tuple
        return Example(join([context, question]), answer, self.questions[row].strip(), target, self.name, take_notes)

    def _read_notes(self, row: dict, where: str) -> list[tuple[int, str]] | None:
        try:
            return _notes_of(row, where)
        except UsageError as error:
            self.wrong_notes = self.wrong_notes or error
            return None

    def _take_notes(self, row: int) -> list[Note]:
        """The row's own notes, each from the end of what it comes after; without any, the target from where the text first says it."""
        text, target = self.inputs[row], self.targets[row]
        told = self._notes[row]
        if told is None:
            said = find_words(target, text)
            if not said:
                return []
            told = [(said, target.strip())]
        read = self.pieces.count(text, [end for end, _ in told])
        return [Note(0, self.first_note), *(Note(tokens, note) for tokens, (_, note) in zip(read, told, strict=True))]

    def choose(self, index: int, length: int = 0) -> int:
        """The row that `index` meets."""
        rows = self._rows(length)
        return rows[epoch_order(len(rows), index, self.seed, self.name) if self.split == "train" else index % len(rows)]

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

    def __init__(self, name: str, tokenizer, options: TaskOptions, lengths: Iterable[str], **kwargs):
        self.name, self._tokenizer, self._options, self._kwargs = name, tokenizer, options, kwargs
        self._lengths = {parse_tokens(length): spell_length(length) for length in lengths}
        self._opened: tuple[int, DatasetTask] | None = None
        self._sizes, self.max_new_tokens = {}, 0
        for tokens, length in self._lengths.items():
            rows = self._open(tokens)
            for number, target in zip(rows.numbers, rows.targets, strict=True):
                if not (is_answer(target.strip(), name) if name in LABELS else re.fullmatch(r"\s*\d+\s*", target)):
                    wanted = ", ".join(LABELS[name]) if name in LABELS else "a number"
                    raise UsageError(
                        f"--dataset_name {options.dataset_name} --task {name} --lengths {length} row {number}: target {target!r} "
                        f"is no answer of {name} ({wanted}); leave out --task and --lengths for rows of your own"
                    )
            self._sizes[tokens] = rows.num_examples(0)
            self.max_new_tokens = max(self.max_new_tokens, rows.max_new_tokens)

    def num_examples(self, length: int) -> int:
        return self._sizes[length]

    def example(self, index: int, length: int) -> Example:
        rows = self._open(length)
        target = rows.targets[rows.choose(index)].strip()  # a label, whatever the tokenizer makes of it
        return replace(rows.example(index), task=self.name, target=target)

    def _open(self, length: int) -> DatasetTask:
        if self._opened is None or self._opened[0] != length:
            self._opened = None  # before the next is read
            options = replace(self._options, dataset_config=self._lengths[length], dataset_split=self.name)
            self._opened = length, DatasetTask(self._tokenizer, options, **self._kwargs)
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


def is_file_of_rows(options: TaskOptions) -> bool:
    """Whether `dataset_name` means a file, rather than a data set of the Hub or a folder that says what is in it."""
    path = Path(str(options.dataset_name)).expanduser()
    return looks_local(str(path)) and not (path / CARD).is_file() and not (options.dataset_config and path.is_dir())


def check_file(path: Path) -> None:
    """Raises UsageError for what is no .jsonl or .parquet file."""
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        fact = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"--dataset_name {path} {fact}; {folder} holds: {listing(folder, limit=12)}")
    if path.suffix.lower() not in _FILE_SUFFIXES:
        raise UsageError(f"--dataset_name {path} is neither .jsonl nor .parquet; convert it to one of them")


def _read_file(path: Path) -> list[tuple[int, dict]]:
    """The rows of a .jsonl or .parquet file, each after its number."""
    check_file(path)
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return list(enumerate(pq.read_table(path).to_pylist(), start=1))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--dataset_name {path} is no readable parquet file: {one_line(error)}") from error
    return read_jsonl(path, "--dataset_name", COLUMNS)


def read_jsonl(path: Path, flag: str, columns: Sequence[str]) -> list[tuple[int, dict]]:
    """The rows of a JSONL file, each after the number of its line; `flag` and `columns` are what errors name."""
    rows = []
    for number, line in enumerate(read_text(path, flag).split("\n"), start=1):  # JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            fact = getattr(error, "msg", one_line(error))
            raise UsageError(f"{path}:{number} is not JSON ({fact}); give one object per line") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number} is no JSON object; give {{{', '.join(columns)}}} on each line")
        rows.append((number, row))
    return rows


def check_characters(text: str, where: str) -> str:
    """The text; UsageError for half a character, which JSON can spell (a lone surrogate) and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} has half a character, {text[error.start]!r}, as its letter {error.start + 1}; write both halves or none"
        ) from None
    return text


def _load(name: str, config: str | None, split: str, **options) -> list[tuple[int, dict]]:
    """The rows that `datasets` reads, each after its number."""
    import datasets

    try:
        return list(enumerate(datasets.load_dataset(name, config, split=split, **options), start=1))
    except Exception as error:  # the Hub client raises many kinds; the user needs one line
        at = f"--dataset_name {name}" + (f" --dataset_config {config}" if config else "") + f" --dataset_split {split}"
        raise UsageError(f"cannot load {at}: {one_line(error)}") from error


def _notes_of(row: dict, where: str) -> list[tuple[int, str]] | None:
    """The column `notes`, a text or a list of `{after, notes}`: each note, and after how many characters of the input it holds. None where
    nothing is said of notes; an empty list says that there is nothing to note.
    """
    given = row.get("notes")
    if given is None:
        return None
    said = _list_in(given)
    if isinstance(said, str):
        note = _text_of(row, "notes", where)
        end = find_words(note, row["input"]) or find_words(row["target"], row["input"])
        if not end:
            raise UsageError(
                f"{where}: the input says neither its `notes`, {note[:60]!r}, nor its target; give a list of {{after, notes}}, each after "
                "words of the input"
            )
        return [(end, note)]
    if not isinstance(said, list) or not all(isinstance(s, dict) and {"after", "notes"} == s.keys() for s in said):
        raise UsageError(f"{where}: `notes` must be a text or a list of {{after, notes}}; got {str(given)[:60]!r}")
    notes, at = [], 0
    for each in said:
        after, note = (_text_of(each, name, f"{where}, notes:", ("after", "notes")) for name in ("after", "notes"))
        at = find_words(after, row["input"], at)
        if not at:
            raise UsageError(
                f"{where}: the input does not say {after[:60]!r}, which notes come after, in this order; correct it"
            )
        notes.append((at, note))
    return notes


def _list_in(notes):
    """The list of mappings that a text spells as JSON, as files without nested columns have it; anything else as it is."""
    try:
        spelt = json.loads(notes) if isinstance(notes, str) else None
    except ValueError:
        return notes
    return spelt if isinstance(spelt, list) and all(isinstance(one, dict) for one in spelt) else notes


def _text_of(row: dict, column: str, where: str, columns: Sequence[str] = COLUMNS) -> str:
    if column not in row:
        raise UsageError(f"{where} has no column {column!r}; needed: {', '.join(columns)}; found: {', '.join(row)}")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where} has no text in {column!r} (got {value!r}); fill it in or remove the row")
    return check_characters(value, f"{where}, {column!r},")
