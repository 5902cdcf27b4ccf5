"""Diagonal batching: what a recurrence in every layer lets run at once does (Sivtsov et al. 2025, arXiv 2506.05229)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lrmt.errors import UsageError


def run_diagonally(
    cells: Sequence[nn.Module], segments: Iterable[Tensor], memory: Sequence[Tensor], **inputs
) -> tuple[Tensor, ...]:
    """Segment s in layer l needs s in layer l - 1 and s - 1 in layer l alone: so all with the same s + l are one batched operation.

    Args:
        cells: of each layer a module `(hidden [B, W, d], *memory, **inputs)` that gives the layer's hidden states and its new memory;
            alike but for their weights, which are copied into one tensor each.
        segments: the embeddings `[B, W, d]` of each. memory: before them, each tensor with the layers first; it stays as it is.

    Returns:
        The memory after them.
    """
    try:
        weights = stack_module_state([*cells])
    except RuntimeError as error:
        raise UsageError(f"`--diagonal_batching` needs layers that are alike, in training or not: {error}") from None
    memory = [tensor.clone() for tensor in memory]

    def run(weights, hidden, *memory):
        return functional_call(cells[0], weights, (hidden, *memory), inputs)

    def step(low: int, high: int, hidden: Tensor) -> Tensor:
        """The layers `low` to `high` (the one after), each on its own segment: what the next ones read."""
        own = tuple({name: weight[low:high] for name, weight in part.items()} for part in weights)
        hidden, *written = vmap(run)(own, hidden, *(tensor[low:high] for tensor in memory))
        for tensor, new in zip(memory, written, strict=True):
            tensor[low:high] = new
        return hidden[: len(cells) - low - 1]  # nothing reads the last layer's

    hidden, high = None, 0
    for embeds in segments:
        high = min(high + 1, len(cells))
        hidden = embeds[None] if hidden is None else torch.cat([embeds[None], hidden])
        hidden = step(0, high, hidden)
    for low in range(1, len(cells)) if hidden is not None else ():
        low, high = low, min(high + 1, len(cells))
        hidden = step(low, high, hidden)
    return tuple(memory)
