"""Recurrence over segments: the one loop, truncated and constant-memory BPTT, reading, and generation across segment ends."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map, tree_map_with_path
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from lrmt.errors import UsageError
from lrmt.flags import flag
from lrmt.models.base import LongContextModel, Text
from lrmt.models.config import Activations, LongContextConfig
from lrmt.models.segments import Grid, Segment, pad_left
from lrmt.models.state import State

#: a tree of tensors, each with the batch first
Memory = Any


class RecurrentConfig(LongContextConfig):
    """What every recurrent method has. Noise on the memory: noisy RNNs, Lim et al. 2021, 2102.04877."""

    segment_length: int = flag(1024, "Tokens per segment L.")
    bptt_segments: int | None = flag(None, "Gradients of a segment's loss reach this many segments; default: all.")
    segment_alignment: Literal["left", "right"] = flag(
        "left", "left: the last segment is the short one; right: the first."
    )
    checkpoint_segments: bool = flag(
        True, "Recompute segments in the backward pass: memory does not grow with their number."
    )
    memory_noise: float = flag(
        0.0,
        "Noise on the memory in training, as a share of its size, so that it does not drift over longer texts; grows from none "
        "in the first stage to this in the last.",
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.segment_length < 1:
            raise UsageError(f"`--segment_length` must be 1 or more; got {self.segment_length}")
        if self.bptt_segments is not None and self.bptt_segments < 1:
            raise UsageError(f"`--bptt_segments` must be 1 or more, or left out; got {self.bptt_segments}")
        if self.memory_noise < 0:
            raise UsageError(f"`--memory_noise` must be 0 or more; got {self.memory_noise}. 0 leaves it out")
        if self.segment_alignment not in ("left", "right"):
            raise UsageError(f"`--segment_alignment` must be left or right; got {self.segment_alignment}")
        window = getattr(self.backbone_config, "max_position_embeddings", None)
        if window is not None and self.positions > window:
            self.refuse_window(window)

    @property
    def positions(self) -> int:
        """Positions of a segment with what stands before and after its tokens."""
        return self.segment_length

    def refuse_window(self, window: int) -> None:
        """Raises `UsageError` for segments that do not fit into the backbone's window."""
        raise UsageError(
            f"`--segment_length` must fit into the backbone's window of {window} positions; got {self.segment_length} tokens, "
            f"{self.positions} positions. Lower it to {self.segment_length - self.positions + window} or less"
        )

    def matters_to_training(self) -> dict[str, object]:
        return {k: v for k, v in super().matters_to_training().items() if k != "checkpoint_segments"}

    def check_training(self, num_segments: int, *, num_ranks: int = 1, task: str = "", use_peft: bool = True) -> None:
        if self.bptt_segments and num_ranks > 1 and task == "dataset" and self.segment_alignment == "left":
            # an answer that crosses the end of a segment is two windows, and other ranks may have one
            raise UsageError(
                f"`--bptt_segments` {self.bptt_segments} on several ranks needs every answer within one segment, which "
                "your own rows have with `--segment_alignment right`; got left"
            )

    def activations(self, num_segments: int) -> Activations:
        live = 1 if self.checkpoint_segments else min(num_segments, self.bptt_segments or num_segments)
        return Activations(self.positions, live, 0)


@dataclasses.dataclass
class RecurrentState(State):
    """Memory and the running segment, whose memory is written when the token after it arrives.

    `memory`: a tree of tensors, batch first; `pending_ids [B, P]`, padded on the right, with `pending_length [B]` in 0..L;
    `num_tokens [B]` read.
    """

    memory: Memory
    pending_ids: Tensor
    pending_length: Tensor
    num_tokens: Tensor

    def unread(self) -> tuple[Tensor, Tensor]:
        return self.pending_ids, self.pending_mask()

    def pending_mask(self) -> Tensor:
        return torch.arange(self.pending_ids.shape[1], device=self.pending_ids.device) < self.pending_length[:, None]

    @property
    def batch_size(self) -> int:
        return len(self.num_tokens)

    @property
    def device(self) -> torch.device:
        return self.num_tokens.device

    def expand(self, batch_size: int) -> RecurrentState:
        times = self._times(batch_size)
        if times == 1:
            return self
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[2:]}
        rows = tree_map(lambda t: t.repeat_interleave(times, dim=0), given)
        return dataclasses.replace(self, **rows, cache=None)

    def tensors(self) -> dict[str, Tensor]:
        """By name; the leaves of a memory that is no single tensor as `memory.…`, each by its path."""
        leaves = {_name(path): leaf for path, leaf in tree_flatten_with_path(self.memory)[0]}
        names = ("pending_ids", "pending_length", "num_tokens")
        return leaves | {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], fingerprint: str, model: RecurrentModel) -> RecurrentState:
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        with torch.no_grad():  # of the same structure as any memory of the model
            memory = tree_map_with_path(lambda path, _: tensors.pop(_name(path)), model.start(1))
        return cls(fingerprint=fingerprint, cache=None, memory=memory, **tensors)


