"""Weights as PEFT and ZeRO-3 keep them."""

from __future__ import annotations

import inspect
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
    """The parts of a decoder layer that look at each position by itself, behind its attention, and at nothing else; none where they are
    not known.
    """
    parts = []
    for name in BEHIND_ATTENTION:
        part = layer
        for step in name.split("."):
            part = getattr(part, step, None)
        if part is not None:
            taken = inspect.signature(part.forward).parameters.values()
            needed = [one for one in taken if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
            parts += [part] * (len(needed) == 1)
    return parts


@contextmanager
def narrowed(layers: list[nn.Module], positions: int):
    """While it lasts, of what decoder layers give the last so many positions alone are right: behind their attention nothing else is
    computed. A layer that is compiled, or is run again on the way back, when this is over, stays as it is.
    """
    hooks, widths = [], {}

    def narrow(module, args):
        widths[module] = args[0].shape[1]
        return args[0][:, -positions:].contiguous(), *args[1:]

    def widen(module, args, output):
        first, *others = output if isinstance(output, tuple) else (output,)
        first = F.pad(first, (0, 0, widths[module] - positions, 0))
        return (first, *others) if isinstance(output, tuple) else first

    for layer in layers:
        whole = layer._compiled_call_impl or (layer.gradient_checkpointing and layer.training)
        for module in () if whole else behind_attention(layer):
            hooks += [module.register_forward_pre_hook(narrow), module.register_forward_hook(widen)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, first to last."""
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
