"""Memory supervision in training: batches of notes, and how well the memory says them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lrmt.models.notes import Notes, NotesScore
from lrmt.models.scoring import IGNORED
from lrmt.tasks.base import Example, Pieces

NEVER = torch.iinfo(torch.long).max
SINCE = ("0", "1", "2_3", "4_7", "8_15", "16_up")  #: hand-overs since a note was told, as they are logged


def spell(notes: Sequence[str], pieces: Pieces, size: int) -> tuple[Tensor, bool]:
    """Ids `[N, size]` of notes, and whether one was cut. Each ends in EOS: else the memory would be free to make up more, which later
    segments could not tell from what was read. Behind EOS it is free: half a sentence at the end of a segment has to go somewhere.
    """
    ids = torch.full((len(notes), size), IGNORED, dtype=torch.long)
    said = [told if note else told[:0] for note, told in zip(notes, pieces.encode(notes), strict=True)]
    for row, told in zip(ids, said, strict=True):
        told = np.append(told, pieces.tokenizer.eos_token_id)[:size]
        row[: len(told)] = torch.from_numpy(told)
    return ids, any(len(told) > size for told in said)


def collate_notes(examples: Sequence[Example], pieces: Pieces, size: int) -> tuple[Notes, bool]:
    """The notes of examples as ids, each cut to `size` tokens, and whether one was."""
    told = [example.notes for example in examples]
    ids = torch.full((len(examples), max(1, *map(len, told)), size), IGNORED, dtype=torch.long)
    ends = torch.full(ids.shape[:2], NEVER, dtype=torch.long)
    cut = False
    for row, notes in enumerate(told):
        said, longer = spell([note.text for note in notes], pieces, size)
        ids[row, : len(notes)] = said
        ends[row, : len(notes)] = torch.tensor([note.end for note in notes], dtype=torch.long)
        cut = cut or longer
    return Notes(ids, ends), cut


class NotesMeter:
    """Counts what the memory says of its notes, by the hand-overs since each was told. What has stood in its place since before the
    text, the names in a story's notes or the EOS of nothing yet, costs but does not count: a memory that never reads would say it.
    """

    def __init__(self):
        self.right, self.asked = np.zeros(len(SINCE)), np.zeros(len(SINCE))
        self.loss, self.scored = 0.0, 0

    def add(self, score: NotesScore) -> None:
        for right, age in zip(score.right.tolist(), score.age.tolist(), strict=True):
            if age >= 0:
                place = min(int(age).bit_length(), len(SINCE) - 1)
                self.right[place] += right
                self.asked[place] += 1
        self.loss += float(score.loss.detach())
        self.scored += score.count

    def numbers(self) -> list[float]:
        """What ranks add up."""
        return [self.loss, self.scored, *self.right, *self.asked]

    @staticmethod
    def values(numbers: Sequence[float], prefix: str = "") -> dict[str, float]:
        """For the log: the mean loss, accuracy in all, and by hand-overs since; empty if nothing was asked."""
        loss, scored, *counts = numbers or [0.0, 0]
        if not scored:
            return {}
        right, asked = counts[: len(SINCE)], counts[len(SINCE) :]
        values = {"loss": loss / scored} | ({"accuracy": sum(right) / sum(asked)} if sum(asked) else {})
        values |= {f"accuracy_{name}": r / n for name, r, n in zip(SINCE, right, asked, strict=True) if n}
        return {f"{prefix}notes_{name}": value for name, value in values.items()}
