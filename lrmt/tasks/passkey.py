"""Passkey retrieval after Landmark attention (Mohtashami & Jaggi 2023, section 4.2): one number in a lot of filler."""

import numpy as np

from lrmt.errors import UsageError
from lrmt.tasks.base import Example, Pieces, Task, check_segment, derive_rng, join, start_of_last_segment

TASK_LINE = "Find the pass key in this text."
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


class PasskeyTask(Task):
    """Task line, filler, the key, filler, question; the filler is cut at token level to the exact length.

    `depth` is the share of the filler before the key (0 at the top), drawn uniformly when None. `early_facts_share` of the
    training texts have the key before the last segment, where only memory can find it.
    Raises UsageError for bad options, or a question and answer longer than `segment_length`.
    """

    name = "passkey"

    def __init__(
        self, tokenizer, *, split="train", seed=0, segment_length=None, num_digits=5, depth=None, early_facts_share=0.0
    ):
        if not 1 <= num_digits <= 18:
            raise UsageError(f"--num_digits must be 1..18; got {num_digits}")
        if depth is not None and not 0 <= depth <= 1:
            raise UsageError(f"--depth must lie in [0, 1] (0 = the key at the top); got {depth}")
        self.pieces = Pieces(tokenizer)
        self.split, self.seed, self.num_digits, self.depth = split, seed, num_digits, depth
        self.task_line, self.question = self.pieces(TASK_LINE), self.pieces(QUESTION)
        self.filler = join(map(self.pieces, FILLER))
        self.max_new_tokens = max(10, num_digits + 2)
        self.segment_length = segment_length
        self.early_facts_share = early_facts_share if split == "train" and segment_length else 0.0
        check_segment(self.question, self.pieces.answer("9" * num_digits), segment_length, "passkey")

    def example(self, index: int, length: int) -> Example:
        rng = derive_rng(self.seed, self.split, self.name, length, index)
        key = str(rng.integers(10 ** (self.num_digits - 1), 10**self.num_digits))
        told, answer = self.pieces.encode([KEY.format(key=key), key])
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
        return Example(prompt, answer, QUESTION, key, self.name)
