"""Documents of plain text: from .txt and .jsonl files, or streamed from a data set."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lrmt.errors import UsageError, one_line
from lrmt.tasks.dataset import read_jsonl

COLUMN = "text"
_SHARES = {1: "test", 2: "validation"}  # of every ten documents; the others are train
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}  # of a data set that is one file


def text_files(paths: Sequence[str | Path], flag: str = "--background_dir") -> list[Path]:
    """The files, and every .txt of the folders; `flag` is what errors name."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(path.rglob("*.txt"))
            if not found:
                there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
                raise UsageError(f"{flag} {path} has no .txt file; it holds: {there}")
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            there = ", ".join(sorted(p.name for p in path.parent.iterdir())[:10]) if path.parent.is_dir() else "nothing"
            raise UsageError(f"{flag} {path} does not exist; {path.parent} holds: {there}")
    return files


def read_documents(file: Path, flag: str) -> Iterator[str]:
    """The documents of a file: a .txt is one, a line of a .jsonl another."""
    if file.suffix.lower() == ".jsonl":
        for number, row in enumerate(read_jsonl(file, flag, (COLUMN,)), start=1):
            yield _text_of(row, f"{flag} {file} row {number}")
    else:
        yield strip_gutenberg(file.read_text(encoding="utf-8-sig", errors="replace")).strip()


def stream_documents(name: str, config: str | None, split: str, flag: str) -> Iterator[str]:
    """Column text of a data set, row by row: a Hub id, or a local folder or file that `datasets` reads."""
    at = _describe(name, config, split, flag)
    with _told_in_one_line(at):
        for number, row in enumerate(_stream(name, config, split=split), start=1):
            yield _text_of(row, f"{at} row {number}")


def stream_share(name: str, config: str | None, split: str, flag: str) -> Iterator[str]:
    """Column text of what is for `split` (train, validation or test) in a data set: its own split of that name.

    One that it has not is a tenth of train, the second of every ten documents for test and the third for validation, which
    train then leaves out.
    """
    at, empty = _describe(name, config, split, flag), True
    with _told_in_one_line(at):
        splits = _stream(name, config)
        own = set(splits) - {"train"} if "train" in splits else set()  # those that need no share of train
        rows = splits[split] if split in own else splits.get("train", next(iter(splits.values())))
        for number, row in enumerate(rows):
            share = _SHARES.get(number % 10, "train")
            if split in own or split == ("train" if share in own else share):
                yield _text_of(row, f"{at} row {number + 1}")
                empty = False
    if empty:
        raise UsageError(
            f"{at} has no document: no split of that name, and too few in all to share them; give more, or name a folder with "
            "--background_dir"
        )


def _stream(name: str, config: str | None, **options):
    import datasets

    local = {"data_files": name} if Path(name).is_file() else {}
    path = _BUILDERS.get(Path(name).suffix.lower(), "text") if local else name
    return datasets.load_dataset(path, config, streaming=True, **options, **local)


def _describe(name: str, config: str | None, split: str, flag: str) -> str:
    return f"{flag} {name}" + (f" --dataset_config {config}" if config else "") + f" of split {split}"


@contextmanager
def _told_in_one_line(at: str):
    """Turns what the Hub client raises, of many kinds, into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"cannot load {at}: {one_line(error)}") from error


def _text_of(row: dict, where: str) -> str:
    if COLUMN not in row:
        raise UsageError(f"{where} has no column {COLUMN!r}; found: {', '.join(row) or 'none'}")
    if not isinstance(row[COLUMN], str):
        raise UsageError(f"{where} has no text in {COLUMN!r} (got {row[COLUMN]!r}); give a string")
    return row[COLUMN].strip()


_START = re.compile(r"^\*\*\*\s?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE | re.IGNORECASE)
_END = re.compile(r"^(?:\*\*\*\s?)?END OF (?:TH(?:E|IS) )?PROJECT GUTENBERG", re.MULTILINE | re.IGNORECASE)


def strip_gutenberg(text: str) -> str:
    """The text between Project Gutenberg's START and END marks; all of it where they are absent."""
    start = _START.search(text)
    begin = start.end() if start else 0
    end = _END.search(text, begin)
    return text[begin : end.start() if end else len(text)]


_STOP = re.compile(r"(\S*?)([.!?]+[\"'”’)\]_]*)\s+(?=[\"'“‘(\[_—]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:^|[^A-Za-z])(?:[A-Z]|[A-Za-z]\.[A-Za-z]|Mr|Mrs|Ms|Messrs|Dr|Prof|St|Ste|Rev|Hon|Sr|Jr|Capt|Col|Gen|Lieut|Lt"
    r"|Sergt|Sgt|Maj|Gov|Mt|No|Nos|Vol|Chap|Fig|Esq|Mme|Mlle|p|pp|cf|vs|viz)$"
)


def split_sentences(text: str) -> list[str]:
    """Split prose into sentences: paragraphs at blank lines, then stops before a capital, abbreviations spared."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        start = 0
        for stop in _STOP.finditer(paragraph):
            if stop[2].startswith(".") and len(stop[2]) == 1 and _ABBREVIATION.search(stop[1]):
                continue
            sentences.append(paragraph[start : stop.end(2)])
            start = stop.end()
        if start < len(paragraph):
            sentences.append(paragraph[start:])
    return sentences
