"""What a model tells of its memory while it reads and answers."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lrmt.models.scoring import widened


class Span(NamedTuple):
    """A stretch of the text that was read from memory: tokens `start` to `end` (the one after the last), the `number`-th block or
    segment, with `weight`, its share (0..1) of the attention in a layer, averaged over heads.
    """

    layer: int
    number: int
    start: int
    end: int
    weight: float


class Written(NamedTuple):
    """What a segment left, row by row: of each of its k vectors, as the next segment reads them, the token that the backbone's head
    finds likeliest, `ids [B, k]`, its `probability [B, k]`, and `looked [B, k, W]`, the shares (0..1) of the segment's tokens in the
    attention of the position that wrote it, averaged over layers and heads. A vector that no position wrote: -1, 0 and 0.
    """

    ids: Tensor
    probability: Tensor
    looked: Tensor

    @classmethod
    def of(cls, logits: Tensor, looked: Tensor) -> Written:
        """From what the head says of the vectors, `[B, k, V]`."""
        probability, ids = widened(logits.detach()).softmax(-1).max(-1)
        return cls(ids, probability, looked)

    def shifted(self) -> Written:
        """The same, each vector read one place on: no position wrote the first, and of what the last one says nothing is left."""
        return Written(
            F.pad(self.ids, (1, -1), value=-1), F.pad(self.probability, (1, -1)), F.pad(self.looked, (0, 0, 1, -1))
        )


@dataclasses.dataclass
class Recording:
    """What was read and written inside `recording()`.

    read: for every forward that ended in scored last tokens, what these read: for each row its spans. looked: for the same forwards
    the shares (0..1) of the memory's n vectors, those that stand before the tokens, in the attention of the last token, `[B, n]`,
    averaged over layers and heads; n may grow. written: for every segment that ended, what it left; rows that have ended leave
    nothing, whatever stands there.
    """

    read: list[list[list[Span]]] = field(default_factory=list)
    looked: list[Tensor] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)


@contextlib.contextmanager
def eager_attention(backbone: PreTrainedModel):
    """The only attention that tells its shares, for a while."""
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)


@torch.no_grad()
def average_attention(layers: tuple[Tensor, ...]) -> Tensor:
    """Shares `[B, T, S]` from those of each layer, `[B, H, T, S]`."""
    return torch.stack([widened(layer.detach()).mean(1) for layer in layers]).mean(0)
