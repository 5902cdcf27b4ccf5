"""Passkey retrieval: one number in a lot of filler, in a short wording and in those of three benchmarks."""

import numpy as np

from lrmt.errors import UsageError, suggest
from lrmt.tasks.base import Example, Pieces, Task, check_segment, derive_rng, join, start_of_last_segment
from lrmt.tasks.haystack import check_depth

_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize"
_QUIZ = f"{_HIDDEN} them. I will quiz you about the important information there."
WORDINGS = {  # the line that opens the text
    "plain": "Find the pass key in this text.",
    "landmark": _QUIZ,  # Mohtashami & Jaggi 2023, section 4.2
    "longlora": _QUIZ,  # Chen et al. 2023, appendix B, who took it over
    "infinitebench": f"{_HIDDEN} it. I will quiz you about the important information.",  # Zhang et al. 2024, Retrieve.PassKey
}
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LANDMARK_KEYS = 50_000  # the protocol's numbers are 1 to this one


class PasskeyTask(Task):
    """Task line, filler, the key, filler, question; the filler is cut at token level to the exact length.

    `wording` names the task line: plain, landmark, longlora or infinitebench, which agree in all else but that `landmark`
    draws the number from 1 to 50000, as its protocol does, and not among those of `num_digits`. Task line, filler, needle
    and question are the protocol's to the letter; what joins them is a space instead of a line break, and the filler is
    cut between tokens instead of characters.
    `depth` is the share of the filler before the key (0 at the top), drawn uniformly when None. `early_facts_share` of the
    training texts have the key before the last segment, where only memory can find it.
    Raises UsageError for bad options, or a question and answer longer than `segment_length`.
    """

    name = "passkey"

    def __init__(
        self,
        tokenizer,
        *,
        split: str = "train",
        seed: int = 0,
        segment_length: int | None = None,
        num_digits: int = 5,
        wording: str = "plain",
        depth: float | None = None,
        early_facts_share: float = 0.0,
    ):
        if not 1 <= num_digits <= 18:
            raise UsageError(f"--num_digits must be 1..18; got {num_digits}")
        if wording not in WORDINGS:
            got = f"{wording!r}{suggest(wording, WORDINGS)}"
            raise UsageError(f"--passkey_wording must be one of {', '.join(WORDINGS)}; got {got}")
        check_depth(depth)
        self.pieces = Pieces(tokenizer)
        self.split, self.seed, self.num_digits, self.depth = split, seed, num_digits, depth
        self.task_line, self.question = self.pieces(WORDINGS[wording]), self.pieces(QUESTION)
        self.filler = join(map(self.pieces, FILLER))
        self.keys = (1, LANDMARK_KEYS + 1) if wording == "landmark" else (10 ** (num_digits - 1), 10**num_digits)
        longest = str(self.keys[1] - 1)
        self.max_new_tokens = max(10, len(longest) + 2)
        self.segment_length = segment_length
        self.early_facts_share = early_facts_share if split == "train" and segment_length else 0.0
        check_segment(self.question, self.pieces.answer(longest), segment_length, "passkey")

    def example(self, index: int, length: int) -> Example:
        rng = derive_rng(self.seed, self.split, self.name, length, index)
        key = str(rng.integers(*self.keys))
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
