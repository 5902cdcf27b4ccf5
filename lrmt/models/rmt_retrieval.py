"""RMT-R: RMT that also reads its own past memory states (Kuratov et al. 2024, arXiv 2402.10790, §4)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lrmt.errors import UsageError
from lrmt.flags import flag
from lrmt.models.config import Activations
from lrmt.models.cost import Shape
from lrmt.models.memory import Memory, RecurrentState
from lrmt.models.outputs import Text
from lrmt.models.recording import Span
from lrmt.models.recurrent import SegmentOutput
from lrmt.models.rmt import RmtConfig, RmtForCausalLM
from lrmt.models.scoring import widened


class RmtRetrievalConfig(RmtConfig):
    """Settings of RMT-R. L + 3m positions must fit into the backbone's window."""

    model_type = "rmt_retrieval"
    memory_copies = 3  # M, R, and M to write
    reading_settings = ("retrieval_top_k", "retrieval_max_segments", "retrieval_on_cpu")
    placement_settings: ClassVar[tuple[str, ...]] = ("retrieval_max_segments", "retrieval_on_cpu")

    retrieval_top_k: int | None = flag(None, "Past segments that a segment reads, the best ones; default: all.")
    retrieval_max_segments: int | None = flag(None, "Refuse to keep more past segments than this; default: no limit.")
    retrieval_on_cpu: bool = flag(False, "Keep past memory states in CPU memory.")
    retrieval_dropout: float = flag(
        0.1, "Dropout behind the attention to past states, and behind the MLP, in training."
    )

    def __post_init__(self, **kwargs):
        if self.num_memory_tokens == 0:
            raise UsageError("`--num_memory_tokens` must be 1 or more: without memory there is no past to read; got 0")
        for name in ("retrieval_top_k", "retrieval_max_segments"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`--{name}` must be 1 or more, or left out; got {value}")
        if not 0 <= self.retrieval_dropout < 1:
            raise UsageError(f"`--retrieval_dropout` must lie in [0, 1); got {self.retrieval_dropout}")
        super().__post_init__(**kwargs)

    def matters_to_training(self) -> dict[str, object]:
        return super().matters_to_training() | {"retrieval_top_k": self.retrieval_top_k}

    def check_training(self, num_segments: int, **run) -> None:
        if self.retrieval_max_segments is not None and self.state_passing:
            raise UsageError(
                f"`--retrieval_max_segments` {self.retrieval_max_segments} with `--state_passing` {self.state_passing:g}: passed memories "
                "bring a past of their own, of any length; leave one of them out"
            )
        if self.retrieval_max_segments is not None and num_segments - 1 > self.retrieval_max_segments:
            raise UsageError(
                f"`--retrieval_max_segments` {self.retrieval_max_segments}: texts of `--curriculum_stages` {num_segments} have "
                f"{num_segments - 1} past segments; raise it, or leave it out"
            )
        super().check_training(num_segments, **run)

    def activations(self, num_segments: int) -> Activations:
        kept = super().activations(num_segments)  # and each segment holds the keys and values of all before it
        return kept._replace(carried=kept.carried + self.num_memory_tokens * num_segments**2)

    #: retrieval stands before the layers, once
    num_reading_layers = 1

    def segments_flops(self, shape: Shape, tokens: int, first: int, last: int) -> float:
        m, d, n = self.num_memory_tokens, shape.width, last - first
        past = n * (first + last - 1) // 2 * m  # vectors, of all of these segments together
        # keys and values; query, output, and an MLP of width 4 d
        maps = 2 * m * d * d * (2 * n + (2 + 8) * (n - (first == 0)))
        return super().segments_flops(shape, tokens, first, last) + maps + 4 * m * d * past

    def state_numbers(self, shape: Shape, tokens: int) -> tuple[int, int]:
        written = max(0, -(-tokens // self.segment_length) - 1)
        return (1 + 2 * written) * self.num_memory_tokens * shape.width, 0


class PastKeys(nn.Module):
    """A written memory `[B, m, d]` as the keys and values by which later segments find it."""

    def __init__(self, width: int, **place):
        super().__init__()
        self.norm = nn.LayerNorm(width, **place)
        self.key, self.value = (nn.Linear(width, width, bias=False, **place) for _ in range(2))

    def forward(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(memory.to(self.key.weight.dtype))
        return self.key(normed).to(memory.dtype), self.value(normed).to(memory.dtype)


class PastReader(nn.Module):
    """One block of single-head cross-attention from the memory to past states, and an MLP; as untrained, the memory itself."""

    def __init__(self, width: int, dropout: float, **place):
        super().__init__()
        self.norm, self.norm_mlp = (nn.LayerNorm(width, **place) for _ in range(2))
        self.query, self.out = (nn.Linear(width, width, bias=False, **place) for _ in range(2))
        self.up, self.down = nn.Linear(width, 4 * width, **place), nn.Linear(4 * width, width, **place)
        self.dropout = nn.Dropout(dropout)
        if self.out.weight.device.type != "meta":
            for layer in (self.out, self.down):
                nn.init.zeros_(layer.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, memory: Tensor, keys: Tensor, values: Tensor, there: Tensor, top_k: int | None):
        """What is read, `[B, m, d]`, and the shares of attention, `[B, m, n, m]`.

        Args:
            memory: `[B, m, d]`. keys, values: `[B, n·m, d]`, n past states. there: `[B, n]` bool, those of the row.
            top_k: of the n those with the largest score, for any of their vectors and any query, are read; None: all.
        """
        dtype, n = self.query.weight.dtype, there.shape[1]
        memory, keys, values = (tensor.to(dtype) for tensor in (memory, keys, values))
        scores = self.query(self.norm(memory)) @ keys.transpose(1, 2) / math.sqrt(memory.shape[-1])
        scores = scores.unflatten(2, (n, -1)).masked_fill(~there[:, None, :, None], torch.finfo(scores.dtype).min)
        if top_k is not None and top_k < n:
            best = scores.amax((1, 3)).topk(top_k, dim=1).indices
            read = torch.zeros_like(there).scatter(1, best, True)
            scores = scores.masked_fill(~read[:, None, :, None], torch.finfo(scores.dtype).min)
        shares = widened(scores.flatten(2)).softmax(-1).to(dtype)
        read = memory + self.dropout(self.out(shares @ values))
        return read + self.dropout(self.down(F.gelu(self.up(self.norm_mlp(read))))), shares.view_as(scores)


class RmtRetrievalForCausalLM(RmtForCausalLM):
    """Before each segment the memory attends to all memories written before; the segment is `[M ; R ; tokens ; M]`, R what was read.

    The memory is `memory [B, m, d]`, M; `keys` and `values [B, n·m, d]` of the n states so far; and which of them are the row's, `there [B,
    n]`. Before anything was written R is `retrieved_embedding [m, d]`.
    """

    config_class = RmtRetrievalConfig
    later_state_settings = (*RmtForCausalLM.later_state_settings, "retrieval_top_k")
    memory_modules = ["memory_embedding", "retrieved_embedding", "past_keys", "past_reader"]

    def __init__(self, config: RmtRetrievalConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.retrieved_embedding = self.make_embedding(
            config.num_memory_tokens, lambda weight, embeddings: nn.init.normal_(weight, std=float(embeddings.std()))
        )
        embeddings = self.retrieved_embedding.weight
        place = {"device": embeddings.device, "dtype": embeddings.dtype}
        self.past_keys = PastKeys(embeddings.shape[-1], **place)
        self.past_reader = PastReader(embeddings.shape[-1], config.retrieval_dropout, **place)
        self.finish()

    def start(self, batch_size: int) -> Memory:
        memory = super().start(batch_size)
        device = torch.device("cpu") if self.config.retrieval_on_cpu else memory.device
        nothing = memory.new_zeros(batch_size, 0, memory.shape[-1], device=device)
        there = torch.zeros(batch_size, 0, dtype=torch.bool, device=memory.device)
        return {"memory": memory, "keys": nothing, "values": nothing, "there": there}

    def prefix(self, memory: Memory) -> Tensor:
        now = memory["memory"]
        first = self._rows(self.retrieved_embedding, now.dtype).expand_as(now)
        there = memory["there"]
        if there.shape[1] == 0:
            return torch.cat([now, first], dim=1)
        limit = self.config.retrieval_max_segments
        if limit is not None and int(there.sum(1).max()) > limit:
            raise UsageError(
                f"`--retrieval_max_segments` {limit}: the text has more past segments of {self.config.segment_length} tokens; raise it, or "
                "read less"
            )
        read = self._retrieve(memory)[0].to(now.dtype)
        return torch.cat([now, torch.where(there.any(1)[:, None, None], read, first)], dim=1)

    def suffix(self, memory: Memory) -> Tensor:
        return memory["memory"]

    def write(self, memory: Memory, output: SegmentOutput) -> Memory:
        written = super().write(memory["memory"], output)
        keys, values = self.past_keys(written)
        new = {"keys": keys, "values": values, "there": memory["there"].new_ones(len(written), 1)}
        return {"memory": written} | {
            name: append(memory[name], part.to(memory[name].device)) for name, part in new.items()
        }

    def to_pass_on(self, memory: Memory) -> Memory:
        """Without the states that no row has: of texts that a batch went on from before. One stays in any case: with none the next
        batch would not look back, and another rank's would.
        """
        there = memory["there"]
        kept = there.any(0)
        kept[:1] |= ~kept.any()
        if bool(kept.all()):
            return memory
        past = {name: memory[name].unflatten(1, (len(kept), -1))[:, kept].flatten(1, 2) for name in ("keys", "values")}
        return memory | past | {"there": there[:, kept]}

    def _retrieve(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """R `[B, m, d]`, and the shares of attention `[B, m, n, m]`."""
        now = memory["memory"]
        past = [memory[name].to(now.device) for name in ("keys", "values")]
        if torch.is_grad_enabled():  # a graph would keep what a later text may be written behind, in the same storage
            past = [part if part.requires_grad else part.clone() for part in past]
        return self.past_reader(now, *past, memory["there"], self.config.retrieval_top_k)

    def shake(self, memory: Memory, noise: float) -> Memory:
        m = memory["memory"].shape[1]
        last = super().shake({name: memory[name][:, -m:] for name in ("memory", "keys", "values")}, noise)
        past = {name: torch.cat([memory[name][:, :-m], last[name]], dim=1) for name in ("keys", "values")}
        return memory | past | {"memory": last["memory"]}

    def go_on(self, text: Text) -> tuple[Tensor, RecurrentState]:
        hidden, state = super().go_on(text)
        if self._record is not None:
            self._record.read.append(self._spans(state))
        return hidden, state

    def _spans(self, state: RecurrentState) -> list[list[Span]]:
        """Of each row, what the running segment has read of the past: every segment, with its share of the attention."""
        there, size = state.memory["there"], self.config.segment_length
        if there.shape[1] == 0:
            return [[] for _ in there]
        shares = self._retrieve(state.memory)[1].float().sum(3).mean(1)
        first = (state.num_tokens - state.pending_length - size * there.sum(1)).tolist()
        rows = []
        for row, seen, begin in zip(shares, there, first, strict=True):
            ends = [begin + size * (n + 1) for n in range(int(seen.sum()))]  # only the first can be shorter
            weights = row[seen].tolist()
            rows.append([
                Span(0, n, max(0, end - size), end, weight)
                for n, (end, weight) in enumerate(zip(ends, weights, strict=True))
            ])  # fmt: skip
        return rows


def append(past: Tensor, new: Tensor) -> Tensor:
    """`[past ; new]` along the second dimension. Without gradients the result has room behind it, into which the next one is written: a
    text of any length is copied a few times in all. What `past` holds is never changed: where another has gone on from it, it is copied.
    """
    n, k = past.shape[1], new.shape[1]
    if torch.is_grad_enabled() or new.requires_grad:
        return torch.cat([past, new], dim=1)
    room = getattr(past, "room", None)  # the buffer of which it is the filled part
    ours = room is not None and room.filled == n and room.shape[1] >= n + k
    if not ours or room.is_inference() != torch.is_inference_mode_enabled():
        room = past.new_empty(len(past), 2 * (n + k), *past.shape[2:], device=new.device)
        room[:, :n] = past
    room[:, n : n + k] = new
    room.filled = n + k
    grown = room[:, : n + k]
    grown.room = room
    return grown
