"""Keeps ranks in step: under ZeRO-3 a rank that makes another number of module calls would hang the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lrmt.errors import TrainingFault


def gather_numbers(numbers: Sequence[float], device: torch.device | str) -> list[list[float]]:
    """The numbers of every rank, in rank order, of which each has as many: one collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [list(numbers)]
    dtype = torch.float64 if torch.device(device).type != "mps" else torch.float32
    mine = torch.tensor(numbers, dtype=dtype, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [row.tolist() for row in everyone]


def check_same_segments(num_backbone_calls: int, device: torch.device | str) -> None:
    """Raises `TrainingFault` on every rank, at once, if ranks are about to run different numbers of segments."""
    check_same_calls(gather_numbers([num_backbone_calls], device))


def check_same_calls(calls: list[list[float]]) -> None:
    """Raises `TrainingFault` if ranks would run one of the batches, in turn, through different numbers of segments.

    Args:
        calls: of each rank, how often it would run the backbone on each batch.
    """
    for counts in zip(*calls, strict=True):
        if len(set(counts)) > 1:
            each = ", ".join(f"rank {rank}: {int(n)}" for rank, n in enumerate(counts))
            raise TrainingFault(
                f"ranks are about to run different numbers of segments ({each}), which hangs under ZeRO-3; "
                "give every rank texts of one length per step"
            )
