"""What every task shares: the example, the interface, seeding, and how a piece of text becomes token ids."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from lrmt.errors import UsageError


class Note(NamedTuple):
    """What a perfect reader would have written down, `text`, once the first `end` tokens have been read."""

    end: int
    text: str


@dataclass(frozen=True)
class Example:
    """One tokenised sample: `prompt_ids` int64 [P] (context, question), `answer_ids` int64 [A] (answer, EOS).

    `take_notes` makes its `notes`, only where they are asked for; until the first of them `first_note` holds. One at 0 alone says
    that there is nothing to note.
    """

    prompt_ids: np.ndarray
    answer_ids: np.ndarray
    question: str
    target: str
    task: str
    take_notes: Callable[[], Iterable[Note]] = tuple
    first_note: str = ""

    @cached_property
    def notes(self) -> tuple[Note, ...]:
        """What should be known along the way, each until the next, from the beginning on; none at all where a task has none."""
        notes = tuple(self.take_notes())
        return (Note(0, self.first_note), *(note for note in notes if note.end)) if notes else ()


class Task(ABC):
    """A stream of examples, each a pure function of (seed, split, index, length): no state, any worker, any order."""

    name: str
    max_new_tokens: int  # room for the longest answer and EOS
    first_note = ""  # what a perfect reader would have written down before reading anything

    @abstractmethod
    def example(self, index: int, length: int) -> Example:
        """Build example `index` of exactly `length` tokens, answer and EOS included (stored rows ignore `length`).

        Raises UsageError when nothing of this task fits into `length`.
        """

    def num_examples(self, length: int) -> int | None:
        """How many different examples there are at this length; None when they never end."""
        return None


def derive_seed(*parts: object) -> int:
    """Hash parts such as (seed, split, task, length, index) into 128 bits, equal in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def derive_rng(*parts: object) -> np.random.Generator:
    """A generator seeded by `derive_seed(*parts)`."""
    return np.random.default_rng(derive_seed(*parts))


def epoch_order(num_samples: int, index: int, *parts: object) -> int:
    """The sample that `index` meets when every epoch is a fresh permutation seeded by `parts`."""
    epoch, position = divmod(index, num_samples)
    return int(_permutation(num_samples, epoch, parts)[position])


@lru_cache(maxsize=16)  # an epoch is read by neighbouring indices
def _permutation(num_samples: int, epoch: int, parts: tuple) -> np.ndarray:
    return derive_rng("epoch", epoch, *parts).permutation(num_samples)


class Pieces:
    """Tokenise pieces of text (sentences, questions, answers), each preceded by exactly one space."""

    def __init__(self, tokenizer):
        if tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no EOS token, which ends every answer; set tokenizer.eos_token")
        self.tokenizer = tokenizer
        # SentencePiece-style tokenizers put a space before the text themselves
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
        self.prefix = "" if first and str(first[0]).startswith("▁") else " "
        self._cache: dict[str, np.ndarray] = {}

    def __call__(self, text: str) -> np.ndarray:
        """Ids int64 [n] of one piece, cached: for texts that recur."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._cache[text] = self.encode([text])[0]
            ids.setflags(write=False)
        return ids

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int64 of many pieces at once, not cached."""
        if not texts:
            return []
        encoded = encode_plain(self.tokenizer, [self.prefix + text.strip() for text in texts])
        return [np.array(ids, dtype=np.int64) for ids in encoded]

    def count(self, text: str, ends: Sequence[int]) -> list[int]:
        """How many tokens of one piece hold the first `end` letters of its text, for each of `ends`."""
        if not getattr(self.tokenizer, "is_fast", False):  # which do not say where their tokens stand
            return [len(ids) for ids in self.encode([text[:end] for end in ends])]
        (spans,) = encode_plain(self.tokenizer, [self.prefix + text.strip()], "offset_mapping")
        before = len(self.prefix) - (len(text) - len(text.lstrip()))
        letters = [before + len(text[:end].rstrip()) for end in ends]
        return np.searchsorted([begin for begin, _ in spans], letters).tolist()

    def answer(self, text: str) -> np.ndarray:
        """Ids int64 [A] of an answer, EOS last."""
        return np.append(self(text), self.tokenizer.eos_token_id)

    def said(self, text: str) -> str:
        """What is read of a text that a model says to the letter: tokenizers may normalise it, or know no such letter."""
        return self.tokenizer.decode(self(text), skip_special_tokens=True).strip()


def encode_plain(tokenizer, texts: Sequence[str], wanted: str = "input_ids") -> list[list]:
    """Ids of texts as they are, or their "offset_mapping": what spells a special token in them is text."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if type(tokenizer).__name__ != "MistralCommonBackend":  # which knows no other way, and refuses to be told
        options["split_special_tokens"] = True
    if wanted == "offset_mapping":
        options["return_offsets_mapping"] = True
    return tokenizer(texts, **options)[wanted]


def join(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate id arrays into one int64 array, empty when there are none."""
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])


def check_segment(question: np.ndarray, answer: np.ndarray, segment_length: int | None, where: str) -> None:
    """Raise UsageError when question and answer do not fit into one segment together."""
    needed = len(question) + len(answer)
    if segment_length is not None and needed > segment_length:
        raise UsageError(
            f"--segment_length {segment_length} is too short: question and answer of {where} take {needed} tokens; "
            f"raise it to {needed} or more, or shorten them (a recipe without that flag has `--context_length`)"
        )


def hold_out(rows: list, split: str) -> list:
    """The share of `rows` for a split: the last tenth is "validation", the rest "train"; at least one is held out."""
    cut = len(rows) - max(1, len(rows) // 10)
    return rows[:cut] if split == "train" else rows[cut:]


def start_of_last_segment(length: int, segment_length: int) -> int:
    """How many tokens stand before the last segment of a text, its first segment being full."""
    return (-(-length // segment_length) - 1) * segment_length
