"""The one interface of every memory method: `forward`, `read`, `generate`, `State`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from contextlib import nullcontext
from typing import ClassVar, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from lrmt.errors import UsageError

generation_logger = logging.getLogger("transformers.generation.configuration_utils")


def setting(default, help: str):
    """A field of a config that is a flag too."""
    return dataclasses.field(default=default, metadata={"help": help})


class LongContextConfig(PreTrainedConfig):
    """What every method's config has: the backbone's config and where the backbone came from.

    Args:
        backbone_config: config of the wrapped transformers decoder, a config object or its dict.
        backbone_name: Hub id, folder, or name of a shipped backbone; what `lrmt.load` opens under an adapter.
        backbone_revision: Hub revision of it. backbone_quantization: "nf4" if the adapter was trained over 4-bit weights.
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
        """The method's own settings, each a flag of its recipe: the fields that have a help text."""
        return [field for field in dataclasses.fields(cls) if "help" in field.metadata]

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

    # DeepSpeed's "auto" settings and transformers' utilities look these up
    hidden_size = property(lambda self: self.backbone_config.hidden_size)
    vocab_size = property(lambda self: self.backbone_config.vocab_size)
    num_hidden_layers = property(lambda self: self.backbone_config.num_hidden_layers)


class Activations(NamedTuple):
    """Of one text: `positions` of a segment, how many segments are `live` at once, and `carried`, vectors that are kept besides."""

    positions: int
    live: int
    carried: int


class Span(NamedTuple):
    """A stretch of the text that was read from memory: tokens `start` to `end` (the one after the last), the `number`-th block or
    segment, with `weight`, its share (0..1) of the attention in a layer, averaged over heads.
    """

    layer: int
    number: int
    start: int
    end: int
    weight: float


