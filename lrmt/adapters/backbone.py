"""The backbone under an adapter: found, loaded, identified, and its quirks in 4 bits."""

from __future__ import annotations

import hashlib
import json

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lrmt.adapters.find import resolve_backbone
from lrmt.errors import UsageError, one_line
from lrmt.models.base import gathered


def open_pretrained(loader, name: str, **kwargs):
    try:
        return loader(resolve_backbone(name), **kwargs)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"`--model_name_or_path` {name} cannot be loaded: {one_line(error)}") from None


def load_tokenizer(name: str, revision: str | None = None):
    """The backbone's tokenizer, with a padding token."""
    tokenizer = open_pretrained(AutoTokenizer.from_pretrained, name, revision=revision)
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"`--model_name_or_path` {name}: its tokenizer has no end-of-sequence token, which answers end in"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    device_map: dict | None = None,
) -> PreTrainedModel:
    """Loads a frozen decoder (`trust_remote_code` stays off). Raises `UsageError` if it cannot be loaded."""
    config = open_pretrained(AutoConfig.from_pretrained, name, revision=revision)
    backbone = open_pretrained(
        AutoModelForCausalLM.from_pretrained,
        name,
        config=config,
        revision=revision,
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        quantization_config=quantization_config,
        attn_implementation=attn_implementation,
        device_map=device_map,
    )
    backbone.config.use_cache = False
    return backbone.requires_grad_(False)


def backbone_fingerprint(backbone: PreTrainedModel) -> str:
    """Identifies a backbone by its shape and the start of its token embeddings, which quantisation leaves alone."""
    config = backbone.config
    shape = [config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size]
    embeddings = backbone.get_input_embeddings().weight
    with gathered(embeddings):
        rows = embeddings[:16].detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(json.dumps(shape).encode() + rows.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def keep_4bit_trainable(model: torch.nn.Module) -> None:
    """Leaves 4-bit layers in training mode while the rest of the model evaluates.

    On CPUs with bf16 instructions bitsandbytes repacks a layer when it first runs in eval mode; the repacked layer has no
    gradient, so that training would go on with silently wrong ones.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True
