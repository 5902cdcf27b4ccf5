"""Merging an adapter into its backbone, offline, on CPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lrmt.adapters.adapter import load
from lrmt.adapters.backbone import keep_4bit_trainable
from lrmt.errors import UsageError


def merge_adapter(
    adapter_path: str, output_dir: str, merge_base: str = "original", dtype: str = "float32"
) -> dict[str, float]:
    """Writes a checkpoint that `lrmt.load` opens without PEFT, and measures what merging changed.

    Args:
        merge_base: "original" merges into the unquantised weights; "nf4_roundtrip" into the weights that a 4-bit adapter was
            trained against, i.e. quantised to NF4 and back. dtype: of the merged weights.

    Returns:
        Relative gaps ‖merged − unmerged‖ / ‖unmerged‖ of the logits, in `dtype`, to the unmerged model over the same base
        (`same_base`) and to the model as it was trained (`as_trained`).

    Raises:
        UsageError: a merge base that does not exist, an output folder that is not empty, or not an adapter.
    """
    if merge_base not in ("original", "nf4_roundtrip"):
        raise UsageError(f"`--merge_base` must be original or nf4_roundtrip; got {merge_base}")
    output = Path(output_dir).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"`--output_dir` {output} is not empty; name another folder")
    as_trained = load(adapter_path)
    if not isinstance(as_trained, PeftModel):
        raise UsageError(f"`--adapter_path` {adapter_path} is a merged checkpoint already; name an adapter")
    config = as_trained.get_base_model().config
    length = config.segment_length
    ids = torch.randint(0, config.vocab_size, (2, 2 * length + length // 2), generator=torch.Generator().manual_seed(0))
    keep_4bit_trainable(as_trained)  # or CPUs compute in bf16, whatever it was trained in
    trained_logits = _logits(as_trained, ids)
    del as_trained
    model = load(adapter_path, load_in_4bit=False, dtype=dtype)
    if merge_base == "nf4_roundtrip":
        packed = load(adapter_path, load_in_4bit=True)
        copy_dequantised_(model.get_base_model().backbone, packed.get_base_model().backbone)
        del packed
    unmerged_logits = _logits(model, ids)
    merged = model.merge_and_unload()
    merged.config.backbone_quantization = None
    for name in merged.memory_modules:
        merged.get_submodule(name).to(getattr(torch, dtype))
    merged_logits = _logits(merged, ids)
    gaps = {
        "same_base": _gap(merged_logits, unmerged_logits),
        "as_trained": _gap(merged_logits, trained_logits),
    }
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as temporary:
        merged.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(adapter_path).save_pretrained(temporary)
        # config.json last: without it the folder is nobody's model
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, output / path.name)
    return gaps


def copy_dequantised_(backbone: nn.Module, packed: nn.Module) -> None:
    """Gives `backbone` the weights that its 4-bit twin `packed` computes with, in place."""
    for name, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            target = backbone.get_submodule(name)
            target.weight.data = (values.T if isinstance(target, Conv1D) else values).to(target.weight).contiguous()


@torch.no_grad()
def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def _gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())
