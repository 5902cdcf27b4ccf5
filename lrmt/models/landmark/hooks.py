"""How a stock decoder comes to attend by landmarks: looked up by name, no modelling code is copied."""

from __future__ import annotations

import logging

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lrmt.errors import UsageError

logger = logging.getLogger(__name__)

#: decoders whose attention is looked up by name, and whose rotary embedding turns the two halves of a head
BACKBONES = ("llama", "mistral", "qwen2", "qwen3")


def attend_by_landmarks(
    module, query, key, value, attention_mask, scaling, dropout=0.0, landmark_attend=None, **kwargs
):
    """What decoders call as their attention: `[B, H, T, D]` to `[B, T, H, D]`. Outside the wrapper it is plain attention."""
    if landmark_attend is not None:
        output = landmark_attend(module.layer_idx, query, key, value, scaling)
    else:
        column = torch.arange(key.shape[2], device=query.device)
        row = column[-query.shape[2] :, None]
        visible = column <= row
        if attention_mask is not None:  # padding sees itself, or it would be NaN
            visible = (visible & attention_mask[:, None, None, -len(column) :].bool()) | (column == row)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return output.transpose(1, 2).contiguous(), None


def keep_padding_mask(attention_mask=None, **kwargs):
    """The mask that `attend_by_landmarks` is given: `[B, T]`, as the user gave it."""
    return attention_mask


def check_backbone(backbone: PreTrainedModel) -> None:
    config, name = backbone.config, type(backbone).__name__
    if config.model_type not in BACKBONES:
        raise UsageError(
            f"`--model_name_or_path`: the attention of {name} cannot be replaced by landmark attention; choose one of "
            f"{', '.join(BACKBONES)}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UsageError(
            f"`--model_name_or_path`: rotary type {rope} has frequencies that depend on length, and a stored block has none; "
            "choose a backbone with default, linear, llama3 or yarn frequencies"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UsageError(
            f"`--model_name_or_path`: {name} has layers of sliding-window attention that cannot be switched off; choose a "
            "backbone of full attention"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UsageError(
            f"`--model_name_or_path`: attention dropout {config.attention_dropout} is not supported; set it to 0 in its config.json"
        )


def switch_sliding_window_off(backbone: PreTrainedModel) -> None:
    window = getattr(backbone.config, "sliding_window", None)
    if window is not None and backbone.config.model_type == "mistral":
        logger.warning("sliding window of %s tokens switched off: landmarks reach what lies behind it", window)
        backbone.config.sliding_window = None


AttentionInterface.register("landmark", attend_by_landmarks)
AttentionMaskInterface.register("landmark", keep_padding_mask)
