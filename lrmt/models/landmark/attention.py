"""Landmark attention as ordinary softmax attention with one bias per query and block.

Of a past block c, the landmark's share of a query's attention, e^{s_iℓ}/Z, is spread over the block's tokens by their own
softmax. Both exponentials merge: the token's score becomes s_ij + β_ic with β_ic = s_iℓ − logsumexp_{j in c} s_ij. The query's
own block has no bias, landmarks themselves are never read. Gradients flow through β.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lrmt.models.landmark.naive import naive_landmark_attention

IMPLEMENTATIONS = ("auto", "naive", "sdpa", "flex")
#: query rows handled at once by `sdpa`: bounds its scores to `[B, H, 512, T]`
QUERY_CHUNK = 512


def landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_length: int,
    scaling: float | None = None,
    implementation: str = "auto",
    key_mask: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Causal landmark attention (2305.16300 §3.1) over a whole text.

    Args:
        query: `[B, H, T, D]`. key, value: `[B, H_kv, T, D]`, H a multiple of H_kv. Position i is a landmark if i + 1 is a
            multiple of `block_length`; the last block may be incomplete.
        scaling: of the scores (default 1/√D). key_mask: `[B, T]`, False for padding.
        implementation: "naive" (the definition), "sdpa" (any device, query chunks), "flex" (FlexAttention, for GPUs: it has no
            backward pass on CPUs), "auto" (flex on a GPU, else sdpa).
        top_k: each query sees only its past blocks of the `top_k` best landmarks, as at inference (None: all of them).

    Returns:
        `[B, H, T, D]` in the dtype of `value`; undefined for padding queries.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if implementation == "auto":
        # FlexAttention's kernel takes no fp64 and no heads narrower than 16
        fits = query.is_cuda and query.dtype != torch.float64 and query.shape[-1] >= 16
        implementation = "flex" if fits else "sdpa"
    if implementation == "naive":
        return naive_landmark_attention(
            query, key, value, block_length=block_length, scaling=scaling, key_mask=key_mask, top_k=top_k
        )
    attend = _flex if implementation == "flex" else _sdpa
    return attend(query, key, value, block_length, scaling, key_mask, top_k)


def biased_scores(
    query: Tensor,
    key: Tensor,
    position: Tensor,
    block_length: int,
    scaling: float,
    key_mask: Tensor | None = None,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """s_ij + β_i,b(j), and which of them count, both `[B, H, Tq, Tk]`; scores are at least fp32.

    Args:
        query: `[B, H, Tq, D]`. key: `[B, H_kv, Tk, D]`, beginning with a block. position: `[B or 1, Tq]`, the column of `key` at
            which each query stands. key_mask: `[B, Tk]`. top_k: blocks that a query sees.
    """
    scores = _products(query, key, scaling)
    bias, seen = _block_bias(scores, position, block_length, key_mask, top_k)
    column = torch.arange(key.shape[2], device=key.device)
    position = position[:, None, :, None]  # [B, 1, Tq, 1]
    own = column // block_length == position // block_length
    width = key.shape[2] // block_length * block_length
    spread = F.pad(bias.repeat_interleave(block_length, dim=-1), (0, key.shape[2] - width))
    scores = scores + spread.masked_fill(own, 0.0)
    past = F.pad(seen.repeat_interleave(block_length, dim=-1), (0, key.shape[2] - width))
    visible = (column <= position) & (column % block_length != block_length - 1) & (own | past)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    return scores, visible


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last dimension of what is visible; a row that sees nothing is 0."""
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~visible, 0.0)


