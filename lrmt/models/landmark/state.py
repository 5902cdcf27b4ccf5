"""What landmark attention keeps of a text, as a value: saved, loaded, repeated for a batch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrmt.models.landmark.cache import Blocks, Level
from lrmt.models.state import State

if TYPE_CHECKING:
    from lrmt.models.landmark.model import LandmarkForCausalLM


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

    @property
    def device(self) -> torch.device:
        return self.num_tokens.device

    def tensors(self) -> dict[str, Tensor]:
        """`keys`, `values` `[B, layers, H_kv, N, K, D]`, `tail_keys`, `tail_values` `[B, layers, H_kv, P, D]` and counts `[B]`."""
        count = self.blocks.count
        result = {"num_blocks": count, "tail_length": self.tail_length, "num_tokens": self.num_tokens}
        longest = int(count.max()) if len(count) else 0
        if longest:
            layers = self.blocks.written()  # levels that no block has reached yet have no tables
            index = torch.arange(longest, device=count.device).expand(len(count), layers[0].shape[1], -1)
            pairs = [[t.cpu() for t in self.blocks.gather(layer, index)] for layer in range(len(layers))]
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
