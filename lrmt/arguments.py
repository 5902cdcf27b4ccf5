"""Every flag of a recipe: a dataclass field, a command-line flag and a YAML key of one name."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from dataclasses import dataclass, field

import torch
import yaml
from transformers import TrainingArguments as HfTrainingArguments
from trl import ModelConfig as TrlModelConfig
from trl import ScriptArguments as TrlScriptArguments
from trl import TrlParser

from lrmt.errors import UsageError, one_line, suggest
from lrmt.unsupported import MODEL, TRAINING, refuse_unsupported, refuse_values


def _check_counts(arguments, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is None or value < 1 or value != int(value):
            raise UsageError(f"`--{name}` must be a whole number, 1 or more; got {value}")


@dataclass
class ModelArguments(TrlModelConfig):
    """The backbone, its quantisation and LoRA: TRL's `ModelConfig` with QLoRA switched on."""

    model_name_or_path: str | None = field(
        default="tiny-llama",
        metadata={"help": "Hub id, folder, or a backbone that ships with lrmt: tiny-llama, tiny-mistral."},
    )
    init_adapter_path: str | None = field(
        default=None, metadata={"help": "Start from the LoRA and memory in this folder, say of an easier task."}
    )
    use_peft: bool = field(default=True, metadata={"help": "Train LoRA adapters (off: the memory embedding alone)."})
    load_in_4bit: bool = field(default=True, metadata={"help": "Quantise the frozen backbone to 4 bits."})
    use_bnb_nested_quant: bool = field(default=True, metadata={"help": "Quantise the quantisation constants too."})
    dtype: str | None = field(
        default="bfloat16", metadata={"help": "Of the backbone's computations: bfloat16 or float32."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Backbone layers that LoRA adapts; default: every linear layer but the head."}
    )

    def __post_init__(self):
        refuse_unsupported(self, MODEL)
        if self.load_in_8bit:
            raise UsageError("`--load_in_8bit` is not supported; got True. Use `--load_in_4bit` or neither")
        if self.dtype not in ("bfloat16", "float32", "float16"):
            raise UsageError(f"`--dtype` must be bfloat16, float32 or float16; got {self.dtype}")
        targets = self.lora_target_modules
        super().__post_init__()
        # TRL unpacks a list of one, which PEFT takes for a pattern of the whole name
        if targets is not None and self.lora_target_modules != "all-linear":
            self.lora_target_modules = targets


@dataclass
class TaskArguments(TrlScriptArguments):
    """What is to be remembered."""

    task: str = field(
        default="passkey",
        metadata={
            "help": "passkey, qa1 to qa20, niah_single, memorize, detect_memorize, reasoning, several separated by commas, "
            "dataset (--dataset_name) or text (--text_path)."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Own rows for --task dataset: a JSONL or Parquet file or a Hub id; columns input, question, target."
        },
    )
    text_path: str | None = field(
        default=None,
        metadata={
            "help": "Any text for --task text: a folder of .txt, a .txt file, a .jsonl file (column text) or a Hub id."
        },
    )
    babi_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of official bAbI files (qa1_train.txt, …); default: the built-in simulator."},
    )
    babi_vocabulary: str | None = field(
        default=None,
        metadata={"help": "YAML or JSON file of other people, rooms, objects, … for simulated bAbI stories."},
    )
    background_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of .txt books that hide the facts, begun again where they end; name other ones for evaluation. "
            "Default: built-in procedural prose."
        },
    )
    background_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Books from a data set with column text instead: a Hub id, streamed, or a path; of its split train, but "
            "for the tenths that evaluation reads where it has no other split."
        },
    )
    num_digits: int = field(default=5, metadata={"help": "Digits of a pass key, but for --passkey_wording landmark."})
    passkey_wording: str = field(
        default="plain",
        metadata={
            "help": "Wording of the pass key task: plain, landmark (numbers 1 to 50000), longlora or infinitebench."
        },
    )
    question_position: str = field(
        default="last", metadata={"help": "Where BABILong's question stands: last, first or both."}
    )
    max_n_facts: int | None = field(default=None, metadata={"help": "Drop bAbI stories with more facts than this."})

    early_facts_share: float = field(
        default=0.0,
        metadata={
            "help": "Share (0..1) of training texts with all facts before the last segment: only memory finds them."
        },
    )

    def __post_init__(self):
        if self.text_path is not None and self.dataset_name is not None:
            raise UsageError(
                f"`--text_path` and `--dataset_name` are two tasks; got {self.text_path} and {self.dataset_name}. Name one"
            )
        names = [name.strip() for name in self.task.split(",")]
        if self.text_path is not None and "text" not in names:
            self.task = "text"
        elif self.text_path is None and self.dataset_name is None and "text" in names:
            raise UsageError(
                f"`--task {self.task}` needs `--text_path`; got none. Name a folder of .txt files, a file or a Hub id"
            )
        if self.dataset_name is not None:
            self.task = "dataset"
        elif self.task == "dataset":
            raise UsageError(
                "`--task dataset` needs `--dataset_name`; got none. Name a JSONL or Parquet file or a Hub id"
            )


