"""Memory supervision: what the written memory should say, scored through the backbone's own head."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrmt.models.scoring import IGNORED, widened

if TYPE_CHECKING:
    from lrmt.models.segments import Grid


class Notes(NamedTuple):
    """What a perfect reader would have written down, for a batch of texts.

    `ids [B, E, m]`: the notes that hold once the row's first `ends [B, E]` tokens have been read, -100 where there is nothing to
    say; rows of `ends` grow, and end in what no text reaches.
    """

    ids: Tensor
    ends: Tensor

    def to(self, device: torch.device) -> Notes:
        return Notes(self.ids.to(device), self.ends.to(device))

    def after(self, read: list[int | None]) -> tuple[Tensor, Tensor]:
        """The notes `[B, m]` of rows of which so many tokens are read (None: those of this row do not count), and how many tokens
        ago each was told, `[B, m]`, -1 for what has stood there since before the text.
        """
        tokens = torch.tensor([-1 if n is None else n for n in read], device=self.ends.device)
        known = (self.ends <= tokens[:, None]).sum(1)  # events so far
        at = (known - 1).clamp(min=0)[:, None, None].expand(-1, 1, self.ids.shape[2])
        ids = self.ids.gather(1, at)[:, 0]
        ids = ids.masked_fill((known == 0)[:, None], IGNORED)
        told = self._told().gather(1, at)[:, 0]
        return ids, (tokens[:, None] - told).masked_fill(told == 0, -1)

    def _told(self) -> Tensor:
        """For each note, since when the same has stood in its place, `[B, E, m]` tokens."""
        told = [self.ends[:, :1].expand(-1, self.ids.shape[2])]
        for e in range(1, self.ids.shape[1]):
            same = self.ids[:, e] == self.ids[:, e - 1]
            told.append(torch.where(same, told[-1], self.ends[:, e, None]))
        return torch.stack(told, dim=1)


@dataclasses.dataclass
class NotesScore:
    """What the notes of a batch cost: `loss`, summed over the `count` scored tokens; `right` and `age`, `[count]`: which of them the
    memory says, and how many segments after the one in which they were told, -1 for what the text has not told.
    """

    loss: Tensor
    right: Tensor
    age: Tensor

    @property
    def count(self) -> int:
        return len(self.right)


def score(logits: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of what the head says of written vectors, `[B, k, V]`, against `notes [B, m]`, m <= k, and which are said,
    `[B, m]` bool.
    """
    logits = logits[:, : notes.shape[1]]
    loss = F.cross_entropy(widened(logits).flatten(0, 1), notes.flatten(), reduction="sum", ignore_index=IGNORED)
    return loss, logits.detach().argmax(-1) == notes


def collect(grid: Grid, told: dict[int, tuple[Tensor, Tensor] | None]) -> NotesScore | None:
    """What the notes of a batch cost together, from what `score` gave of each segment that has any; None if none has."""
    told = {s: scored for s, scored in told.items() if scored is not None}
    if not told:
        return None
    right, ages = [], []
    for s, (_, says) in told.items():
        ids, age = grid.notes_after(s)
        right.append(says[ids != IGNORED])
        ages.append(age[ids != IGNORED])
    return NotesScore(torch.stack([cost for cost, _ in told.values()]).sum(), torch.cat(right), torch.cat(ages))
