"""A model, a tokenizer and a task without weights, for the loop of an evaluation."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from transformers import PreTrainedConfig

from lrmt.errors import UsageError
from lrmt.tasks.base import Example, Task

SEGMENT = 16
EOS, PAD, KEY = 10, 11, 12  # ids 0..9 are digits


class FakeTokenizer:
    eos_token_id, pad_token_id = EOS, PAD

    def decode(self, ids, skip_special_tokens=True):
        return "".join(str(i) if i < 10 else "?" for i in ids)


class FakeTask(Task):
    """A 5-digit key at the start, filler of 15s, a question mark (14) at the end."""

    name, max_new_tokens = "passkey", 6

    def example(self, index, length):
        if length < 8:
            raise UsageError(f"nothing fits into {length} tokens")
        digits = [int(d) for d in str(10_000 + 7 * index)]
        prompt = np.full(length - 6, 15)
        prompt[:6], prompt[-1] = [KEY, *digits], 14
        return Example(prompt, np.array([*digits, EOS]), "?", "".join(map(str, digits)), "passkey")


class FakeModel:
    """Sees up to `reach` segments back when trained, and only what it is shown when its adapter is disabled."""

    device, generation_config = "cpu", None
    config = SimpleNamespace(model_type="rmt", segment_length=SEGMENT)

    def __init__(self, reach=4):
        self.reach, self.enabled = reach, True
        self.calls = []
        self.backbone = SimpleNamespace(
            generate=self._generate_backbone, config=PreTrainedConfig(), generation_config=None
        )

    def eval(self):
        return self

    def get_base_model(self):
        return self

    @contextmanager
    def disable_adapter(self):
        self.enabled = False
        yield
        self.enabled = True

    def generate(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        segments = -(-(input_ids.shape[1] + FakeTask.max_new_tokens) // SEGMENT)  # of the text
        who = "rmt" if self.enabled else "untrained"
        return self._answer(who, input_ids, max_new_tokens, knows=self.enabled and segments <= self.reach)

    def _generate_backbone(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        assert not self.enabled, "the backbone must be measured without the adapter"
        return self._answer("backbone", input_ids, max_new_tokens, knows=True)

    def _answer(self, who, input_ids, max_new_tokens, knows):
        self.calls.append((who, tuple(input_ids.shape)))
        new = torch.full((len(input_ids), max_new_tokens), EOS)
        for row, ids in enumerate(input_ids.tolist()):
            digits = ids[ids.index(KEY) + 1 :][:5] if knows and KEY in ids else [0] * 5
            new[row, : len(digits)] = torch.tensor(digits)
        return torch.cat([input_ids, new], dim=1)
