"""RMT: recurrent memory tokens on a decoder-only backbone (Bulatov et al. 2022, arXiv 2207.06881; 2023, arXiv 2304.11062)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from lrmt.errors import UsageError
from lrmt.models.base import (
    Activations,
    LongContextConfig,
    LongContextModel,
    LongContextOutput,
    State,
    gathered,
    setting,
)
from lrmt.models.segments import Grid, Segment, pad_left


class RmtConfig(LongContextConfig):
    """Settings of RMT. L + 2m positions must fit into the backbone's window; m = 0 gives the plain backbone, segment by segment.

    Noise on the memory: noisy RNNs, Lim et al. 2021, 2102.04877.
    """

    model_type = "rmt"

    num_memory_tokens: int = setting(16, "Memory tokens m that carry the past.")
    segment_length: int = setting(1024, "Tokens per segment L.")
    bptt_segments: int | None = setting(None, "Gradients of a segment's loss reach this many segments; default: all.")
    segment_alignment: Literal["left", "right"] = setting(
        "left", "left: the last segment is the short one; right: the first."
    )
    checkpoint_segments: bool = setting(
        True, "Recompute segments in the backward pass: memory does not grow with their number."
    )
    memory_noise: float = setting(
        0.0,
        "Noise on the memory in training, as a share of its size, so that it does not drift over longer texts; grows from none "
        "in the first stage to this in the last.",
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        m, length = self.num_memory_tokens, self.segment_length
        if m < 0:
            raise UsageError(f"`--num_memory_tokens` must be 0 or more; got {m}. 16 is the published value")
        if length < 1 or length <= 2 * m:
            raise UsageError(
                f"`--segment_length` must exceed 2 × `--num_memory_tokens`; got {length} and {m}. "
                f"Raise it to {2 * m + 1} or more"
            )
        if self.bptt_segments is not None and self.bptt_segments < 1:
            raise UsageError(f"`--bptt_segments` must be 1 or more, or left out; got {self.bptt_segments}")
        if self.memory_noise < 0:
            raise UsageError(f"`--memory_noise` must be 0 or more; got {self.memory_noise}. 0 leaves it out")
        if self.segment_alignment not in ("left", "right"):
            raise UsageError(f"`--segment_alignment` must be left or right; got {self.segment_alignment}")
        window = getattr(self.backbone_config, "max_position_embeddings", None)
        if window is not None and length + 2 * m > window:
            raise UsageError(
                f"`--segment_length` + 2 × `--num_memory_tokens` must fit into the backbone's window of {window}; "
                f"got {length} and {m}. Lower `--segment_length` to {window - 2 * m} or less"
            )

    def matters_to_training(self) -> dict[str, object]:
        return {k: v for k, v in super().matters_to_training().items() if k != "checkpoint_segments"}

    def check_training(self, num_segments: int, *, num_ranks: int = 1, task: str = "", use_peft: bool = True) -> None:
        if self.num_memory_tokens == 0:
            raise UsageError(
                "`--num_memory_tokens` must be 1 or more to train a memory; got 0. 16 is the published value"
            )
        if self.bptt_segments and num_ranks > 1 and task == "dataset" and self.segment_alignment == "left":
            # an answer that crosses the end of a segment is two windows, and other ranks may have one
            raise UsageError(
                f"`--bptt_segments` {self.bptt_segments} on several ranks needs every answer within one segment, which "
                "your own rows have with `--segment_alignment right`; got left"
            )

    def activations(self, num_segments: int) -> Activations:
        live = 1 if self.checkpoint_segments else min(num_segments, self.bptt_segments or num_segments)
        m = self.num_memory_tokens
        return Activations(self.segment_length + 2 * m, live, m * num_segments)


@dataclasses.dataclass
class RmtState(State):
    """Memory and the running segment, whose memory is written when the token after it arrives.

    `memory [B, m, d]`; `pending_ids [B, P]`, padded on the right, with `pending_length [B]` in 0..L; `num_tokens [B]` read.
    """

    memory: Tensor
    pending_ids: Tensor
    pending_length: Tensor
    num_tokens: Tensor

    def pending_mask(self) -> Tensor:
        return torch.arange(self.pending_ids.shape[1], device=self.pending_ids.device) < self.pending_length[:, None]


class RmtForCausalLM(LongContextModel):
    """Reads a text segment by segment as `[M ; tokens ; M]`; the last m hidden states are the next segment's `M`."""

    config_class = RmtConfig
    state_class = RmtState
    state_settings = ("num_memory_tokens", "segment_length", "segment_alignment")
    memory_modules = ["memory_embedding"]
    noise_share = 1.0  #: of `memory_noise`: a curriculum starts with little, or memory is never found
    _memory_norm: Tensor | None = None

    def __init__(self, config: RmtConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        if not _takes_embeddings(self.backbone):
            raise UsageError(
                f"`--model_name_or_path`: {type(self.backbone).__name__} takes no `inputs_embeds`, which memory tokens need; "
                "choose a decoder such as LLaMA, Mistral, Qwen or GPT-2"
            )
        embeddings = self.get_input_embeddings().weight
        with gathered(embeddings):
            width = embeddings.shape[-1]
            self.memory_embedding = nn.Embedding(
                config.num_memory_tokens, width, device=embeddings.device, dtype=embeddings.dtype
            )
            if embeddings.device.type != "meta":  # else `from_pretrained` is about to load everything
                nn.init.normal_(self.memory_embedding.weight, std=float(embeddings.detach().float().std()))
                for parameter in self.parameters():
                    parameter._is_hf_initialized = True  # or `post_init` draws the backbone's weights anew
        self.post_init()

    def _init_weights(self, module):
        pass  # the backbone initialises its own; the memory is drawn above

    def _memory_weights(self):
        return [self.memory_embedding.weight]

    def on_progress(self, share: float) -> None:
        self.noise_share = share

    def log_values(self) -> dict[str, float]:
        return {} if self._memory_norm is None else {"memory_norm": float(self._memory_norm)}

    # ------------------------------------------------------------------ the recurrence

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: RmtState | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> LongContextOutput:
        """Runs every segment of the text (methods: RMT, 2207.06881 §3).

        Args:
            input_ids: `[B, T]`, any length. attention_mask: `[B, T]`; a padded batch equals its rows alone.
            labels: `[B, T]`, -100 where nothing is scored, unshifted. Logits are then computed for scored positions only.
            state: what was read before; the text goes on from there.
            logits_to_keep: without labels, 1 gives the last position of each row only; 0 gives all.

        Returns:
            With labels: `loss` (mean over scored positions) and `logits [N, V]`, row by row. Without: `logits [B, T, V]` or
            `[B, 1, V]`, and with `logits_to_keep=1` the `state` that generation goes on from.
        """
        if labels is None and logits_to_keep == 1:
            return self._next_token(input_ids, attention_mask, state)
        grid, memory = self._begin(input_ids, attention_mask, labels, state)
        hidden, memory = self._scored_hidden_states(grid, memory)
        hidden = grid.row_major(hidden)
        if labels is None:
            logits = self.get_output_embeddings()(hidden)
            if attention_mask is None or bool(attention_mask.all()):
                return LongContextOutput(logits=logits.view(*input_ids.shape, -1))
            padded = logits.new_zeros(*input_ids.shape, logits.shape[-1])
            padded[attention_mask.bool()] = logits
            return LongContextOutput(logits=padded)
        targets = grid.targets()
        norm = self._memory_norm = _root_mean_square(memory.detach())
        # one call of the head per step, also when nothing is scored: ranks must make the same module calls
        logits = self.get_output_embeddings()(hidden if len(targets) else hidden.new_zeros(1, hidden.shape[-1]))
        if not len(targets):
            return LongContextOutput(loss=(logits.sum() + memory.sum()) * 0.0, logits=logits[:0], memory_norm=norm)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
        return LongContextOutput(loss=loss, logits=logits, memory_norm=norm)

    def _scored_hidden_states(self, grid: Grid, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states of the scored positions, `[N, d]`, segment by segment, and the last memory."""
        hidden, last = [memory.new_zeros(0, memory.shape[-1])], memory
        at = 0
        for begin, end in self._windows(grid):
            if begin > at:
                with torch.no_grad():
                    memory = self._recur(grid, range(at, begin), memory)[1]
                at = begin
            kept, last = self._recur(grid, range(begin, end), memory)
            hidden += kept if begin == 0 and end == len(grid) else kept[-1:]
        return torch.cat(hidden), last

    def _windows(self, grid: Grid) -> list[tuple[int, int]]:
        """Spans of segments to run with gradients: all at once, or with truncation one window per scored segment.

        Exact truncation: the loss of segment s reaches the k segments s-k+1..s and no other, so windows overlap.
        """
        k = self.config.bptt_segments
        if k is None or k >= len(grid) or not torch.is_grad_enabled():
            return [(0, len(grid))]
        scored = [s for s, segment in enumerate(grid) if segment.scored is not None]
        return [(max(0, s - k + 1), s + 1) for s in scored or [len(grid) - 1]]

    def num_backbone_calls(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> int:
        """How often `forward` runs the backbone on this batch: what must agree between ranks."""
        config = self.config
        grid = Grid(
            input_ids, attention_mask, labels, segment_length=config.segment_length, alignment=config.segment_alignment
        )
        windows = self._windows(grid)
        return windows[-1][0] + sum(end - begin for begin, end in windows)

    @torch.no_grad()
    def memory_norms(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[float]:
        """Root-mean-square of the memory written by each segment but the last."""
        grid, memory = self._begin(input_ids, attention_mask, None, None, reading=True)
        norms = []
        for s in range(len(grid) - 1):
            memory = self._recur(grid, range(s, s + 1), memory)[1]
            norms.append(float(_root_mean_square(memory)))
        return norms

    def find_fault(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> str:
        norms = self.memory_norms(input_ids, attention_mask)
        for segment, norm in enumerate(norms, 1):
            if not math.isfinite(norm):
                return f"memory first breaks in segment {segment}"
        return f"it breaks in the last segment, {len(norms) + 1}"  # which writes no memory

    def _recur(self, grid: Grid, window: range, memory: Tensor) -> tuple[list[Tensor], Tensor]:
        """The RMT loop: hidden states of the scored positions per segment, and the memory after the window."""
        run = self._segment
        if self.config.checkpoint_segments and torch.is_grad_enabled():

            def run(*args):
                return checkpoint(self._segment, *args, use_reentrant=False)

        hidden = []
        for s in window:
            kept, written = run(grid[s], memory)
            hidden.append(kept)
            memory = _choose(grid.running(s), self._with_noise(written), memory)
        return hidden, memory

    def _with_noise(self, memory: Tensor) -> Tensor:
        noise = self.config.memory_noise * self.noise_share
        if not self.training or noise == 0:
            return memory
        size = memory.detach().pow(2).mean(-1, keepdim=True).sqrt()
        return memory + noise * size * torch.randn_like(memory)

    def _segment(self, segment: Segment, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One segment: `[M ; E(x) ; M]` through the decoder gives the scored hidden states `[N, d]` and the new `M [B, m, d]`."""
        m = memory.shape[1]
        tokens = self.get_input_embeddings()(segment.ids)
        hidden = self._run_decoder(torch.cat([memory, tokens, memory], dim=1), segment.mask, m)
        kept = hidden[:, m : hidden.shape[1] - m]
        kept = kept[segment.scored] if segment.scored is not None else hidden.new_zeros(0, hidden.shape[-1])
        # copies, not views: a view of the memory would keep the hidden states of the whole segment alive
        return kept, hidden[:, hidden.shape[1] - m :].clone()

    def _run_decoder(self, embeds: Tensor, mask: Tensor | None, m: int) -> Tensor:
        """Last hidden states `[B, m + W + m, d]` of the decoder; padding among the W tokens changes nothing else."""
        if mask is not None:
            mask = F.pad(mask, (m, m), value=True)
        embeds, mask, position_ids, order = pad_left(embeds, mask)
        hidden = self.backbone.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        if order is None:
            return hidden
        return torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)

    def _begin(self, input_ids, attention_mask, labels, state, reading=False) -> tuple[Grid, Tensor]:
        """The grid of the text (behind the state's running segment) and the memory it starts from."""
        if input_ids.shape[1] == 0 or (attention_mask is not None and not bool(attention_mask.any())):
            raise ValueError("`input_ids` is empty: nothing to read; give at least one token")
        alignment = self.config.segment_alignment
        wanted = None
        if labels is None and not reading:
            wanted = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if state is None:
            memory = self._initial_memory(len(input_ids))
        else:
            if state.fingerprint != self.fingerprint():
                raise UsageError(f"the state was made by another model ({state.fingerprint}); read the text again")
            state = state.expand(len(input_ids))
            alignment = "left"  # the running segment has its place on the grid already
            memory, pending = state.memory, state.pending_ids
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            if labels is not None:
                labels = torch.cat([torch.full_like(pending, -100), labels], dim=1)
            if wanted is not None:
                wanted = torch.cat([torch.zeros_like(pending, dtype=torch.bool), wanted], dim=1)
            input_ids = torch.cat([pending, input_ids], dim=1)
            attention_mask = torch.cat([state.pending_mask().to(attention_mask), attention_mask], dim=1)
        length = self.config.segment_length
        return Grid(input_ids, attention_mask, labels, wanted, segment_length=length, alignment=alignment), memory

    def _initial_memory(self, batch_size: int) -> Tensor:
        index = torch.arange(self.config.num_memory_tokens, device=self.get_input_embeddings().weight.device)
        memory = self.memory_embedding(index)  # a module call, so that ZeRO-3 gathers the weight
        return memory.to(self.get_input_embeddings().weight.dtype).expand(batch_size, -1, -1)

    # ------------------------------------------------------------------ reading and generating

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, state: RmtState | None = None) -> RmtState:
        """Streams a document into memory; what is held does not grow with its length.

        Args:
            input_ids: `[B, T]`, on any device. attention_mask: `[B, T]`. state: what was read before.

        Returns:
            The state, from which `forward`, `read` and `generate` go on as if the whole text had been given at once.
        """
        grid, memory = self._begin(input_ids, attention_mask, None, state, reading=True)
        for s in range(len(grid) - 1):
            _, written = self._segment(grid[s], memory)
            memory = _choose(grid.running(s), written, memory)
        pending_ids, pending_length = grid.last_segments()
        new = (
            torch.full_like(pending_length, input_ids.shape[1])
            if attention_mask is None
            else attention_mask.bool().sum(1)
        )
        return RmtState(
            fingerprint=self.fingerprint() if state is None else state.fingerprint,
            cache=None,
            memory=memory,
            pending_ids=pending_ids,
            pending_length=pending_length,
            num_tokens=new if state is None else state.expand(len(input_ids)).num_tokens + new,
        )

    @torch.no_grad()
    def _next_token(
        self, input_ids: Tensor, attention_mask: Tensor | None, state: RmtState | None
    ) -> LongContextOutput:
        """Logits `[B, 1, V]` after the last token of each row: scored from `[M ; E(x)]`, where training scored them."""
        if state is None or state.cache is None:
            state, hidden = self._open_segment(self.read(input_ids, attention_mask, state))
        else:
            state, hidden = self._append(state, input_ids)
        return LongContextOutput(logits=self.get_output_embeddings()(hidden), state=state)

    def _open_segment(self, state: RmtState) -> tuple[RmtState, Tensor]:
        """Runs `[M ; running segment]` into a fresh KV cache; returns the hidden state `[B, 1, d]` of the last token."""
        embeds = torch.cat([state.memory, self.get_input_embeddings()(state.pending_ids)], dim=1)
        mask = state.pending_mask()
        mask = None if bool(mask.all()) else F.pad(mask, (state.memory.shape[1], 0), value=True)
        embeds, mask, position_ids, _ = pad_left(embeds, mask)
        kv = DynamicCache(config=self.backbone.config)
        hidden = self.backbone.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, past_key_values=kv, use_cache=True
        ).last_hidden_state
        return dataclasses.replace(state, cache=(kv, mask)), hidden[:, -1:]

    def _append(self, state: RmtState, token: Tensor) -> tuple[RmtState, Tensor]:
        """One generated token `[B, 1]`: rows whose segment is full write their memory and begin a new one."""
        full = state.pending_length == self.config.segment_length
        if bool(full.any()):
            written = self._extend(state, state.memory)
            state = dataclasses.replace(
                state,
                memory=torch.where(full[:, None, None], written, state.memory),
                pending_length=state.pending_length.masked_fill(full, 0),
                cache=None,
            )
        grown = dataclasses.replace(
            state,
            pending_ids=F.pad(state.pending_ids, (0, 1)).scatter(1, state.pending_length[:, None], token),
            pending_length=state.pending_length + 1,
            num_tokens=state.num_tokens + 1,
        )
        grown.pending_ids = grown.pending_ids[:, : int(grown.pending_length.max())]
        if state.cache is None:
            return self._open_segment(grown)
        hidden = self._extend(state, self.get_input_embeddings()(token))
        kv, mask = state.cache
        grown.cache = (kv, None if mask is None else F.pad(mask, (0, 1), value=1))
        return grown, hidden

    def _extend(self, state: RmtState, embeds: Tensor) -> Tensor:
        """Hidden states of `embeds [B, n, d]` run through the KV cache behind the running segment."""
        kv, mask = state.cache
        n = embeds.shape[1]
        if n == 0:
            return embeds
        begin = state.memory.shape[1] + state.pending_length[:, None]
        return self.backbone.base_model(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else F.pad(mask, (0, n), value=1),
            position_ids=begin + torch.arange(n, device=embeds.device),
            past_key_values=kv,
            use_cache=True,
        ).last_hidden_state


def _root_mean_square(memory: Tensor) -> Tensor:
    return memory.float().pow(2).mean().sqrt()


def _choose(rows: list[bool], new: Tensor, old: Tensor) -> Tensor:
    """`new` for the rows marked, `old` for the others, `[B, m, d]`."""
    if all(rows):
        return new
    if not any(rows):
        return old
    return torch.where(torch.tensor(rows, device=new.device)[:, None, None], new, old)


def _takes_embeddings(backbone: PreTrainedModel) -> bool:
    import inspect

    return "inputs_embeds" in inspect.signature(backbone.base_model.forward).parameters
