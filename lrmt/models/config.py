"""What every method's config has, and what training, plans and flags ask of it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

from transformers import AutoConfig, PreTrainedConfig


class LongContextConfig(PreTrainedConfig):
    """What every method's config has: the backbone's config and where the backbone came from.

    Args:
        backbone_config: config of the wrapped transformers decoder, a config object or its dict.
        backbone_name: Hub id, folder, or name of a shipped backbone; what `lrmt.load` opens under an adapter.
        backbone_revision: Hub revision of it. backbone_quantization: "nf4" if the adapter was trained over 4-bit weights;
            backbone_nested_quant: whether their constants are quantised too. backbone_fingerprint: of its shape and embeddings.

    A method's config has `segment_length`, in tokens: the unit in which curricula and evaluations count.
    """

    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig}
    #: fields that say how a trained model reads, and may be changed when it is opened
    reading_settings: ClassVar[tuple[str, ...]] = ()
    #: those of them that say where things are kept, and change no answer
    placement_settings: ClassVar[tuple[str, ...]] = ()
    #: tokens by which training texts should differ in length, so that their ends meet every place of an attention block
    length_slack = 0

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_name: str | None = None
    backbone_revision: str | None = None
    backbone_quantization: str | None = None
    backbone_nested_quant: bool = True
    backbone_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        # transformers hands this setting down to the backbone's config: keep what that one has
        kwargs.setdefault("attn_implementation", getattr(self.backbone_config, "_attn_implementation", None))
        super().__post_init__(**kwargs)
        if self.backbone_config is not None:
            self.tie_word_embeddings = False  # the backbone ties its own

    @classmethod
    def own_settings(cls) -> list[dataclasses.Field]:
        """The method's own settings, each a flag of its recipe: the fields with a help text, those of the class itself first."""
        told = [field for field in dataclasses.fields(cls) if "help" in field.metadata]
        made_by = {
            name: place
            for place, c in reversed([*enumerate(cls.__mro__)])
            for name in vars(c).get("__annotations__", ())
        }
        return sorted(told, key=lambda field: made_by[field.name])

    def matters_to_training(self) -> dict[str, object]:
        """The settings that shape batches and weights, so that a resumed run must have them as they were."""
        return {f.name: getattr(self, f.name) for f in self.own_settings() if f.name not in self.reading_settings}

    def check_training(self, num_segments: int, *, num_ranks: int = 1, task: str = "", use_peft: bool = True) -> None:
        """Raises `UsageError` if the method cannot be trained so: on texts of at most `num_segments`, on `num_ranks` processes,
        on a task of this name, with LoRA or without.
        """

    def activations(self, num_segments: int) -> Activations:
        """What a training step keeps of a text of so many segments, for the estimate of memory."""
        return Activations(self.segment_length, num_segments, 0)

    @property
    def span_length(self) -> int:
        """Tokens of the spans that `recording` tells of; a text that is shorter has none."""
        return self.segment_length

    # DeepSpeed's "auto" settings and transformers' utilities look these up
    hidden_size = property(lambda self: self.backbone_config.hidden_size)
    vocab_size = property(lambda self: self.backbone_config.vocab_size)
    num_hidden_layers = property(lambda self: self.backbone_config.num_hidden_layers)


class Activations(NamedTuple):
    """Of one text: `positions` of a segment, how many segments are `live` at once, and `carried`, vectors that are kept besides."""

    positions: int
    live: int
    carried: int
