"""Merging an adapter into its backbone, offline, on CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer

from lrmt.errors import UsageError
from lrmt.training.checkpoint import load


def merge_adapter(adapter_path: str, output_dir: str, merge_base: str = "original", dtype: str = "float32") -> dict[str, float]:
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
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"`--output_dir` {output} is not empty; name another folder")
    as_trained = load(adapter_path)
    if not isinstance(as_trained, PeftModel):
        raise UsageError(f"`--adapter_path` {adapter_path} is a merged checkpoint already; name an adapter")
    config = as_trained.get_base_model().config
    length = config.segment_length
    ids = torch.randint(0, config.vocab_size, (2, 2 * length + length // 2), generator=torch.Generator().manual_seed(0))
    trained_logits = _logits(as_trained, ids)
    del as_trained
    model = load(adapter_path, load_in_4bit=False, dtype=dtype)
    if merge_base == "nf4_roundtrip":
        roundtrip_nf4_(model.get_base_model().backbone)
    unmerged_logits = _logits(model, ids)
    merged = model.merge_and_unload()
    merged.config.backbone_quantization = None
    merged.memory_embedding.to(getattr(torch, dtype))
    gaps = {
        "same_base": _gap(_logits(merged, ids), unmerged_logits),
        "as_trained": _gap(_logits(merged, ids), trained_logits),
    }
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(adapter_path).save_pretrained(temporary)
    if output.is_dir():
        output.rmdir()
    temporary.rename(output)
    return gaps


def roundtrip_nf4_(backbone: nn.Module) -> None:
    """Replaces every linear weight but the head's by its NF4 double-quantised value, in place."""
    head = backbone.get_output_embeddings()
    for module in backbone.modules():
        weight = getattr(module, "base_layer", module)
        if isinstance(weight, nn.Linear) and weight is not head and "lora" not in type(module).__module__.split(".")[-1:]:
            data = weight.weight.data
            packed, state = quantize_4bit(data.contiguous(), quant_type="nf4", compress_statistics=True)
            weight.weight.data = dequantize_4bit(packed, state).to(data)


@torch.no_grad()
def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def _gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())
