"""What a model keeps of a text: a value, and one file."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from lrmt.files import replacing

if TYPE_CHECKING:
    from lrmt.models.base import LongContextModel


@dataclasses.dataclass
class State:
    """What a model keeps of the text it has read: saved to one safetensors file, refused by a model that did not make it.

    A state is a value: whatever goes on from it leaves it as it is. `fingerprint` is that of the model; `cache` speeds up the
    running generation and is never saved. Every other field of a subclass is a tensor whose first dimension is the batch.
    """

    fingerprint: str
    cache: object | None

    def tensors(self) -> dict[str, Tensor]:
        fields = (f.name for f in dataclasses.fields(self) if f.name not in ("fingerprint", "cache"))
        return {name: getattr(self, name) for name in fields}

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.tensors().values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    def unread(self) -> tuple[Tensor, Tensor] | None:
        """Tokens that are read again with what follows: ids `[B, P]`, and which of them are real, `[B, P]` (None: there are none)."""
        return None

    def expand(self, batch_size: int) -> State:
        """Repeats each row so that a document read once answers a batch of questions."""
        times = self._times(batch_size)
        if times == 1:
            return self
        rows = {name: tensor.repeat_interleave(times, dim=0) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **rows, cache=None)

    def _times(self, batch_size: int) -> int:
        if batch_size % self.batch_size:
            raise ValueError(f"a state of {self.batch_size} rows cannot serve a batch of {batch_size}; read that batch")
        return batch_size // self.batch_size

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], fingerprint: str, model: LongContextModel) -> State:
        """The inverse of `tensors`, on the model's device."""
        return cls(fingerprint=fingerprint, cache=None, **{name: t.to(model.device) for name, t in tensors.items()})

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, whole or not at all."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "lrmt-state-1", "fingerprint": self.fingerprint})