@dataclass
class RmtArguments:
    """RMT's own settings (`RmtConfig`)."""

    num_memory_tokens: int = field(default=16, metadata={"help": "Memory tokens m that carry the past."})
    segment_length: int = field(default=1024, metadata={"help": "Tokens per segment L."})
    bptt_segments: int | None = field(
        default=None, metadata={"help": "Gradients of a segment's loss reach this many segments; default: all."}
    )
    segment_alignment: str = field(
        default="left", metadata={"help": "left: the last segment is the short one; right: the first."}
    )
    checkpoint_segments: bool = field(
        default=True,
        metadata={"help": "Recompute segments in the backward pass: memory does not grow with their number."},
    )
    memory_noise: float = field(
        default=0.0,
        metadata={
            "help": "Noise on the memory in training, as a share of its size, so that it does not drift over longer texts; grows "
            "from none in the first stage to this in the last."
        },
    )


@dataclass
class LandmarkArguments:
    """Landmark attention's own settings (`LandmarkConfig`)."""

    block_length: int = field(default=64, metadata={"help": "Positions per block K: K-1 tokens and their landmark."})
    context_length: int = field(
        default=2048, metadata={"help": "Tokens per training text, the unit of --curriculum_stages; bounds positions."}
    )
    top_k: int = field(default=4, metadata={"help": "Blocks that a token reads beside what is near, at inference."})
    train_top_k: int | None = field(
        default=None, metadata={"help": "As many in training too, as longer texts will have it; default: all blocks."}
    )
    landmark_embedding: str = field(
        default="trained", metadata={"help": "trained, or frozen_mean: the mean of the token embeddings."}
    )
    retrieval: str = field(
        default="token", metadata={"help": "token: each head and token chooses blocks; chunk: each head for a chunk."}
    )
    offload_blocks: bool = field(default=False, metadata={"help": "Keep blocks in CPU memory at inference."})
    implementation: str = field(
        default="auto", metadata={"help": "Of landmark attention in training: auto, sdpa, flex or naive."}
    )


