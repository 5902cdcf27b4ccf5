"""Facts hidden, in order, between sentences of background text: what BABILong and the needle tasks share."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest

import numpy as np

from lrmt.tasks import babi
from lrmt.tasks.babi import BabiSample
from lrmt.tasks.background import Background
from lrmt.tasks.base import Example, Note, Pieces, Task, check_segment, derive_rng, join, start_of_last_segment
from lrmt.tasks.options import TaskOptions


@dataclass(frozen=True)
class Row:
    """One sample as text. `stretches` are the background before, between and after the facts.

    `places` are token offsets of the facts in `input`, which has `num_tokens` tokens.
    """

    opening: str
    stretches: tuple[str, ...]
    facts: tuple[str, ...]
    question: str
    target: str
    places: tuple[int, ...]
    num_tokens: int

    @cached_property
    def input(self) -> str:
        facts = (f" {fact.strip()}" for fact in self.facts)
        return "".join([self.opening, *chain.from_iterable(zip_longest(self.stretches, facts, fillvalue=""))]).strip()


class HaystackTask(Task):
    """Facts over background text, and a question.

    Facts keep their order and go to gaps between background sentences, drawn uniformly with replacement among the
    gaps from `task_start_pct` to `task_end_pct` (shares 0..1 of the background, in tokens); with `depth`, also such a
    share, the first goes to the gap nearest to it and the others to gaps from there on. `question_position` says where
    the question stands relative to the context; "both" repeats it.
    `early_facts_share` of the training texts have all facts before the last segment, where only memory can find them.
    `length` 0 means no background at all (the 0k setting).
    Raises UsageError for a question and answer longer than `segment_length`.
    """

    opening = ""  # stands before everything

    def __init__(
        self,
        name: str,
        tokenizer,
        background: Background,
        options: TaskOptions,
        *,
        split: str = "train",
        seed: int = 0,
        segment_length: int | None = None,
    ):
        self.name, self.background, self.split, self.seed = name, background, split, seed
        self.question_position, self.segment_length = options.question_position, segment_length
        self.span, self.depth = (options.task_start_pct, options.task_end_pct), options.depth
        self.early_facts_share = options.early_facts_share if split == "train" and segment_length else 0.0
        self.pieces = Pieces(tokenizer)
        self.opening_ids = join([self.pieces(self.opening)] if self.opening else [])
        self.set_cast({}, ())

    def set_cast(self, cast: Mapping[str, str], rooms: Sequence[str]) -> None:
        """Who, and what, has a place in notes from the start, what it says until something is told, and the rooms where they can be."""
        self.cast, self.rooms = cast, rooms
        self._short = self._shorten(" ".join([babi.first_note(cast), *rooms]).split())
        self.first_note = self._short_note(babi.first_note(cast))

    def _check_segment(self, questions: Sequence[str], answers: Sequence[str]) -> None:
        """Make room for the longest of the answers, and see that the longest question and it fit into a segment."""
        longest = max(map(self.pieces.answer, answers), key=len)
        self.max_new_tokens = len(longest)
        check_segment(max(map(self.pieces, questions), key=len), longest, self.segment_length, self.name)

    @abstractmethod
    def draw(self, index: int, length: int, whole: bool) -> BabiSample:
        """The sample of an index, `size(sample, whole)` of which is at most `length` tokens, whatever it is when 0."""

    def notes(self, sample: BabiSample) -> Sequence[str]:
        """What a perfect reader would have written down after each fact: here, what was told, the latest first."""
        return [" ".join(reversed(sample.facts[: i + 1])) for i in range(len(sample.facts))]

    def _take_notes(self, facts: Sequence[str], task: str) -> list[str]:
        """Where everybody is after each of the facts of a bAbI task. Raises ValueError for those that are of none."""
        return [self._short_note(note) for note in babi.take_notes(facts, task, self.cast)]

    def _shorten(self, words: Iterable[str]) -> dict[str, str]:
        """For each word its first token as text, where that tells all of them apart: in notes that have a place for everybody a second
        token of one would move the places of all who follow.
        """
        short = {word: self.pieces.tokenizer.decode(self.pieces(word)[:1]).strip() for word in words}
        sizes = {len(self.pieces(text)) if text else 0 for text in short.values()}
        return short if sizes == {1} and len({*short.values()}) == len(short) else {}

    def _short_note(self, note: str) -> str:
        return " ".join(self._short.get(word, word) for word in note.split())

    def num_rows(self, length: int) -> int | None:
        """How many different rows there are at this length; None when they never end."""
        return None

    def size(self, sample: BabiSample, whole: bool) -> int:
        """Tokens of a sample without any background: all of it, or all that stands in a row's input."""
        tokens = len(self.opening_ids) + sum(map(len, self._encode(sample.facts)))
        if whole:
            tokens += len(self.pieces(sample.question)) * (2 if self.question_position == "both" else 1)
            tokens += len(self.pieces(sample.answer)) + 1
        return tokens

    def _encode(self, facts: Sequence[str]) -> list[np.ndarray]:
        return [self.pieces(fact) for fact in facts]

    def example(self, index: int, length: int) -> Example:
        rng = derive_rng(self.seed, self.split, self.name, length, index)
        sample = self.draw(index, length, whole=True)
        facts, question = self._encode(sample.facts), self.pieces(sample.question)
        room = length - self.size(sample, whole=True) if length else 0
        span = self._draw_span(rng, length, room, facts, question)
        passage = self.background.take(rng, room)
        stretches = passage.split(self._draw_gaps(rng, passage.gaps, len(facts), span))
        before = [question] if self.question_position != "last" else []
        after = [question] if self.question_position != "first" else []
        context = [piece for pair in zip(stretches, facts, strict=False) for piece in pair]
        prompt = join([*before, self.opening_ids, *context, stretches[-1], *after])
        ends = np.cumsum([len(piece) for piece in context])[1::2] + sum(map(len, before)) + len(self.opening_ids)
        answer = self.pieces.answer(sample.answer)

        def take_notes():
            return map(Note, ends.tolist(), self.notes(sample))

        return Example(prompt, answer, sample.question.strip(), sample.answer, self.name, take_notes, self.first_note)

    def row(self, index: int, length: int) -> Row:
        """Sample `index` as text whose input has exactly `length` tokens (0: facts alone), question and answer apart.

        A row counts as the tokenizer reads it after one space.
        """
        rng = derive_rng(self.seed, self.split, self.name, length, index)
        sample = self.draw(index, length, whole=False)
        sizes = [len(fact) for fact in self._encode(sample.facts)]
        start = len(self.opening_ids)
        room = length - start - sum(sizes) if length else 0
        passage = self.background.take_text(rng, room)
        gaps = self._draw_gaps(rng, passage.gaps, len(sizes), self.span)
        stretches = tuple(bytes(part).decode() for part in passage.split(gaps))
        places = passage.gaps[gaps] + np.cumsum([start, *sizes[:-1]])
        return Row(
            self.opening,
            stretches,
            sample.facts,
            sample.question,
            sample.answer,
            places=tuple(places.tolist()),
            num_tokens=start + room + sum(sizes),
        )

    def _draw_span(self, rng, length: int, room: int, facts: list[np.ndarray], question: np.ndarray):
        """Where facts may stand, as shares of the background."""
        if self.early_facts_share and rng.random() < self.early_facts_share and room:
            asked = len(question) if self.question_position == "both" else 0
            early = start_of_last_segment(length, self.segment_length) - sum(map(len, facts)) - asked
            if early > 0:
                return (0.0, min(1.0, early / room))
        return self.span

    def _draw_gaps(self, rng: np.random.Generator, gaps: np.ndarray, num_facts: int, span) -> np.ndarray:
        """Sorted indices int64 [num_facts] of the gaps, given as token offsets, that the facts go to."""
        low, high, length = 0, len(gaps) - 1, gaps[-1]
        if span != (0.0, 1.0):
            inside = np.flatnonzero((gaps >= span[0] * length) & (gaps <= span[1] * length))
            if len(inside):
                low, high = int(inside[0]), int(inside[-1])
            else:  # the span lies within one sentence: the gap before it
                low = high = int(np.searchsorted(gaps, span[0] * length)) - 1
        if self.depth is not None:
            low = int(np.abs(gaps - self.depth * length).argmin())
        chosen = np.sort(rng.integers(low, high + 1, size=num_facts))
        if self.depth is not None:
            chosen[0] = low
        return chosen