@dataclasses.dataclass
class LongContextOutput(ModelOutput):
    """`loss` scalar; `logits` `[B, T, V]`, or `[N, V]` for the N scored positions when labels are given; `state`.

    `memory_norm` is the root-mean-square of the last memory.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None
    memory_norm: Tensor | None = None


@dataclasses.dataclass
class State:
    """What a model keeps of the text it has read: saved to one safetensors file, refused by a model that did not make it.

    `fingerprint` is that of the model; `cache` speeds up the running generation and is never saved. Every other field of a
    subclass is a tensor whose first dimension is the batch.
    """

    fingerprint: str
    cache: Cache | None

    def tensors(self) -> dict[str, Tensor]:
        fields = (f.name for f in dataclasses.fields(self) if f.name not in ("fingerprint", "cache"))
        return {name: getattr(self, name) for name in fields}

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.tensors().values())))

    def expand(self, batch_size: int) -> State:
        """Repeats each row so that a document read once answers a batch of questions."""
        times = self._times(batch_size)
        if times == 1:
            return self
        rows = {name: tensor.repeat_interleave(times, dim=0) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **rows, cache=None)

    def _times(self, batch_size: int) -> int:
        if batch_size % self.batch_size:
            raise ValueError(f"a state of {self.batch_size} rows cannot serve a batch of {batch_size}; read that batch")
        return batch_size // self.batch_size

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], fingerprint: str, model: LongContextModel) -> State:
        """The inverse of `tensors`."""
        return cls(fingerprint=fingerprint, cache=None, **{name: t.to(model.device) for name, t in tensors.items()})

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, under a temporary name first."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        temporary = f"{path}.tmp"
        save_file(tensors, temporary, metadata={"format": "lrmt-state-1", "fingerprint": self.fingerprint})
        os.replace(temporary, path)


class LongContextModel(PreTrainedModel, GenerationMixin):
    """A transformers decoder with a memory. Subclasses implement `forward` and `read`; `generate` is transformers' own."""

    config_class = LongContextConfig
    state_class: ClassVar[type[State]]
    #: config fields on which a state depends
    state_settings: ClassVar[tuple[str, ...]] = ()
    #: submodules that train in full beside LoRA (PEFT's `modules_to_save`)
    memory_modules: ClassVar[list[str]] = []
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # attention runs inside the backbone, which checks for itself what it supports
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LongContextConfig, backbone: PreTrainedModel | None = None):
        generation_logger.disabled = True  # transformers takes a `top_k` of ours for one of sampling, and warns
        super().__init__(config)
        generation_logger.disabled = False
        self._fingerprint: tuple = (None, None)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone_config) if backbone is None else backbone
        if getattr(self.backbone, "generation_config", None) is not None:
            self.generation_config = type(self.backbone.generation_config).from_dict(
                self.backbone.generation_config.to_dict()
            )

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, **settings) -> LongContextModel:
        """Wraps a loaded backbone; `settings` are fields of the config class. The backbone's weights are not touched."""
        config = cls.config_class(
            backbone_config=backbone.config, backbone_name=backbone.config.name_or_path, **settings
        )
        return cls(config, backbone)

    @classmethod
    def trained_modules(cls, settings: dict) -> list[str]:
        """Those of `memory_modules` that train under these settings."""
        return list(cls.memory_modules)

    #: whether `recording` tells what was read
    can_record: ClassVar[bool] = False

    def __init_subclass__(cls, **options):
        """Makes every method known to transformers' Auto classes."""
        super().__init_subclass__(**options)
        if cls.config_class.model_type:
            AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
            AutoModelForCausalLM.register(cls.config_class, cls, exist_ok=True)

    def on_progress(self, share: float) -> None:
        """Told at every training step: how far the curriculum is, 0 in its first stage, 1 in its last."""

    def log_values(self) -> dict[str, float]:
        """What the last training forward leaves for the log, by name."""
        return {}

    def recording(self):
        """A context that collects, for every forward inside that ends in scored last tokens, what these read: a list with a list of
        `Span` for each row. Only where `can_record`.
        """
        raise UsageError(f"a {self.config.model_type} model does not tell what it reads")

    def num_backbone_calls(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels=None) -> int:
        """How often `forward` runs the backbone on this batch: what must agree between ranks."""
        return 1

    def memory_norms(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[float]:
        """Root-mean-square of the memory that each segment but the last writes; none where nothing is written."""
        return []

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self):
        return self.backbone.get_output_embeddings()

    def set_input_embeddings(self, value):
        raise UsageError(
            "the vocabulary is never resized: memory lives beside the backbone; leave the embeddings alone"
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state carries its own cache

    def prepare_inputs_for_generation(
        self, input_ids, state=None, attention_mask=None, is_first_iteration=False, **kwargs
    ):
        """transformers' hook: the whole prompt first, then one token and the state."""
        if is_first_iteration or state is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask, "state": state, "logits_to_keep": 1}
        return {"input_ids": input_ids[:, -1:], "state": state, "logits_to_keep": 1}

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """transformers' `generate` (prompt and new ids are returned), plus `state`: a text read before the prompt."""
        if (kwargs.get("num_beams") or getattr(generation_config, "num_beams", None) or 1) > 1:
            raise UsageError(
                "`num_beams` must be 1: a memory state cannot be reordered; use sampling or greedy decoding"
            )
        return super().generate(inputs, generation_config, **kwargs)

    def fingerprint(self) -> str:
        """Identifies the model that made a state: its settings, memory, LoRA, and the start of the backbone's embeddings."""
        lora = [parameter for name, parameter in self.named_parameters() if ".lora_" in name]
        embeddings = self.get_input_embeddings().weight
        weights = [*self._memory_weights(), *lora]
        # hashing takes a while, generation asks for every token, and in-place changes are counted by torch
        made_of = [(tensor.data_ptr(), tensor._version) for tensor in (*weights, embeddings)]
        if self._fingerprint[0] == made_of:
            return self._fingerprint[1]
        settings = [self.config.model_type, self.config.backbone_config.model_type]
        settings += [getattr(self.config, name) for name in self.state_settings]
        digest = hashlib.sha256(json.dumps(settings).encode())
        with gathered(*weights, embeddings):
            for tensor in [*weights, embeddings[:4]]:
                digest.update(
                    tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
                )
        self._fingerprint = made_of, digest.hexdigest()[:16]
        return self._fingerprint[1]

    def _memory_weights(self) -> list[Tensor]:
        return []

    def load_state(self, path: str | os.PathLike) -> State:
        """Opens a file written by `State.save`; raises `UsageError` if another model wrote it."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:
            raise UsageError(f"state file {path} cannot be read ({error}); write it again with State.save") from None
        mine = self.fingerprint()
        if metadata.get("fingerprint") != mine:
            theirs = metadata.get("fingerprint", "none")
            raise UsageError(f"state {path} was made by another model ({theirs}, this is {mine}); read the text again")
        return self.state_class.from_tensors(tensors, mine, self)


def gathered(*parameters: Tensor):
    """The full values of parameters that ZeRO-3 may have partitioned, for as long as the context lasts."""
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)
    return nullcontext()
