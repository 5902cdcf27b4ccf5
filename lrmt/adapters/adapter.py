"""An adapter on disk: saved, audited, and opened again by `lrmt.load`."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

import lrmt
from lrmt.adapters.backbone import (
    backbone_fingerprint,
    check_complete,
    computes_bf16,
    dequantise_,
    load_backbone,
    load_tokenizer,
)
from lrmt.adapters.find import check_whole, find_adapter, find_backbone, is_adapter
from lrmt.errors import TrainingFault, UsageError, one_line
from lrmt.files import filling
from lrmt.models import METHODS, LongContextConfig, LongContextModel

if TYPE_CHECKING:  # importing it takes as long as torch does, and a merged checkpoint has no need of it
    from peft import PeftModel

ADAPTER = "--adapter_path"
GENERATION_FILE = "generation_config.json"


# ---------------------------------------------------------------------- open


def load(
    path_or_hub_id: str | os.PathLike,
    *,
    load_in_4bit: bool | None = None,
    dequantize: bool = False,
    dtype: torch.dtype | str | None = None,
    model_name_or_path: str | None = None,
    device_map: dict | str | None = None,
    **reading,
) -> PeftModel | LongContextModel:
    """Opens an adapter over its backbone, or a merged checkpoint, ready for `read` and `generate`.

    Args:
        path_or_hub_id: folder or Hub id. load_in_4bit: quantise the backbone (default: as the adapter was trained). An adapter that
            was trained over 4 bits may forget over the full weights.
        dequantize: put full weights of the same values in place of 4-bit ones: what is computed is the same, 1.4 times as fast where
            SmolLM2 reads on a CPU, at four times the memory.
        dtype: of the backbone (default: as the adapter was trained, but float32 for bfloat16 on a CPU that only imitates it, many times
            slower). model_name_or_path: another place of the backbone.
        device_map: where the weights go, as transformers takes it (default: the CPU).
        reading: the method's `reading_settings` to be changed, for landmark attention `top_k`, `retrieval`, `offload_blocks`.

    Raises:
        UsageError: nothing there, a half-written folder, or an adapter of another backbone.
    """
    path = find_adapter(path_or_hub_id)
    check_whole(path)
    config = read_config(path, **reading)
    precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(precision, torch.dtype) and precision.is_floating_point):
        raise UsageError(f"`dtype` must be bfloat16, float32 or float16; got {dtype}")
    if not is_adapter(path):
        given = {"load_in_4bit": load_in_4bit, "dequantize": dequantize, "model_name_or_path": model_name_or_path}
        for flag, value in given.items():
            if value:
                raise UsageError(
                    f"`--{flag}`: {path} is a merged checkpoint, which is opened as saved; leave the flag out"
                )
        return _open_merged(path, config, precision, device_map)
    backbone = _open_backbone(path, config, load_in_4bit, dequantize, precision, model_name_or_path, device_map)
    backbone.config._name_or_path = config.backbone_name  # where it was found is a path of this machine
    config.backbone_config = backbone.config
    config._attn_implementation = backbone.config._attn_implementation
    model = METHODS[config.model_type](config, backbone)
    model.generation_config = read_generation_config(path, backbone)
    return _add_adapter(model, path)


def read_config(path: str | os.PathLike, flag: str = ADAPTER, **reading) -> LongContextConfig:
    """The config of a folder that `find_adapter` found, with the method's `reading_settings` that are to be changed."""
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise UsageError(f"{flag} {path}: config.json cannot be read ({one_line(error)})") from None
    if not isinstance(config, LongContextConfig):
        raise UsageError(f"{flag} {path} is a {config.model_type}, not an lrmt model; give what training wrote")
    if config.backbone_config is None:
        raise UsageError(f"{flag} {path}: config.json cannot be read (it has no backbone_config)")
    if config.model_type not in METHODS:
        raise UsageError(
            f"{flag} {path} is of a method that this lrmt lacks, {config.model_type}; known: {', '.join(METHODS)}"
        )
    for name in reading:
        if name not in config.reading_settings:
            known = ", ".join(config.reading_settings) or "none"
            raise UsageError(
                f"`--{name}` is no setting of how a {config.model_type} model reads (known: {known}); leave it out"
            )
    return type(config).from_dict(config.to_dict() | reading) if reading else config


