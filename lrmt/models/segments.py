"""Pure functions that lay a batch of texts on a grid of segments: align, split, shift labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lrmt.models.notes import Notes


class Segment(NamedTuple):
    """One column block of a `Grid`: `ids [B, W]`, `mask [B, W]` (None: no padding), `wanted [B, W]` (None: nothing), `notes [B, m]`
    for the memory that it writes (None: none).
    """

    ids: Tensor
    mask: Tensor | None
    wanted: Tensor | None
    notes: Tensor | None = None

    def of(self, rows: Tensor) -> Segment:
        """That of some rows alone, `[N]`."""
        return Segment(*(part if part is None else part[rows] for part in self))


class Grid:
    """A batch of texts cut into segments of `segment_length` tokens, whatever the padding it came with.

    Row b occupies the columns `start[b] : start[b] + length[b]` of a table of `num_segments * segment_length` columns, so its
    segments are the same as if it stood alone. With alignment "left" rows start at column 0 and the last segment is the
    short one; with "right" the first is.

    Args:
        input_ids: `[B, T]` token ids. attention_mask: `[B, T]`, nonzero where a token is real (None: everywhere).
        wanted: `[B, T]`, True where a token's hidden state is wanted (None: nowhere).
        notes: what the memory should say, by tokens read (None: nothing is asked of it).
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        wanted: Tensor | None = None,
        *,
        segment_length: int,
        alignment: str = "left",
        notes: Notes | None = None,
    ):
        self.segment_length, self.notes = segment_length, notes
        self._noted: dict[int, tuple[Tensor, Tensor]] = {}
        if attention_mask is None:
            length = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        else:
            attention_mask = attention_mask.bool()
            length = attention_mask.sum(1)
        start = -length % segment_length if alignment == "right" else torch.zeros_like(length)
        self.length, self.start = length.tolist(), start.tolist()
        end = [s + n for s, n in zip(self.start, self.length, strict=True)]
        self.segments_per_row = [-(-e // segment_length) for e in end]
        self.num_segments = max(self.segments_per_row)
        width = self.num_segments * segment_length
        if all(n == input_ids.shape[1] for n in self.length) and not any(self.start):

            def place(values, fill):  # nothing to move: the common case costs no copy
                return values
        else:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
            row = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(attention_mask)
            column = start[:, None] + attention_mask.cumsum(1) - 1
            row, column = row[attention_mask], column[attention_mask]

            def place(values, fill):
                out = values.new_full((len(values), width), fill)
                out[row, column] = values[attention_mask]
                return out

        self.ids = place(input_ids, 0)
        self.wanted = None if wanted is None else place(wanted, False)

    def __len__(self) -> int:
        return self.num_segments

    def __iter__(self) -> Iterator[Segment]:
        return (self[s] for s in range(self.num_segments))

    def __getitem__(self, s: int) -> Segment:
        """Segment s, without the columns in which no row has a token."""
        low, high = s * self.segment_length, (s + 1) * self.segment_length
        spans = [
            (max(start, low), min(start + n, high))
            for start, n in zip(self.start, self.length, strict=True)
            if start < high and start + n > low
        ]
        first, last = min(a for a, _ in spans), max(b for _, b in spans)
        ids = self.ids[:, first:last]
        mask = None
        if len(spans) < len(self.length) or any(span != (first, last) for span in spans):
            column = torch.arange(first, last, device=ids.device)
            start = torch.tensor(self.start, device=ids.device)[:, None]
            end = start + torch.tensor(self.length, device=ids.device)[:, None]
            mask = (column >= start) & (column < end)
        wanted = None if self.wanted is None else self.wanted[:, first:last]
        notes = None if self.notes is None or s + 1 == self.num_segments else self.notes_after(s)[0]
        return Segment(ids, mask, wanted if wanted is not None and bool(wanted.any()) else None, notes)

    def notes_after(self, s: int) -> tuple[Tensor, Tensor]:
        """The notes `[B, m]` for the memory that segment s writes, and how many segments before s each was told, `[B, m]`, -1 for what
        was not.
        """
        if s in self._noted:
            return self._noted[s]
        read = [
            (s + 1) * self.segment_length - start if runs else None
            for start, runs in zip(self.start, self.running(s), strict=True)
        ]
        ids, tokens_ago = self.notes.after(read)
        self._noted[s] = ids, tokens_ago // self.segment_length
        return self._noted[s]

    def last_notes(self) -> Tensor:
        """The notes `[B, m]` for the last memory of each row: what its last segment reads, of a row of one what it begins from."""
        rows = zip(self.start, self.segments_per_row, strict=True)
        return self.notes.after([max(0, (n - 1) * self.segment_length - start) for start, n in rows])[0]

    def row_major(self, values: Tensor) -> Tensor:
        """Reorders values of the wanted positions, `[N, ...]`, from segment by segment to row by row."""
        row, column = self.wanted.nonzero(as_tuple=True)
        rows, width = self.wanted.shape
        by_segment = (column // self.segment_length * rows + row) * width + column
        return values[by_segment.argsort().argsort()]

    def running(self, s: int) -> list[bool]:
        """For each row: does it have a segment after s, so that its memory is written at the end of s?"""
        return [s + 1 < n for n in self.segments_per_row]

    def is_whole(self, s: int) -> bool:
        """Has every row all tokens of segment s, and another segment after it?"""
        low, high = s * self.segment_length, (s + 1) * self.segment_length
        return all(start <= low and high < start + n for start, n in zip(self.start, self.length, strict=True))

    def needed(self, s: int, segment: Segment) -> Tensor:
        """Which rows segment s has something of: a memory that it writes, or a hidden state that is wanted; `[N]`."""
        needed = torch.tensor(self.running(s), device=self.ids.device)
        return (needed if segment.wanted is None else needed | segment.wanted.any(1)).nonzero()[:, 0]

    def last_segments(self) -> tuple[Tensor, Tensor]:
        """The last segment of every row, `[B, P]` with padding on the right, and its lengths `[B]`."""
        spans = []
        for start, n, count in zip(self.start, self.length, self.segments_per_row, strict=True):
            low = max(start, (count - 1) * self.segment_length) if n else 0
            spans.append((low, start + n if n else 0))
        width = max(b - a for a, b in spans)
        ids = self.ids.new_zeros(len(spans), width)
        for row, (a, b) in enumerate(spans):
            ids[row, : b - a] = self.ids[row, a:b]
        return ids, torch.tensor([b - a for a, b in spans], device=ids.device)


def pad_left(embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Moves the padding of each row to its left, so that the last positions are real and distances contiguous.

    Args:
        embeds: `[B, W, d]`. mask: `[B, W]`, True where real; None: no padding, everything is returned as it came.

    Returns:
        embeds `[B, W, d]`, mask `[B, W]`, position ids `[B, W]` counted over real positions, and `order [B, W]`: the position
        that each came from.
    """
    if mask is None:
        return embeds, None, None, None
    order = mask.long().argsort(dim=1, stable=True)
    embeds = embeds.gather(1, order[..., None].expand_as(embeds))
    mask = mask.gather(1, order)
    return embeds, mask.long(), (mask.cumsum(1) - 1).clamp(min=0), order
