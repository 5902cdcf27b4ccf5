"""Documents of plain text: from .txt and .jsonl files, or streamed from a data set."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lrmt.errors import UsageError, one_line
from lrmt.tasks.dataset import read_jsonl

COLUMN = "text"
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
    import datasets

    at = f"{flag} {name}" + (f" --dataset_config {config}" if config else "") + f" of split {split}"
    local = {"data_files": name} if Path(name).is_file() else {}
    path = _BUILDERS.get(Path(name).suffix.lower(), "text") if local else name
    try:
        rows = datasets.load_dataset(path, config, split=split, streaming=True, **local)
        for number, row in enumerate(rows, start=1):
            yield _text_of(row, f"{at} row {number}")
    except UsageError:
        raise
    except Exception as error:  # the Hub client raises many kinds; the user needs one line
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