def read_generation_config(path: Path, backbone: PreTrainedModel) -> GenerationConfig:
    """How an adapter generates unless told otherwise: as it was stored with it; of older folders, as the backbone, with the
    end-of-sequence token of the folder's tokenizer.
    """
    if (path / GENERATION_FILE).is_file():
        try:
            return GenerationConfig.from_pretrained(path)
        except Exception as error:
            raise UsageError(f"{ADAPTER} {path}: {GENERATION_FILE} cannot be read ({one_line(error)})") from None
    tokenizer = load_tokenizer(path, flag=ADAPTER) if (path / "tokenizer_config.json").is_file() else None
    return end_as_trained(backbone.generation_config, tokenizer)


def end_as_trained(config: GenerationConfig, tokenizer) -> GenerationConfig:
    """These settings with the tokenizer's end of sequence, in which training answers ended, and its padding."""
    config = copy.deepcopy(config)
    if tokenizer is not None:
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return config


def _open_backbone(path, config, load_in_4bit, dequantize, dtype, name, device_map) -> PreTrainedModel:
    """The backbone of an adapter, in the precision it was trained in unless told otherwise."""
    quantised = config.backbone_quantization is not None if load_in_4bit is None else load_in_4bit
    if dequantize and not quantised:
        raise UsageError(f"`--dequantize`: the backbone of {path} is not in 4 bits; leave the flag out")
    if dtype is None:
        stored = config.backbone_config.dtype or (torch.bfloat16 if quantised else torch.float32)
        dtype = getattr(torch, stored) if isinstance(stored, str) else stored
        if dtype == torch.bfloat16 and device_map in (None, "cpu", {"": "cpu"}) and not computes_bf16():
            dtype = torch.float32
    quantization_config = None
    if quantised:
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.backbone_quantization or "nf4",
            bnb_4bit_use_double_quant=getattr(config, "backbone_nested_quant", True),
            bnb_4bit_compute_dtype=dtype,
        )
    place = name or find_backbone(path, config.backbone_name)
    backbone = load_backbone(
        place,
        revision=config.backbone_revision,
        quantization_config=quantization_config,
        dtype=dtype,
        device_map=device_map,
        flag="`--model_name_or_path`" if name else f"{ADAPTER} {path}: its backbone",
    )
    found = backbone_fingerprint(backbone)
    if config.backbone_fingerprint is not None and found != config.backbone_fingerprint:
        raise UsageError(
            f"{ADAPTER} {path}: it was trained on another backbone ({config.backbone_name}, fingerprint "
            f"{config.backbone_fingerprint}) than {name or config.backbone_name} ({found}); name that one with "
            "`--model_name_or_path`"
        )
    if dequantize:
        dequantise_(backbone, dtype)
    return backbone


def _open_merged(path: Path, config: LongContextConfig, dtype, device_map) -> LongContextModel:
    method = METHODS[config.model_type]
    try:
        model, loaded = method.from_pretrained(
            path, config=config, dtype=dtype or "auto", device_map=device_map, output_loading_info=True
        )
    except Exception as error:
        raise UsageError(f"{ADAPTER} {path}: the checkpoint cannot be opened ({one_line(error)})") from None
    check_complete(loaded, f"{ADAPTER} {path}")
    return model.eval()


def _add_adapter(model: LongContextModel, path: Path) -> PeftModel:
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(model, str(path)).eval()
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            differ = sorted(saved_tensors(model).keys() ^ set(file.keys()))
    except Exception as error:
        raise UsageError(f"{ADAPTER} {path}: the adapter cannot be opened ({one_line(error)})") from None
    if differ:  # PEFT passes over them
        raise UsageError(
            f"{ADAPTER} {path}: {differ[0]}, and {len(differ) - 1} more, are in its weights or in its configuration, not in "
            "both; copy or download both again"
        )
    _share_buffers(model)
    return model


