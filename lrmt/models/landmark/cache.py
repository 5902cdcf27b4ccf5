"""What landmark attention keeps of the text behind it: whole blocks, and how a chunk of queries reads them.

A block's keys are stored as if the block began at position 0. To place it at slot s, s·K positions into the window, the query
is turned back by s·K instead of the keys forward: rotations compose, and there are few slots and many keys.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lrmt.models.landmark.attention import biased_scores, masked_softmax, weighted_values
from lrmt.models.rotary import rotate

#: scores of landmarks, and elements of blocks, held at once: both bound what a chunk takes, whatever the text's length
SCORED_AT_ONCE = 2**18
GATHERED_AT_ONCE = 2**22
#: how much less a landmark counts, while choosing, for being 64 blocks older than the newest without a slot of its own
TIE_BREAK = 1e-3


class Level:
    """An append-only stretch of blocks: `[B, H_kv, capacity, K, D]` keys and values for each layer, filled up to `filled [B]`.

    Landmark keys, `[B, H_kv, capacity, D]`, stay on `device`; with `offload` the blocks lie in (pinned) CPU memory.
    """

    def __init__(self, num_layers: int, filled: Tensor, offload: bool):
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.landmarks: list[Tensor | None] = [None] * num_layers
        self.filled, self.offload, self.device = filled, offload, filled.device

    def write(self, layer: int, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts `keys`, `values [B, H_kv, N, K, D]` at the places `where [B, N]`; those below 0 are left out."""
        needed = int(where.max()) + 1
        row, column = (where >= 0).nonzero(as_tuple=True)
        place = where[row, column]
        for table, new in ((self.keys, keys), (self.values, values), (self.landmarks, keys[:, :, :, -1])):
            device = torch.device("cpu") if self.offload and table is not self.landmarks else self.device
            if table[layer] is None or table[layer].shape[2] < needed:
                table[layer] = _grown(table[layer], new, needed, device, pinned=self.device.type == "cuda")
            new = new.transpose(1, 2)[row.to(new.device), column.to(new.device)]
            table[layer][row.to(device), :, place.to(device)] = new.to(device)


def _grown(old: Tensor | None, new: Tensor, needed: int, device: torch.device, pinned: bool) -> Tensor:
    """A table with room for `needed` blocks and as many again, so that growing costs little per block.

    Zeros: a row that has fewer blocks than another gathers what was never written, and gives it no weight.
    """
    room = needed if old is None else max(needed, 2 * old.shape[2])
    shape = (new.shape[0], new.shape[1], room, *new.shape[3:])
    table = torch.zeros(shape, dtype=new.dtype, device=device, pin_memory=pinned and device.type == "cpu")
    if old is not None:
        table[:, :, : old.shape[2]] = old
    return table


