"""A bare backbone that reads texts of any length in constant memory: sliding window, and Transformer-XL's cached segment."""

import torch
from torch import Tensor
from transformers import DynamicCache

from lrmt.errors import UsageError


class StreamedBackbone:
    """Greedy answers of a backbone that keeps the keys and values of the last segment's tokens and forgets the others.

    A text is cut into segments of `segment_length` tokens, the last of which holds the end of the prompt and the answer, wherever
    the prompt begins; so a padded batch equals its rows alone.

    Args:
        backbone: a transformers decoder with rotary (relative) positions.
        recurrence: "window", where each token sees the `segment_length` tokens that end with itself; or "segment", where a
            segment sees itself and all of the one before (Transformer-XL, Dai et al. 2019, 1901.02860, §3.2; not trained for it).

    Raises UsageError for a backbone whose positions are learned, and end.
    """

    def __init__(self, backbone, segment_length: int, recurrence: str):
        if not any("rotary" in name for name, _ in backbone.named_modules()):
            raise UsageError(
                f"--baseline: {type(backbone).__name__} has no rotary positions and cannot read beyond its window; "
                "leave sliding_window and xl out"
            )
        self.backbone, self.length = backbone, segment_length
        self.reach = segment_length if recurrence == "window" else 2 * segment_length
        own = getattr(backbone.config.get_text_config(), "sliding_window", None)
        self.reach = min(self.reach, own or self.reach)  # tokens that one token can see, itself included
        self.kept = min(segment_length, self.reach - 1) if recurrence == "window" else segment_length

    @torch.inference_mode()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, eos_token_id: int, **ignored
    ) -> Tensor:
        """Prompts `[B, T]`, padded on the left, and up to `max_new_tokens` greedy tokens behind them, `[B, T + new]`."""
        batch, width = input_ids.shape
        pad = -(width + max_new_tokens) % self.length
        ids = torch.nn.functional.pad(input_ids, (pad, 0))
        seen = torch.nn.functional.pad(attention_mask.bool(), (pad, 0))
        self._begin(batch, ids.device)
        for at in range(0, ids.shape[1], self.length):
            logits = self._read(ids[:, at : at + self.length], seen[:, at : at + self.length])
        output, done = [input_ids], torch.zeros(batch, 1, dtype=torch.bool, device=ids.device)
        for new in range(max_new_tokens):
            token = logits.argmax(-1).masked_fill(done, eos_token_id)
            output.append(token)
            done = done | (token == eos_token_id)
            if bool(done.all()) or new + 1 == max_new_tokens:
                break
            logits = self._read(token, torch.ones_like(done))
        return torch.cat(output, dim=1)

    def _begin(self, batch: int, device) -> None:
        self.cache, self.position, self.in_segment = DynamicCache(), 0, 0
        self.seen = torch.zeros(batch, 0, dtype=torch.bool, device=device)  # of the cached keys: which are no padding

    def _read(self, ids: Tensor, seen: Tensor) -> Tensor:
        """Runs `ids [B, n]`, one segment or a part of it, behind what is cached; logits `[B, 1, V]` after its last token."""
        if self.in_segment % self.length == 0:
            self._forget()
        n, past = ids.shape[1], self.seen.shape[1]
        self.seen = torch.cat([self.seen, seen], dim=1)
        query = torch.arange(past, past + n, device=ids.device)[:, None]
        key = torch.arange(past + n, device=ids.device)
        visible = (key <= query) & (query - key < self.reach) & self.seen[:, None, None, :]
        dtype = self.backbone.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill(~visible, torch.finfo(dtype).min)
        positions = torch.arange(self.position, self.position + n, device=ids.device).expand(len(ids), -1)
        logits = self.backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        self.position += n
        self.in_segment += n
        return logits

    def _forget(self) -> None:
        """Drops all but the last `kept` keys and values."""
        cut = self.seen.shape[1] - self.kept
        if cut > 0:
            self.seen = self.seen[:, cut:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, cut:].clone(), layer.values[:, :, cut:].clone()
