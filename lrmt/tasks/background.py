"""Background text: consecutive sentences of books, or built-in prose, tokenised once and cut to an exact length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from lrmt.errors import UsageError
from lrmt.files import digest, digest_each
from lrmt.progress import progress
from lrmt.tasks import prose
from lrmt.tasks.base import Pieces, derive_seed
from lrmt.tasks.cache import Arrays, cache_folder, fingerprint_tokenizer, load_or_make
from lrmt.tasks.documents import read_documents, split_sentences, stream_share, text_files
from lrmt.tasks.options import TaskOptions

MIN_SENTENCE_TOKENS = 10
MIN_SENTENCES = 2  # or facts stand before or behind it all
MAX_DATASET_TOKENS = 2**24  # read of a data set, which may be larger than any disk
_CACHE_VERSION = "4"  # raise it whenever splitting or the stored arrays change
_BATCH = 4096  # sentences tokenised at once, in parallel
_CUTS_TRIED = 16  # sentences searched for a beginning of the wanted number of tokens
_ENDS_TRIED = 100  # of such a beginning, the likeliest first
_GIVEN_UP = 4  # sentences left out where none has one


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences: `content` as token ids int32 [N] or UTF-8 bytes uint8 [B].

    `gaps` int64 [S + 1] are the token offsets before, between and after the S sentences, `cuts` the same places in `content`.
    """

    content: np.ndarray
    gaps: np.ndarray
    cuts: np.ndarray

    def split(self, places: np.ndarray) -> list[np.ndarray]:
        """The content between the gaps of these indices, in order: one part more than there are places."""
        return np.split(self.content, self.cuts[places])


