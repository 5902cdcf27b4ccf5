"""Weights as PEFT and ZeRO-3 keep them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer


def in_use(module: nn.Module) -> nn.Module:
    """The module itself or, of PEFT's wrapper of `modules_to_save`, the copy that is active."""
    if not hasattr(module, "modules_to_save"):
        return module
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    return module.modules_to_save[active[0]] if active and not module.disable_adapters else module.original_module


def gathered(*parameters: Tensor, written: bool = False):
    """The full values of parameters that ZeRO-3 may have partitioned, for as long as the context lasts; `written` inside, those of the
    first rank are kept.
    """
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if written else None)
    return nullcontext()


def uncompiled(backbone: nn.Module):
    """A context in which compiled layers run as they are: with a KV cache, which grows, each would be compiled for itself and again."""
    if any(layer._compiled_call_impl for layer in layers_of(backbone)):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


#: of a decoder layer what runs behind its attention, by name
BEHIND_ATTENTION = ("mlp", "self_attn.o_proj", "attn.c_proj")


def behind_attention(layer: nn.Module) -> list[nn.Module]:
    """The parts of a decoder layer that look at each position by itself, behind its attention; none where they are not known."""
    parts = dict(layer.named_modules())
    return [parts[name] for name in BEHIND_ATTENTION if name in parts]


@contextmanager
def narrowed(backbone: nn.Module, positions: int):
    """While it lasts, the hidden states of the last so many positions alone are right: behind the attention of the last layer nothing
    else is computed, with zeros in its place. A compiled layer stays as it is.
    """
    last = layers_of(backbone)[-1:]
    hooks, widths = [], {}

    def narrow(module, args):
        widths[module] = args[0].shape[1]
        return args[0][:, -positions:].contiguous(), *args[1:]

    def widen(module, args, output):
        return F.pad(output, (0, 0, widths[module] - positions, 0))

    for layer in last:
        for module in () if layer._compiled_call_impl else behind_attention(layer):
            hooks += [module.register_forward_pre_hook(narrow), module.register_forward_hook(widen)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, first to last."""
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
