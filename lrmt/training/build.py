"""From a backbone to a trainable model: quantise, wrap, LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from safetensors.torch import load_file
from trl import get_peft_config, get_quantization_config

from lrmt.adapters.backbone import backbone_fingerprint, load_backbone
from lrmt.arguments import ModelArguments
from lrmt.errors import UsageError, one_line
from lrmt.models.base import LongContextModel


def build_model(
    model_class: type[LongContextModel],
    model_args: ModelArguments,
    settings: dict,
    *,
    sharded: bool = False,
    device_map: dict | None = None,
) -> PeftModel:
    """Loads, quantises (NF4), wraps, and adds LoRA and the memory: exactly those two train.

    Args:
        model_class: the memory method. settings: fields of its config class.
        sharded: under DeepSpeed all trainables have the backbone's dtype, and 4-bit weights are stored in it, because
            ZeRO-3 gathers tensors of one dtype together; otherwise trainables are fp32.

    Returns:
        `PeftModel(model_class(backbone))`.
    """
    if sharded and model_args.load_in_4bit:
        model_args.bnb_4bit_quant_storage = model_args.dtype
    quantization_config = get_quantization_config(model_args)
    backbone = load_backbone(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        quantization_config=quantization_config,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        device_map=device_map,
    )
    model = model_class.from_backbone(
        backbone,
        backbone_revision=model_args.model_revision,
        backbone_quantization=model_args.bnb_4bit_quant_type if model_args.load_in_4bit else None,
        backbone_fingerprint=backbone_fingerprint(backbone),
        **settings,
    )
    model.config.backbone_nested_quant = model_args.use_bnb_nested_quant
    # the name as the user gave it: a shipped backbone's folder is a path of this machine
    model.config.backbone_name = model.name_or_path = model.config._name_or_path = model_args.model_name_or_path
    model.config.backbone_config._name_or_path = model_args.model_name_or_path
    peft_config = get_peft_config(model_args) or LoraConfig(task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES)
    peft_config.modules_to_save = model_class.trained_modules(settings)
    peft_config.base_model_name_or_path = model_args.model_name_or_path
    if peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"
    try:
        peft_model = get_peft_model(model, peft_config, autocast_adapter_dtype=not sharded)
    except ValueError as error:  # raised for names that match nothing, and for layers that LoRA does not know
        if model_args.lora_target_modules is None:
            raise
        raise UsageError(
            f"`--lora_target_modules` {model_args.lora_target_modules}: {str(error).split('. ')[0]}; name layers of "
            f"{type(backbone).__name__}, or leave the flag out for every linear one"
        ) from None
    dtype = getattr(torch, model_args.dtype) if sharded else torch.float32
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if model_args.init_adapter_path is not None:
        _start_from(peft_model, model_args.init_adapter_path)
    return peft_model


def _start_from(model: PeftModel, path: str) -> None:
    """Copies a trained adapter's LoRA and memory into a new one of the same method, backbone and shape."""
    flag, folder = f"`--init_adapter_path` {path}", Path(path)
    try:
        weights = load_file(folder / "adapter_model.safetensors")
        saved = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{flag} is no adapter that training wrote: {one_line(error)}") from None
    config = model.get_base_model().config
    for name in ("model_type", "backbone_fingerprint"):
        if saved.get(name) != getattr(config, name):
            raise UsageError(
                f"{flag} has {name} {saved.get(name)}; this run has {getattr(config, name)}; they must agree"
            )
    mine = {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    theirs = {name: tensor.shape for name, tensor in weights.items()}
    if mine != theirs:
        name = next(name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name))
        got, want = (list(shapes[name]) if name in shapes else "none" for shapes in (theirs, mine))
        raise UsageError(f"{flag} has {name} of shape {got}, this run {want}; use the same `--lora_r` and memory")
    set_peft_model_state_dict(model, weights)


def trainable_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