@dataclass
class CurriculumArguments:
    """Growing lengths."""

    curriculum_stages: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Longest text of each stage, in segments."}
    )
    stage_max_steps: list[int] = field(
        default_factory=lambda: [500], metadata={"help": "Step limit of each stage (one number: of every stage)."}
    )
    promotion_accuracy: float = field(
        default=0.95,
        metadata={"help": "A stage but the last ends early at this held-out accuracy (0..1) on its longest text."},
    )
    vary_lengths: bool = field(
        default=True, metadata={"help": "Stage n draws --min_segments..n segments per step; off: always n."}
    )
    min_segments: int = field(default=1, metadata={"help": "Shortest text that --vary_lengths draws, in segments."})
    stage_lr_decay: float = field(
        default=1.0, metadata={"help": "Peak learning rate of a stage as a share (0..1] of that of the stage before."}
    )
    eval_samples: int = field(
        default=64,
        metadata={"help": "Held-out samples per evaluation, over all ranks; rounded up to whole evaluation batches."},
    )

    def __post_init__(self):
        _check_counts(self, "eval_samples")
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
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, trackio, … or none."})
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
        # transformers refuses bf16 without a GPU unless told that the CPU is meant, and DeepSpeed looks for a GPU by itself
        told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        self.use_cpu = self.use_cpu or told or not torch.accelerator.is_available()
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__post_init__()
        if self.use_cpu and (self.activation_checkpointing_kwargs or {}).get("offload"):
            raise UsageError("`--activation_checkpointing_kwargs` offload moves to the CPU what is there: leave it out")


class Parser(TrlParser):
    """TRL's parser; an unknown flag or key, or a value of the wrong type, is one line and exit code 2."""

    def error(self, message: str):
        raise UsageError(message)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        for flag in unknown:
            if flag.startswith("--"):
                self._refuse("flag", flag.split("=")[0], [o for a in self._actions for o in a.option_strings])
        return namespace, unknown

    def _refuse(self, kind: str, name: str, known: list[str]):
        raise UsageError(f"unknown {kind} `{name}`{suggest(name, known, quote='`') or '; see --help'}")


def parse_arguments(
    *dataclass_types, default_config: str | os.PathLike, description: str, args: list[str] | None = None
) -> tuple:
    """One instance per dataclass type, from the command line over `--config FILE` over the defaults.

    Args:
        default_config: the YAML file used where no `--config` is given.

    Raises:
        UsageError: unknown key or flag (with a "did you mean"), a value of the wrong type, an unreadable file.
    """
    parser = Parser(
        dataclass_types,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=f"YAML file of any of these keys; default: {os.path.basename(default_config)}")
    args = list(sys.argv[1:] if args is None else args)
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    config_path = str(default_config)
    while "--config" in args[:-1]:  # the last one wins, as with any flag
        position = args.index("--config")
        config_path = args[position + 1]
        del args[position : position + 2]
    parser.set_defaults_with_config(**_read_config(config_path, parser))
    try:
        return tuple(parser.parse_args_into_dataclasses(args=args)[: len(dataclass_types)])
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(one_line(error)) from None


def _read_config(path: str, parser: Parser) -> dict:
    try:
        with open(path) as file:
            config = yaml.safe_load(file) or {}
    except OSError as error:
        folder = os.path.dirname(path) or "."
        there = sorted(n for n in os.listdir(folder) if n.endswith((".yaml", ".yml"))) if os.path.isdir(folder) else []
        raise UsageError(
            f"`--config` {path}: {error.strerror}" + (f"; {folder} holds {', '.join(there)}" if there else "")
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"`--config` {path} is not YAML: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise UsageError(f"`--config` {path} must be a mapping of keys to values; got {type(config).__name__}")
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    for key in config:
        if key not in known:
            parser._refuse(f"key in {path}", str(key), known)
    for action in parser._actions:
        # argparse converts string defaults only: bring "1e-4", which YAML reads as a string, and numbers to their type
        value, many = config.get(action.dest), action.nargs in ("+", "*")
        if (
            value is None
            or action.type is None
            or isinstance(value, dict)
            or (isinstance(value, list) and action.type is str)
        ):
            continue
        try:
            values = [action.type(str(v)) for v in (value if many and isinstance(value, list) else [value])]
        except (ValueError, argparse.ArgumentTypeError):
            raise UsageError(f"key `{action.dest}` in {path}: {value!r} is not a valid value; see --help") from None
        config[action.dest] = values if many else values[0]
    return config


def as_dict(*instances) -> dict:
    return {k: v for instance in instances for k, v in dataclasses.asdict(instance).items()}
