"""Weights as PEFT and ZeRO-3 keep them."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
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


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, first to last."""
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