def _name(path: tuple) -> str:
    """Of a leaf of the memory: "memory", or "memory.3.key"."""
    return ".".join(["memory", *(str(getattr(step, "key", getattr(step, "idx", step))) for step in path)])


class SegmentOutput(NamedTuple):
    """Last hidden states of one segment: `before [B, n, d]`, `tokens [B, W, d]` with their `mask [B, W]` (None: no padding), `after
    [B, k, d]`.
    """

    before: Tensor
    tokens: Tensor
    after: Tensor
    mask: Tensor | None


class RunningCache(NamedTuple):
    """The KV cache of the running segment, its mask `[B, S]` (None: no padding), and the model that filled it."""

    kv: DynamicCache
    mask: Tensor | None
    owner: RecurrentModel


class RecurrentModel(LongContextModel):
    """Reads a text segment by segment, each after the memory that the one before has written.

    A method writes `start`, `write`, and what stands around a segment's tokens: `prefix`, `suffix`.
    """

    config_class = RecurrentConfig
    state_class = RecurrentState
    state_settings = ("segment_length", "segment_alignment")
    noise_share = 1.0  #: of `memory_noise`: a curriculum starts with little, or memory is never found
    _memory_norm: Tensor | None = None

    def __init__(self, config: RecurrentConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        if "inputs_embeds" not in inspect.signature(self.backbone.base_model.forward).parameters:
            raise UsageError(
                f"`--model_name_or_path`: {type(self.backbone).__name__} takes no `inputs_embeds`, which memory tokens need; "
                "choose a decoder such as LLaMA, Mistral, Qwen or GPT-2"
            )

    # ------------------------------------------------------------------ what a method writes

    def start(self, batch_size: int) -> Memory:
        """The memory before anything is read: a tree of tensors, batch first."""
        raise NotImplementedError(f"{type(self).__name__} must say what its memory starts from: `start`")

    def prefix(self, memory: Memory) -> Tensor | None:
        """What stands before a segment's tokens, `[B, n, d]`, if anything."""

    def suffix(self, memory: Memory) -> Tensor | None:
        """What stands after a segment's tokens, `[B, k, d]`, if anything."""

    def write(self, memory: Memory, output: SegmentOutput) -> Memory:
        """The memory after a segment, of the same structure; tensors may grow. Copies, not views, which would keep the segment alive.

        Of a row that has ended the memory stays as it was, with zeros where that of others has grown: a method whose memory grows
        keeps count, row by row.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what a segment leaves: `write`")

    # ------------------------------------------------------------------ the recurrence

    def _segment(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory]:
        """One segment: `[prefix ; E(x) ; suffix]` through the decoder gives the wanted hidden states `[N, d]` and the new memory."""
        tokens = self.get_input_embeddings()(segment.ids)
        before, after = (tokens[:, :0] if part is None else part for part in (self.prefix(memory), self.suffix(memory)))
        n, width, k = before.shape[1], tokens.shape[1], after.shape[1]
        mask = None if segment.mask is None else F.pad(segment.mask, (n, k), value=True)
        hidden = self._run_decoder(torch.cat([before, tokens, after], dim=1), mask)
        output = SegmentOutput(*hidden.split([n, width, k], dim=1), segment.mask)
        kept = hidden.new_zeros(0, hidden.shape[-1]) if segment.wanted is None else output.tokens[segment.wanted]
        return kept, self.write(memory, output)

    def _recur(self, grid: Grid, window: range, memory: Memory, noisy: bool = True) -> tuple[list[Tensor], Memory]:
        """The loop: hidden states of the wanted positions per segment, and the memory after the window."""
        run = self._segment
        if self.config.checkpoint_segments and torch.is_grad_enabled():

            def run(*args):
                return checkpoint(self._segment, *args, use_reentrant=False)

        hidden = []
        for s in window:
            kept, written = run(grid[s], memory)
            hidden.append(kept)
            memory = _choose(grid.running(s), self._with_noise(written) if noisy else written, memory)
        return hidden, memory

    def _run_decoder(self, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """Last hidden states `[B, W, d]` of the decoder; padding (False in `mask [B, W]`) changes nothing else."""
        embeds, mask, position_ids, order = pad_left(embeds, mask)
        hidden = self.backbone.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        if order is None:
            return hidden
        return torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)

    def _with_noise(self, memory: Memory) -> Memory:
        noise = self.config.memory_noise * self.noise_share
        if not self.training or noise == 0:
            return memory

        def shake(tensor):
            size = tensor.detach().pow(2).mean(-1, keepdim=True).sqrt()
            return tensor + noise * size * torch.randn_like(tensor)

        return tree_map(shake, memory)

    def _grid(self, input_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, state: State | None) -> Grid:
        # the running segment of a state has its place on the grid already
        alignment = self.config.segment_alignment if state is None else "left"
        return Grid(input_ids, mask, wanted, segment_length=self.config.segment_length, alignment=alignment)

    def _windows(self, grid: Grid) -> list[tuple[int, int]]:
        """Spans of segments to run with gradients: all at once, or with truncation one window per scored segment.

        Exact truncation: the loss of segment s reaches the k segments s-k+1..s and no other, so windows overlap.
        """
        k = self.config.bptt_segments
        if k is None or k >= len(grid) or not torch.is_grad_enabled():
            return [(0, len(grid))]
        scored = [s for s, segment in enumerate(grid) if segment.wanted is not None]
        return [(max(0, s - k + 1), s + 1) for s in scored or [len(grid) - 1]]

    def encode(self, input_ids, mask, wanted, state) -> tuple[Tensor, State | None]:
        grid = self._grid(input_ids, mask, wanted, state)
        memory = self.start(len(input_ids)) if state is None else state.memory
        if wanted is None:  # the last segment stays open
            memory = self._recur(grid, range(len(grid) - 1), memory, noisy=False)[1]
            return tree_leaves(memory)[0][:0], self._state(grid, memory, state)
        hidden, last, at = [], memory, 0
        for begin, end in self._windows(grid):
            if begin > at:
                with torch.no_grad():
                    memory = self._recur(grid, range(at, begin), memory)[1]
                at = begin
            kept, last = self._recur(grid, range(begin, end), memory)
            hidden += kept if begin == 0 and end == len(grid) else kept[-1:]
        if self.training:
            self._memory_norm = _root_mean_square(last)
        hidden = torch.cat(hidden)
        if not len(hidden):  # hangs on the memory, so that every rank has gradients
            hidden = hidden + sum(leaf.sum() for leaf in tree_leaves(last)).to(hidden)
        return grid.row_major(hidden), None

    def num_backbone_calls(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> int:
        text = self._open(input_ids, attention_mask, labels, None)
        grid = self._grid(text.ids, text.mask, self._wanted(text), None)
        windows = self._windows(grid)
        return windows[-1][0] + sum(end - begin for begin, end in windows)

    @torch.no_grad()
    def find_fault(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> str:
        text = self._open(input_ids, attention_mask, None, None)
        grid, memory = self._grid(text.ids, text.mask, None, None), self.start(len(input_ids))
        broken = []
        for s in range(len(grid) - 1):  # all of them, on every rank
            memory = self._recur(grid, range(s, s + 1), memory)[1]
            broken += [] if math.isfinite(_root_mean_square(memory)) else [s + 1]
        return (
            f"memory first breaks in segment {broken[0]}" if broken else f"it breaks in the last segment, {len(grid)}"
        )

    def on_progress(self, share: float) -> None:
        self.noise_share = share

    def log_values(self) -> dict[str, float]:
        return {} if self._memory_norm is None else {"memory_norm": float(self._memory_norm)}

    # ------------------------------------------------------------------ reading and generating

    def _state(self, grid: Grid, memory: Memory, before: RecurrentState | None) -> RecurrentState:
        pending_ids, pending_length = grid.last_segments()
        num_tokens = torch.tensor(grid.length, device=pending_ids.device)
        if before is not None:
            num_tokens = before.num_tokens + num_tokens - before.pending_length
        return RecurrentState("", None, memory, pending_ids, pending_length, num_tokens)

    def go_on(self, text: Text) -> tuple[Tensor, RecurrentState]:
        """Scored from `[prefix ; E(x)]`, where training scored them. A segment that is full is run once more and writes its memory."""
        state, new = text.state, text.ids.shape[1] - text.before
        if state is None or state.cache is None or state.cache.owner is not self or new > 1 or text.padded:
            return self._open_segment(self.encode(text.ids, text.mask, None, state)[1])
        return self._append(state, text.ids[:, text.before :])

    def _open_segment(self, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Runs `[prefix ; running segment]` into a fresh KV cache."""
        embeds, mask = self.get_input_embeddings()(state.pending_ids), state.pending_mask()
        if (before := self.prefix(state.memory)) is not None:
            embeds, mask = torch.cat([before, embeds], dim=1), F.pad(mask, (before.shape[1], 0), value=True)
        embeds, mask, position_ids, _ = pad_left(embeds, None if bool(mask.all()) else mask)
        cache = RunningCache(DynamicCache(config=self.backbone.config), mask, self)
        return self._run_cached(state, cache, embeds, position_ids)

    def _append(self, state: RecurrentState, token: Tensor) -> tuple[Tensor, RecurrentState]:
        """One more token `[B, 1]`: rows whose segment is full write their memory and begin a new one."""
        memory, length, cache = state.memory, state.pending_length, state.cache
        full = length == self.config.segment_length
        if bool(full.any()):
            mask = state.pending_mask()
            segment = Segment(state.pending_ids, None if bool(mask.all()) else mask, None)
            memory = _choose(full.tolist(), self._segment(segment, memory)[1], memory)
            length, cache = length.masked_fill(full, 0), None
        ids = F.pad(state.pending_ids, (0, 1)).scatter(1, length[:, None], token)[:, : int(length.max()) + 1]
        grown = dataclasses.replace(
            state,
            memory=memory,
            pending_ids=ids,
            pending_length=length + 1,
            num_tokens=state.num_tokens + 1,
            cache=None,
        )
        if cache is None:
            return self._open_segment(grown)
        mask = None if cache.mask is None else F.pad(cache.mask, (0, 1), value=1)
        place = length[:, None] + (0 if (before := self.prefix(memory)) is None else before.shape[1])
        return self._run_cached(
            grown, cache._replace(kv=_copy(cache.kv), mask=mask), self.get_input_embeddings()(token), place
        )

    def _run_cached(self, state, cache: RunningCache, embeds: Tensor, position_ids: Tensor | None):
        hidden = self.backbone.base_model(
            inputs_embeds=embeds,
            attention_mask=cache.mask,
            position_ids=position_ids,
            past_key_values=cache.kv,
            use_cache=True,
        ).last_hidden_state
        return hidden[:, -1], dataclasses.replace(state, cache=cache)


def _root_mean_square(memory: Memory) -> Tensor:
    leaves = [leaf.detach().float().flatten() for leaf in tree_leaves(memory)]
    return (leaves[0] if len(leaves) == 1 else torch.cat(leaves)).pow(2).mean().sqrt()


def _choose(rows: list[bool], new: Memory, old: Memory) -> Memory:
    """`new` for the rows marked, `old` for the others, with zeros where the new memory has grown."""
    if all(rows):
        return new
    if not any(rows):
        return old

    def choose(a: Tensor, b: Tensor) -> Tensor:
        b = F.pad(b, [side for i in reversed(range(a.dim())) for side in (0, a.shape[i] - b.shape[i])])
        return torch.where(torch.tensor(rows, device=a.device).view(-1, *[1] * (a.dim() - 1)), a, b)

    return tree_map(choose, new, old)


def _copy(kv: DynamicCache) -> DynamicCache:
    """A cache that grows by itself: layers are replaced as they grow, tensors are never written."""
    twin = copy.copy(kv)
    twin.layers = [copy.copy(layer) for layer in kv.layers]
    return twin
