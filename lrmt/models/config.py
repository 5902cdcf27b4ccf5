"""What every method's config has, what every recurrent one has, and what training, plans and flags ask of them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from lrmt.errors import UsageError
from lrmt.flags import flag
from lrmt.models.cost import Shape, split_flops
from lrmt.models.handover import KINDS


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
    #: whether training runs what it reads forward once more, for its gradients
    runs_again = False

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

    def check_training(
        self,
        num_segments: int,
        *,
        num_ranks: int = 1,
        task: str = "",
        use_peft: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Raises `UsageError` if the method cannot be trained so: on texts of at most `num_segments`, on `num_ranks` processes,
        on a task of this name, with LoRA or without, with layers that are run again for their gradients.
        """

    def activations(self, num_segments: int) -> Activations:
        """What a training step keeps of a text of so many segments, for the estimate of memory."""
        return Activations(self.segment_length, num_segments, 0)

    def read_flops(self, shape: Shape, tokens: int) -> float:
        """FLOPs of reading a text of so many tokens, all of it, with the logits of its last token alone."""
        raise UsageError(f"--method: what a {self.model_type} model costs is not known; leave it out")

    def train_flops(self, shape: Shape, tokens: int) -> float:
        """FLOPs of a training step on a text of so many tokens. Frozen weights pass gradients through, which costs as much as going
        forward, attention twice as much; LoRA and what the method trains are not counted on their way back.
        """
        attention, rest = split_flops(lambda shape: self.read_flops(shape, tokens), shape)
        return (3 + self.runs_again) * attention + (2 + self.runs_again) * rest

    def state_numbers(self, shape: Shape, tokens: int) -> tuple[int, int]:
        """What is kept of a text of so many tokens: numbers in the backbone's precision, and in fp32."""
        raise UsageError(f"--method: what a {self.model_type} model keeps is not known; leave it out")

    #: vectors of the written memory that notes can be asked of; none: the method takes no notes
    note_length = 0

    @property
    def num_reading_layers(self) -> int:
        """Layers of whose attention `recording` tells spans."""
        return self.num_hidden_layers

    @property
    def span_length(self) -> int:
        """Tokens of the spans that `recording` tells of; a text that is shorter has none."""
        return self.segment_length

    # DeepSpeed's "auto" settings and transformers' utilities look these up
    hidden_size = property(lambda self: self.backbone_config.hidden_size)
    vocab_size = property(lambda self: self.backbone_config.vocab_size)
    num_hidden_layers = property(lambda self: self.backbone_config.num_hidden_layers)


class Activations(NamedTuple):
    """Of one text: `positions` of a segment, how many segments are `live` at once, and vectors that are kept besides: `carried`, in the
    backbone's precision, and `single`, in fp32.
    """

    positions: int
    live: int
    carried: int
    single: int = 0


