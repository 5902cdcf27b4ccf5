"""An adapter on disk: saved, audited, and opened again by `lrmt.load`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import lrmt
from lrmt.adapters.backbone import backbone_fingerprint, load_backbone
from lrmt.adapters.find import ADAPTER_FILES, find_adapter
from lrmt.errors import TrainingFault, UsageError, one_line
from lrmt.models.base import LongContextModel


def save_adapter(
    model: PeftModel, directory: str | os.PathLike, tokenizer=None, state_dict: dict | None = None
) -> None:
    """Writes a PEFT adapter, the wrapper's `config.json`, the tokenizer and a card; audits them before they take their place.

    Args:
        state_dict: the gathered weights of the trainables under ZeRO-3; default: the model's own.
    """
    directory = Path(directory)
    temporary = directory / "writing.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # save_embedding_layers=False: PEFT would look the backbone up on the Hub, and lrmt never trains its embeddings
    model.save_pretrained(temporary, state_dict=state_dict, save_embedding_layers=False)
    config = model.get_base_model().config
    config.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_card(config))
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    adapter = f".{model.active_adapter}"  # PEFT leaves it out of the names in the file
    try:
        audit_adapter(temporary, [name.replace(".modules_to_save", "").replace(adapter, "") for name in trained])
    except TrainingFault:
        shutil.rmtree(temporary)
        raise
    for path in temporary.iterdir():
        os.replace(path, directory / path.name)
    temporary.rmdir()


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


def load(
    path_or_hub_id: str | os.PathLike,
    *,
    load_in_4bit: bool | None = None,
    dtype: torch.dtype | str | None = None,
    model_name_or_path: str | None = None,
    device_map: dict | None = None,
    **reading,
) -> PeftModel | LongContextModel:
    """Opens an adapter over its backbone, or a merged checkpoint, ready for `read` and `generate`.

    Args:
        path_or_hub_id: folder or Hub id. load_in_4bit: quantise the backbone (default: as the adapter was trained).
        dtype: of the backbone (default: as the adapter was trained). model_name_or_path: another place of the backbone.
        reading: the method's `reading_settings` to be changed, for landmark attention `top_k`, `retrieval`, `offload_blocks`.

    Raises:
        UsageError: nothing there, a half-written folder, or an adapter of another backbone.
    """
    path = find_adapter(path_or_hub_id)
    if not (path / "adapter_config.json").exists() and (path / "config.json").exists():
        return _load_merged(path, load_in_4bit, dtype, reading)
    missing = [name for name in ADAPTER_FILES if not (path / name).is_file()]
    if missing:
        raise UsageError(f"`--adapter_path` {path_or_hub_id}: not a whole adapter, {' and '.join(missing)} missing")
    config = _read_config(path, reading)
    quantised = config.backbone_quantization is not None if load_in_4bit is None else load_in_4bit
    if dtype is None:
        dtype = config.backbone_config.dtype or (torch.bfloat16 if quantised else torch.float32)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    quantization_config = None
    if quantised:
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.backbone_quantization or "nf4",
            bnb_4bit_use_double_quant=getattr(config, "backbone_nested_quant", True),
            bnb_4bit_compute_dtype=dtype,
        )
    backbone = load_backbone(
        model_name_or_path or config.backbone_name,
        revision=config.backbone_revision,
        quantization_config=quantization_config,
        dtype=dtype,
        device_map=device_map,
    )
    found = backbone_fingerprint(backbone)
    if config.backbone_fingerprint is not None and found != config.backbone_fingerprint:
        raise UsageError(
            f"`--adapter_path` {path_or_hub_id}: it was trained on another backbone ({config.backbone_name}, fingerprint "
            f"{config.backbone_fingerprint}) than {model_name_or_path or config.backbone_name} ({found}); name that one"
        )
    attention = backbone.config._attn_implementation
    config.backbone_config = backbone.config
    config._attn_implementation = attention
    model = AutoModelForCausalLM._model_mapping[type(config)](config, backbone)
    try:
        return PeftModel.from_pretrained(model, str(path)).eval()
    except Exception as error:
        raise UsageError(f"`--adapter_path` {path_or_hub_id}: {one_line(error)}") from None


def _read_config(path: Path, reading: dict):
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"`--adapter_path` {path}: config.json cannot be read ({one_line(error)})") from None
    if not hasattr(config, "backbone_config"):
        raise UsageError(f"`--adapter_path` {path}: its config.json is not of an lrmt model but of {config.model_type}")
    for name in reading:
        if name not in config.reading_settings:
            known = ", ".join(config.reading_settings) or "none"
            raise UsageError(
                f"`--{name}` is no setting of how a {config.model_type} model reads (known: {known}); leave it out"
            )
    return type(config).from_dict(config.to_dict() | reading) if reading else config


def _load_merged(path: Path, load_in_4bit: bool | None, dtype, reading: dict) -> LongContextModel:
    if load_in_4bit:
        raise UsageError(
            f"`--load_in_4bit`: {path} is a merged checkpoint, which is opened as saved; leave the flag out"
        )
    config = _read_config(path, reading)
    try:
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype or "auto").eval()
    except Exception as error:
        raise UsageError(f"`--adapter_path` {path}: {one_line(error)}") from None
