"""Recurrence over segments: the one loop, truncated and constant-memory BPTT, reading, and generation across segment ends."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from lrmt.errors import UsageError
from lrmt.models.base import LongContextModel
from lrmt.models.config import RecurrentConfig
from lrmt.models.handover import HandOver, states_and_embeddings
from lrmt.models.memory import Memory, RecurrentState, choose, put, root_mean_square
from lrmt.models.notes import collect, score
from lrmt.models.outputs import Encoded, Text
from lrmt.models.passing import Passed
from lrmt.models.recording import Recording, Written, average_attention, eager_attention
from lrmt.models.scoring import IGNORED
from lrmt.models.segments import Grid, Segment, pad_left
from lrmt.models.state import State
from lrmt.models.weights import gathered, in_use, layers_of, narrowed, uncompiled


class SegmentOutput(NamedTuple):
    """Last hidden states of one segment: `before [B, n, d]`, `tokens [B, W, d]` with their `mask [B, W]` (None: no padding), `after
    [B, k, d]`. Of a method with `written_positions` there is `after` alone where the segment is read only.
    """

    before: Tensor | None
    tokens: Tensor | None
    after: Tensor
    mask: Tensor | None


class RunningCache(NamedTuple):
    """The KV cache of the running segment, its mask `[B, S]` (None: no padding), how many of its positions stand before the tokens, and the
    model that filled it.
    """

    kv: DynamicCache
    mask: Tensor | None
    before: int
    owner: RecurrentModel


class RecurrentModel(LongContextModel):
    """Reads a text segment by segment, each after the memory that the one before has written.

    A method writes `start`, `write`, and what stands around a segment's tokens: `prefix`, `suffix`.
    """

    config_class = RecurrentConfig
    state_class = RecurrentState
    state_settings = ("segment_length", "segment_alignment")
    later_state_settings = ("memory_handover", "memory_shift")
    can_record = True
    noise_share = 1.0  #: of `memory_noise`: a curriculum starts with little, or memory is never found
    _memory_norm: Tensor | None = None
    _record: Recording | None = None

    def __init__(self, config: RecurrentConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        if "inputs_embeds" not in inspect.signature(self.backbone.base_model.forward).parameters:
            raise UsageError(
                f"`--model_name_or_path`: {type(self.backbone).__name__} takes no `inputs_embeds`, which memory tokens need; "
                "choose a decoder such as LLaMA, Mistral, Qwen or GPT-2"
            )
        self._passed = Passed()
        self._last_layer = layers_of(self.backbone)[
            -1:
        ]  # a list, which may be empty: a module would be one of the model's own
        with gathered(self.get_input_embeddings().weight):
            self.handover = HandOver(config.memory_handover, self.get_input_embeddings().weight)

    @classmethod
    def trained_modules(cls, settings: dict) -> list[str]:
        """With a fitted hand-over, which does not train, but is saved with what does."""
        fitted = ["handover"] * (settings.get("memory_handover") == "aligned")
        return [*super().trained_modules(settings), *fitted]

    def fit(self, texts) -> str:
        if self.config.memory_handover != "aligned":
            return ""
        training = self.training
        self.eval()
        with gathered(*self.parameters()):
            pairs = states_and_embeddings(self.backbone, texts().to(self.device))
        self.train(training)
        left = [module.fit(*pairs) for module in self.modules() if isinstance(module, HandOver)]  # PEFT keeps two
        return f"hand-over aligned: {1 - left[0]:.0%} of what sets tokens' embeddings apart is in the hidden states"

    def _memory_weights(self) -> list[Tensor]:
        return [*super()._memory_weights(), *in_use(self.handover).buffers()]

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

    def to_pass_on(self, memory: Memory) -> Memory:
        """What a later batch may begin from, of the memories that a batch has left."""
        return memory

    def fault_of(self, memory: Memory) -> str:
        """Where in a memory that is not finite, if there is more to tell: ", …"."""
        return ""

    def around(self, memory: Memory, ends: bool):
        """A context in which the decoder runs a segment, as far as it goes; what stands in no segment, but around layers, is set up
        here. `ends`: the suffix stands at its end, and `write` comes next.
        """
        return contextlib.nullcontext()

    # ------------------------------------------------------------------ the recurrence

    def _segment(self, segment: Segment, memory: Memory) -> tuple[Tensor, Memory, tuple[Tensor, Tensor] | None]:
        """One segment: `[prefix ; E(x) ; suffix]` through the decoder gives the wanted hidden states `[N, d]`, the new memory, and what
        its notes cost, if there are any.
        """
        tokens = self.get_input_embeddings()(segment.ids)
        before, after = (tokens[:, :0] if part is None else part for part in (self.prefix(memory), self.suffix(memory)))
        n, width, k = before.shape[1], tokens.shape[1], after.shape[1]
        mask = None if segment.mask is None else F.pad(segment.mask, (n, k), value=True)
        alone = segment.wanted is None and self.config.written_positions == k > 0
        with self.around(memory, ends=True), narrowed(self._last_layer, k) if alone else contextlib.nullcontext():
            hidden, attention = self._run_decoder(torch.cat([before, tokens, after], dim=1), mask)
        before, tokens, after = hidden.split([n, width, k], dim=1)
        kept = hidden.new_zeros(0, hidden.shape[-1]) if segment.wanted is None else tokens[segment.wanted]
        asked, says = segment.notes is not None, None
        if asked or self._record or self.config.memory_handover == "tokens":  # on every rank alike, notes or not
            rows = after.flatten(0, 1)  # of a view `[B, k, d]` the head would be copied and multiplied row by row
            says = self.get_output_embeddings()(rows).unflatten(0, after.shape[:2])
        shift = self.config.memory_shift and k > 0
        if self._record:
            written = Written.of(says, attention[:, n + width :, n : n + width].clone())
            self._record.written.append(written.shifted() if shift else written)
        told = score(says, segment.notes) if asked else None
        after = self.handover(after, says, self.get_input_embeddings())
        if shift:
            after = torch.cat([self.suffix(self.start(len(after)))[:, :1], after[:, :-1]], dim=1)
        seen = (None, None, after, None) if alone else (before, tokens, after, segment.mask)
        return kept, self.write(memory, SegmentOutput(*seen)), told

    def _recur(self, grid: Grid, window: range, memory: Memory, noisy: bool = True) -> tuple[list, Memory, list]:
        """The loop: hidden states of the wanted positions per segment, the memory after the window, and the notes' cost per segment."""
        run = self._segment
        if self.config.checkpoint_segments and torch.is_grad_enabled():

            def run(*args):
                return checkpoint(self._segment, *args, use_reentrant=False)

        hidden, told = [], []
        whole = torch.is_grad_enabled() or grid.notes is not None or self._record is not None
        for s in window:
            segment = grid[s]
            rows = None if whole else grid.needed(s, segment)
            if rows is None or len(rows) in (0, len(segment.ids)):
                kept, written, cost = run(segment, memory)
            else:  # rows that have ended cost nothing
                kept, written, cost = run(
                    segment.of(rows), tree_map(lambda leaf, at=rows: leaf[at.to(leaf.device)], memory)
                )
                written = put(rows, written, memory)
            hidden.append(kept)
            told.append(cost)
            memory = choose(grid.running(s), self._with_noise(written) if noisy else written, memory)
        return hidden, memory, told

    def _run_decoder(self, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Last hidden states `[B, W, d]` of the decoder; padding (False in `mask [B, W]`) changes nothing else. While recording also
        the shares of its attention, `[B, W, W]`.
        """
        embeds, mask, position_ids, order = pad_left(embeds, mask)
        hidden, attention = self._decode(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
        )
        if order is None:
            return hidden, attention
        back = order.argsort(dim=1)
        if attention is not None:
            attention = attention.gather(1, back[..., None].expand_as(attention))
            attention = attention.gather(2, back[:, None].expand_as(attention))
        return torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden), attention

    def _decode(self, **inputs) -> tuple[Tensor, Tensor | None]:
        """Last hidden states and, while recording, attention."""
        if not self._record:
            return self.backbone.base_model(**inputs).last_hidden_state, None
        output = self.backbone.base_model(**inputs, output_attentions=True)
        return output.last_hidden_state, average_attention(output.attentions)

    @contextlib.contextmanager
    def recording(self):
        with eager_attention(self.backbone):
            self._record = Recording()
            try:
                yield self._record
            finally:
                self._record = None

    def _with_noise(self, memory: Memory) -> Memory:
        noise = self.config.memory_noise * self.noise_share
        return memory if not self.training or noise == 0 else self.shake(memory, noise)

    def shake(self, memory: Memory, noise: float) -> Memory:
        """With noise on what was written last, of this share of its size."""

        def shaken(tensor):
            size = tensor.detach().pow(2).mean(-1, keepdim=True).sqrt()
            return tensor + noise * size * torch.randn_like(tensor)

        return tree_map(shaken, memory)

    def _grid(
        self, input_ids: Tensor, mask: Tensor | None, wanted: Tensor | None, state: State | None, notes=None
    ) -> Grid:
        # the running segment of a state has its place on the grid already
        at = self.config.segment_alignment if state is None else "left"
        return Grid(input_ids, mask, wanted, segment_length=self.config.segment_length, alignment=at, notes=notes)

    def _windows(self, grid: Grid) -> list[tuple[int, int]]:
        """Spans of segments to run with gradients: all at once, or with truncation one window per scored segment.

        Exact truncation: the loss of segment s reaches the k segments s-k+1..s and no other, so windows overlap.
        """
        k = self.config.bptt_segments
        if k is None or k >= len(grid) or not torch.is_grad_enabled():
            return [(0, len(grid))]
        scored = [s for s, segment in enumerate(grid) if segment.wanted is not None or segment.notes is not None]
        return [(max(0, s - k + 1), s + 1) for s in scored or [len(grid) - 1]]

    def encode(self, input_ids, mask, wanted, state, notes=None) -> Encoded:
        grid = self._grid(input_ids, mask, wanted, state, notes)
        memory = self.start(len(input_ids)) if state is None else state.memory
        if wanted is None:  # the last segment stays open
            memory = self._recur(grid, range(len(grid) - 1), memory, noisy=False)[1]
            return Encoded(tree_leaves(memory)[0][:0], self._state(grid, memory, state))
        passing = self.config.state_passing if self.training and state is None else 0.0
        memory, grid.notes = self._passed.take(memory, grid.notes, passing * (self.noise_share > 0))
        hidden, told, last, at = [], {}, memory, 0
        for begin, end in self._windows(grid):
            if begin > at:
                with torch.no_grad():
                    memory = self._recur(grid, range(at, begin), memory)[1]
                at = begin
            kept, last, scores = self._recur(grid, range(begin, end), memory)
            # of several windows the last segment of each counts, or one would count twice
            first = begin if (begin, end) == (0, len(grid)) else end - 1
            hidden += kept[first - begin :]
            told |= dict(enumerate(scores[first - begin :], start=first))
        if self.training:
            self._memory_norm = root_mean_square(last)
        if passing:
            self._passed.leave(self.to_pass_on(last), grid)
        hidden = torch.cat(hidden)
        if not len(hidden):  # hangs on the memory, so that every rank has gradients
            hidden = hidden + sum(leaf.sum() for leaf in tree_leaves(last)).to(hidden)
        return Encoded(grid.row_major(hidden), None, collect(grid, told))

    def num_backbone_calls(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, notes=None
    ) -> int:
        text = self._open(input_ids, attention_mask, labels, None)
        asked = None if notes is None else notes.to(self.device)
        grid = self._grid(text.ids, text.mask, self._wanted(text), None, asked)
        windows = self._windows(grid)
        return windows[-1][0] + sum(end - begin for begin, end in windows)

    def num_notes(self, notes, input_ids, attention_mask=None, labels=None) -> int:
        text = self._open(input_ids, attention_mask, None, None)
        grid = self._grid(text.ids, text.mask, None, None, notes.to(self.device))
        return sum(int((grid.notes_after(s)[0] != IGNORED).sum()) for s in range(len(grid) - 1))

    @torch.no_grad()
    def find_fault(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> str:
        text = self._open(input_ids, attention_mask, None, None)
        grid, memory = self._grid(text.ids, text.mask, None, None), self.start(len(input_ids))
        broken = []
        for s in range(len(grid) - 1):  # all of them, on every rank
            memory = self._recur(grid, range(s, s + 1), memory)[1]
            broken += [] if math.isfinite(root_mean_square(memory)) else [f"segment {s + 1}{self.fault_of(memory)}"]
        return f"memory first breaks in {broken[0]}" if broken else f"it breaks in the last segment, {len(grid)}"

    def on_progress(self, share: float) -> None:
        self.noise_share = share

    def training_state(self) -> dict[str, Tensor]:
        return self._passed.tensors()

    def load_training_state(self, tensors: dict[str, Tensor]) -> None:
        self._passed.load(tensors, self)

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
            return self._open_segment(self.encode(text.ids, text.mask, None, state).state)
        return self._append(state, text.ids[:, text.before :])

    def _open_segment(self, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Runs `[prefix ; running segment]` into a fresh KV cache."""
        embeds, mask = self.get_input_embeddings()(state.pending_ids), state.pending_mask()
        before, tokens = self.prefix(state.memory), embeds.shape[1]
        if before is not None:
            embeds, mask = torch.cat([before, embeds], dim=1), F.pad(mask, (before.shape[1], 0), value=True)
        width = embeds.shape[1] - tokens
        embeds, mask, position_ids, _ = pad_left(embeds, None if bool(mask.all()) else mask)
        cache = RunningCache(DynamicCache(config=self.backbone.config), mask, width, self)
        return self._run_cached(state, cache, embeds, position_ids)

    def _append(self, state: RecurrentState, token: Tensor) -> tuple[Tensor, RecurrentState]:
        """One more token `[B, 1]`: rows whose segment is full write their memory and begin a new one."""
        memory, length, cache = state.memory, state.pending_length, state.cache
        full = length == self.config.segment_length
        if bool(full.any()):
            mask = state.pending_mask()
            segment = Segment(state.pending_ids, None if bool(mask.all()) else mask, None)
            memory = choose(full.tolist(), self._segment(segment, memory)[1], memory)
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
        cache = cache._replace(kv=_copy(cache.kv), mask=mask)
        return self._run_cached(grown, cache, self.get_input_embeddings()(token), length[:, None] + cache.before)

    def _run_cached(self, state, cache: RunningCache, embeds: Tensor, position_ids: Tensor | None):
        with self.around(state.memory, ends=False), uncompiled(self.backbone):
            hidden, attention = self._decode(
                inputs_embeds=embeds,
                attention_mask=cache.mask,
                position_ids=position_ids,
                past_key_values=cache.kv,
                use_cache=True,
            )
        if self._record:
            padding = 0 if cache.mask is None else (cache.mask == 0).sum(1, keepdim=True)
            place = torch.arange(cache.before, device=hidden.device) + padding
            self._record.looked.append(attention[:, -1].gather(1, place.expand(len(hidden), -1)))
        return hidden[:, -1], dataclasses.replace(state, cache=cache)


def _copy(kv: DynamicCache) -> DynamicCache:
    """A cache that grows by itself: layers are replaced as they grow, tensors are never written."""
    twin = copy.copy(kv)
    twin.layers = [copy.copy(layer) for layer in kv.layers]
    return twin