def _products(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scaled q·k `[B, H, Tq, Tk]`, each key head serving its group of query heads."""
    batch, heads, rows, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)  # rounded products would not fit their logsumexp
    grouped = query.reshape(batch, key.shape[1], -1, width).to(wide)
    return (grouped @ key.transpose(-1, -2).to(wide)).view(batch, heads, rows, key.shape[2]) * scaling


def _block_bias(
    scores: Tensor, position: Tensor, block_length: int, key_mask: Tensor | None, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """β `[B, H, Tq, C]` for the C complete blocks, and which of them each query sees if they are past, broadcastable to it."""
    count = scores.shape[-1] // block_length
    blocks = scores[..., : count * block_length].unflatten(-1, (count, block_length))
    regular, landmark = blocks[..., :-1], blocks[..., -1]
    seen = torch.ones(1, 1, 1, count, dtype=torch.bool, device=scores.device)
    if key_mask is not None:
        real = key_mask[:, None, None, : count * block_length].unflatten(-1, (count, block_length))
        seen = real[..., -1] & real[..., :-1].any(-1)
        regular = regular.masked_fill(~real[..., :-1], -1e30)  # finite: an empty block has no NaN gradient
    bias = (landmark - regular.logsumexp(-1)).masked_fill(~seen, 0.0)
    if top_k is not None and top_k < count:
        past = seen & (torch.arange(count, device=scores.device) < (position // block_length)[:, None, :, None])
        best = landmark.detach().masked_fill(~past, float("-inf")).topk(top_k, dim=-1).indices
        seen = seen & torch.zeros_like(landmark, dtype=torch.bool).scatter(-1, best, True)
    return bias, seen


def _sdpa(query, key, value, block_length: int, scaling: float, key_mask: Tensor | None, top_k: int | None) -> Tensor:
    """The bias form. Chunks of queries are recomputed in the backward pass, so that no `[T, T]` matrix is kept."""
    outputs = []
    for begin in range(0, query.shape[2], QUERY_CHUNK):
        end = min(begin + QUERY_CHUNK, query.shape[2])
        mask = None if key_mask is None else key_mask[:, :end]
        inputs = (query[:, :, begin:end], key[:, :, :end], value[:, :, :end], begin, block_length, scaling, mask, top_k)
        if torch.is_grad_enabled() and query.shape[2] > QUERY_CHUNK:
            outputs.append(checkpoint(_attend_chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend_chunk(*inputs))
    return torch.cat(outputs, dim=2)


def _attend_chunk(query, key, value, begin: int, block_length: int, scaling: float, key_mask, top_k) -> Tensor:
    position = torch.arange(begin, begin + query.shape[2], device=query.device)[None]
    scores, visible = biased_scores(query, key, position, block_length, scaling, key_mask, top_k)
    return weighted_values(masked_softmax(scores, visible), value)


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """`weights [B, H, Tq, Tk]` @ `value [B, H_kv, Tk, D]`, each value head serving its group of query heads."""
    batch, heads, rows, columns = weights.shape
    grouped = weights.to(value.dtype).view(batch, value.shape[1], -1, columns)
    return (grouped @ value).view(batch, heads, rows, value.shape[-1])


# ---------------------------------------------------------------------- FlexAttention


def _flex(query, key, value, block_length: int, scaling: float, key_mask: Tensor | None, top_k: int | None) -> Tensor:
    """β in query chunks without keeping any score, then one FlexAttention that adds it; landmarks and the future are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, heads, length, _ = query.shape
    bias = _all_biases(query, key, block_length, scaling, key_mask, top_k)
    if bias.shape[-1] == 0:  # less than one block: nothing is past, but a buffer must exist
        bias = bias.new_zeros(batch, heads, length, 1)
    last = bias.shape[-1] - 1
    real = torch.ones(batch, length, dtype=torch.bool, device=query.device) if key_mask is None else key_mask

    def score_mod(score, b, h, i, j):
        block = j // block_length
        past = block < i // block_length
        return score + torch.where(past, bias[b, h, i, torch.clamp(block, max=last)].to(score.dtype), 0.0)

    def mask_mod(b, h, i, j):
        return (j <= i) & (j % block_length != block_length - 1) & real[b, j]

    rows = batch if key_mask is not None else None
    block_mask = create_block_mask(mask_mod, rows, None, length, length, device=query.device)
    attend = _compiled_flex() if query.is_cuda else flex_attention
    return attend(
        query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scaling, enable_gqa=heads != key.shape[1]
    )


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _all_biases(query, key, block_length: int, scaling: float, key_mask: Tensor | None, top_k: int | None) -> Tensor:
    """β `[B, H, T, C]` of every query and complete block, −∞ if it is not seen; scores are recomputed in the backward pass."""

    def biases(rows, begin, key, key_mask):
        position = torch.arange(begin, begin + rows.shape[2], device=rows.device)[None]
        bias, seen = _block_bias(_products(rows, key, scaling), position, block_length, key_mask, top_k)
        return bias.masked_fill(~seen, float("-inf"))

    chunks = []
    for begin in range(0, query.shape[2], QUERY_CHUNK):
        end = min(begin + QUERY_CHUNK, query.shape[2])
        inputs = (query[:, :, begin:end], begin, key[:, :, :end], None if key_mask is None else key_mask[:, :end])
        if torch.is_grad_enabled():
            chunks.append(checkpoint(biases, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(biases(*inputs))
    count = query.shape[2] // block_length
    return torch.cat([F.pad(chunk, (0, count - chunk.shape[-1])) for chunk in chunks], dim=2)
