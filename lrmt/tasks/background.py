"""Background text: consecutive sentences of books, or built-in prose, tokenised once and cut to an exact length."""

import hashlib
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lrmt.errors import UsageError
from lrmt.tasks import prose
from lrmt.tasks.base import Pieces, derive_seed

MIN_SENTENCE_TOKENS = 10
_CACHE_VERSION = 1  # raise it whenever splitting or the stored arrays change


class Background:
    """Sentences of text files (or of every .txt of a folder), as one flat int32 array of token ids plus offsets.

    Sentences shorter than 10 tokens are dropped. The arrays are cached on disk under a hash of the texts and the
    tokenizer, in `cache_dir` (default: $LRMT_CACHE, else ~/.cache/lrmt).
    Raises UsageError when a path is missing or no sentence remains.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], tokenizer, cache_dir: str | Path | None = None):
        files = text_files([paths] if isinstance(paths, str | Path) else paths)
        texts = [strip_gutenberg(f.read_text(encoding="utf-8-sig", errors="replace")) for f in files]
        cache_dir = Path(cache_dir or os.environ.get("LRMT_CACHE") or Path.home() / ".cache" / "lrmt")
        cache = cache_dir / f"background-{_fingerprint(texts, tokenizer)}.npz"
        arrays = _load_cache(cache)
        if arrays is None:
            arrays = _tokenise((split_sentences(text) for text in texts), Pieces(tokenizer))
            _save_cache(cache, arrays)
        self._set(arrays, f"background {', '.join(map(str, files[:3]))}")

    def _set(self, arrays: tuple[np.ndarray, np.ndarray, np.ndarray], what: str) -> None:
        """Keep ids int32 [N], offsets int64 [S + 1], and of each book its first sentence and the one after its last."""
        self.ids, self.offsets, books = arrays
        if len(self.offsets) < 2:
            raise UsageError(f"{what} has no sentence of {MIN_SENTENCE_TOKENS} tokens or more; give longer prose")
        self.books = [(a, b) for a, b in zip(books[:-1].tolist(), books[1:].tolist(), strict=True) if a < b]

    def take(self, rng: np.random.Generator, num_tokens: int) -> list[np.ndarray]:
        """Consecutive sentences from a random place of a random book, `num_tokens` ids in all, the last one cut.

        At the end of a book the next one follows, after the last one the first.
        """
        first, last = self.books[int(rng.integers(len(self.books)))]
        start = int(rng.integers(first, last))
        taken: list[np.ndarray] = []
        while num_tokens > 0:
            begin = self.offsets[start]
            stop = int(np.searchsorted(self.offsets, begin + num_tokens, side="left"))  # the sentence that fills up
            bounds = self.offsets[start : stop + 1].tolist()
            taken.extend(self.ids[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True))
            num_tokens -= bounds[-1] - bounds[0]
            start = 0
        if num_tokens < 0:
            taken[-1] = taken[-1][:num_tokens]
        return taken


class ProceduralProse(Background):
    """Built-in English-like prose that needs no file: `num_sentences` seeded sentences, taken like a book's."""

    def __init__(self, tokenizer, seed: int | str = 0, num_sentences: int = 20000):
        sentences = prose.write(num_sentences, derive_seed("prose", seed))
        self._set(_tokenise([sentences], Pieces(tokenizer)), "procedural prose")


def _tokenise(books: Iterable[Sequence[str]], pieces: Pieces) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat ids, sentence offsets, and the first sentence of each book plus their total."""
    ids, lengths, starts = [], [], [0]
    for sentences in books:
        kept = [s.astype(np.int32) for s in pieces.encode(sentences) if len(s) >= MIN_SENTENCE_TOKENS]
        ids.extend(kept)
        lengths.extend(map(len, kept))
        starts.append(len(lengths))
    flat = np.concatenate([np.empty(0, dtype=np.int32), *ids])
    return flat, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64), np.array(starts)


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


def _fingerprint(texts: Sequence[str], tokenizer) -> str:
    """Hash of everything the arrays depend on: the texts and the whole tokenizer, not only its name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest = hashlib.blake2b(f"{_CACHE_VERSION}/{MIN_SENTENCE_TOKENS}/{rules}".encode(), digest_size=16)
    for text in texts:
        digest.update(hashlib.blake2b(text.encode()).digest())
    return digest.hexdigest()


def _load_cache(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored["ids"], stored["offsets"], stored["books"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent or damaged: made again
        return None


def _save_cache(path: Path, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Write under a temporary name and rename, so that no reader and no crash meets half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, ids=arrays[0], offsets=arrays[1], books=arrays[2])
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        warnings.warn(f"background not cached in {path.parent}: {error}", stacklevel=2)


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
