"""BABILong: the facts of a bAbI question hidden, in order, between sentences of background text."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrmt.errors import UsageError
from lrmt.files import listing
from lrmt.tasks import babi
from lrmt.tasks.background import Background
from lrmt.tasks.base import derive_seed, epoch_order, hold_out
from lrmt.tasks.haystack import HaystackTask
from lrmt.tasks.names import TASK_LABELS, is_answer
from lrmt.tasks.options import TaskOptions

_MAX_STORIES = 10_000  # simulated stories tried before a length counts as too short


class BabilongTask(HaystackTask):
    """One bAbI task over background text (Kuratov et al. 2024, section 2).

    Samples whose facts do not fit into the length, or number more than `max_n_facts`, are left out.

    Train draws a fresh permutation for each epoch; validation and test keep file order, so index i is the i-th sample
    that fits. Test is qaN_test.txt; in a folder without it qaN_valid.txt is, and validation is then the last tenth of
    qaN_train.txt, which training leaves out: what selects a model is never what is reported. Without `babi_dir` each
    index simulates its own story, with the words of the file `babi_vocabulary` if one is given.
    Raises UsageError for missing files, an answer that is no label of the task, or a question and answer
    longer than `segment_length`.
    """

    def __init__(
        self,
        name: str,
        tokenizer,
        background: Background,
        options: TaskOptions,
        **kwargs,
    ):
        super().__init__(name, tokenizer, background, options, **kwargs)
        babi_dir, max_n_facts = options.babi_dir, options.max_n_facts
        self.max_n_facts = max_n_facts
        self._fitting: dict[tuple[int, bool], np.ndarray] = {}  # length, whole -> indices of the samples that fit
        words = options.babi_vocabulary
        self.vocabulary = None if words is None else babi.Vocabulary.load(words)
        if babi_dir is None:
            self.samples = None
            answers = babi.answers(name, self.vocabulary)
            questions = {sample.question for sample in babi.simulate(name, 50, 0, self.vocabulary)}
        else:
            self.samples = _read_split(Path(babi_dir), name, self.split)
            if max_n_facts is not None:
                self.samples = [s for s in self.samples if len(s.facts) <= max_n_facts]
                if not self.samples:
                    raise UsageError(f"no sample of {name} has {max_n_facts} facts or fewer; raise --max_n_facts")
            answers, questions = {s.answer for s in self.samples}, {s.question for s in self.samples}
            self.num_tokens = np.array([self.size(s, whole=True) for s in self.samples])
        self._check_segment(questions, answers)
        self.set_cast(*babi.find_cast(name, self.vocabulary, [] if babi_dir is None else [self._facts(Path(babi_dir))]))

    def num_examples(self, length: int) -> int | None:
        return None if self.samples is None else len(self._fits(length, True))

    def num_rows(self, length: int) -> int | None:
        return None if self.samples is None else len(self._fits(length, False))

    def draw(self, index: int, length: int, whole: bool) -> babi.BabiSample:
        if self.samples is None:
            return self._simulate(index, length, whole)
        fits = self._fits(length, whole)
        if self.split != "train":
            return self.samples[fits[index % len(fits)]]
        return self.samples[fits[epoch_order(len(fits), index, self.seed, self.split, self.name, length)]]

    def notes(self, sample: babi.BabiSample) -> Sequence[str]:
        try:
            return self._take_notes(sample.facts, self.name)
        except ValueError:  # files of the user's own making
            return super().notes(sample)

    def _facts(self, folder: Path) -> list[str]:
        """Every sentence that training knows: notes of all splits have the same places."""
        path = _find_file(folder, self.name, "train")
        samples = self.samples if path is None else babi.read(path)
        return list(dict.fromkeys(fact for sample in samples for fact in sample.facts))

    def _fits(self, length: int, whole: bool) -> np.ndarray:
        """Indices of the samples of the file that fit into `length` tokens, in file order."""
        if (length, whole) not in self._fitting:
            sizes = self.num_tokens if whole else np.array([self.size(s, whole=False) for s in self.samples])
            fits = np.flatnonzero(sizes <= length) if length else np.arange(len(self.samples))
            if len(fits) == 0:
                raise UsageError(
                    f"no sample of {self.name} fits into {length} tokens; the shortest takes {sizes.min()}"
                )
            self._fitting[length, whole] = fits
        return self._fitting[length, whole]

    def _simulate(self, index: int, length: int, whole: bool) -> babi.BabiSample:
        """The question of the first simulated story that fits; each index has its own stories."""
        rng = random.Random(derive_seed("story", self.seed, self.split, self.name, length, index))
        for _ in range(_MAX_STORIES):
            sample = babi.simulate_question(self.name, rng, self.vocabulary)
            few_enough = self.max_n_facts is None or len(sample.facts) <= self.max_n_facts
            if few_enough and (not length or self.size(sample, whole) <= length):
                return sample
        limit = f" with --max_n_facts {self.max_n_facts}" if self.max_n_facts else ""
        raise UsageError(f"no story of {self.name} fits into {length} tokens{limit}; give a greater length")


def _read_split(folder: Path, name: str, split: str) -> list[babi.BabiSample]:
    test = _find_file(folder, name, "test")
    if split == "test":
        return _read(test or _find_file(folder, name, "valid", required=True), name)
    if test is not None:
        return _read(_find_file(folder, name, {"train": "train", "validation": "valid"}[split], required=True), name)
    return hold_out(_read(_find_file(folder, name, "train", required=True), name), split)


def _read(path: Path, name: str) -> list[babi.BabiSample]:
    """The samples of a file, every answer a label of the task or, of qa8, a list of them."""
    samples = babi.read(path)
    for sample in samples:
        if not is_answer(sample.answer, name):
            raise UsageError(
                f"{path} answers {sample.question.strip()!r} with {sample.answer!r}, which is no label of {name} "
                f"({', '.join(TASK_LABELS[name])}); is it the file of another task?"
            )
    return samples


def _find_file(folder: Path, name: str, suffix: str, required: bool = False) -> Path | None:
    """The file of a task: `qa1_train.txt`, or the archive's `qa1_single-supporting-fact_train.txt`."""
    for found in (folder / f"{name}_{suffix}.txt", *sorted(folder.glob(f"{name}_*_{suffix}.txt"))):
        if found.is_file():
            return found
    if not required:
        return None
    raise UsageError(f"--babi_dir {folder} has no {name}_{suffix}.txt; it holds: {listing(folder, limit=12)}")
