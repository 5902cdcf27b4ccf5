"""Keeps ranks in step: under ZeRO-3 a rank that makes another number of module calls would hang the others."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lrmt.errors import TrainingFault


def gather_numbers(number: float, device: torch.device | str) -> list[float]:
    """One number of every rank, in rank order."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [number]
    mine = torch.tensor(
        [number], dtype=torch.float64 if torch.device(device).type != "mps" else torch.float32, device=device
    )
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [float(t) for t in everyone]


def check_same_segments(num_backbone_calls: int, device: torch.device | str) -> None:
    """Raises `TrainingFault` on every rank, at once, if ranks are about to run different numbers of segments."""
    counts = [int(n) for n in gather_numbers(num_backbone_calls, device)]
    if len(set(counts)) > 1:
        each = ", ".join(f"rank {rank}: {n}" for rank, n in enumerate(counts))
        raise TrainingFault(
            f"ranks are about to run different numbers of segments ({each}), which hangs under ZeRO-3; "
            "give every rank texts of one length per step"
        )
