"""From a backbone to a trainable model: quantise, wrap, LoRA."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import get_peft_config, get_quantization_config

from lrmt.adapters.adapter import check_savable, read_config, saved_tensors
from lrmt.adapters.backbone import (
    backbone_fingerprint,
    build_empty,
    check_compilable,
    compile_layers,
    load_backbone,
    quantization_of,
    read_backbone_config,
)
from lrmt.adapters.find import check_whole, find_adapter, is_adapter
from lrmt.arguments import ModelArguments
from lrmt.errors import UsageError, one_line
from lrmt.models.base import LongContextModel

INIT_FLAG = "`--init_adapter_path`"


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
    packed, *quantization = _quantization(model_args, sharded)
    if packed and os.environ.get("RANK", "0") == "0":
        print(f"{model_args.model_name_or_path} is in 4 bits already ({quantization[0]}): trained over as it is")
    backbone = load_backbone(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        quantization_config=get_quantization_config(model_args),
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        device_map=device_map,
    )
    model = model_class.from_backbone(
        backbone,
        backbone_revision=model_args.model_revision,
        backbone_fingerprint=backbone_fingerprint(backbone),
        **settings,
    )
    model.config.backbone_quantization, model.config.backbone_nested_quant = quantization
    # the name as the user gave it: a shipped backbone's folder is a path of this machine
    model.config.backbone_name = model.config._name_or_path = model_args.model_name_or_path
    model.config.backbone_config._name_or_path = model_args.model_name_or_path
    peft_model = _add_lora(model, model_args, settings, autocast_adapter_dtype=not sharded)
    dtype = getattr(torch, model_args.dtype) if sharded else torch.float32
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if model_args.init_adapter_path is not None:
        _start_from(peft_model, model_args.init_adapter_path)
    if model_args.compile_layers:
        compile_layers(peft_model)
    return peft_model


def build_empty_model(
    model_class: type[LongContextModel], model_args: ModelArguments, settings: dict, *, sharded: bool = False
) -> PeftModel:
    """The same model without weights, on the meta device: what of it can be refused is, in a second or two.

    Raises:
        UsageError: as `build_model`, but for what only weights can show.
    """
    if model_args.compile_layers:
        check_compilable(model_class)
    if model_args.compile_layers and sharded:
        raise UsageError(
            "`--compile_layers true`: DeepSpeed gathers weights between the steps of a layer; leave it out, or launch without ds_configs"
        )
    if model_args.init_adapter_path is not None:  # before anything takes time
        check_whole(find_adapter(model_args.init_adapter_path, INIT_FLAG), INIT_FLAG)
    _quantization(model_args, sharded)
    name, attention = model_args.model_name_or_path, model_args.attn_implementation
    backbone = build_empty(
        read_backbone_config(name, revision=model_args.model_revision, attn_implementation=attention)
    )
    with torch.device("meta"):
        model = _add_lora(model_class.from_backbone(backbone, **settings), model_args, settings)
    check_savable(model)
    if model_args.init_adapter_path is not None:
        _check_start(model, model_args.init_adapter_path)
    return model


def _quantization(model_args: ModelArguments, sharded: bool) -> tuple[bool, str | None, bool]:
    """Whether the checkpoint is in 4 bits already, which stays as it is; the kind of 4 bits that the backbone will have (None: it
    is not quantised), and whether its constants are quantised too. Raises `UsageError` where the flags say otherwise.
    """
    name, flag = model_args.model_name_or_path, f"`--model_name_or_path` {model_args.model_name_or_path}"
    packed = quantization_of(read_backbone_config(name, revision=model_args.model_revision))
    if packed is None:
        kind = model_args.bnb_4bit_quant_type if model_args.load_in_4bit else None
        return False, kind, model_args.use_bnb_nested_quant
    kind, storage = packed.get("bnb_4bit_quant_type", "fp4"), packed.get("bnb_4bit_quant_storage", "uint8")
    if not model_args.load_in_4bit:
        raise UsageError(
            f"`--load_in_4bit false`: {flag} is in 4 bits already ({kind}); leave the flag out, or name the full weights"
        )
    if sharded and storage != model_args.dtype:
        raise UsageError(
            f"{flag} stores its 4 bits as {storage}, which ZeRO cannot gather beside {model_args.dtype}; name the full weights"
        )
    return True, kind, packed.get("bnb_4bit_use_double_quant", False)


def _add_lora(model: LongContextModel, model_args: ModelArguments, settings: dict, **options) -> PeftModel:
    """Freezes all but LoRA and the memory."""
    model.name_or_path = model_args.model_name_or_path
    if model_args.use_peft and model_args.use_dora and model_args.load_in_4bit and is_deepspeed_zero3_enabled():
        raise UsageError(
            "`--use_dora` over 4 bits does not run under ZeRO-3, which takes apart the weights that it measures; use ZeRO-2, "
            "`--load_in_4bit false`, or leave it out"
        )
    try:
        peft_config = get_peft_config(model_args) or LoraConfig(
            task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES
        )
        peft_config.modules_to_save = model.trained_modules(settings)
        peft_config.base_model_name_or_path = model_args.model_name_or_path
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return get_peft_model(model, peft_config, **options)
    except Exception as error:  # raised for names that match nothing, and for layers that LoRA does not know
        if model_args.lora_target_modules is None:
            raise UsageError(f"`--use_peft`: LoRA cannot be added as asked for: {one_line(error)}") from None
        raise UsageError(
            f"`--lora_target_modules` {model_args.lora_target_modules}: {str(error).split('. ')[0]}; name layers of "
            f"{type(model.backbone).__name__}, or leave the flag out for every linear one"
        ) from None


def _start_from(model: PeftModel, path_or_hub_id: str) -> None:
    """Copies a trained adapter's LoRA and memory into a new one; of a larger memory, the adapter's vectors come first."""
    path = _check_start(model, path_or_hub_id)
    weights, fresh = load_file(path / "adapter_model.safetensors"), saved_tensors(model)
    for name, old in weights.items():
        if old.shape != fresh[name].shape:
            weights[name] = torch.cat([old, fresh[name][len(old) :].to(old)])
    set_peft_model_state_dict(model, weights)


def _check_start(model: PeftModel, path_or_hub_id: str) -> Path:
    """The folder of a trained adapter that the model can start from: of the same method, backbone (of an empty model nobody knows which),
    LoRA and shape, but that the memory may have fewer vectors. Raises `UsageError` for any other.
    """
    told, path = f"{INIT_FLAG} {path_or_hub_id}", find_adapter(path_or_hub_id, INIT_FLAG)
    check_whole(path, INIT_FLAG)
    if not is_adapter(path):
        raise UsageError(f"{told} is no adapter, but a merged checkpoint; name what training wrote")
    base, saved = model.get_base_model(), read_config(path, INIT_FLAG)
    for name in ("model_type", "backbone_fingerprint", *base.later_state_settings):
        mine = getattr(base.config, name)
        if mine is not None and getattr(saved, name) != mine:
            raise UsageError(f"{told} has {name} {getattr(saved, name)}; this run has {mine}; they must agree")
    try:
        theirs = LoraConfig.from_pretrained(str(path))
    except Exception as error:
        raise UsageError(f"{told}: adapter_config.json cannot be read ({one_line(error)}); copy it again") from None
    shapes = {name: list(tensor.shape) for name, tensor in saved_tensors(model).items()}
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        of_theirs = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    lora, lora_of_theirs = _lora_flags(model.peft_config["default"], shapes), _lora_flags(theirs, of_theirs)
    for name, value in lora_of_theirs.items():
        if value != lora[name]:
            old, mine = map(_spell, (value, lora[name]))
            raise UsageError(f"{told} was trained with {name} {old}; got `--{name}` {mine}; give that of the adapter")
    for name in shapes.keys() & of_theirs.keys():
        mine, old = shapes[name], of_theirs[name]
        if name.split(".")[-2] in base.memory_modules and mine[0] > old[0] and mine[1:] == old[1:]:
            of_theirs[name] = mine
    if shapes != of_theirs:
        name = next(name for name in sorted({*shapes, *of_theirs}) if shapes.get(name) != of_theirs.get(name))
        got, want = (of.get(name, "none") for of in (of_theirs, shapes))
        raise UsageError(f"{told} has {name} of shape {got}, this run {want}; use as large a memory, or a larger one")
    return path


def _lora_flags(config: LoraConfig, names: Iterable[str]) -> dict:
    """What makes LoRA's function of its weights, by flag; the layers that have it, by the `names` of their weights."""
    if config.target_modules == DUMMY_TARGET_MODULES:
        return {"use_peft": False}
    return {
        "use_peft": True,
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_target_modules": sorted({name.split(".lora_")[0] for name in names if ".lora_" in name}),
    }


def _spell(value: object) -> object:
    """Of layers, what they are called wherever they are."""
    return " ".join(sorted({layer.split(".")[-1] for layer in value})) if isinstance(value, list) else value


def trainable_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
