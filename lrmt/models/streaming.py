"""A bare backbone that reads texts of any length in constant memory: sliding window, and Transformer-XL's cached segment."""

import contextlib

import torch
from torch import Tensor
from transformers import DynamicCache

from lrmt.errors import UsageError
from lrmt.models.rotary import rotate


class StreamedBackbone:
    """Greedy answers of a backbone that keeps the keys and values of the last segment's tokens and forgets the others.

    A text is cut into segments of `segment_length` tokens, the last of which holds the end of the prompt and the answer, wherever
    the prompt begins; so a padded batch equals its rows alone. Positions count from the first key that is kept: as keys are
    forgotten the others are turned back, so that however long a text is its positions stay small, and exact.

    Args:
        backbone: a transformers decoder with rotary (relative) positions.
        recurrence: "window", where each token sees the `segment_length` tokens that end with itself; or "segment", where a
            segment sees itself and all of the one before (Transformer-XL, Dai et al. 2019, 1901.02860, §3.2; not trained for it).

    Raises UsageError for a backbone whose positions are learned, and end, or whose keys cannot be turned back.
    """

    def __init__(self, backbone, segment_length: int, recurrence: str):
        check_rotary(backbone, "leave sliding_window and xl out")
        self.backbone, self.length = backbone, segment_length
        self.inv_freq = find_frequencies(backbone)
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
        with attending_by_mask(self.backbone):
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
        self.cache, self.in_segment = DynamicCache(), 0
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
        logits = self.backbone(
            input_ids=ids, attention_mask=mask, position_ids=query.T.expand(len(ids), -1), past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        self.in_segment += n
        return logits

    def _forget(self) -> None:
        """Drops all but the last `kept` keys and values."""
        cut = self.seen.shape[1] - self.kept
        if cut > 0:
            self.seen = self.seen[:, cut:]
            for layer in self.cache.layers:
                layer.keys = turn_back(layer.keys[:, :, cut:], cut, self.inv_freq)
                layer.values = layer.values[:, :, cut:].clone()


def turn_back(keys: Tensor, positions: int, inv_freq: Tensor) -> Tensor:
    """Rotary keys `[B, H, T, D]` as if they stood so many positions earlier; of a partial rotation the rest is left alone."""
    turning = 2 * len(inv_freq)
    distance = torch.full((1, keys.shape[2]), -positions, device=keys.device)
    turned = rotate(keys[..., :turning], distance, inv_freq.to(keys.device))
    return torch.cat([turned, keys[..., turning:]], dim=-1)


def find_frequencies(backbone) -> Tensor:
    """The inverse frequencies `[D / 2]` by which every layer turns its keys.

    Raises UsageError where frequencies depend on length, or where a token's keys at position 1, turned back, are not those
    it has at position 0.
    """
    name, remedy = type(backbone).__name__, "leave sliding_window and xl out"
    config = backbone.config.get_text_config()
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UsageError(f"--baseline: rotary type {rope} of {name} has frequencies that depend on length; {remedy}")
    rotary = next((module for module in backbone.modules() if hasattr(module, "inv_freq")), None)
    if rotary is not None:
        tokens = torch.arange(8, device=backbone.device).repeat(2)[:, None]  # each alone, at position 0 and at 1
        place, cache = torch.arange(2, device=backbone.device).repeat_interleave(8)[:, None], DynamicCache()
        with torch.inference_mode():
            backbone(input_ids=tokens, position_ids=place, past_key_values=cache, use_cache=True)
        pairs = [(layer.keys[:8], turn_back(layer.keys[8:], 1, rotary.inv_freq)) for layer in cache.layers]
        if all((first - turned).norm() <= 0.05 * first.norm() for first, turned in pairs):
            return rotary.inv_freq
    raise UsageError(f"--baseline: the keys of {name} cannot be turned to other positions; {remedy}")


def check_rotary(backbone, remedy: str) -> None:
    """Raises UsageError for a backbone without rotary positions."""
    if not any("rotary" in name for name, _ in backbone.named_modules()):
        raise UsageError(
            f"--baseline: {type(backbone).__name__} has no rotary positions and cannot read beyond its window; {remedy}"
        )


@contextlib.contextmanager
def attending_by_mask(backbone):
    """Meanwhile the backbone's attention takes masks `[B, 1, T, S]`, which landmark and flash attention do not."""
    own = backbone.config._attn_implementation
    if own not in ("eager", "sdpa"):
        backbone.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if own not in ("eager", "sdpa"):
            backbone.set_attn_implementation(own)
