"""Needles in background text: RULER's single needle, and the memory tasks of the 1M-token RMT paper."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lrmt.errors import UsageError
from lrmt.tasks import babi, prose
from lrmt.tasks.babi import BabiSample
from lrmt.tasks.background import Background
from lrmt.tasks.base import derive_rng
from lrmt.tasks.haystack import HaystackTask
from lrmt.tasks.options import TaskOptions

OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


class SampledTask(HaystackTask):
    """A task whose samples are drawn, each from its index."""

    def draw(self, index: int, length: int, whole: bool) -> BabiSample:
        sample = self.invent(derive_rng("sample", self.seed, self.split, self.name, length, index))
        needed = self.size(sample, whole)
        if length and needed > length:
            raise UsageError(f"{self.name} does not fit into {length} tokens; give a length of {needed} or more")
        return sample

    @abstractmethod
    def invent(self, rng: np.random.Generator) -> BabiSample:
        """Facts, question and answer."""


class NeedleTask(SampledTask):
    """One number to be found by its key, in the wording of RULER's niah_single (Hsieh et al. 2024, section 3)."""

    NEEDLE = "One of the special magic numbers for {key} is: {value}."
    QUESTION = (
        "What is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is"
    )
    opening = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    num_digits = 7

    def __init__(self, *given, **kwargs):
        super().__init__(*given, **kwargs)
        words = (sorted(prose.WORDS[kind].split(), key=len)[-1] for kind in ("adjective", "thing"))
        self._check_segment([self.QUESTION.format(key="-".join(words))], ["9" * self.num_digits])

    def invent(self, rng: np.random.Generator) -> BabiSample:
        key = "-".join(str(rng.choice(prose.WORDS[kind].split())) for kind in ("adjective", "thing"))
        value = str(rng.integers(10 ** (self.num_digits - 1), 10**self.num_digits))
        return BabiSample(
            (self.NEEDLE.format(key=key, value=value),), self.QUESTION.format(key=key), value, support=(0,)
        )

    def notes(self, sample: BabiSample) -> Sequence[str]:
        return [sample.answer]

    def _encode(self, facts: Sequence[str]) -> list[np.ndarray]:
        return self.pieces.encode(facts)  # which do not recur


class MemoryTask(SampledTask):
    """What memory must do with a fact (Bulatov et al. 2023, section 4): one class for three tasks.

    memorize: a fact at the very beginning, where is the person? detect_memorize: the same fact anywhere.
    reasoning: two facts anywhere, each of which says where one room lies from another; only one of them answers.
    """

    def __init__(self, name: str, tokenizer, background: Background, options: TaskOptions, **kwargs):
        if name == "memorize":
            if options.depth or options.task_start_pct:
                raise UsageError("--task memorize has its fact at the top; leave out --depth, or use detect_memorize")
            if options.task_end_pct == 1:
                options = replace(options, depth=0.0)
        super().__init__(name, tokenizer, background, options, **kwargs)
        self._like = "qa4" if name == "reasoning" else "qa1"  # whose sentences its facts are
        self.set_cast(*babi.find_cast(self._like))
        rng = np.random.default_rng(0)
        self._check_segment([self.invent(rng).question for _ in range(50)], babi.ROOMS)

    def notes(self, sample: BabiSample) -> Sequence[str]:
        return self._take_notes(sample.facts, self._like)

    def invent(self, rng: np.random.Generator) -> BabiSample:
        if self.name != "reasoning":
            person, go, room = (str(rng.choice(words)) for words in (babi.PEOPLE, babi.GO, babi.ROOMS))
            return BabiSample((f"{person} {go} the {room}.",), f"Where is {person}? ", room, support=(0,))
        first, middle, last = map(str, rng.permutation(babi.ROOMS)[:3])
        way = str(rng.choice(list(OPPOSITE)))  # from the last room to the first
        facts = (f"The {first} is {way} of the {middle}.", f"The {last} is {OPPOSITE[way]} of the {middle}.")
        order, asked = rng.permutation(2), int(rng.integers(2))
        question = f"What is {(way, OPPOSITE[way])[asked]} of the {middle}?"
        return BabiSample(tuple(facts[i] for i in order), question, (first, last)[asked], (int(order[asked]),))
