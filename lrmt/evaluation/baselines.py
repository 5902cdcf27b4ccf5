"""Who answers: the trained model, the untrained memory, and the backbone alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Contender:
    """One column of the table.

    `generate(input_ids [B, T], attention_mask [B, T], **generation arguments)` returns [B, T + new].
    `loss(input_ids [B, T], count)` returns [B], fp32: the mean negative log-likelihood of the last `count` tokens, < T.
    `window`: how many tokens of the END of a prompt it sees; None sees all.
    """

    name: str
    generate: Callable[..., torch.Tensor]
    loss: Callable[[torch.Tensor, int], torch.Tensor]
    window: int | None = None


def build_contenders(model) -> list[Contender]:
    """The columns that `model` allows, in the order of the table.

    An adapter (PeftModel) gives three: itself under its model type, "untrained" (the adapter disabled: initial memory,
    no LoRA) and "backbone" (no memory at all, the last `segment_length` tokens). A merged model holds no backbone to
    compare with and gives the first alone.
    """

    def loss(input_ids, count):
        labels = input_ids.clone()
        labels[:, :-count] = -100
        return row_losses(model(input_ids=input_ids, labels=labels).logits, input_ids[:, -count:])

    trained = Contender(model.config.model_type, model.generate, loss)
    if not hasattr(model, "disable_adapter"):
        return [trained]
    backbone = model.get_base_model().backbone

    def backbone_loss(input_ids, count):
        logits = backbone(input_ids=input_ids, logits_to_keep=count + 1, use_cache=False).logits
        return row_losses(logits[:, -count - 1 : -1].flatten(0, 1), input_ids[:, -count:])

    def without_adapter(function):
        def call(*arguments, **named):
            with model.disable_adapter():
                return function(*arguments, **named)

        return call

    return [
        trained,
        Contender("untrained", without_adapter(model.generate), without_adapter(loss)),
        Contender(
            "backbone",
            without_adapter(backbone.generate),
            without_adapter(backbone_loss),
            window=model.config.segment_length,
        ),
    ]


def row_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each row, [B] fp32, from logits [B * count, V], row by row, of `targets` [B, count]."""
    losses = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


@torch.inference_mode()
def answer(contender: Contender, prompts, tokenizer, max_new_tokens: int, device="cpu") -> list[str]:
    """Greedy answers, decoded up to the end-of-sequence token, to `prompts` (a list of int arrays [P])."""
    if contender.window:
        prompts = [ids[-contender.window :] for ids in prompts]
    input_ids, attention_mask = pad_left(prompts, pad_token_id(tokenizer))
    output = contender.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id(tokenizer),
    )
    return [decode_answer(ids, tokenizer) for ids in output[:, input_ids.shape[1] :].tolist()]


def decode_answer(ids: list[int], tokenizer) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True)


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
