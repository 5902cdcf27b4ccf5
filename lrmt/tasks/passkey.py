"""Passkey retrieval: one number in a lot of filler, in a short wording and in those of three benchmarks."""

import numpy as np

from lrmt.errors import UsageError
from lrmt.tasks.base import Example, Note, Pieces, Task, check_segment, derive_rng, join, start_of_last_segment
from lrmt.tasks.names import PASSKEY_WORDINGS
from lrmt.tasks.options import TaskOptions

_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize"
_QUIZ = f"{_HIDDEN} them. I will quiz you about the important information there."
_LINES = (
    "Find the pass key in this text.",
    _QUIZ,  # Mohtashami & Jaggi 2023, section 4.2
    _QUIZ,  # Chen et al. 2023, appendix B, who took it over
    f"{_HIDDEN} it. I will quiz you about the important information.",  # Zhang et al. 2024, Retrieve.PassKey
)
WORDINGS = dict(zip(PASSKEY_WORDINGS, _LINES, strict=True))  # the line that opens the text
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
FIRST = "The pass key is {key}."
KEY = FIRST + " Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LANDMARK_KEYS = 50_000  # the protocol's numbers are 1 to this one


class PasskeyTask(Task):
    """Task line, filler, the key, filler, question; the filler is cut at token level to the exact length.

    `passkey_wording` names the task line: plain, landmark, longlora or infinitebench, which agree in all else but that
    `landmark` draws the number from 1 to 50000, as its protocol does, and not among those of `num_digits`. Task line, filler,
    needle and question are the protocol's to the letter; what joins them is a space instead of a line break, and the filler is
    cut between tokens instead of characters.
    `depth` is the share of the filler before the key (0 at the top), drawn uniformly when None. `early_facts_share` of the
    training texts have the key before the last segment, where only memory can find it.
    Raises UsageError for a question and answer longer than `segment_length`.
    """

    name = "passkey"

    def __init__(
        self,
        tokenizer,
        options: TaskOptions,
        *,
        split: str = "train",
        seed: int = 0,
        segment_length: int | None = None,
    ):
        wording, num_digits = options.passkey_wording, options.num_digits
        self.pieces = Pieces(tokenizer)
        self.split, self.seed, self.num_digits, self.depth = split, seed, num_digits, options.depth
        self.task_line, self.question = self.pieces(WORDINGS[wording]), self.pieces(QUESTION)
        self.filler = join(map(self.pieces, FILLER))
        self.keys = (1, LANDMARK_KEYS + 1) if wording == "landmark" else (10 ** (num_digits - 1), 10**num_digits)
        longest = str(self.keys[1] - 1)
        self.max_new_tokens = max(10, len(longest) + 2)
        self.segment_length = segment_length
        self.early_facts_share = options.early_facts_share if split == "train" and segment_length else 0.0
        check_segment(self.question, self.pieces.answer(longest), segment_length, "passkey")

    def example(self, index: int, length: int) -> Example:
        rng = derive_rng(self.seed, self.split, self.name, length, index)
        key = str(rng.integers(*self.keys))
        told, first, answer = self.pieces.encode([KEY.format(key=key), FIRST.format(key=key), key])
        answer = np.append(answer, self.pieces.tokenizer.eos_token_id)
        needed = len(self.task_line) + len(told) + len(self.question) + len(answer)
        room = length - needed
        if room < 0:
            raise UsageError(f"passkey does not fit into {length} tokens; give a length of {needed} or more")
        latest = room
        if self.early_facts_share and rng.random() < self.early_facts_share:
            early = start_of_last_segment(length, self.segment_length) - len(self.task_line) - len(told)
            latest = min(room, early) if early >= 0 else room
        before = int(rng.integers(latest + 1)) if self.depth is None else round(self.depth * room)
        filler = np.resize(self.filler, max(before, room - before))
        prompt = join([self.task_line, filler[:before], told, filler[: room - before], self.question])
        # once it was said, not twice: else a segment that ends in between would have to leave it to the next, which may not see it whole
        note = Note(len(self.task_line) + before + len(first), key)
        return Example(prompt, answer, QUESTION, key, self.name, lambda: [note])