def _share_buffers(model: PeftModel) -> None:
    """Gives what runs with the adapter disabled the buffers of the adapter too: they are fitted to the backbone and do not train."""
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            fitted = dict(module.modules_to_save[module.active_adapters[0]].named_buffers())
            for name, buffer in module.original_module.named_buffers():
                buffer.copy_(fitted[name])


# ---------------------------------------------------------------------- save


def save_adapter(
    model: PeftModel, directory: str | os.PathLike, tokenizer=None, state_dict: dict | None = None
) -> None:
    """Writes a PEFT adapter, the wrapper's `config.json`, how it generates, the tokenizer and a card; audits them before they
    take their place.

    Args:
        tokenizer: the one that training answers ended in; what the adapter generates ends as they did.
        state_dict: the gathered weights of the trainables under ZeRO-3; default: the model's own.
    """
    base = model.get_base_model()
    with filling(directory, last="config.json") as folder:
        # save_embedding_layers=False: PEFT would look the backbone up on the Hub, and lrmt never trains its embeddings
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        base.config.save_pretrained(folder)
        write_generation_config(folder, end_as_trained(base.generation_config, tokenizer))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(base.config), encoding="utf-8")
        audit_adapter(folder, saved_tensors(model))


def write_generation_config(folder: Path, config: GenerationConfig) -> None:
    """As transformers does, but whatever is in it: many published ones fail its own checks once a setting is changed."""
    config.to_json_file(folder / GENERATION_FILE, use_diff=True, keys_to_pop=["compile_config", "_from_model_config"])


def saved_tensors(model: PeftModel, keep_vars: bool = False) -> dict[str, torch.Tensor]:
    """What PEFT saves of a model, by the names in its file; with `keep_vars` the parameters themselves."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, model.state_dict(keep_vars=keep_vars), save_embedding_layers=False)


def check_savable(model: PeftModel) -> None:
    """Raises `UsageError` for what would train and not be saved: before a run is spent on it."""
    saved = {id(tensor) for tensor in saved_tensors(model, keep_vars=True).values()}
    lost = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in saved
    ]
    if lost:
        raise UsageError(
            f"{lost[0]} and {len(lost) - 1} more would train, but PEFT does not save them; train LoRA and the memory alone"
        )


def audit_adapter(directory: str | os.PathLike, expected: Iterable[str] = ()) -> None:
    """Reopens a saved adapter; raises `TrainingFault` on an empty, missing (of those `expected`) or non-finite tensor."""
    with safe_open(Path(directory) / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            if tensor.numel() == 0:
                raise TrainingFault(f"saved adapter {directory}: tensor {name} is empty, of shape {list(tensor.shape)}")
            if not bool(torch.isfinite(tensor.float()).all()):
                raise TrainingFault(f"saved adapter {directory}: tensor {name} is not finite")
    if missing := sorted(set(expected) - set(names)):
        raise TrainingFault(f"saved adapter {directory}: {missing[0]} is missing, and {len(missing) - 1} more")
    modules = json.loads((Path(directory) / "adapter_config.json").read_text())["modules_to_save"] or []
    for module in modules:
        if not any(f".{module}." in f".{name}" for name in names):
            raise TrainingFault(f"saved adapter {directory}: {module} is missing")


def _card(config) -> str:
    backbone = config.backbone_name or "unknown"
    quantised = f", over {config.backbone_quantization} weights" if config.backbone_quantization else ""
    return (
        "---\nlibrary_name: lrmt\n"
        + (f"base_model: {backbone}\n" if backbone.count("/") == 1 and not Path(backbone).exists() else "")
        + f"tags:\n- {config.model_type}\n- long-context\n---\n\n# {config.model_type} adapter\n\n"
        f"A long-memory adapter (LoRA and memory embeddings) for `{Path(backbone).name}`{quantised}, trained with lrmt "
        f'{lrmt.__version__}.\n\n```python\nimport lrmt\n\nmodel = lrmt.load("path/to/this/folder")\n```\n'
    )
