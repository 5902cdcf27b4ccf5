"""Which positions are scored, against what, and what it costs: the same for every method."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def next_tokens(labels: Tensor, mask: Tensor | None) -> Tensor:
    """What the token at each position should be followed by, `[B, T]`: the label of the row's next real token, or -100.

    Args:
        labels: `[B, T]`, -100 where nothing is scored, unshifted. mask: `[B, T]`, True where a token is real (None: everywhere).
    """
    if mask is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    order = (~mask).long().argsort(dim=1, stable=True)  # real tokens first, as they come
    packed = labels.masked_fill(~mask, IGNORED).gather(1, order)
    return torch.empty_like(labels).scatter(1, order, F.pad(packed[:, 1:], (0, 1), value=IGNORED))


def last_tokens(input_ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The last `count` real tokens of each row (0: all of them), `[B, T]` bool."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    if count == 0:
        return real
    left = real.flip(1).long().cumsum(1).flip(1)  # real tokens from here to the end of the row
    return real & (left <= count)


def cross_entropy(head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss, scalar, and the logits `[N, V]` of the hidden states `[N, d]` of scored positions; `targets [N]`.

    The head is called once per step, also when nothing is scored: ranks must make the same module calls. The loss is then 0,
    and so is every gradient.
    """
    if not len(targets):
        logits = head(hidden.new_zeros(1, hidden.shape[-1]))
        return logits.sum() * 0.0 + hidden.sum(), logits[:0]
    logits = head(hidden)
    return F.cross_entropy(widened(logits), targets), logits


def widened(tensor: Tensor) -> Tensor:
    """In fp32, or as it is if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def lay_out(logits: Tensor, wanted: Tensor, count: int) -> Tensor:
    """Logits `[N, V]` of the `wanted [B, T]` positions, row by row, as `[B, T, V]`; as `[B, count, V]` of the last `count` of each row.

    What no token stands for is 0: padding and, before a row of fewer tokens, what is missing.
    """
    rows, length = wanted.shape
    if bool(wanted.all()):
        return logits.view(rows, length, -1)
    if not count:
        padded = logits.new_zeros(rows, length, logits.shape[-1])
        padded[wanted] = logits
        return padded
    padded = logits.new_zeros(rows, count, logits.shape[-1])
    padded[torch.arange(count, device=wanted.device) >= count - wanted.sum(1, keepdim=True)] = logits
    return padded
