"""Flags of transformers and TRL that would change nothing here, or not what they say: refused unless they have their default."""

from __future__ import annotations

import dataclasses

from lrmt.errors import UsageError


def _each(remedies: dict[str, str]) -> dict[str, str]:
    """The remedy of each flag, from flags in one string by their remedy."""
    return {name: remedy for remedy, names in remedies.items() for name in names.split()}


#: what to do instead of a flag of transformers' `TrainingArguments`
TRAINING = _each(
    {
        "Stages have limits of their own: set `--stage_max_steps`": "max_steps num_train_epochs",
        "The loss is the mean over a batch's answer tokens, on each rank: leave it out": (
            "label_smoothing_factor average_tokens_across_devices"
        ),
        "Texts of a step have one length, drawn from step and rank: leave it out": (
            "train_sampling_strategy length_column_name dataloader_drop_last dataloader_num_workers "
            "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context "
            "dataloader_in_order remove_unused_columns label_names data_seed accelerator_config ignore_data_skip"
        ),
        "Set `--per_device_train_batch_size` to what fits (`--dry_run` estimates it)": "auto_find_batch_size",
        "Held-out accuracy is measured in training's precision and batches: leave it out": (
            "bf16_full_eval fp16_full_eval prediction_loss_only eval_do_concat_batches eval_use_gather_object "
            "eval_accumulation_steps include_for_metrics batch_eval_metrics do_predict"
        ),
        "The memory replaces the backbone's cache: leave it out": "use_cache",
        "Its kernels do not know memory models: leave it out": "use_liger_kernel liger_kernel_config",
        "A loss that is not finite ends a run and is explained: leave it out": "logging_nan_inf_filter debug",
        "Set `--compile_layers true`": "torch_compile torch_compile_backend torch_compile_mode",
        "`--dry_run` estimates memory: leave it out": "skip_memory_metrics",
        "Checkpoints come every `--save_steps`: leave it out": (
            "enable_jit_checkpoint restore_callback_states_from_checkpoint"
        ),
        "What lies in `--output_dir` is pushed once, after training: leave it out": "hub_always_push",
        "Launch with one of ds_configs/zero*.yaml to shard": "fsdp fsdp_config parallelism_config",
        "LoRA is of low rank already: take another `--optim` and leave it out": "optim_target_modules",
    }
)

#: what to do instead of a flag of TRL's `ModelConfig`; `trust_remote_code` is one in some of its versions
MODEL = _each(
    {
        "The memory trains beside LoRA, embeddings and head never do: leave it out": "lora_modules_to_save",
        "Name layers with `--lora_target_modules`": "lora_target_parameters",
        "Every method here is a causal language model: leave it out": "lora_task_type",
        "Code from the Hub is never run: name a backbone that transformers knows": "trust_remote_code",
    }
)


#: flags of `TrainingArguments` with the values that are left of them, and what to do instead
HONOURED_VALUES = {
    "eval_strategy": (
        ("steps",),
        "Held-out accuracy ends stages: say how often it is measured with `--eval_steps` and `--eval_delay`",
    ),
    "hub_strategy": (("end",), "What lies in `--output_dir` is pushed once, after training: leave it out"),
    "metric_for_best_model": (
        (None, "loss", "eval_loss", "accuracy", "eval_accuracy"),
        "Choose loss or accuracy: what an evaluation measures",
    ),
}
#: with the beginnings of values that are refused
REFUSED_VALUES = {
    "lr_scheduler_type": (
        ("reduce_lr_on_plateau", "greedy"),
        "The rate follows the steps of a stage: choose linear, cosine, …",
    ),
    "optim": (
        ("galore", "apollo", "lomo", "adalomo", "schedule_free"),
        "It needs training loops of its own, and LoRA is small: choose adamw_torch, adamw_bnb_8bit, …",
    ),
}


def refuse_unsupported(arguments, remedies: dict[str, str]) -> None:
    """Raises `UsageError` for the first flag of `remedies` that does not have its default in the dataclass `arguments`."""
    for field in dataclasses.fields(arguments):
        if field.name not in remedies:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(arguments, field.name)
        if value != default and (value or default):  # an old run's file may have [] for ""
            raise UsageError(f"`--{field.name}` is not supported; got {value}. {remedies[field.name]}")


def refuse_values(arguments) -> None:
    """Raises `UsageError` for flags of transformers' `TrainingArguments` of which lrmt honours some values only."""
    for name, (values, remedy) in HONOURED_VALUES.items():
        value = getattr(arguments, name)
        value = getattr(value, "value", value)  # an enum's
        if value not in values:
            raise UsageError(f"`--{name}` {value} is not supported. {remedy}")
    for name, (beginnings, remedy) in REFUSED_VALUES.items():
        value = getattr(arguments, name)
        value = getattr(value, "value", value)
        if str(value).startswith(beginnings):
            raise UsageError(f"`--{name}` {value} is not supported. {remedy}")
