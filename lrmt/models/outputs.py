"""What goes into a model, checked, and what comes out."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from lrmt.models.notes import NotesScore
from lrmt.models.state import State


@dataclasses.dataclass
class LongContextOutput(ModelOutput):
    """`loss` scalar; `logits` `[B, T, V]`, or `[N, V]` for the N scored positions when labels are given; `state`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None
    notes: NotesScore | None = None


class Encoded(NamedTuple):
    """What `encode` returns: hidden states `[N, d]` of the wanted tokens, row by row (of none of them an empty tensor that still hangs on
    what was computed); the state after the text, unsigned, where nothing was wanted; what the notes cost, where there were any.
    """

    hidden: Tensor
    state: State | None = None
    notes: NotesScore | None = None


class Text(NamedTuple):
    """What a model is given, checked, on its device, with what the state wants read again in front of it.

    `ids`, `labels` `[B, T]`; `mask [B, T]` bool, None without padding; `state` for this batch; `before`, how many columns come
    from the state; `padded`, whether there is padding among the others.
    """

    ids: Tensor
    mask: Tensor | None
    labels: Tensor | None
    state: State | None
    before: int
    padded: bool
