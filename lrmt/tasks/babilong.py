"""BABILong: the facts of a bAbI question hidden, in order, between sentences of background text."""

import random
from pathlib import Path

import numpy as np

from lrmt.errors import UsageError
from lrmt.tasks import babi
from lrmt.tasks.background import Background
from lrmt.tasks.base import (
    Example,
    Pieces,
    Task,
    check_segment,
    derive_rng,
    derive_seed,
    epoch_order,
    hold_out,
    join,
    start_of_last_segment,
)

QUESTION_POSITIONS = ("last", "first", "both")
_MAX_STORIES = 10_000  # simulated stories tried before a length counts as too short


class BabilongTask(Task):
    """One bAbI task over background text.

    Facts keep their order and go to gaps between background sentences, drawn uniformly with replacement among the
    gaps from `task_start_pct` to `task_end_pct` (shares 0..1 of the background, in tokens). Samples whose facts do
    not fit into the length, or number more than `max_n_facts`, are left out. `question_position` says where the
    question stands relative to the context; "both" repeats it.

    Train draws a fresh permutation for each epoch; validation and test keep file order, so index i is the i-th sample
    that fits. Test is qaN_test.txt; in a folder without it qaN_valid.txt is, and validation is then the last tenth of
    qaN_train.txt, which training leaves out: what selects a model is never what is reported. Without `babi_dir` each
    index simulates its own story.
    `early_facts_share` of the training texts have all facts before the last segment, where only memory can find them.
    `length` 0 means no background at all (the 0k setting).
    Raises UsageError for bad options, missing files, or a question and answer longer than `segment_length`.
    """

    def __init__(
        self,
        name: str,
        tokenizer,
        background: Background,
        *,
        split: str = "train",
        seed: int = 0,
        babi_dir: str | Path | None = None,
        segment_length: int | None = None,
        max_n_facts: int | None = None,
        question_position: str = "last",
        task_start_pct: float = 0.0,
        task_end_pct: float = 1.0,
        early_facts_share: float = 0.0,
    ):
        if question_position not in QUESTION_POSITIONS:
            raise UsageError(
                f"--question_position must be one of {', '.join(QUESTION_POSITIONS)}; got {question_position!r}"
            )
        if not 0 <= task_start_pct <= task_end_pct <= 1:
            raise UsageError(
                "--task_start_pct and --task_end_pct must satisfy 0 <= start <= end <= 1; "
                f"got {task_start_pct} and {task_end_pct}"
            )
        if max_n_facts is not None and max_n_facts < 1:
            raise UsageError(f"--max_n_facts must be 1 or more, or left out; got {max_n_facts}")
        self.name, self.background, self.split, self.seed = name, background, split, seed
        self.max_n_facts, self.question_position = max_n_facts, question_position
        self.span = (task_start_pct, task_end_pct)
        self.segment_length = segment_length
        self.early_facts_share = early_facts_share if split == "train" and segment_length else 0.0
        self.pieces = Pieces(tokenizer)
        self._fitting: dict[int, np.ndarray] = {}  # length -> indices of the samples that fit
        if babi_dir is None:
            self.samples = None
            answers, questions = babi.answers(name), {s.question for s in babi.simulate(name, 50, 0)}
        else:
            self.samples = _read_split(Path(babi_dir), name, split)
            if max_n_facts is not None:
                self.samples = [s for s in self.samples if len(s.facts) <= max_n_facts]
                if not self.samples:
                    raise UsageError(f"no sample of {name} has {max_n_facts} facts or fewer; raise --max_n_facts")
            answers, questions = {s.answer for s in self.samples}, {s.question for s in self.samples}
            self.num_tokens = np.array([self._count(s) for s in self.samples])
        longest_answer = max(map(self.pieces.answer, answers), key=len)
        self.max_new_tokens = len(longest_answer)
        check_segment(max(map(self.pieces, questions), key=len), longest_answer, segment_length, name)

    def num_examples(self, length: int) -> int | None:
        return None if self.samples is None else len(self._fits(length))

    def example(self, index: int, length: int) -> Example:
        rng = derive_rng(self.seed, self.split, self.name, length, index)
        sample = self._simulate(index, length) if self.samples is None else self.samples[self._choose(index, length)]
        facts = [self.pieces(fact) for fact in sample.facts]
        question, answer = self.pieces(sample.question), self.pieces.answer(sample.answer)
        context = facts
        if length:
            background = length - self._count(sample)
            span = self.span
            if self.early_facts_share and rng.random() < self.early_facts_share and background:
                asked = len(question) if self.question_position == "both" else 0
                early = start_of_last_segment(length, self.segment_length) - sum(map(len, facts)) - asked
                if early > 0:
                    span = (0.0, min(1.0, early / background))
            context = self._hide(facts, self.background.take(rng, background), rng, span)
        before = [question] if self.question_position != "last" else []
        after = [question] if self.question_position != "first" else []
        prompt = join([*before, *context, *after])
        return Example(prompt, answer, sample.question.strip(), sample.answer, self.name)

    def _count(self, sample: babi.BabiSample) -> int:
        """Tokens of a sample without any background."""
        asked = len(self.pieces(sample.question)) * (2 if self.question_position == "both" else 1)
        return sum(len(self.pieces(fact)) for fact in sample.facts) + asked + len(self.pieces.answer(sample.answer))

    def _fits(self, length: int) -> np.ndarray:
        """Indices of the samples of the file that fit into `length` tokens, in file order."""
        if length not in self._fitting:
            fits = np.flatnonzero(self.num_tokens <= length) if length else np.arange(len(self.samples))
            if len(fits) == 0:
                raise UsageError(
                    f"no sample of {self.name} fits into {length} tokens; the shortest takes {self.num_tokens.min()}"
                )
            self._fitting[length] = fits
        return self._fitting[length]

    def _choose(self, index: int, length: int) -> int:
        fits = self._fits(length)
        if self.split != "train":
            return int(fits[index % len(fits)])
        return int(fits[epoch_order(len(fits), index, self.seed, self.split, self.name, length)])

    def _simulate(self, index: int, length: int) -> babi.BabiSample:
        """The question of the first simulated story that fits; each index has its own stories."""
        rng = random.Random(derive_seed("story", self.seed, self.split, self.name, length, index))
        for _ in range(_MAX_STORIES):
            sample = babi.simulate_question(self.name, rng)
            few_enough = self.max_n_facts is None or len(sample.facts) <= self.max_n_facts
            if few_enough and (not length or self._count(sample) <= length):
                return sample
        limit = f" with --max_n_facts {self.max_n_facts}" if self.max_n_facts else ""
        raise UsageError(f"no story of {self.name} fits into {length} tokens{limit}; give a greater length")

    def _hide(self, facts: list[np.ndarray], background: list[np.ndarray], rng: np.random.Generator, span=None):
        """Facts and background sentences in one list; gap g lies before background sentence g."""
        span = span or self.span
        low, high = 0, len(background)
        if span != (0.0, 1.0):
            offsets = np.concatenate([[0], np.cumsum([len(s) for s in background])])
            inside = np.flatnonzero((offsets >= span[0] * offsets[-1]) & (offsets <= span[1] * offsets[-1]))
            if len(inside):
                low, high = int(inside[0]), int(inside[-1])
            else:  # the span lies within one sentence: the gap before it
                low = high = int(np.searchsorted(offsets, span[0] * offsets[-1])) - 1
        gaps = np.sort(rng.integers(low, high + 1, size=len(facts))).tolist()
        pieces: list[np.ndarray] = []
        start = 0
        for gap, fact in zip(gaps, facts, strict=True):
            pieces += background[start:gap]
            pieces.append(fact)
            start = gap
        return pieces + background[start:]


def _read_split(folder: Path, name: str, split: str) -> list[babi.BabiSample]:
    test = _find_file(folder, name, "test")
    if split == "test":
        return babi.read(test or _find_file(folder, name, "valid", required=True))
    if test is not None:
        return babi.read(_find_file(folder, name, {"train": "train", "validation": "valid"}[split], required=True))
    samples = babi.read(_find_file(folder, name, "train", required=True))
    return hold_out(samples, split)


def _find_file(folder: Path, name: str, suffix: str, required: bool = False) -> Path | None:
    """The file of a task: `qa1_train.txt`, or the archive's `qa1_single-supporting-fact_train.txt`."""
    for found in (folder / f"{name}_{suffix}.txt", *sorted(folder.glob(f"{name}_*_{suffix}.txt"))):
        if found.is_file():
            return found
    if not required:
        return None
    if not folder.is_dir():
        raise UsageError(f"--babi_dir {folder} is not a folder; give the one with the bAbI text files")
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    raise UsageError(f"--babi_dir {folder} has no {name}_{suffix}.txt; it holds: {there}")
