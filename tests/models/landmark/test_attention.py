"""Every implementation of landmark attention is the literal definition, outputs and gradients."""

import functools

import pytest
import torch

from lrmt.models.landmark import attention as module
from lrmt.models.landmark.attention import landmark_attention

SHAPES = {  # B, H, H_kv, T, D, K, rows of padding
    "one block": (2, 2, 2, 4, 8, 4, None),
    "less than one block": (1, 2, 1, 3, 4, 5, None),
    "several": (2, 4, 4, 24, 8, 4, None),
    "grouped heads": (1, 6, 2, 20, 4, 5, None),
    "incomplete last block": (2, 2, 1, 23, 4, 6, None),
    "shortest blocks": (1, 2, 2, 9, 4, 2, None),
    "200 blocks": (1, 1, 1, 400, 2, 2, None),
    "padding on the right": (3, 2, 1, 17, 4, 4, [0, 5, 13]),
    "holes, blocks without tokens or landmark": (2, 2, 2, 19, 4, 4, "holes"),
}


def draw(shape, dtype=torch.float64, device="cpu"):
    batch, heads, kv_heads, length, width, block, padding = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, n, length, width, generator=generator, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads)
    ]
    mask = None
    if padding == "holes":
        mask = torch.ones(batch, length, dtype=torch.bool)
        mask[0, 4:7] = False  # a block of which the landmark alone is left
        mask[1, 11] = False  # a landmark
        mask[1, 1] = mask[1, 14] = False
    elif padding is not None:
        mask = torch.arange(length) < length - torch.tensor(padding)[:, None]
    query, key, value = (t.to(device, dtype).requires_grad_() for t in tensors)
    return (query, key, value), {"block_length": block, "key_mask": None if mask is None else mask.to(device)}


def outputs_and_gradients(inputs, implementation, key_mask=None, **options):
    out = landmark_attention(*inputs, implementation=implementation, key_mask=key_mask, **options)
    if key_mask is not None:
        out = out * key_mask[:, None, :, None]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad((out * direction).sum(), inputs)]


@functools.cache
def definition(shape, top_k):
    """Outputs and gradients of the naive implementation in fp64, which takes seconds."""
    inputs, options = draw(shape)
    return [tensor.detach() for tensor in outputs_and_gradients(inputs, "naive", **options, top_k=top_k)]


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("chunk", [5, 512], ids=["chunks", "whole"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa_is_the_definition(shape, chunk, top_k, monkeypatch):
    monkeypatch.setattr(module, "QUERY_CHUNK", 64 if shape == "200 blocks" and chunk == 5 else chunk)
    inputs, options = draw(shape)
    got = outputs_and_gradients(inputs, "sdpa", **options, top_k=top_k)
    for one, other in zip(got, definition(shape, top_k), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_it_is_not_full_attention():
    """Nor does a changed landmark value matter, while a changed landmark key does."""
    (query, key, value), options = draw("several")
    out = landmark_attention(query, key, value, **options)
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert relative(out, full) > 0.1
    other = value.detach().clone()
    other[:, :, 3::4] += 1
    assert torch.equal(landmark_attention(query, key, other, **options), out)
    other = key.detach().clone()
    other[:, :, 3::4] += 1
    assert relative(landmark_attention(query, other, value, **options), out) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype):
    inputs, options = draw("grouped heads")
    want = outputs_and_gradients(inputs, "naive", **options)
    low = [t.detach().to(dtype).requires_grad_() for t in inputs]
    for got, expected in zip(outputs_and_gradients(low, "sdpa", **options), want, strict=True):
        assert got.dtype == dtype
        assert relative(got, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_forward_is_the_definition(shape, top_k):
    """On a CPU it has no backward pass."""
    inputs, options = draw(shape, torch.float32)
    options["top_k"] = top_k
    inputs = [t.detach() for t in inputs]
    with torch.no_grad():
        want = landmark_attention(*(t.double() for t in inputs), implementation="naive", **options)
        got = landmark_attention(*inputs, implementation="flex", **options)
    if options["key_mask"] is not None:
        want, got = (t * options["key_mask"][:, None, :, None] for t in (want, got))
    assert relative(got, want) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padding", [None, [0, 61]])
def test_flex_with_gradients_on_a_gpu(padding, monkeypatch):
    monkeypatch.setitem(SHAPES, "kernel", (2, 4, 2, 200, 64, 16, padding))
    inputs, options = draw("kernel")
    want = outputs_and_gradients(inputs, "naive", **options)
    low = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in inputs]
    mask = options.pop("key_mask")
    got = outputs_and_gradients(low, "flex", key_mask=None if mask is None else mask.cuda(), **options)
    for one, other in zip(got, want, strict=True):
        assert relative(one.cpu(), other) < 1e-2


def test_unknown_implementation():
    inputs, options = draw("one block")
    with pytest.raises(ValueError, match="naive, sdpa, flex; got 'fast'"):
        landmark_attention(*inputs, implementation="fast", **options)
