"""The literal definition of landmark attention (Mohtashami & Jaggi 2023, arXiv 2305.16300, §3.1): slow, and the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_length: int,
    scaling: float,
    key_mask: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """One query at a time, one block at a time, as the formula reads.

    Args:
        query: `[B, H, T, D]`. key, value: `[B, H_kv, T, D]`; every `block_length`-th position is a landmark.
        key_mask: `[B, T]`, False for padding: such a token is in no block, and a block without its landmark is not seen.
        top_k: how many past blocks a query sees, those of its highest landmark scores (None: all).

    Returns:
        `[B, H, T, D]`; rows of padding queries are 0.
    """
    batch, heads, length, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros_like(query)
    for b in range(batch):
        real = [True] * length if key_mask is None else key_mask[b].tolist()
        for h in range(heads):
            keys, values = key[b, h // group], value[b, h // group]
            for i in range(length):
                if real[i]:
                    output[b, h, i] = _attend(query[b, h, i], keys, values, i, real, block_length, scaling, top_k)
    return output


def _attend(query, keys, values, i: int, real: list[bool], block_length: int, scaling: float, top_k: int | None):
    """o_i = Σ_own p_ij v_j + Σ_past blocks g_ic Σ_{j in c} r_ij v_j."""
    weight = torch.exp(scaling * keys[: i + 1] @ query)  # e^{s_ij}
    block = i // block_length
    landmark = {c: (c + 1) * block_length - 1 for c in range(block + 1)}
    regular = {c: [j for j in range(c * block_length, landmark[c]) if j <= i and real[j]] for c in range(block + 1)}
    past = [c for c in range(block) if real[landmark[c]] and regular[c]]
    past = sorted(past, key=lambda c: float(weight[landmark[c]]))[-top_k:] if top_k else past
    total = weight[regular[block]].sum() + weight[[landmark[c] for c in past]].sum()
    if not regular[block] and not past:
        return torch.zeros_like(values[0])
    output = weight[regular[block]] / total @ values[regular[block]]
    for c in past:
        gate = weight[landmark[c]] / total
        within = weight[regular[c]] / weight[regular[c]].sum()
        output = output + gate * (within @ values[regular[c]])
    return output