@dataclasses.dataclass
class Blocks:
    """The blocks of a text, as a view of levels that other texts may share: appending never changes what another view sees.

    `levels`: a level, how many of its blocks count for each row of the text, `[B]`, and which of its own rows that is, `[B]`.
    """

    levels: list[tuple[Level, Tensor, Tensor]]
    batch: Tensor  # 0..B-1, on the model's device

    @property
    def count(self) -> Tensor:
        """Blocks of each row, `[B]`."""
        return sum((count for _, count, _ in self.levels), torch.zeros_like(self.batch))

    def written(self) -> list[Tensor]:
        """The keys of each layer in some level that has any block."""
        return next(level.keys for level, _, _ in self.levels if level.keys[0] is not None)

    def expand(self, row: Tensor) -> Blocks:
        """The view of a batch whose i-th text is `row[i]` of this one; no block is copied."""
        levels = [(level, count[row], rows[row]) for level, count, rows in self.levels]
        return Blocks(levels, torch.arange(len(row), device=row.device))

    def open(self, num_layers: int, offload: bool) -> Blocks:
        """A view whose last level can be written: the same one, unless another text went on from it already."""
        if self.levels:
            level, count, rows = self.levels[-1]
            if torch.equal(level.filled, count) and torch.equal(rows, self.batch):
                return self
        level = Level(num_layers, torch.zeros_like(self.batch), offload)
        return Blocks([*self.levels, (level, level.filled, self.batch)], self.batch)

    def grown(self, new: Tensor) -> Blocks:
        """The view after `new [B]` blocks were written to the last level."""
        level, count, rows = self.levels[-1]
        level.filled = count + new
        return Blocks([*self.levels[:-1], (level, level.filled, rows)], self.batch)

    def gather(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, S, K, D]` of the blocks `index [B, H, S]`, which run through all levels."""
        found, offset = None, torch.zeros_like(self.batch)
        for level, count, rows in self.levels:
            if level.keys[layer] is None:
                continue
            local = index - offset[:, None, None]
            inside = (local >= 0) & (local < count[:, None, None])
            table = level.keys[layer]
            head = torch.arange(index.shape[1], device=table.device) // (index.shape[1] // table.shape[1])
            place = rows[:, None, None].to(table.device), head[None, :, None], (local * inside).to(table.device)
            pair = [t[layer][place].to(index.device, non_blocking=True) for t in (level.keys, level.values)]
            if found is not None:
                pair = [torch.where(inside[..., None, None], new, old) for new, old in zip(pair, found, strict=True)]
            found, offset = pair, offset + count
        return tuple(found)

    def landmark_slices(self, layer: int, at_once: int):
        """`(first [B], landmarks [B, H_kv, n, D], real [B, n])` until all are seen; block `first + i` has the i-th landmark."""
        offset = torch.zeros_like(self.batch)
        for level, count, rows in self.levels:
            longest = int(count.max())
            if longest:
                table = level.landmarks[layer]
                same = len(rows) == len(table) and torch.equal(rows, self.batch)
                for begin in range(0, longest, at_once):
                    end = min(begin + at_once, longest)
                    part = table[:, :, begin:end] if same else table[rows, :, begin:end]
                    yield offset + begin, part, torch.arange(begin, end, device=rows.device) < count[:, None]
            offset = offset + count


class Chunk:
    """One forward pass of a chunk of text over the blocks behind it; the backbone's layers call `attend` in turn.

    Args:
        blocks: what is stored. tails: for each layer keys and values `[B, H_kv, P, D]` of the unfinished block, keys as if it
            began at position 0 (None at the start of a text). tail_length: `[B]`. valid: `[B, W]`, the chunk's real columns.
        per_token: each token chooses its own k blocks; else each head chooses for the whole chunk.
        record: takes what the last token of each row read, `{(row, layer): (blocks [H, k], shares [H, k])}`.
    """

    def __init__(
        self,
        blocks: Blocks,
        tails: list | None,
        tail_length: Tensor,
        valid: Tensor,
        *,
        block_length: int,
        top_k: int,
        inv_freq: Tensor,
        num_layers: int,
        offload: bool,
        per_token: bool,
        record: dict | None = None,
    ):
        self.blocks, self.tails, self.tail_length, self.valid = (
            blocks.open(num_layers, offload),
            tails,
            tail_length,
            valid,
        )
        self.block_length, self.top_k, self.inv_freq, self.per_token = block_length, top_k, inv_freq, per_token
        self.count = self.blocks.count
        #: where the unfinished block begins: behind the slots of k blocks and one for all that is older
        self.start = self.count.clamp(max=top_k + 1) * block_length
        self.column = tail_length[:, None] + torch.arange(valid.shape[1], device=valid.device)  # in the local buffer
        self.position_ids = self.start[:, None] + self.column
        self.local_length = tail_length + valid.sum(1)
        self.new_tails: list = [None] * num_layers
        self.record = record

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Landmark attention over [k blocks ; unfinished block ; chunk]; `[B, H, W, D]`. Stores what the chunk completes."""
        local_key, local_value = self._local(layer, key, value)
        real = torch.arange(local_key.shape[2], device=key.device) < self.local_length[:, None]
        scores, visible = biased_scores(query, local_key, self.column, self.block_length, scaling, real)
        if int(self.count.max()) == 0:
            output = weighted_values(masked_softmax(scores, visible), local_value)
        else:
            output = self._attend_far(layer, query, scores, visible, local_value, scaling)
        self._store(layer, local_key, local_value)
        return output

    def finish(self) -> tuple[Blocks, list, Tensor]:
        """Blocks, tails and tail lengths after the chunk."""
        new = self.local_length // self.block_length
        return self.blocks.grown(new), self.new_tails, self.local_length - new * self.block_length

    # ------------------------------------------------------------------ near: the unfinished block and the chunk

    def _local(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The unfinished block and the chunk side by side, each row without a gap."""
        if self.tails is None or self.tails[layer] is None:
            return key, value
        tail_key, tail_value = self.tails[layer]
        tail_key = rotate(tail_key, self.start[:, None].expand(-1, tail_key.shape[2]), self.inv_freq)
        width = int(self.local_length.max())
        index = self.column.masked_fill(~self.valid, width)[
            :, None, :, None
        ]  # padding goes to a column that is cut off
        result = []
        for tail, new in ((tail_key, key), (tail_value, value)):
            buffer = new.new_zeros(*new.shape[:2], max(width, tail.shape[2]) + 1, new.shape[3])
            buffer[:, :, : tail.shape[2]] = tail
            result.append(buffer.scatter(2, index.expand_as(new), new)[:, :, :width])
        return result[0], result[1]

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Moves complete blocks to the store and keeps the rest, both turned to begin at position 0."""
        size = self.block_length
        width = key.shape[2]
        turn = self.start[:, None] + torch.arange(width, device=key.device) // size * size
        key = rotate(key, -turn, self.inv_freq)
        new = self.local_length // size
        longest = int(new.max())
        if longest:
            level, count, _ = self.blocks.levels[-1]
            step = torch.arange(longest, device=key.device)
            where = torch.where(step < new[:, None], count[:, None] + step, -1)
            whole = [t[:, :, : longest * size].unflatten(2, (longest, size)) for t in (key, value)]
            level.write(layer, where, *whole)
        left = self.local_length - new * size
        keep = int(left.max())
        index = (new * size)[:, None] + torch.arange(keep, device=key.device)
        index = index.clamp(max=max(width - 1, 0))[:, None, :, None]
        tail = [t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in (key, value)]
        self.new_tails[layer] = tuple(tail) if keep else None

    # ------------------------------------------------------------------ far: the k blocks that the landmarks point to

    def _attend_far(self, layer, query, scores, visible, local_value, scaling) -> Tensor:
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        batch, heads, rows, width = query.shape
        slots = range(min(int(self.count.max()), self.top_k) + 1)
        at_slot = torch.stack(
            [rotate(wide, -torch.full_like(self.column, s * self.block_length), self.inv_freq) for s in slots], dim=3
        )  # [B, H, W, slots, D]
        index, slot, chosen = self._choose(layer, at_slot, scaling)
        per_step = batch * heads * index.shape[-1] * self.block_length * width
        step = max(1, GATHERED_AT_ONCE // per_step) if self.per_token else rows
        outputs = []
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            pick = part if self.per_token else slice(0, 1)
            outputs.append(
                self._attend_chosen(
                    layer, at_slot[:, :, part], index[:, :, pick], slot[:, :, pick], chosen[:, :, pick],
                    scores[:, :, part], visible[:, :, part], local_value, scaling, begin,
                )
            )  # fmt: skip
        return torch.cat(outputs, dim=2)

    def _attend_chosen(
        self, layer, at_slot, index, slot, chosen, scores, visible, local_value, scaling, begin
    ) -> Tensor:
        """Attention of some query rows over their chosen blocks `[B, H, R or 1, k]` and what is near."""
        batch, heads, rows, _, width = at_slot.shape
        picks, k = index.shape[2:]
        size = self.block_length
        key, value = self.blocks.gather(layer, index.flatten(2).clamp(min=0))
        key, value = (t.unflatten(2, (picks, k)) for t in (key, value))  # [B, H, R or 1, k, K, D]
        turned = at_slot.gather(
            3, slot[..., None].expand(batch, heads, rows, k, width)
        )  # the query for each block's slot
        products = torch.einsum("bhrkd,bhrksd->bhrks", turned, key.to(turned.dtype).expand(-1, -1, rows, -1, -1, -1))
        products = products * scaling
        regular, landmark = products[..., :-1], products[..., -1:]
        far = (regular + landmark - regular.logsumexp(-1, keepdim=True)).flatten(3)  # [B, H, R, k·(K−1)]
        seen = chosen[..., None].expand(batch, heads, rows, k, size - 1).flatten(3)
        weights = masked_softmax(
            torch.cat([far, scores.to(far.dtype)], dim=-1), torch.cat([seen, visible.expand_as(scores)], dim=-1)
        )
        from_blocks, near = weights.split([far.shape[-1], scores.shape[-1]], dim=-1)
        from_blocks = from_blocks.unflatten(-1, (k, size - 1))
        if self.record is not None:
            self._note(layer, begin, index, chosen, from_blocks)
        read = torch.einsum(
            "bhrks,bhrksd->bhrd", from_blocks.to(value.dtype), value[..., :-1, :].expand(-1, -1, rows, -1, -1, -1)
        )
        return read + weighted_values(near, local_value)

    def _choose(self, layer: int, at_slot: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """The k best blocks of each token (or of each head), in the order of the text: index, slot, and whether it is one.

        All `[B, H, W or 1, k]`. While choosing, the k most recent blocks stand at their true distance and all older ones at
        slot 0; the r-th chosen then stands at slot r, one further if it is recent and older ones exist.

        In the first layer all landmarks have one key, so that all older blocks tie: the most recent of them win.
        """
        batch, heads, rows, slots, _ = at_slot.shape
        k = slots - 1
        recent = self.count.clamp(max=self.top_k)  # how many of a row's blocks have a slot of their own
        old = self.count - recent
        valid = self.valid[:, None, :, None]
        best = at_slot.new_full((batch, heads, rows if self.per_token else 1, 0), 0.0)
        where = best.to(torch.long)

        def merge(best, where, scores, index, real):
            scores = scores.masked_fill(~real, float("-inf"))
            if not self.per_token:
                scores = scores.masked_fill(~valid, float("-inf")).amax(2, keepdim=True)
            scores, order = scores.topk(min(k, scores.shape[-1]), dim=-1)
            index = index.expand(*scores.shape[:-1], -1).gather(-1, order)
            best, where = torch.cat([best, scores], dim=-1), torch.cat([where, index], dim=-1)
            best, order = best.topk(min(k, best.shape[-1]), dim=-1)
            return best, where.gather(-1, order)

        for first, landmarks, real in self.blocks.landmark_slices(
            layer, max(64, SCORED_AT_ONCE // (batch * heads * rows))
        ):
            index = first[:, None] + torch.arange(landmarks.shape[2], device=first.device)
            scores = _grouped(at_slot[:, :, :, 0], landmarks.to(at_slot.dtype)) * scaling
            age = (old[:, None] - index).clamp(min=0, max=64) / 64
            scores = scores - TIE_BREAK * age[:, None, None]
            index, real = index[:, None, None], (real & (index < old[:, None]))[:, None, None]
            best, where = merge(best, where, scores, index, real)
        step = torch.arange(k, device=recent.device)
        index = (old[:, None] + step)[:, None, None]
        real = (step < recent[:, None])[:, None, None]
        keys, _ = self.blocks.gather(layer, (index[:, 0] * real[:, 0]).expand(-1, heads, -1))
        own_slot = (step + (old > 0)[:, None]).clamp(max=k)[:, None, None, :, None]
        turned = at_slot.gather(3, own_slot.expand(batch, heads, rows, k, at_slot.shape[-1]))
        scores = torch.einsum("bhrkd,bhkd->bhrk", turned, keys[:, :, :, -1].to(turned.dtype)) * scaling
        best, where = merge(best, where, scores, index, real)

        chosen = best > float("-inf")
        where = where.masked_fill(~chosen, torch.iinfo(torch.long).max)
        where, order = where.sort(dim=-1)
        chosen = chosen.gather(-1, order)
        is_recent = where >= old[:, None, None, None]
        slot = (
            torch.arange(where.shape[-1], device=where.device) + (is_recent & (old > 0)[:, None, None, None])
        ).clamp(max=k)
        return where.masked_fill(~chosen, -1), slot, chosen

    def _note(self, layer: int, begin: int, index: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Keeps, for the last real token of each row, its blocks and their shares of the attention."""
        last = self.valid.sum(1) - 1
        for row in range(len(last)):
            at = int(last[row]) - begin
            if 0 <= at < weights.shape[2]:
                pick = at if self.per_token else 0
                share = weights[row, :, at].sum(-1)
                self.record[row, layer] = (index[row, :, pick].cpu(), (share * chosen[row, :, pick]).float().cpu())


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """`query [B, H, R, D]` · `key [B, H_kv, N, D]` = `[B, H, R, N]`."""
    batch, heads, rows, width = query.shape
    products = query.reshape(batch, key.shape[1], -1, width) @ key.transpose(-1, -2)
    return products.view(batch, heads, rows, key.shape[2])
