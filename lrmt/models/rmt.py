"""RMT: recurrent memory tokens on a decoder-only backbone (Bulatov et al. 2022, arXiv 2207.06881; 2023, arXiv 2304.11062)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lrmt.errors import UsageError
from lrmt.flags import flag
from lrmt.models.config import Activations, RecurrentConfig
from lrmt.models.cost import Shape
from lrmt.models.recurrent import RecurrentModel, SegmentOutput
from lrmt.models.scoring import IGNORED
from lrmt.models.weights import gathered


class RmtConfig(RecurrentConfig):
    """Settings of RMT. L + 2m positions must fit into the backbone's window; m = 0 gives the plain backbone, segment by segment."""

    model_type = "rmt"
    memory_copies: ClassVar[int] = (
        2  #: how often m positions stand beside a segment's tokens: M to read, and M to write
    )

    num_memory_tokens: int = flag(16, "Memory tokens m that carry the past.")
    memory_positions: bool = flag(
        False,
        "Add trained vectors to the memory, M_0 and what is handed over alike, one for each place: each vector knows which it is, "
        "whatever it says.",
    )

    def __post_init__(self, **kwargs):
        m, length = self.num_memory_tokens, self.segment_length
        if m < 0:
            raise UsageError(f"`--num_memory_tokens` must be 0 or more; got {m}. 16 is the published value")
        if length < 1 or length <= 2 * m:
            raise UsageError(
                f"`--segment_length` must exceed 2 × `--num_memory_tokens`; got {length} and {m}. "
                f"Raise it to {2 * m + 1} or more"
            )
        if self.memory_shift and m == 1:
            raise UsageError(
                "`--memory_shift` leaves nothing of one memory token; got `--num_memory_tokens` 1. 16 is usual"
            )
        super().__post_init__(**kwargs)

    @property
    def note_length(self) -> int:
        return max(0, self.num_memory_tokens - self.memory_shift)

    @property
    def written_positions(self) -> int | None:
        return self.num_memory_tokens or None

    @property
    def positions(self) -> int:
        return self.segment_length + self.memory_copies * self.num_memory_tokens

    def refuse_window(self, window: int) -> None:
        length, m, copies = self.segment_length, self.num_memory_tokens, self.memory_copies
        raise UsageError(
            f"`--segment_length` + {copies} × `--num_memory_tokens` must fit into the backbone's window of {window}; "
            f"got {length} and {m}. Lower `--segment_length` to {window - copies * m} or less"
        )

    def activations(self, num_segments: int) -> Activations:
        return super().activations(num_segments)._replace(carried=self.num_memory_tokens * num_segments)

    def state_numbers(self, shape: Shape, tokens: int) -> tuple[int, int]:
        return self.num_memory_tokens * shape.width, 0

    def check_training(self, num_segments: int, **run) -> None:
        if self.num_memory_tokens == 0:
            raise UsageError(
                "`--num_memory_tokens` must be 1 or more to train a memory; got 0. 16 is the published value"
            )
        super().check_training(num_segments, **run)


class RmtForCausalLM(RecurrentModel):
    """Reads a text segment by segment as `[M ; tokens ; M]`; the last m hidden states are the next segment's `M` (2207.06881 §3).

    The first copy is read by every token, the second sees the whole segment. `M` is `[B, m, d]`, and trains from `M_0 [m, d]`.
    """

    config_class = RmtConfig
    state_settings = ("num_memory_tokens", "segment_length", "segment_alignment")
    later_state_settings = (*RecurrentModel.later_state_settings, "memory_positions")
    memory_modules = ["memory_embedding"]

    def __init__(self, config: RmtConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.memory_embedding = self.make_embedding(
            config.num_memory_tokens, lambda weight, embeddings: nn.init.normal_(weight, std=float(embeddings.std()))
        )
        if config.memory_positions:
            self.memory_positions = self.make_embedding(
                config.num_memory_tokens,
                lambda weight, embeddings: nn.init.normal_(weight, std=0.3 * float(embeddings.std())),
            )
            self.memory_modules = [*self.memory_modules, "memory_positions"]
        self.finish()

    @classmethod
    def trained_modules(cls, settings: dict) -> list[str]:
        return [*super().trained_modules(settings), *["memory_positions"] * bool(settings.get("memory_positions"))]

    def start(self, batch_size: int) -> Tensor:
        dtype = self.get_input_embeddings().weight.dtype
        memory = self._rows(self.memory_embedding, dtype)
        if self.config.memory_positions:
            memory = memory + self._rows(self.memory_positions, dtype)
        return memory.expand(batch_size, -1, -1)

    @torch.no_grad()
    def begin_with(self, said: Tensor) -> None:
        """`M_0` starts from the embeddings of what it should say (prompt tuning's initialisation by text, Lester et al. 2021)."""
        embed = self.get_input_embeddings()
        tables = [part for part in self.memory_embedding.modules() if isinstance(part, nn.Embedding)]  # PEFT keeps two
        with gathered(embed.weight, *(table.weight for table in tables), written=True):
            told = embed(said[said != IGNORED].to(embed.weight.device))
            for table in tables:
                table.weight[self.config.memory_shift :][: len(told)] = told.to(table.weight.dtype)

    def prefix(self, memory: Tensor) -> Tensor:
        return memory

    def suffix(self, memory: Tensor) -> Tensor:
        return memory

    def write(self, memory: Tensor, output: SegmentOutput) -> Tensor:
        if not self.config.memory_positions:
            return output.after.clone()  # a view would keep the hidden states of the whole segment alive
        added = self._rows(self.memory_positions, output.after.dtype)
        if self.config.memory_shift:  # the first vector is M_0's, to which its place is added already
            added = F.pad(added[1:], (0, 0, 1, 0))
        return output.after + added

    def _rows(self, table: nn.Embedding, dtype: torch.dtype) -> Tensor:
        """All of a table `[m, d]`, by a module call, so that ZeRO-3 gathers the weight."""
        index = torch.arange(self.config.num_memory_tokens, device=self.get_input_embeddings().weight.device)
        return table(index).to(dtype)
