"""How every model is asked, and its answer read: prompts padded, the likeliest tokens, and what of them is text."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig


def greedy(tokenizer, max_new_tokens: int) -> dict:
    """The arguments of `generate` by which all models are measured: always the likeliest token, up to the tokenizer's EOS."""
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_token_id(tokenizer),
    }


def generating(model) -> Callable[..., torch.Tensor]:
    """The model's `generate`, whatever its own generation_config says: penalties, beams or temperatures of a backbone's file.

    transformers fills from that one whatever a call leaves open, and no argument says "none" of every setting.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def generate(**arguments):
        own, owner.generation_config = owner.generation_config, GenerationConfig()
        try:
            return model.generate(**arguments)
        finally:
            owner.generation_config = own

    return generate


def decode_answer(ids: list[int], tokenizer) -> str:
    """The text of new tokens up to EOS. Special tokens are told, for they may be text of the user's; padding is not."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    pad = pad_token_id(tokenizer)
    return tokenizer.decode([token for token in ids if token != pad], skip_special_tokens=False)


def pad_left(prompts, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Int arrays [P] to input_ids and attention_mask [B, max P], both int64."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.as_tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    return input_ids, attention_mask


def pad_token_id(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