class Background:
    """Sentences of text files (or of every .txt of a folder), as one array of token ids and one of UTF-8, with offsets.

    Sentences shorter than 10 tokens are dropped. The arrays are cached on disk under a hash of the texts and the
    tokenizer, in `cache_dir` (default: $LRMT_CACHE, else ~/.cache/lrmt), and mapped into memory.
    Raises UsageError when a path is missing or no sentence remains.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], tokenizer, cache_dir: str | Path | None = None):
        files = text_files([paths] if isinstance(paths, str | Path) else paths)

        def books():
            return (text for file in files for text in read_documents(file, "--background_dir"))

        self._open(tokenizer, cache_dir, digest_each(books()), books(), f"background {', '.join(map(str, files[:3]))}")

    @classmethod
    def from_dataset(
        cls,
        name: str,
        tokenizer,
        *,
        config: str | None = None,
        split: str = "train",
        num_tokens: int = MAX_DATASET_TOKENS,
        cache_dir: str | Path | None = None,
    ) -> "Background":
        """The first books, `num_tokens` or a little more, of a data set with column text: a Hub id, streamed, or a path.

        `split` is train, validation or test: books of one are never those of another (`documents.stream_share`).
        """
        self = cls.__new__(cls)
        files = [Path(name)] if Path(name).is_file() else sorted(p for p in Path(name).rglob("*") if p.is_file())
        stamps = [f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files]
        key = digest("share of dataset", name, str(config), split, str(num_tokens), *stamps)
        books = stream_share(name, config, split, "--background_dataset")
        self._open(tokenizer, cache_dir, key, books, f"--background_dataset {name}", num_tokens)
        return self

    def _open(
        self, tokenizer, cache_dir, key: str, books: Iterable[str], what: str, num_tokens: int | None = None
    ) -> None:
        sentences = map(split_sentences, books)
        arrays = _load_or_tokenise(tokenizer, cache_dir, key, sentences, num_tokens)
        self._set(arrays, Pieces(tokenizer), key, what)

    def _set(self, arrays: Arrays, pieces: Pieces, key: str, what: str) -> None:
        """Keep ids int32 [N], offsets int64 [S + 1], and of each book its first sentence and the one after its last."""
        self.ids, self.offsets, books = arrays["ids"], arrays["offsets"], arrays["books"]
        self.text, self.text_offsets = arrays["text"], arrays["text_offsets"]
        self.pieces, self.fingerprint, self.what = pieces, key, what
        if len(self.offsets) < 2:
            raise UsageError(f"{what} has no sentence of {MIN_SENTENCE_TOKENS} tokens or more; give longer prose")
        self.books = [(a, b) for a, b in zip(books[:-1].tolist(), books[1:].tolist(), strict=True) if a < b]

    def reserve(self, num_tokens: int) -> None:
        """Make sure that `num_tokens` can be taken without repeating anything; raises UsageError where they cannot."""
        if num_tokens > len(self.ids):
            raise UsageError(
                f"{self.what} has {len(self.ids):,} tokens, fewer than the {num_tokens:,} of one sample; give more text, "
                "ask for shorter --lengths, or repeat it with --repeat_background"
            )

    def take(self, rng: np.random.Generator, num_tokens: int) -> Passage:
        """Consecutive sentences from a random place of a random book as `num_tokens` ids, the last one cut.

        At the end of a book the next one follows, after the last one the first.
        """
        runs, _ = self._choose(rng, num_tokens)
        ids = _join([self.ids[self.offsets[a] : self.offsets[b]] for a, b in runs], np.int32)[:num_tokens]
        gaps = np.minimum(_relative(self.offsets, runs), num_tokens)
        return Passage(ids, gaps, gaps)

    def take_text(self, rng: np.random.Generator, num_tokens: int) -> Passage:
        """The same sentences as UTF-8, each after a space, the last one cut so that the text has exactly `num_tokens`.

        Where no beginning of the last one has as many tokens as are missing, a later or longer one takes its place.
        """
        runs, surplus = self._choose(rng, num_tokens)
        runs, tail = self._shorten(runs, surplus) if surplus else (runs, b"")
        parts = [self.text[self.text_offsets[a] : self.text_offsets[b]] for a, b in runs]
        text = _join([*parts, np.frombuffer(tail, dtype=np.uint8)], np.uint8)
        gaps, cuts = _relative(self.offsets, runs), _relative(self.text_offsets, runs)
        if tail:
            gaps, cuts = np.append(gaps, num_tokens), np.append(cuts, len(text))
        return Passage(text, gaps, cuts)

    def _choose(self, rng: np.random.Generator, num_tokens: int) -> tuple[list[tuple[int, int]], int]:
        """Runs of sentences (first, one after the last) that make up `num_tokens`, and their tokens beyond that."""
        first, last = self.books[int(rng.integers(len(self.books)))]
        start = int(rng.integers(first, last))
        runs = []
        while num_tokens > 0:
            stop = int(np.searchsorted(self.offsets, self.offsets[start] + num_tokens, side="left"))
            stop = min(stop, len(self.offsets) - 1)  # the sentence that fills up, or the end of all books
            runs.append((start, stop))
            num_tokens -= int(self.offsets[stop] - self.offsets[start])
            start = 0
        return runs, -num_tokens

    def _shorten(self, runs: list[tuple[int, int]], surplus: int) -> tuple[list[tuple[int, int]], bytes]:
        """Leave out the last sentences; what is then missing is the beginning of one, or the beginnings of several."""
        missing, tail, sentence = -surplus, None, 0
        for _ in range(_GIVEN_UP):
            if tail is None and runs:
                first, stop = runs.pop()
                sentence = stop - 1
                missing += int(self.offsets[stop] - self.offsets[sentence])
                runs += [(first, sentence)] if first < sentence else []
                tail = self._begin(sentence, missing)
        tail = tail or self._begin_several(sentence, missing)
        if tail is None:
            raise UsageError(f"no beginning of a sentence of {self.what} has {missing} tokens; give a greater length")
        return runs, tail

    def _begin(self, sentence: int, num_tokens: int) -> bytes | None:
        """The beginning of exactly `num_tokens` of a sentence or of a following one, in UTF-8 after a space."""
        for number in range(sentence, sentence + _CUTS_TRIED):
            text, length = self._read(number)
            likely = len(text) * num_tokens / length
            ends = range(1, len(text) + 1) if num_tokens <= length else ()
            for end in sorted(ends, key=lambda end: abs(end - likely))[:_ENDS_TRIED]:
                if not text[end - 1].isspace() and len(self.pieces.encode([text[:end]])[0]) == num_tokens:
                    return f" {text[:end]}".encode()
        return None

    def _begin_several(self, sentence: int, num_tokens: int) -> bytes | None:
        """Beginnings of this and the next sentences that have `num_tokens` together, each after a space.

        Where every letter takes three tokens, say, those of one sentence alone never have some numbers of them.
        """
        found = {0: b""}  # tokens -> text
        for number in range(sentence, sentence + _CUTS_TRIED):
            text, _ = self._read(number)
            beginnings = [text[:end] for end in range(1, len(text) + 1) if not text[end - 1].isspace()]
            counts = dict(zip(map(len, self.pieces.encode(beginnings)), beginnings, strict=True))
            found = {
                have + more: said + f" {beginning}".encode()
                for have, said in found.items()
                for more, beginning in counts.items()
                if have + more <= num_tokens
            }
            if num_tokens in found:
                return found[num_tokens]
        return None

    def _read(self, number: int) -> tuple[str, int]:
        """A sentence, counted on from the first after the last one, and its tokens."""
        number %= len(self.offsets) - 1
        text = bytes(self.text[self.text_offsets[number] : self.text_offsets[number + 1]]).decode().strip()
        return text, int(self.offsets[number + 1] - self.offsets[number])


class ProceduralProse(Background):
    """Built-in English-like prose that needs no file: seeded sentences, taken like those of a book, and never at an end.

    A passage begins in the first `num_sentences`. More are written when a longer one is asked for, cached on disk.
    """

    def __init__(self, tokenizer, seed: int | str = 0, num_sentences: int = 20000):
        self.tokenizer, self.seed, self.num_sentences = tokenizer, seed, num_sentences
        pieces = Pieces(tokenizer)
        self._set(_tokenise([self._write(0)], pieces), pieces, f"prose {seed} {num_sentences}", "procedural prose")
        self.blocks, self._first, self._begins = 1, digest(bytes(self.text).decode()), self.books

    def _write(self, block: int) -> list[str]:
        return prose.write(self.num_sentences, derive_seed("prose", self.seed, *([block] if block else [])))

    def reserve(self, num_tokens: int) -> None:
        first = int(self.offsets[self._begins[0][1]])
        while len(self.ids) < first + num_tokens:  # wherever a passage begins
            self.blocks *= 2
            if self.blocks * first >= num_tokens:
                books = (self._write(block) for block in range(self.blocks))
                arrays = _load_or_tokenise(self.tokenizer, None, digest("prose", self._first, str(self.blocks)), books)
                self._set(arrays, self.pieces, self.fingerprint, self.what)
        self.books = self._begins

    def _choose(self, rng, num_tokens):
        self.reserve(num_tokens)
        return super()._choose(rng, num_tokens)


def open_background(
    tokenizer, options: TaskOptions, *, split: str = "train", seed: int = 0, longest: int = 0
) -> Background:
    """Books of files or of a data set, or built-in prose; texts of one split never occur in another's, but for files.

    A data set is read until there are `longest` tokens. Raises UsageError where there are fewer, unless `repeat_background`,
    and where there is no place between sentences.
    """
    if options.background_dataset is not None:
        enough = max(MAX_DATASET_TOKENS, longest)
        background = Background.from_dataset(options.background_dataset, tokenizer, split=split, num_tokens=enough)
    elif options.background_dir is not None:
        background = Background(options.background_dir, tokenizer)
    else:
        background = ProceduralProse(tokenizer, seed=f"{seed}/{split}")
    if not options.repeat_background:
        background.reserve(longest)
    if len(background.offsets) <= MIN_SENTENCES:
        raise UsageError(f"{background.what} is one sentence, and facts stand between sentences; give longer prose")
    return background


def _load_or_tokenise(tokenizer, cache_dir, key: str, books: Iterable[list[str]], num_tokens: int | None = None):
    by = fingerprint_tokenizer(tokenizer)
    folder = cache_folder(cache_dir) / f"background-{digest(_CACHE_VERSION, str(MIN_SENTENCE_TOKENS), by, key)}"
    return load_or_make(folder, by, lambda: _tokenise(books, Pieces(tokenizer), num_tokens), _is_whole)


def _is_whole(arrays: Arrays) -> bool:
    return (
        len(arrays["offsets"]) > 1
        and len(arrays["offsets"]) == len(arrays["text_offsets"]) == arrays["books"][-1] + 1
        and (arrays["offsets"][-1], arrays["text_offsets"][-1]) == (len(arrays["ids"]), len(arrays["text"]))
    )


def _tokenise(books: Iterable[Sequence[str]], pieces: Pieces, num_tokens: int | None = None) -> Arrays:
    """Flat ids and UTF-8, sentence offsets of both, and the first sentence of each book plus their total.

    Ends with the book that reaches `num_tokens`. The tokenizer works in parallel.
    """
    ids, lengths, text, text_lengths, starts = [], [], [], [], [0]
    with progress(None, "token", "tokenising background", unit_scale=True, leave=False) as bar:
        for sentences, encoded in _encode(books, pieces):
            kept = [(s, e) for s, e in zip(sentences, encoded, strict=True) if len(e) >= MIN_SENTENCE_TOKENS]
            utf8 = [f" {sentence}".encode() for sentence, _ in kept]
            ids.append(_join([e for _, e in kept], np.int32))
            lengths.extend(len(e) for _, e in kept)
            text.append(b"".join(utf8))
            text_lengths.extend(map(len, utf8))
            starts.append(len(lengths))
            bar.update(len(ids[-1]))
            if num_tokens is not None and sum(map(len, ids)) >= num_tokens:
                break
    return {
        "ids": _join(ids, np.int32),
        "offsets": _offsets(lengths),
        "text": np.frombuffer(b"".join(text), dtype=np.uint8),
        "text_offsets": _offsets(text_lengths),
        "books": np.array(starts),
    }


def _encode(books: Iterable[Sequence[str]], pieces: Pieces) -> Iterator[tuple[Sequence[str], list[np.ndarray]]]:
    """Each book with the ids of its sentences; short books are tokenised together."""
    books = iter(books)
    while batch := _fill(books):
        encoded = iter(pieces.encode(list(chain.from_iterable(batch))))
        for sentences in batch:
            yield sentences, list(islice(encoded, len(sentences)))


def _fill(books: Iterator[Sequence[str]]) -> list[Sequence[str]]:
    """The next books, `_BATCH` sentences in all or more."""
    batch, size = [], 0
    while size < _BATCH and (sentences := next(books, None)) is not None:
        batch.append(sentences)
        size += len(sentences)
    return batch


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _relative(offsets: np.ndarray, runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Offsets int64 of the sentences of runs that follow each other, from 0."""
    parts = [np.zeros(1, dtype=np.int64)]
    for first, stop in runs:
        parts.append(offsets[first + 1 : stop + 1] - offsets[first] + parts[-1][-1])
    return np.concatenate(parts)


def _join(parts: Sequence[np.ndarray], dtype) -> np.ndarray:
    """One array of all parts; no copy of a single one."""
    if len(parts) == 1 and parts[0].dtype == dtype:
        return parts[0]
    return np.concatenate([np.empty(0, dtype=dtype), *parts]).astype(dtype, copy=False)
