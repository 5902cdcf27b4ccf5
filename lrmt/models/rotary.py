"""Rotary positions: keys and queries turned to where they are read."""

import torch
from torch import Tensor


def rotate(x: Tensor, distance: Tensor, inv_freq: Tensor) -> Tensor:
    """Turns rotary vectors `x [B, H, T, D]` by `distance [B or 1, T]` positions, in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = distance.to(wide)[:, None, :, None] * inv_freq.to(wide)
    cos, sin = angle.cos().repeat(1, 1, 1, 2), angle.sin().repeat(1, 1, 1, 2)
    first, second = x.to(wide).chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
