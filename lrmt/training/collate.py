"""Examples to tensors."""

from collections.abc import Sequence

import torch

from lrmt.models.scoring import IGNORED
from lrmt.tasks.base import Example


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad examples into `input_ids`, `attention_mask` and `labels`, int64 [B, T].

    `labels` are -100 everywhere except on the answer and its EOS.
    """
    length = max(len(e.prompt_ids) + len(e.answer_ids) for e in examples)
    input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, e in enumerate(examples):
        start, end = len(e.prompt_ids), len(e.prompt_ids) + len(e.answer_ids)
        input_ids[row, :start] = torch.from_numpy(e.prompt_ids)
        input_ids[row, start:end] = labels[row, start:end] = torch.from_numpy(e.answer_ids)
        attention_mask[row, :end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
