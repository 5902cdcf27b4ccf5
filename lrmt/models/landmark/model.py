"""Landmark attention on a stock decoder (Mohtashami & Jaggi 2023, arXiv 2305.16300)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lrmt.errors import UsageError
from lrmt.models.base import (
    Activations,
    LongContextConfig,
    LongContextModel,
    LongContextOutput,
    Span,
    State,
    gathered,
    setting,
)
from lrmt.models.landmark.attention import landmark_attention
from lrmt.models.landmark.cache import Blocks, Chunk, Level

logger = logging.getLogger(__name__)

#: decoders whose attention is looked up by name, and whose rotary embedding turns the two halves of a head
BACKBONES = ("llama", "mistral", "qwen2", "qwen3")


#: tokens for which places are computed at once: a long text takes no memory but its own
TOKENS_LAID_OUT_AT_ONCE = 8192


class LandmarkConfig(LongContextConfig):
    """Settings of landmark attention."""

    model_type = "landmark"
    reading_settings: ClassVar[tuple[str, ...]] = ("top_k", "retrieval", "offload_blocks")
    placement_settings: ClassVar[tuple[str, ...]] = ("offload_blocks",)

    block_length: int = setting(64, "Positions per block K: K-1 tokens and their landmark.")
    context_length: int = setting(2048, "Tokens per training text, the unit of --curriculum_stages; bounds positions.")
    top_k: int = setting(4, "Blocks that a token reads beside what is near, at inference.")
    train_top_k: int | None = setting(
        None, "As many in training too, as longer texts will have it; default: all blocks."
    )
    landmark_embedding: Literal["trained", "frozen_mean"] = setting(
        "trained", "trained, or frozen_mean: the mean of the token embeddings."
    )
    retrieval: Literal["token", "chunk"] = setting(
        "token", "token: each head and token chooses blocks; chunk: each head for a chunk."
    )
    offload_blocks: bool = setting(False, "Keep blocks in CPU memory at inference; landmark keys stay on the GPU.")
    implementation: Literal["auto", "sdpa", "flex", "naive"] = setting(
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
    def chunk_length(self) -> int:
        """Positions read at once beyond the training context: whole blocks, and no position exceeds training."""
        return (self.max_positions // self.block_length - self.top_k - 2) * self.block_length

    def matters_to_training(self) -> dict[str, object]:
        return {k: v for k, v in super().matters_to_training().items() if k != "implementation"}

    def activations(self, num_segments: int) -> Activations:
        return Activations(self.max_positions, num_segments, 0)

    def check_training(self, num_segments: int, *, num_ranks: int = 1, task: str = "", use_peft: bool = True) -> None:
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


@dataclasses.dataclass
class LandmarkState(State):
    """Blocks of keys and values, and the unfinished block behind them.

    `blocks`, `tails` and `tail_length [B]` as `Chunk` takes them; `num_tokens [B]` read.
    """

    blocks: Blocks
    tails: list | None
    tail_length: Tensor
    num_tokens: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.num_tokens)

    def expand(self, batch_size: int) -> LandmarkState:
        times = self._times(batch_size)
        if times == 1:
            return self
        row = torch.arange(self.batch_size, device=self.num_tokens.device).repeat_interleave(times)
        tails = self.tails and [pair and tuple(t[row] for t in pair) for pair in self.tails]
        blocks = self.blocks.expand(row)
        return dataclasses.replace(
            self,
            blocks=blocks,
            tails=tails,
            tail_length=self.tail_length[row],
            num_tokens=self.num_tokens[row],
            cache=None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """`keys`, `values` `[B, layers, H_kv, N, K, D]`, `tail_keys`, `tail_values` `[B, layers, H_kv, P, D]` and counts `[B]`."""
        count = self.blocks.count
        result = {"num_blocks": count, "tail_length": self.tail_length, "num_tokens": self.num_tokens}
        longest = int(count.max()) if len(count) else 0
        if longest:
            first = self.blocks.levels[0][0]
            index = torch.arange(longest, device=count.device).expand(len(count), first.keys[0].shape[1], -1)
            pairs = [[t.cpu() for t in self.blocks.gather(layer, index)] for layer in range(len(first.keys))]
            result["keys"], result["values"] = (torch.stack([pair[i] for pair in pairs], 1) for i in (0, 1))
        if self.tails is not None and self.tails[0] is not None:
            result["tail_keys"], result["tail_values"] = (
                torch.stack([pair[i] for pair in self.tails], 1) for i in (0, 1)
            )
        return result

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], fingerprint: str, model: LandmarkForCausalLM) -> LandmarkState:
        counts = {name: tensors[name].to(model.device) for name in ("num_blocks", "tail_length", "num_tokens")}
        rows = torch.arange(len(counts["num_tokens"]), device=model.device)
        levels = []
        if "keys" in tensors:
            level = Level(tensors["keys"].shape[1], counts["num_blocks"], model.config.offload_blocks)
            place = torch.arange(tensors["keys"].shape[3], device=model.device).expand(len(rows), -1)
            for layer in range(tensors["keys"].shape[1]):
                level.write(layer, place, tensors["keys"][:, layer], tensors["values"][:, layer])
            levels.append((level, counts["num_blocks"], rows))
        tails = None
        if "tail_keys" in tensors:
            tails = [
                tuple(tensors[name][:, layer].to(model.device) for name in ("tail_keys", "tail_values"))
                for layer in range(tensors["tail_keys"].shape[1])
            ]
        return cls(fingerprint, None, Blocks(levels, rows), tails, counts["tail_length"], counts["num_tokens"])


class LandmarkForCausalLM(LongContextModel):
    """Puts a landmark after every K−1 tokens; attention reaches a past block through its landmark only."""

    config_class = LandmarkConfig
    state_class = LandmarkState
    state_settings = ("block_length", "top_k", "context_length")
    memory_modules: ClassVar[list[str]] = ["landmark_embedding"]

    def __init__(self, config: LandmarkConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        _check_backbone(self.backbone)
        _switch_sliding_window_off(self.backbone)
        self.backbone.set_attn_implementation("landmark")
        embeddings = self.get_input_embeddings().weight
        with gathered(embeddings):
            width, device = embeddings.shape[-1], embeddings.device
            self.landmark_embedding = nn.Embedding(1, width, device=device, dtype=embeddings.dtype)
            if device.type != "meta":  # else `from_pretrained` is about to load everything
                with torch.no_grad():
                    self.landmark_embedding.weight.copy_(embeddings.float().mean(0, keepdim=True))
                for parameter in self.parameters():
                    parameter._is_hf_initialized = True  # or `post_init` draws the backbone's weights anew
        self._record: list | None = None
        self.post_init()

    @classmethod
    def trained_modules(cls, settings: dict) -> list[str]:
        return [] if settings.get("landmark_embedding") == "frozen_mean" else cls.memory_modules

    def _init_weights(self, module):
        pass  # the backbone initialises its own; the landmark is made above

    def _memory_weights(self):
        return [self.landmark_embedding.weight]

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: LandmarkState | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> LongContextOutput:
        """Training reads the whole text at once, and every block through its landmark; inference (no gradients, not in
        training mode) reads it in chunks and beyond the training context only the `top_k` best blocks.

        Args:
            input_ids: `[B, T]`, the user's tokens without landmarks. attention_mask: `[B, T]`; a padded batch equals its rows.
            labels: `[B, T]`, -100 where nothing is scored, unshifted. Logits are then computed for scored positions only.
            state: what was read before; the text goes on from there, without gradients.
            logits_to_keep: 1 gives the last position of each row.

        Returns:
            With labels: `loss` and `logits [N, V]`, row by row. Without: `logits [B, T, V]`, or with `logits_to_keep=1` logits
            `[B, 1, V]` and the `state` that generation goes on from.
        """
        self._check_input(input_ids, attention_mask)
        whole = state is None and (self.training or torch.is_grad_enabled())
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        wanted = mask
        if labels is not None:
            scored = labels != -100
            wanted = _next_is(scored, mask)
        elif logits_to_keep == 1:
            wanted = _last_only(mask)
        if whole:
            hidden = self._read_whole(input_ids, mask)[wanted]
        else:
            hidden, state = self._stream(input_ids, mask, state, wanted, sign=logits_to_keep == 1)
        head = self.get_output_embeddings()
        if labels is not None:
            return self._loss(head, hidden, labels, mask, wanted)
        logits = head(hidden)
        if logits_to_keep == 1:
            return LongContextOutput(logits=logits[:, None], state=state)
        padded = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        padded[wanted] = logits
        return LongContextOutput(logits=padded)

    def _loss(self, head, hidden, labels, mask, wanted) -> LongContextOutput:
        if not len(hidden):  # one call of the head per step, also when nothing is scored
            logits = head(
                self.landmark_embedding(torch.zeros(1, dtype=torch.long, device=labels.device)).to(hidden.dtype)
            )
            return LongContextOutput(loss=logits.sum() * 0.0, logits=logits[:0])
        logits = head(hidden)
        targets = _targets(labels, mask, wanted)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
        return LongContextOutput(loss=loss, logits=logits)

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

    # ------------------------------------------------------------------ reading in chunks

    @torch.no_grad()
    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, state: LandmarkState | None = None
    ) -> LandmarkState:
        """Streams a document into blocks, chunk by chunk.

        Args:
            input_ids: `[B, T]`. attention_mask: `[B, T]`. state: what was read before; it stays usable.
        """
        self._check_input(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._stream(input_ids, mask.bool(), state, None)[1]

    @torch.no_grad()  # blocks outlive the pass, and other texts may share them
    def _stream(
        self, input_ids: Tensor, mask: Tensor, state: LandmarkState | None, wanted: Tensor | None, sign: bool = True
    ) -> tuple[Tensor, LandmarkState]:
        """Hidden states of the tokens `wanted [B, T]`, `[N, d]` row by row, and the state after the text."""
        config, device = self.config, self.device
        if state is None:
            rows = torch.arange(len(input_ids), device=device)
            zero = torch.zeros_like(rows)
            state = LandmarkState("", None, Blocks([], rows), None, zero, zero)  # signed when it leaves the model
        elif state.fingerprint != self.fingerprint():
            raise UsageError(f"the state was made by another model ({state.fingerprint}); read the text again")
        state = state.expand(len(input_ids))
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
            fingerprint=state.fingerprint or (self.fingerprint() if sign else ""),
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

    def _check_input(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.shape[1] == 0 or (attention_mask is not None and not bool(attention_mask.any(1).all())):
            raise ValueError("`input_ids` is empty: nothing to read; give at least one token in each row")
        if int(input_ids.max()) >= self.config.vocab_size or int(input_ids.min()) < 0:
            raise UsageError(
                f"`input_ids` must lie in 0..{self.config.vocab_size - 1}, the backbone's vocabulary; got "
                f"{int(input_ids.min())}..{int(input_ids.max())}. Landmarks are put in by the model and have no id"
            )

    def num_backbone_calls(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels=None) -> int:
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
        steps: list[list[list[Span]]] = []
        with self._recording_blocks() as record:
            try:
                yield steps
            finally:
                steps += [self._spans(step) for step in record]

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


def attend_by_landmarks(
    module, query, key, value, attention_mask, scaling, dropout=0.0, landmark_attend=None, **kwargs
):
    """What decoders call as their attention: `[B, H, T, D]` to `[B, T, H, D]`. Outside the wrapper it is plain attention."""
    if landmark_attend is not None:
        output = landmark_attend(module.layer_idx, query, key, value, scaling)
    else:
        column = torch.arange(key.shape[2], device=query.device)
        row = column[-query.shape[2] :, None]
        visible = column <= row
        if attention_mask is not None:  # padding sees itself, or it would be NaN
            visible = (visible & attention_mask[:, None, None, -len(column) :].bool()) | (column == row)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return output.transpose(1, 2).contiguous(), None


def keep_padding_mask(attention_mask=None, **kwargs):
    """The mask that `attend_by_landmarks` is given: `[B, T]`, as the user gave it."""
    return attention_mask


def _check_backbone(backbone: PreTrainedModel) -> None:
    config, name = backbone.config, type(backbone).__name__
    if config.model_type not in BACKBONES:
        raise UsageError(
            f"`--model_name_or_path`: the attention of {name} cannot be replaced by landmark attention; choose one of "
            f"{', '.join(BACKBONES)}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UsageError(
            f"`--model_name_or_path`: rotary type {rope} has frequencies that depend on length, and a stored block has none; "
            "choose a backbone with default, linear, llama3 or yarn frequencies"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UsageError(
            f"`--model_name_or_path`: {name} has layers of sliding-window attention that cannot be switched off; choose a "
            "backbone of full attention"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UsageError(
            f"`--model_name_or_path`: attention dropout {config.attention_dropout} is not supported; set it to 0 in its config.json"
        )


def _switch_sliding_window_off(backbone: PreTrainedModel) -> None:
    window = getattr(backbone.config, "sliding_window", None)
    if window is not None and backbone.config.model_type == "mistral":
        logger.warning("sliding window of %s tokens switched off: landmarks reach what lies behind it", window)
        backbone.config.sliding_window = None


def _next_is(scored: Tensor, mask: Tensor) -> Tensor:
    """Tokens whose next real token is scored, `[B, T]`."""
    wanted = torch.zeros_like(mask)
    for row in range(len(mask)):
        real = mask[row].nonzero()[:, 0]
        wanted[row, real[:-1]] = scored[row, real[1:]]
    return wanted


def _targets(labels: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """The labels that the tokens `wanted` predict, `[N]`, row by row."""
    targets = []
    for row in range(len(mask)):
        real = mask[row].nonzero()[:, 0]
        targets.append(labels[row, real[1:]][wanted[row, real[:-1]]])
    return torch.cat(targets)


def _last_only(mask: Tensor) -> Tensor:
    """The last real token of each row, `[B, T]`."""
    return mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))


AttentionInterface.register("landmark", attend_by_landmarks)
AttentionMaskInterface.register("landmark", keep_padding_mask)