class RecurrentConfig(LongContextConfig):
    """What every recurrent method has. Noise on the memory: noisy RNNs, Lim et al. 2021, 2102.04877."""

    segment_length: int = flag(1024, "Tokens per segment L.")
    bptt_segments: int | None = flag(None, "Gradients of a segment's loss reach this many segments; default: all.")
    segment_alignment: Literal["left", "right"] = flag(
        "left", "left: the last segment is the short one; right: the first."
    )
    memory_handover: Literal["identity", "scaled", "aligned", "tokens"] = flag(
        "identity",
        "What the next segment reads of a hidden state that one has written. identity: the state itself; scaled: to the size of "
        "token embeddings; aligned: mapped, by a fitted matrix, to the embedding of what the head would say; tokens: the mean "
        "embedding of what the head says.",
    )
    memory_shift: bool = flag(
        False,
        "Each vector that is written is read one place on, after M_0's first: as a decoder, which says at each place what stands at "
        "the next, copies what it has read.",
    )
    state_passing: float = flag(
        0.0,
        "Share of the training texts, from the second of several stages on, that begin from the memory that one of the step before "
        "has left, so that memories of any age are read and handed on; not of bAbI's stories, which do not go on from another.",
    )
    checkpoint_segments: bool = flag(
        True, "Recompute segments in the backward pass: memory does not grow with their number."
    )
    memory_noise: float = flag(
        0.0,
        "Noise on the memory in training, as a share of its size, so that it does not drift over longer texts; grows from none "
        "in the first stage to this in the last.",
    )

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.segment_length < 1:
            raise UsageError(f"`--segment_length` must be 1 or more; got {self.segment_length}")
        if self.bptt_segments is not None and self.bptt_segments < 1:
            raise UsageError(f"`--bptt_segments` must be 1 or more, or left out; got {self.bptt_segments}")
        if not 0 <= self.state_passing <= 1:
            raise UsageError(f"`--state_passing` must lie in [0, 1]; got {self.state_passing}")
        if self.memory_noise < 0:
            raise UsageError(f"`--memory_noise` must be 0 or more; got {self.memory_noise}. 0 leaves it out")
        if self.memory_handover not in KINDS:
            raise UsageError(f"`--memory_handover` must be one of {', '.join(KINDS)}; got {self.memory_handover}")
        if self.segment_alignment not in ("left", "right"):
            raise UsageError(f"`--segment_alignment` must be left or right; got {self.segment_alignment}")
        window = getattr(self.backbone_config, "max_position_embeddings", None)
        if window is not None and self.positions > window:
            self.refuse_window(window)

    runs_again = property(lambda self: self.checkpoint_segments)

    @property
    def positions(self) -> int:
        """Positions of a segment with what stands before and after its tokens."""
        return self.segment_length

    #: positions at a segment's end of which alone `write` writes; of a segment that is read only it is then given no others, and the last
    #: layer computes no others. None: `write` looks at all of them
    written_positions: ClassVar[int | None] = None

    def refuse_window(self, window: int) -> None:
        """Raises `UsageError` for segments that do not fit into the backbone's window."""
        raise UsageError(
            f"`--segment_length` must fit into the backbone's window of {window} positions; got {self.segment_length} tokens, "
            f"{self.positions} positions. Lower it to {self.segment_length - self.positions + window} or less"
        )

    def read_flops(self, shape: Shape, tokens: int) -> float:
        whole, rest = divmod(tokens, self.segment_length)
        spans = ((self.segment_length, 0, whole), (rest, whole, whole + 1))
        spared = 0 if self.written_positions is None else self.positions - self.written_positions
        before_last = whole - (rest == 0)
        return sum(
            self.segments_flops(shape, size, first, last) for size, first, last in spans if size and first < last
        ) - (2 * spared * shape.tail * before_last)

    def segments_flops(self, shape: Shape, tokens: int, first: int, last: int) -> float:
        """FLOPs of the segments number `first` to `last` (the one after), each of so many tokens."""
        positions = tokens + self.positions - self.segment_length
        head = self.note_length + self.memory_shift if self.memory_handover == "tokens" else 0
        return (last - first) * (shape.run(positions) + 2 * head * shape.head)

    def matters_to_training(self) -> dict[str, object]:
        return {k: v for k, v in super().matters_to_training().items() if k != "checkpoint_segments"}

    def check_training(self, num_segments: int, *, num_ranks: int = 1, task: str = "", **run) -> None:
        if (
            self.bptt_segments
            and num_ranks > 1
            and "dataset" in map(str.strip, task.split(","))
            and self.segment_alignment == "left"
        ):
            # an answer that crosses the end of a segment is two windows, and other ranks may have one
            raise UsageError(
                f"`--bptt_segments` {self.bptt_segments} on several ranks needs every answer within one segment, which "
                "your own rows have with `--segment_alignment right`; got left"
            )

    def activations(self, num_segments: int) -> Activations:
        live = 1 if self.checkpoint_segments else min(num_segments, self.bptt_segments or num_segments)
        return Activations(self.positions, live, 0)
