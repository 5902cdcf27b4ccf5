"""Documents of plain text: from .txt and .jsonl files, or streamed from a data set."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lrmt.errors import UsageError, one_line
from lrmt.files import listing, read_text
from lrmt.tasks.dataset import check_characters, read_jsonl

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
                raise UsageError(f"{flag} {path} has no .txt file; it holds: {listing(path)}")
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"{flag} {path} does not exist; {path.parent} holds: {listing(path.parent)}")
    return files


def read_documents(file: Path, flag: str) -> Iterator[str]:
    """The documents of a file: a .txt is one, a line of a .jsonl another."""
    if file.suffix.lower() == ".jsonl":
        for number, row in read_jsonl(file, flag, (COLUMN,)):
            yield _text_of(row, f"{flag} {file} row {number}")
    else:
        yield strip_gutenberg(read_text(file, flag)).strip()


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
    return check_characters(row[COLUMN], f"{where}, {COLUMN!r},").removeprefix("\ufeff").strip()


_START = re.compile(r"^\*\*\*\s?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE | re.IGNORECASE)
_END = re.compile(r"^(?:\*\*\*\s?)?END OF (?:TH(?:E|IS) )?PROJECT GUTENBERG", re.MULTILINE | re.IGNORECASE)


def strip_gutenberg(text: str) -> str:
    """The text between Project Gutenberg's START and END marks; all of it where they are absent."""
    start = _START.search(text)
    begin = start.end() if start else 0
    end = _END.search(text, begin)
    return text[begin : end.start() if end else len(text)]


LONGEST_SENTENCE = 3000  # characters; novels have none so long
_LONGEST_FOREIGN = 600  # of scripts that may have no stops at all, as Thai
_PIECE = 400  # characters of what is cut, where nothing tells sentences
_FEW = 0.01  # share of letters beyond ASCII; names and quotations in English have fewer
_BEYOND_ASCII = re.compile(r"[^\W\d_\x00-\x7f]")
_LINE_OF_HAN = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])[^\S\n]*\n[^\S\n]*(?=[\u3000-\u9fff\uff00-\uffef])")
_OPENING, _CLOSING = r"\"'“‘(\[_—«„¿¡「『（【《", r"\"'”’)\]_»」』）】》"
_OWN = "。｡！？؟۔।॥։።፧།༎။។៕᠃᠉\u037e"  # stops that need neither space nor capital after them
_STOP = re.compile(
    rf"(?<![.!?])(?P<latin>[.!?]+[{_CLOSING}]*)\s+(?=[{_OPENING}]*(?P<next>[^\W_]))|[{_OWN}][{_OWN}.!?]*[{_CLOSING}]*\s*"
)
_ANY_STOP = re.compile(rf"(?<![.!?])(?P<latin>[.!?]+[{_CLOSING}]*)\s+")
_PAUSE = re.compile(r"[,;:—،؛]\s|[、，；：]")
_ABBREVIATION = re.compile(
    r"(?:^|[^A-Za-z])(?:[A-Z]|[A-Za-z]\.[A-Za-z]|Mr|Mrs|Ms|Messrs|Dr|Prof|St|Ste|Rev|Hon|Sr|Jr|Capt|Col|Gen|Lieut|Lt"
    r"|Sergt|Sgt|Maj|Gov|Mt|No|Nos|Vol|Chap|Fig|Esq|Mme|Mlle|p|pp|cf|vs|viz)$"
)
_ABBREVIATED = 8  # characters looked at: more than the longest abbreviation and the one before it


def split_sentences(text: str) -> list[str]:
    """Split prose into sentences: paragraphs at blank lines, then stops before a capital, abbreviations spared.

    Stops of other scripts end a sentence whatever follows, and letters without case are capitals. What is longer than
    `LONGEST_SENTENCE` characters, or in other scripts than Latin `_LONGEST_FOREIGN`, is parted at any stop before a space, and
    cut where it has none.
    """
    foreign = len(_BEYOND_ASCII.findall(text)) > _FEW * len(text)
    if foreign:
        text = _LINE_OF_HAN.sub("", text)  # which has no spaces

    def begins(letter: str) -> bool:
        return not letter.islower() and (foreign or letter.isascii())

    longest = _LONGEST_FOREIGN if foreign else LONGEST_SENTENCE
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _part(" ".join(paragraph.split()), _STOP, begins):
            if len(sentence) <= longest:
                sentences.append(sentence)
                continue
            for part in _part(sentence, _ANY_STOP):
                sentences.extend([part] if len(part) <= longest else _cut(part))
    return sentences


def _part(text: str, stops: re.Pattern, begins: Callable[[str], bool] | None = None) -> Iterator[str]:
    """The text up to each stop that is no abbreviation's, and before a letter that `begins` a sentence; then its rest."""
    start = 0
    for stop in stops.finditer(text):
        if stop["latin"] and begins is not None and not begins(stop["next"]):
            continue
        if stop["latin"] == "." and _ABBREVIATION.search(text[max(0, stop.start() - _ABBREVIATED) : stop.start()]):
            continue
        yield text[start : stop.end()].rstrip()
        start = stop.end()
    if start < len(text):
        yield text[start:]


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most `_PIECE` characters, each up to its last pause, or space, unless that makes it short."""
    while len(text) > _PIECE:
        pauses = [pause.end() for pause in _PAUSE.finditer(text, _PIECE // 2, _PIECE)]
        end = pauses[-1] if pauses else text.rfind(" ", _PIECE // 2, _PIECE) + 1 or _PIECE
        yield text[:end].rstrip()
        text = text[end:]
    yield text
