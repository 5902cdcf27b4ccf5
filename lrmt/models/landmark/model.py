"""Landmark attention on a stock decoder (Mohtashami & Jaggi 2023, arXiv 2305.16300)."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrmt.errors import UsageError
from lrmt.flags import flag
from lrmt.models import scoring
from lrmt.models.base import LongContextModel
from lrmt.models.config import Activations, LongContextConfig
from lrmt.models.cost import Shape, split_flops
from lrmt.models.landmark.attention import QUERY_CHUNK, landmark_attention
from lrmt.models.landmark.cache import Blocks, Chunk
from lrmt.models.landmark.hooks import check_backbone, switch_sliding_window_off
from lrmt.models.landmark.state import LandmarkState
from lrmt.models.outputs import Encoded, Text
from lrmt.models.recording import Recording, Span
from lrmt.models.weights import layers_of

#: tokens for which places are computed at once: a long text takes no memory but its own
TOKENS_LAID_OUT_AT_ONCE = 8192


class LandmarkConfig(LongContextConfig):
    """Settings of landmark attention."""

    model_type = "landmark"
    reading_settings: ClassVar[tuple[str, ...]] = ("top_k", "retrieval", "offload_blocks")
    placement_settings: ClassVar[tuple[str, ...]] = ("offload_blocks",)

    block_length: int = flag(64, "Positions per block K: K-1 tokens and their landmark.")
    context_length: int = flag(2048, "Tokens per training text, the unit of --curriculum_stages; bounds positions.")
    top_k: int = flag(4, "Blocks that a token reads beside what is near, at inference.")
    train_top_k: int | None = flag(None, "As many in training too, as longer texts will have it; default: all blocks.")
    landmark_embedding: Literal["trained", "frozen_mean"] = flag(
        "trained", "trained, or frozen_mean: the mean of the token embeddings."
    )
    retrieval: Literal["token", "chunk"] = flag(
        "token", "token: each head and token chooses blocks; chunk: each head for a chunk."
    )
    offload_blocks: bool = flag(False, "Keep blocks in CPU memory at inference; landmark keys stay on the GPU.")
    implementation: Literal["auto", "sdpa", "flex", "naive"] = flag(
        "auto", "Of landmark attention in training: auto, sdpa, flex or naive."
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.block_length < 2:
            raise UsageError(
                f"`--block_length` must be 2 or more, one token and its landmark; got {self.block_length}. 64 is the published value"
            )
        if self.top_k < 1:
            raise UsageError(f"`--top_k` must be 1 or more; got {self.top_k}. 4 is the published value")
        if self.train_top_k is not None and self.train_top_k < 1:
            raise UsageError(f"`--train_top_k` must be 1 or more, or left out; got {self.train_top_k}")
        for name, known in (("landmark_embedding", ("trained", "frozen_mean")), ("retrieval", ("token", "chunk"))):
            if getattr(self, name) not in known:
                raise UsageError(f"`--{name}` must be {' or '.join(known)}; got {getattr(self, name)}")
        if self.implementation not in ("auto", "sdpa", "flex", "naive"):
            raise UsageError(f"`--implementation` must be auto, sdpa, flex or naive; got {self.implementation}")
        least = (self.top_k + 3) * self.block_length
        if self.max_positions < least:
            raise UsageError(
                f"`--context_length` {self.context_length} leaves no room for {self.top_k} blocks of {self.block_length}, one of "
                f"older text, the unfinished one and a chunk; raise it to {least} or more, or lower `--top_k`"
            )
        window = getattr(self.backbone_config, "max_position_embeddings", None)
        if window is not None and self.max_positions > window:
            raise UsageError(
                f"`--context_length` with its landmarks must fit into the backbone's window of {window}; got "
                f"{self.max_positions}. Lower it to {window * (self.block_length - 1) // self.block_length} or less"
            )

    @property
    def max_positions(self) -> int:
        """Positions of a training text, landmarks included."""
        return self.context_length + self.context_length // (self.block_length - 1)

    @property
    def length_slack(self) -> int:
        return self.block_length - 2

    @property
    def span_length(self) -> int:
        return self.block_length - 1

    @property
    def chunk_length(self) -> int:
        """Positions read at once beyond the training context: whole blocks, and no position exceeds training."""
        return (self.max_positions // self.block_length - self.top_k - 2) * self.block_length

    def matters_to_training(self) -> dict[str, object]:
        return {k: v for k, v in super().matters_to_training().items() if k != "implementation"}

    def read_flops(self, shape: Shape, tokens: int) -> float:
        size, width, columns = self.block_length, self.chunk_length, tokens + tokens // (self.block_length - 1)
        chunks, rest = divmod(columns, width)
        step = width // size  # blocks that a chunk adds to those behind it, of which a query reads `far`
        far = [min(number * step, self.top_k) for number in range(min(chunks, self.top_k))]
        far = sum(far) + (chunks - len(far)) * self.top_k, min(chunks * step, self.top_k)
        products = width * (2 * width * chunks + step * chunks * (chunks - 1) // 2 + (2 * size - 1) * far[0])
        products += rest * (2 * rest + step * chunks + (2 * size - 1) * far[1])
        return shape.run(columns, products / 2 / columns)

    def train_flops(self, shape: Shape, tokens: int) -> float:
        columns = tokens + tokens // (self.block_length - 1)
        ends = range(QUERY_CHUNK, columns, QUERY_CHUNK)  # each chunk of queries sees the keys up to its own end
        seen = sum(end * QUERY_CHUNK for end in ends) + columns * (columns - len(ends) * QUERY_CHUNK)
        attention, rest = split_flops(lambda shape: shape.run(columns, seen / columns), shape)
        again = (
            0.5 if columns > QUERY_CHUNK else 0
        )  # the scores of each chunk are computed once more, not what they weigh
        return (3 + again) * attention + 2 * rest

    def state_numbers(self, shape: Shape, tokens: int) -> tuple[int, int]:
        return 2 * shape.layers * shape.keys * (tokens + tokens // (self.block_length - 1)), 0

    def activations(self, num_segments: int) -> Activations:
        return Activations(self.max_positions, num_segments, 0)

    def check_training(self, num_segments: int, *, use_peft: bool = True, **run) -> None:
        if not use_peft and self.landmark_embedding == "frozen_mean":
            raise UsageError(
                "`--use_peft false` with `--landmark_embedding frozen_mean` trains nothing; leave one of them out"
            )
        longest = self.context_length * num_segments
        longest += longest // (self.block_length - 1)
        window = getattr(self.backbone_config, "max_position_embeddings", None)
        if window is not None and longest > window:
            raise UsageError(
                f"`--curriculum_stages` {num_segments} × `--context_length` {self.context_length} is {longest} positions, which are "
                f"trained at once and must fit into the backbone's window of {window}; 1 stage of 1 is enough for landmarks"
            )

    @property
    def segment_length(self) -> int:
        """The unit in which curricula and evaluations count: one training context."""
        return self.context_length


class LandmarkForCausalLM(LongContextModel):
    """Puts a landmark after every K−1 tokens; attention reaches a past block through its landmark only."""

    config_class = LandmarkConfig
    state_class = LandmarkState
    state_settings = ("block_length", "top_k", "context_length")
    memory_modules: ClassVar[list[str]] = ["landmark_embedding"]
    can_compile = False  # each chunk attends in its own way

    def __init__(self, config: LandmarkConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        check_backbone(self.backbone)
        switch_sliding_window_off(self.backbone)
        self.backbone.set_attn_implementation("landmark")
        self.landmark_embedding = self.make_embedding(
            1, lambda weight, embeddings: weight.copy_(embeddings.mean(0, keepdim=True))
        )
        self._record: list | None = None
        self.finish()

    @classmethod
    def trained_modules(cls, settings: dict) -> list[str]:
        return [] if settings.get("landmark_embedding") == "frozen_mean" else cls.memory_modules

    # ------------------------------------------------------------------ forward

    def encode(self, input_ids, mask, wanted, state) -> Encoded:
        """Training (gradients, or training mode) reads the whole text at once, and every block through its landmark; inference
        reads it in chunks, and beyond the training context only the `top_k` best blocks. Going on from a state has no gradients.
        """
        mask = self._full(input_ids, mask)
        if wanted is not None and state is None and (self.training or torch.is_grad_enabled()):
            return Encoded(self._read_whole(input_ids, mask)[wanted])
        return Encoded(*self._stream(input_ids, mask, state, wanted))

    @staticmethod
    def _full(input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The mask `[B, T]`, of rows that each hold a token."""
        mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        if not bool(mask.any(1).all()):
            raise ValueError("`input_ids` is empty: nothing to read; give at least one token in each row")
        return mask

    def go_on(self, text: Text) -> tuple[Tensor, LandmarkState]:
        return self._stream(
            text.ids, self._full(text.ids, text.mask), text.state, scoring.last_tokens(text.ids, text.mask, 1)
        )

    def _read_whole(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states `[B, T, d]` of a whole text under landmark attention, no block left out."""
        column, valid = self._lay_out(mask, torch.zeros_like(mask[:, 0], dtype=torch.long))
        embeds = self._embed_columns(input_ids, self._invert(column, valid))
        config = self.config

        def attend(layer, query, key, value, scaling):
            return landmark_attention(
                query, key, value, block_length=config.block_length, scaling=scaling,
                implementation=config.implementation, key_mask=None if bool(valid.all()) else valid,
                top_k=config.train_top_k if self.training else None,
            )  # fmt: skip

        position_ids = torch.arange(valid.shape[1], device=valid.device)[None]
        hidden = self._run_decoder(embeds, valid, position_ids, attend)
        return hidden.gather(1, column.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))

    @torch.no_grad()
    def find_fault(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> str:
        text, inputs = self._open(input_ids, attention_mask, None, None), []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            for layer in layers_of(self.backbone)
        ]
        try:
            mask = torch.ones_like(text.ids, dtype=torch.bool) if text.mask is None else text.mask
            self._read_whole(text.ids, mask)
        finally:
            for hook in hooks:
                hook.remove()
        length, size = self.config.context_length, self.config.block_length
        last = -(-int(mask.sum(1).max()) // length)
        for layer, hidden in enumerate(inputs):  # the first only: attention spreads what is not finite to all of a text
            broken = (~hidden.isfinite().all(-1)).any(0).nonzero()
            if len(broken):
                token = int(broken[0]) - int(broken[0]) // size  # columns count landmarks
                return f"hidden states first break in segment {token // length + 1} of {last}, before layer {layer + 1}"
        return f"it breaks in one of {last} segments, in the last layer or behind it"

    # ------------------------------------------------------------------ reading in chunks

    @torch.no_grad()  # blocks outlive the pass, and other texts may share them
    def _stream(
        self, input_ids: Tensor, mask: Tensor, state: LandmarkState | None, wanted: Tensor | None
    ) -> tuple[Tensor, LandmarkState]:
        """Hidden states of the tokens `wanted [B, T]`, `[N, d]` row by row, and the state after the text, chunk by chunk."""
        config, device = self.config, self.device
        if state is None:
            rows = torch.arange(len(input_ids), device=device)
            zero = torch.zeros_like(rows)
            state = LandmarkState("", None, Blocks([], rows), None, zero, zero)
        blocks, tails, tail_length = state.blocks, state.tails, state.tail_length
        lengths = mask.sum(1)
        padded = not bool(mask.all())
        kept: list[tuple[Tensor, Tensor]] = []
        record = None if self._record is None else {}
        if record is not None:
            self._record.append(record)
        slab = TOKENS_LAID_OUT_AT_ONCE // config.chunk_length * config.chunk_length + config.chunk_length
        for begin in range(0, int(lengths.max()), slab):
            # which token of the text stands where, each row without its padding
            token = torch.arange(begin, min(begin + slab, int(lengths.max())), device=mask.device).expand(len(mask), -1)
            real = token < lengths[:, None]
            if padded:
                token = mask.long().argsort(dim=1, descending=True, stable=True)[:, begin : begin + slab]
            ids = input_ids.gather(1, token).to(device)
            column, valid = self._lay_out(real.to(device), tail_length)
            source = self._invert(column, valid)
            for first in range(0, valid.shape[1], config.chunk_length):
                piece = slice(first, first + config.chunk_length)
                chunk = Chunk(
                    blocks, tails, tail_length, valid[:, piece],
                    block_length=config.block_length, top_k=config.top_k, inv_freq=self._inv_freq(),
                    num_layers=config.num_hidden_layers, offload=config.offload_blocks,
                    per_token=config.retrieval == "token", record=record,
                )  # fmt: skip
                embeds = self._embed_columns(ids, source[:, piece])
                hidden = self._run_decoder(embeds, valid[:, piece], chunk.position_ids, chunk.attend)
                blocks, tails, tail_length = chunk.finish()
                if wanted is not None:
                    row, place = (source[:, piece] >= 0).nonzero(as_tuple=True)
                    here = token.to(device)[row, source[:, piece][row, place]]
                    chosen = wanted.to(device)[row, here]
                    kept.append(((row * input_ids.shape[1] + here)[chosen], hidden[row[chosen], place[chosen]]))
        state = dataclasses.replace(
            state,
            blocks=blocks,
            tails=tails,
            tail_length=tail_length,
            num_tokens=state.num_tokens + lengths.to(device),
            cache=None,
        )
        if wanted is None:
            return embeds[:0, 0], state
        order = torch.cat([index for index, _ in kept]).argsort()
        return torch.cat([hidden for _, hidden in kept])[order], state

    def _lay_out(self, mask: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens stand when landmarks are put between them: `column [B, T]`, and which columns are used `[B, W]`.

        `position [B]`: positions of the unfinished block so far. A landmark due there comes first; one due at the end waits for
        the token after it, which is the first that can see it.
        """
        k = self.config.block_length
        regular = position - position // k
        number = mask.long().cumsum(1) - 1 + regular[:, None]  # which regular token each is
        column = number + number // (k - 1) - position[:, None]
        column = column.masked_fill(~mask, -1)
        extent = column.amax(1) + 1
        valid = torch.arange(max(1, int(extent.max())), device=mask.device) < extent[:, None]
        return column, valid

    @staticmethod
    def _invert(column: Tensor, valid: Tensor) -> Tensor:
        """The token at each column, `[B, W]`; -1 for landmarks and padding."""
        source = torch.full_like(valid, -1, dtype=torch.long)
        row, token = (column >= 0).nonzero(as_tuple=True)
        source[row, column[row, token]] = token
        return source

    def _embed_columns(self, input_ids: Tensor, source: Tensor) -> Tensor:
        """Embeddings `[B, W, d]` of columns: the token `source` names, or the landmark where it names none."""
        ids = input_ids.gather(1, source.clamp(min=0))
        tokens = self.get_input_embeddings()(ids)
        # a module call, so that ZeRO-3 gathers the weight
        landmark = self.landmark_embedding(torch.zeros_like(ids)).to(tokens.dtype)
        return torch.where((source >= 0)[..., None], tokens, landmark)

    def _run_decoder(self, embeds: Tensor, valid: Tensor, position_ids: Tensor, attend) -> Tensor:
        return self.backbone.base_model(
            inputs_embeds=embeds,
            attention_mask=valid,
            position_ids=position_ids,
            use_cache=False,
            landmark_attend=attend,
        ).last_hidden_state

    def _inv_freq(self) -> Tensor:
        return self.backbone.base_model.rotary_emb.inv_freq

    def num_backbone_calls(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels=None, notes=None
    ) -> int:
        """One for a whole text, or one for each chunk of the longest row."""
        if self.training or torch.is_grad_enabled():
            return 1
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.bool().sum(1).max())
        positions = longest + (longest - 1) // (self.config.block_length - 1)
        return -(-positions // self.config.chunk_length)

    # ------------------------------------------------------------------ what was read

    can_record = True

    @contextlib.contextmanager
    def recording(self):
        told = Recording()
        with self._recording_blocks() as record:
            try:
                yield told
            finally:
                told.read += [self._spans(step) for step in record]

    def _spans(self, step: dict) -> list[list[Span]]:
        """The blocks that each row read, as spans: `{(row, layer): (blocks [H, k], shares [H, k])}` averaged over heads."""
        rows: list[list[Span]] = [[] for _ in range(1 + max((row for row, _ in step), default=-1))]
        size = self.config.block_length - 1
        for (row, layer), (blocks, shares) in sorted(step.items()):
            for block in blocks[blocks >= 0].unique().tolist():
                share = float(shares[blocks == block].sum()) / len(blocks)
                rows[row].append(Span(layer, block, block * size, (block + 1) * size, share))
        return rows

    @contextlib.contextmanager
    def _recording_blocks(self):
        """Collects, for every text read inside, what the last token of each row read: `{(row, layer): (blocks, shares)}`."""
        self._record = []
        try:
            yield self._record
        finally:
            self._record = None

    def generate(self, inputs=None, generation_config=None, return_retrieval: bool = False, **kwargs):
        """As every `generate`; with `return_retrieval` also which blocks each new token read.

        Returns:
            Ids `[B, T + new]`; with `return_retrieval` a pair of them and, for each new token, a dict
            `{(row, layer): (blocks [H, k], shares [H, k])}`: numbers of blocks (-1: none) and their shares of the attention of
            the token that predicts it. While there is no block beyond what is near, the dict is empty.
        """
        if not return_retrieval:
            return super().generate(inputs, generation_config, **kwargs)
        with self._recording_blocks() as record:
            ids = super().generate(inputs, generation_config, **kwargs)
        return ids, record
