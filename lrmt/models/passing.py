"""State passing: training texts that begin from the memory that another has left (Buitrago & Gu 2025, arXiv 2507.02782)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from lrmt.models.memory import Memory, choose, named_tensors, take_named
from lrmt.models.notes import Notes
from lrmt.models.scoring import IGNORED
from lrmt.models.segments import Grid

if TYPE_CHECKING:
    from lrmt.models.recurrent import RecurrentModel


class Passed:
    """The memories that the last texts of this rank have left, and what each should say, `[B, m]`; None before the first."""

    def __init__(self):
        self.memory: Memory | None = None
        self.said: Tensor | None = None

    def take(self, memory: Memory, notes: Notes | None, share: float) -> tuple[Memory, Notes | None]:
        """For this `share` of the rows, drawn, the memory that was left instead of the one to start from; until a text tells something
        of its own, notes are those of the text before.
        """
        rows = len(tree_leaves(memory)[0])
        if share == 0 or self.memory is None or len(tree_leaves(self.memory)[0]) != rows:
            return memory, notes
        taken = torch.rand(rows) < share
        if notes is not None:
            said = torch.full_like(notes.ids[:, 0], IGNORED) if self.said is None else self.said
            here = taken.to(said.device)[:, None]
            # a text's own notes of before it are those of the text that is gone on from
            before = here & (notes.ends == 0)
            own = torch.where(before[..., None], said[:, None], notes.ids)
            notes = Notes(torch.cat([said.masked_fill(~here, IGNORED)[:, None], own], dim=1), F.pad(notes.ends, (1, 0)))
        # whatever is drawn, what training starts from has a gradient: ranks must have the same
        return choose(taken.tolist(), self.memory, memory, whole=False), notes

    def leave(self, memory: Memory, grid: Grid) -> None:
        """Keeps the last memories of a batch's rows, and what was noted when they were written."""
        self.memory = tree_map(Tensor.detach, memory)
        self.said = None if grid.notes is None else grid.last_notes()

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        if self.memory is None:
            return {}
        leaves = {name: leaf.contiguous() for name, leaf in named_tensors(self.memory).items()}
        return leaves | ({} if self.said is None else {"said": self.said})

    def load(self, tensors: dict[str, Tensor], model: RecurrentModel) -> None:
        """The inverse, on the model's device."""
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        self.memory, self.said = take_named(tensors, model), tensors.get("said")
