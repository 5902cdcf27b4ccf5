"""Merging an adapter into its backbone, offline, on CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from lrmt.adapters.adapter import load, read_config, write_generation_config
from lrmt.adapters.backbone import copy_dequantised_, load_tokenizer
from lrmt.adapters.find import check_whole, find_adapter, is_adapter
from lrmt.errors import UsageError
from lrmt.files import check_writable, filling, told_as
from lrmt.models import LongContextConfig, LongContextModel

MERGE_BASES = ("original", "nf4_roundtrip")


def merge_adapter(
    adapter_path: str,
    output_dir: str,
    merge_base: str = "original",
    dtype: str = "float32",
    model_name_or_path: str | None = None,
) -> dict[str, float]:
    """Writes a checkpoint that `lrmt.load` opens without PEFT, and measures what merging changed.

    Args:
        adapter_path: folder or Hub id. model_name_or_path: another place of its backbone.
        merge_base: "original" merges into the unquantised weights; "nf4_roundtrip" into the weights that a 4-bit adapter was
            trained against, i.e. quantised to NF4 and back. Of a backbone that is published in 4 bits both are the values that
            these stand for. dtype: of the merged weights.

    Returns:
        Relative gaps ‖merged − unmerged‖ / ‖unmerged‖ of the logits, in `dtype`, to the unmerged model over the same base
        (`same_base`) and to the model as it was trained (`as_trained`).

    Raises:
        UsageError: a merge base that does not exist, an output folder that is not empty or cannot be written, or not an adapter.
    """
    path, config = _open_config(adapter_path, merge_base)
    output = _check_output(output_dir)
    tokenizer = load_tokenizer(path, flag="--adapter_path", backbone=model_name_or_path)
    backbone = {"model_name_or_path": model_name_or_path}
    ids = _draw_text(config)
    trained_logits = _logits_as_trained(path, backbone, ids)
    model = _open_over_base(path, backbone, merge_base, dtype)
    unmerged_logits = _logits(model, ids)
    merged = _merge(model, dtype)
    merged_logits = _logits(merged, ids)
    _write(merged, tokenizer, output)
    return {"same_base": _gap(merged_logits, unmerged_logits), "as_trained": _gap(merged_logits, trained_logits)}


def _open_config(adapter_path: str, merge_base: str) -> tuple[Path, LongContextConfig]:
    if merge_base not in MERGE_BASES:
        raise UsageError(f"`--merge_base` must be {' or '.join(MERGE_BASES)}; got {merge_base}")
    path = find_adapter(adapter_path)
    check_whole(path)
    config = read_config(path)
    if not is_adapter(path):
        raise UsageError(f"`--adapter_path` {adapter_path} is a merged checkpoint already; name an adapter")
    return path, config


def _check_output(output_dir: str) -> Path:
    check_writable(output_dir, "`--output_dir`")  # now: merging takes minutes
    output = Path(output_dir).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"`--output_dir` {output} is not empty; name another folder")
    return output


def _draw_text(config: LongContextConfig) -> torch.Tensor:
    """Two random texts of two and a half segments, `[2, T]`."""
    length = config.segment_length
    return torch.randint(
        0, config.vocab_size, (2, 2 * length + length // 2), generator=torch.Generator().manual_seed(0)
    )


def _logits_as_trained(path: Path, backbone: dict, ids: torch.Tensor) -> torch.Tensor:
    return _logits(load(path, **backbone), ids)


def _open_over_base(path: Path, backbone: dict, merge_base: str, dtype: str):
    """The adapter over full weights, those of the merge base."""
    model = load(path, load_in_4bit=False, dtype=dtype, **backbone)
    if merge_base == "nf4_roundtrip":
        packed = load(path, load_in_4bit=True, **backbone)
        copy_dequantised_(model.get_base_model().backbone, packed.get_base_model().backbone)
    return model


def _merge(model, dtype: str) -> LongContextModel:
    merged = model.merge_and_unload()
    merged.config.backbone_quantization = None
    for name in {*merged.memory_modules, *merged.trained_modules(merged.config.to_dict())}:
        merged.get_submodule(name).to(getattr(torch, dtype))
    return merged


def _write(merged: LongContextModel, tokenizer, output: Path) -> None:
    generation, merged.generation_config = merged.generation_config, GenerationConfig()
    with told_as("`--output_dir`", output), filling(output, last="config.json") as folder:  # without it, nobody's model
        merged.save_pretrained(folder)
        write_generation_config(folder, generation)
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def _gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())
