"""This process among those of the run."""

from __future__ import annotations

import torch
from accelerate import PartialState


def this_rank() -> PartialState:
    """Which of the run's processes this is: also on CPUs alone, where accelerate, unless told, takes each for the only one."""
    return PartialState(cpu=not torch.accelerator.is_available())
