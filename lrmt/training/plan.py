"""`--dry_run`: what would be trained, and about how much memory it takes. Loads a config, no weights."""

from __future__ import annotations

import os

import torch
from peft import PeftModel

from lrmt.arguments import ModelArguments, TaskArguments, TrainingArguments
from lrmt.models.cost import NF4_BYTES, shape_of
from lrmt.training.curriculum import Curriculum


def describe_plan(
    model: PeftModel,
    settings: dict,
    model_args: ModelArguments,
    task_args: TaskArguments,
    curriculum: Curriculum,
    training_args: TrainingArguments,
) -> str:
    """The plan of a run as text, of its model without weights: stages, trainable parameters, and an estimate of memory per GPU in GiB."""
    method, backbone = model.get_base_model().config, model.get_base_model().backbone
    world, stage = _sharding(training_args)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    count = sum(trainable.values())
    modules = model.get_base_model().trained_modules(settings)
    memory = sum(n for name, n in trainable.items() if any(module in name for module in modules))
    frozen = sum(p.numel() for p in backbone.parameters() if not p.requires_grad)
    precision = f"{model_args.bnb_4bit_quant_type} 4-bit" if model_args.load_in_4bit else model_args.dtype
    batch, accumulated = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    stages = zip(curriculum.stages, curriculum.max_steps, strict=True)
    rows = _estimate_memory(model, count, model_args, curriculum.stages[-1], training_args)
    lines = [
        f"backbone   {model_args.model_name_or_path} ({backbone.config.model_type}, {frozen:,} parameters, {precision})",
        f"method     {method.model_type}: " + ", ".join(f"{k} {v}" for k, v in settings.items()),
        f"task       {task_args.task}",
        "stages     " + ", ".join(f"up to {n} segments × {steps} steps" for n, steps in stages),
        f"steps      at most {curriculum.total_steps} of batch {batch * accumulated * world} "
        f"({batch} per device × {accumulated} accumulated × {world} ranks)",
        f"trainable  {count:,} parameters: LoRA {count - memory:,} in {sum('lora_' in name for name in trainable)} tensors, "
        f"memory {memory:,}",
        f"memory per GPU, estimated (ZeRO stage {stage}, {world} ranks):",
        *(f"  {name:<34} {size / 2**30:8.3f} GiB" for name, size in [*rows.items(), ("total", sum(rows.values()))]),
    ]
    if stage >= 3 and world > 1:
        whole = _backbone_bytes(backbone, model_args)
        lines.append(f"  while loading, every rank holds the whole backbone: {whole / 2**30:.3f} GiB")
    return "\n".join(lines)


def _sharding(training_args: TrainingArguments) -> tuple[int, int]:
    """The number of ranks, and the stage of ZeRO (0: none)."""
    plugin = training_args.deepspeed_plugin
    return int(os.environ.get("WORLD_SIZE", "1")), plugin.zero_stage if plugin is not None else 0


def _width(model_args: ModelArguments) -> float:
    """Bytes of a number in the backbone's precision."""
    return torch.finfo(getattr(torch, model_args.dtype)).bits / 8


def _backbone_bytes(backbone, model_args: ModelArguments) -> float:
    """Of all weights: matrices may be in 4 bits, but for embeddings and the head."""
    ends = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    head = {id(p) for part in ends for p in part.parameters()}
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    matrices = sum(p.numel() for p in frozen if p.dim() == 2 and id(p) not in head)
    wide = _width(model_args)
    return (
        matrices * (NF4_BYTES if model_args.load_in_4bit else wide) + (sum(p.numel() for p in frozen) - matrices) * wide
    )


def _estimate_memory(
    model, count: int, model_args: ModelArguments, segments: int, training_args: TrainingArguments
) -> dict[str, float]:
    """Bytes on each GPU by what they are for, with `count` trained weights and texts of so many segments."""
    method, backbone = model.get_base_model().config, model.get_base_model().backbone
    world, stage = _sharding(training_args)
    sharded = world if stage >= 3 else 1
    under_deepspeed = training_args.deepspeed_plugin is not None
    wide, batch = _width(model_args), training_args.per_device_train_batch_size
    trained_width = wide if under_deepspeed else 4
    state_bytes = 2 * 4 + (4 if under_deepspeed else 0)  # Adam's two moments; fp32 copies beside 16-bit trainables
    # PEFT keeps what it trains in full twice: as it was, too
    frozen = (p for name, p in model.named_parameters() if not p.requires_grad and ".original_module." in name)
    copies = sum(p.numel() for p in frozen)
    kept, shape = method.activations(segments), shape_of(backbone)
    per_segment = batch * wide * shape.layers * shape.layer_numbers(kept.positions)
    return {
        "frozen backbone": (_backbone_bytes(backbone, model_args) + copies * trained_width) / sharded,
        "trainable weights and gradients": count * trained_width * 2 / sharded,
        "optimizer states": count * state_bytes / (world if stage >= 2 else 1),
        f"activations of {kept.live} segment(s)": per_segment * kept.live,
        f"memory states of {segments} segments": batch * shape.width * (kept.carried * wide + kept.single * 4),
    }
