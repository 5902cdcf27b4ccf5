"""The one interface of every memory method: `forward`, `read`, `generate`, `State`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from typing import ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from lrmt.errors import UsageError
from lrmt.models import scoring
from lrmt.models.config import LongContextConfig
from lrmt.models.notes import Notes
from lrmt.models.outputs import Encoded, LongContextOutput, Text
from lrmt.models.state import State
from lrmt.models.weights import gathered, in_use, layers_of

generation_logger = logging.getLogger("transformers.generation.configuration_utils")


class LongContextModel(PreTrainedModel, GenerationMixin):
    """A transformers decoder with a memory: `forward`, `read` and `generate`. A method writes `encode`."""

    config_class = LongContextConfig
    state_class: ClassVar[type[State]]
    #: config fields on which a state depends
    state_settings: ClassVar[tuple[str, ...]] = ()
    #: those that came later: their defaults leave the states of before as they were
    later_state_settings: ClassVar[tuple[str, ...]] = ()
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
        try:
            super().__init__(config)
        finally:
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

    #: whether torch.compile may take the backbone's layers as they are called
    can_compile: ClassVar[bool] = True
    #: whether `recording` tells what was read
    can_record: ClassVar[bool] = False

    def __init_subclass__(cls, **options):
        """Makes every method known to transformers' Auto classes."""
        super().__init_subclass__(**options)
        if cls.config_class.model_type:
            AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
            AutoModelForCausalLM.register(cls.config_class, cls, exist_ok=True)

    def fit(self, texts: Callable[[], Tensor]) -> str:
        """Called once before training, with what makes ids `[N, T]` of plain text: what a method fits to its backbone, told in a line."""
        return ""

    def begin_with(self, said: Tensor) -> None:
        """Called once before training with notes: ids `[note_length]` that the memory should say before anything is read, -100
        where it is free.
        """

    def on_progress(self, share: float) -> None:
        """Told at every training step: how far the curriculum is, 0 in its first stage, 1 in its last."""

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of the running training besides weights, on each rank."""
        return {}

    def load_training_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `training_state` gave."""

    def log_values(self) -> dict[str, float]:
        """What the last training forward leaves for the log, by name."""
        return {}

    def recording(self):
        """A context that gives a `Recording`, whole when it ends, of what is read and written inside. Only where `can_record`."""
        raise UsageError(f"a {self.config.model_type} model does not tell what it reads")

    def num_backbone_calls(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels=None, notes: Notes | None = None
    ) -> int:
        """How often `forward` runs the backbone on this batch: what must agree between ranks."""
        return 1

    def num_notes(self, notes: Notes, input_ids: Tensor, attention_mask: Tensor | None = None, labels=None) -> int:
        """How many tokens of the notes `forward` scores on this batch."""
        return 0

    def find_fault(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> str:
        """Where a text whose loss is not finite goes wrong, in words that name a segment. Every rank calls it together, and runs
        the backbone equally often.
        """
        return f"a {self.config.model_type} model does not tell in which segment"

    # ------------------------------------------------------------------ what a method writes

    def encode(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        wanted: Tensor | None,
        state: State | None,
        notes: Notes | None = None,
    ) -> Encoded:
        """Reads a text.

        Args:
            input_ids: `[B, T]`, on the model's device. mask: `[B, T]` bool, None without padding.
            wanted: `[B, T]` bool, the tokens whose last hidden states are wanted. None: none, the state is.
            state: what was read before, of this batch.

            notes: what the written memory should say, where it is asked.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it reads a text: `encode`")

    def go_on(self, text: Text) -> tuple[Tensor, State]:
        """Hidden states `[B, d]` of each row's last token, and the state that generation goes on from. Without gradients."""
        raise NotImplementedError(f"{type(self).__name__} must say how it generates: `go_on`")

    # ------------------------------------------------------------------ forward, read, generate

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: State | None = None,
        logits_to_keep: int = 0,
        notes: Notes | None = None,
        **kwargs,
    ) -> LongContextOutput:
        """Reads a text and scores it.

        Args:
            input_ids: `[B, T]`, any length, on any device. attention_mask: `[B, T]`; a padded batch equals its rows alone.
            labels: `[B, T]`, -100 where nothing is scored, unshifted. Logits are then computed for scored positions only.
            state: what was read before; the text goes on from there, and the state stays as it is.
            notes: with labels, what the memory should say along the way; refused by a method that writes nothing readable.
            logits_to_keep: without labels, the last so many positions of each row only; 0 gives all.

        Returns:
            With labels: `loss` (mean over scored positions) and `logits [N, V]`, row by row, and what the `notes` cost. Without:
            `logits [B, T, V]` or
            `[B, logits_to_keep, V]`, and with `logits_to_keep=1`, which has no gradients, the `state` that generation goes on from.

        Raises:
            UsageError: ids outside the vocabulary, a state of another model. ValueError: no token, or a wrong `logits_to_keep`.
        """
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be a whole number, 0 (all) or more; got {logits_to_keep}")
        if notes is not None and not (labels is not None and state is None and self.config.note_length):
            raise UsageError(
                f"notes are for training on whole texts with labels, by a method that writes memory tokens; got them for "
                f"{self.config.model_type}. Set `--notes_weight 0`"
            )
        text = self._open(input_ids, attention_mask, labels, state)
        if labels is None and logits_to_keep == 1:
            with torch.no_grad():
                hidden, state = self.go_on(text)
                logits = self.get_output_embeddings()(hidden[:, None])
            return LongContextOutput(logits=logits, state=self._signed(state))
        wanted = self._wanted(text, logits_to_keep)
        asked = {} if notes is None else {"notes": notes.to(self.device)}
        hidden, _, told = self.encode(text.ids, text.mask, wanted, text.state, **asked)
        if labels is None:
            logits = self.get_output_embeddings()(hidden)
            return LongContextOutput(logits=scoring.lay_out(logits, wanted[:, text.before :], logits_to_keep))
        targets = scoring.next_tokens(text.labels, text.mask)
        loss, logits = scoring.cross_entropy(self.get_output_embeddings(), hidden, targets[wanted])
        return LongContextOutput(loss=loss, logits=logits, notes=told)

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, state: State | None = None) -> State:
        """Streams a document.

        Args:
            input_ids: `[B, T]`, on any device. attention_mask: `[B, T]`. state: what was read before; it stays as it is.

        Returns:
            The state, from which `forward`, `read` and `generate` go on as if the whole text had been given at once.
        """
        text = self._open(input_ids, attention_mask, None, state)
        return self._signed(self.encode(text.ids, text.mask, None, text.state).state)

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """transformers' `generate` (prompt and new ids are returned), plus `state`: a text read before the prompt."""
        beams = (kwargs, vars(generation_config or object), vars(self.generation_config))
        beams = next(filter(None, (settings.get("num_beams") for settings in beams)), 1)
        if beams > 1:
            raise UsageError(
                f"`num_beams` must be 1: a memory state cannot be reordered; got {beams}, from the call or the backbone's "
                "generation_config.json. Pass `num_beams=1`, and use sampling or greedy decoding"
            )
        inputs = inputs.to(self.device) if isinstance(inputs, Tensor) else inputs
        for name in ("input_ids", "attention_mask"):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = kwargs[name].to(self.device)
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, state=None, attention_mask=None, is_first_iteration=False, **kwargs
    ):
        """transformers' hook: the whole prompt first, then one token and the state."""
        if is_first_iteration or state is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask, "state": state, "logits_to_keep": 1}
        return {"input_ids": input_ids[:, -1:], "state": state, "logits_to_keep": 1}

    def _open(self, input_ids, attention_mask, labels, state) -> Text:
        """What was given, checked, and moved to where the model is."""
        device = self.device
        ids, mask = input_ids.to(device), None if attention_mask is None else attention_mask.to(device).bool()
        labels = None if labels is None else labels.to(device)
        if mask is not None and bool(mask.all()):
            mask = None
        if ids.shape[1] == 0 or (mask is not None and not bool(mask.any())):
            raise ValueError("`input_ids` is empty: nothing to read; give at least one token")
        if mask is not None:
            ids = ids.masked_fill(~mask, 0)  # padding may have an id that no embedding has
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(
                f"`input_ids` must lie in 0..{self.config.vocab_size - 1}, the backbone's vocabulary; got {low}..{high}. "
                "Landmarks and memory tokens are put in by the model and have no id"
            )
        if state is None:
            return Text(ids, mask, labels, None, 0, mask is not None)
        ours = getattr(state.cache, "owner", None) is self  # token by token: looking at every weight would take longer
        if not ours and state.fingerprint != self.fingerprint():
            raise UsageError(f"the state was made by another model ({state.fingerprint}); read the text again")
        if state.device != device:
            state = type(state).from_tensors(state.tensors(), state.fingerprint, self)
        state = state.expand(len(ids))
        if (unread := state.unread()) is None:
            return Text(ids, mask, labels, state, 0, mask is not None)
        again, real = unread
        padded = mask is not None
        mask = torch.cat([real, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask], dim=1)
        if labels is not None:
            labels = torch.cat([torch.full_like(again, scoring.IGNORED), labels], dim=1)
        return Text(torch.cat([again, ids], dim=1), mask, labels, state, again.shape[1], padded)

    @staticmethod
    def _wanted(text: Text, logits_to_keep: int = 0) -> Tensor:
        """The tokens whose logits are wanted, `[B, T]` bool: those before a label or, without labels, the last ones (0: all)."""
        if text.labels is not None:
            return scoring.next_tokens(text.labels, text.mask) != scoring.IGNORED
        new = torch.arange(text.ids.shape[1], device=text.ids.device) >= text.before
        return scoring.last_tokens(text.ids, text.mask, logits_to_keep) & new

    def _signed(self, state: State) -> State:
        state.fingerprint = state.fingerprint or self.fingerprint()
        return state

    # ------------------------------------------------------------------ embeddings

    def make_embedding(self, rows: int, fill) -> nn.Embedding:
        """Trained vectors `[rows, d]` beside the backbone, which `fill(weight, token embeddings)` sets, unless a checkpoint is about to.

        The vocabulary is never resized.
        """
        embeddings = self.get_input_embeddings().weight
        with gathered(embeddings):
            made = nn.Embedding(rows, embeddings.shape[-1], device=embeddings.device, dtype=embeddings.dtype)
            if embeddings.device.type != "meta":  # else `from_pretrained` is about to load everything
                with torch.no_grad():
                    fill(made.weight, embeddings.detach().float())
        return made

    def finish(self) -> None:
        """Called at the end of a method's `__init__`."""
        if self.get_input_embeddings().weight.device.type != "meta":
            for parameter in self.parameters():
                parameter._is_hf_initialized = True  # or `post_init` draws the backbone's weights anew
        self.post_init()

    def _init_weights(self, module):
        pass  # the backbone initialises its own; a method fills what it makes

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

    def fingerprint(self) -> str:
        """Identifies the model that made a state: its settings, memory, LoRA and its scale, and the start of the backbone's embeddings and
        of each weight of its last layer, in 4 bits or more.
        """
        lora = [parameter for name, parameter in self.named_parameters() if ".lora_" in name]
        embeddings = self.get_input_embeddings().weight
        weights = [*self._memory_weights(), *lora]
        last = [
            p for layer in layers_of(self.backbone)[-1:] for name, p in layer.named_parameters() if ".lora_" not in name
        ]
        scales = [scale for module in self.modules() if hasattr(module, "lora_A") for scale in module.scaling.values()]
        # hashing takes a while, generation asks for every token, and in-place changes are counted by torch
        made_of = [(tensor.data_ptr(), tensor._version) for tensor in (*weights, embeddings, *last)], scales
        if self._fingerprint[0] == made_of:
            return self._fingerprint[1]
        settings = [self.config.model_type, self.config.backbone_config.model_type]
        settings += [getattr(self.config, name) for name in self.state_settings]
        fields = type(self.config).__dataclass_fields__
        later = {name: getattr(self.config, name) for name in self.later_state_settings}
        settings += [[name, value] for name, value in later.items() if value != fields[name].default]
        settings += [["lora_scales", scales]] * bool(scales)
        digest = hashlib.sha256(json.dumps(settings).encode())
        with gathered(*weights, embeddings, *last):
            for tensor in [*weights, embeddings[:4], *(weight[:64] for weight in last)]:
                digest.update(
                    tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
                )
        self._fingerprint = made_of, digest.hexdigest()[:16]
        return self._fingerprint[1]

    def _memory_weights(self) -> list[Tensor]:
        """The parameters of `memory_modules`; of one that PEFT wraps, those in use."""
        modules = map(self.get_submodule, self.memory_modules)
        return [p for module in modules for p in in_use(module).parameters()]

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
