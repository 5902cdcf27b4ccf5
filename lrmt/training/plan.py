"""`--dry_run`: what would be trained, and about how much memory it takes. Loads a config, no weights."""

from __future__ import annotations

import os

import torch

from lrmt.arguments import ModelArguments, TaskArguments, TrainingArguments
from lrmt.models.base import LongContextModel
from lrmt.training.build import build_empty_model
from lrmt.training.curriculum import Curriculum

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, its block's constant, that constant's own block


def describe_plan(
    model_class: type[LongContextModel],
    settings: dict,
    model_args: ModelArguments,
    task_args: TaskArguments,
    curriculum: Curriculum,
    training_args: TrainingArguments,
) -> str:
    """The plan of a run as text: stages, trainable parameters, and an estimate of memory per GPU in GiB."""
    model = build_empty_model(model_class, model_args, settings)
    method, backbone = model.get_base_model().config, model.get_base_model().backbone
    config = backbone.config
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    memory = sum(n for name, n in trainable.items() if any(module in name for module in model_class.memory_modules))
    lora = sum(trainable.values()) - memory
    head = {
        id(p) for part in (backbone.get_input_embeddings(), backbone.get_output_embeddings()) for p in part.parameters()
    }
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    in_4bit = sum(p.numel() for p in frozen if p.dim() == 2 and id(p) not in head)
    unquantised = sum(p.numel() for p in frozen) - in_4bit
    wide = torch.finfo(getattr(torch, model_args.dtype)).bits / 8
    weights = in_4bit * (NF4_BYTES if model_args.load_in_4bit else wide) + unquantised * wide
    world = int(os.environ.get("WORLD_SIZE", "1"))
    plugin = training_args.deepspeed_plugin
    stage = plugin.zero_stage if plugin is not None else 0
    sharded = world if stage >= 3 else 1
    count = sum(trainable.values())
    master = 4 if plugin is not None else 0  # fp32 copies beside 16-bit trainables
    width = wide if plugin is not None else 4
    states = count * (2 * 4 + master) / (world if stage >= 2 else 1)
    batch = training_args.per_device_train_batch_size
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    segments = curriculum.stages[-1]
    method.check_training(segments, num_ranks=world, task=task_args.task, use_peft=model_args.use_peft)
    kept = method.activations(segments)
    # kept for the backward pass of one layer: residual, norms, q k v o, and the MLP's three wide tensors
    per_segment = batch * kept.positions * layers * wide * (8 * hidden + 3 * inner)
    boundary = batch * kept.carried * hidden * wide
    rows = [
        ("frozen backbone", weights / sharded),
        ("trainable weights and gradients", count * width * 2 / sharded),
        ("optimizer states", states),
        (f"activations of {kept.live} segment(s)", per_segment * kept.live),
        (f"memory states of {segments} segments", boundary),
    ]
    total = sum(size for _, size in rows)
    optimizer_steps = curriculum.total_steps
    effective = batch * training_args.gradient_accumulation_steps * world
    lines = [
        f"backbone   {model_args.model_name_or_path} ({config.model_type}, {sum(p.numel() for p in frozen):,} parameters, "
        + (f"{model_args.bnb_4bit_quant_type} 4-bit" if model_args.load_in_4bit else model_args.dtype)
        + ")",
        f"method     {method.model_type}: " + ", ".join(f"{k} {v}" for k, v in settings.items()),
        f"task       {task_args.task}",
        "stages     "
        + ", ".join(
            f"up to {n} segments × {s} steps" for n, s in zip(curriculum.stages, curriculum.max_steps, strict=True)
        ),
        f"steps      at most {optimizer_steps} of batch {effective} "
        f"({batch} per device × {training_args.gradient_accumulation_steps} accumulated × {world} ranks)",
        f"trainable  {count:,} parameters: LoRA {lora:,} in {sum('lora_' in name for name in trainable)} tensors, memory {memory:,}",
        f"memory per GPU, estimated (ZeRO stage {stage}, {world} ranks):",
        *(f"  {name:<34} {size / 2**30:8.3f} GiB" for name, size in rows),
        f"  {'total':<34} {total / 2**30:8.3f} GiB",
    ]
    if sharded > 1:
        lines.append(f"  while loading, every rank holds the whole backbone: {weights / 2**30:.3f} GiB")
    return "\n".join(lines)
