"""What a recurrent model carries from segment to segment, a tree of tensors, and the state that holds it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map, tree_map_with_path

from lrmt.models.state import State

if TYPE_CHECKING:
    from lrmt.models.recurrent import RecurrentModel

#: a tree of tensors, each with the batch first
Memory = Any


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
        names = ("pending_ids", "pending_length", "num_tokens")
        return named_tensors(self.memory) | {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], fingerprint: str, model: RecurrentModel) -> RecurrentState:
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        memory = take_named(tensors, model)
        return cls(fingerprint=fingerprint, cache=None, memory=memory, **tensors)


def named_tensors(memory: Memory) -> dict[str, Tensor]:
    """The leaves of a memory, each by its path."""
    return {_name(path): leaf for path, leaf in tree_flatten_with_path(memory)[0]}


@torch.no_grad()
def take_named(tensors: dict[str, Tensor], model: RecurrentModel) -> Memory:
    """The inverse, of the structure of any memory of the model; takes its leaves out of `tensors`."""
    return tree_map_with_path(lambda path, leaf: tensors.pop(_name(path)).to(leaf.device), model.start(1))


def _name(path: tuple) -> str:
    """Of a leaf of the memory: "memory", or "memory.3.key"."""
    return ".".join(
        ["memory", *(str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step)))) for step in path)]
    )


def root_mean_square(memory: Memory) -> Tensor:
    leaves = [leaf.detach().float().flatten() for leaf in tree_leaves(memory) if leaf.is_floating_point()]
    return (leaves[0] if len(leaves) == 1 else torch.cat(leaves)).pow(2).mean().sqrt()


def put(rows: Tensor, new: Memory, old: Memory) -> Memory:
    """`old` with `new`, of the rows `[N]`, in their place, and zeros where the new memory has grown."""

    def place(a: Tensor, b: Tensor) -> Tensor:
        b = _grown(b, a).to(torch.promote_types(a.dtype, b.dtype), copy=True)
        b[rows.to(b.device)] = a.to(b.dtype)
        return b

    return tree_map(place, new, old)


def _grown(old: Tensor, new: Tensor) -> Tensor:
    """With zeros where `new` is larger than `old`, but for the batch."""
    sides = [side for i in reversed(range(1, new.dim())) for side in (0, new.shape[i] - old.shape[i])]
    return F.pad(old, sides) if any(sides) else old


def choose(rows: list[bool], new: Memory, old: Memory, whole: bool = True) -> Memory:
    """`new` for the rows marked, `old` for the others, with zeros where the new memory has grown. Where all rows agree, that memory
    itself; without `whole` both stay in the graph all the same.
    """
    if whole and all(rows):
        return new
    if whole and not any(rows):
        return old

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(torch.tensor(rows, device=a.device).view(-1, *[1] * (a.dim() - 1)), a, _grown(b, a))

    return tree_map(pick, new, old)
