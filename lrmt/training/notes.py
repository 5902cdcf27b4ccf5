"""Memory supervision in training: batches of notes, and how well the memory says them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lrmt.models.notes import Notes, NotesScore
from lrmt.models.scoring import IGNORED
from lrmt.tasks.base import Example, Pieces

NEVER = torch.iinfo(torch.long).max
SINCE = ("0", "1", "2_3", "4_7", "8_15", "16_up")  #: hand-overs since a note was told, as they are logged


def collate_notes(examples: Sequence[Example], pieces: Pieces, size: int) -> tuple[Notes, bool]:
    """The notes of examples as ids, each cut to `size` tokens, and whether one was."""
    ids = torch.full((len(examples), max(1, *(len(e.notes) for e in examples)), size), IGNORED, dtype=torch.long)
    ends = torch.full(ids.shape[:2], NEVER, dtype=torch.long)
    cut = False
    for row, example in enumerate(examples):
        for number, told in enumerate(pieces.encode([note.text for note in example.notes])):
            ends[row, number] = example.notes[number].end
            if example.notes[number].text:  # else there is nothing to say yet, not a space
                cut = cut or len(told) > size
                ids[row, number, : len(told)] = torch.from_numpy(told[:size])
    return Notes(ids, ends), cut


class NotesMeter:
    """Counts what the memory says of its notes, by the hand-overs since each was told."""

    def __init__(self):
        self.right, self.asked = np.zeros(len(SINCE)), np.zeros(len(SINCE))
        self.loss = 0.0

    def add(self, score: NotesScore) -> None:
        for right, age in zip(score.right.tolist(), score.age.tolist(), strict=True):
            place = min(int(age).bit_length(), len(SINCE) - 1)
            self.right[place] += right
            self.asked[place] += 1
        self.loss += float(score.loss.detach())

    def numbers(self) -> list[float]:
        """What ranks add up."""
        return [self.loss, *self.right, *self.asked]

    @staticmethod
    def values(numbers: Sequence[float], prefix: str = "") -> dict[str, float]:
        """For the log: the mean loss, accuracy in all, and by hand-overs since; empty if nothing was asked."""
        right, asked = numbers[1 : 1 + len(SINCE)], numbers[1 + len(SINCE) :]
        if not sum(asked):  # or there were none
            return {}
        values = {"loss": numbers[0] / sum(asked), "accuracy": sum(right) / sum(asked)}
        values |= {f"accuracy_{name}": r / n for name, r, n in zip(SINCE, right, asked, strict=True) if n}
        return {f"{prefix}notes_{name}": value for name, value in values.items()}
