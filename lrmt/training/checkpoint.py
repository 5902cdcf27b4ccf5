"""Checkpoints of a run: find the one to go on from, and refuse one of another run."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from lrmt.adapters.find import ADAPTER_FILES
from lrmt.errors import UsageError
from lrmt.training.curriculum import Curriculum

#: written last into a checkpoint: one without it was cut off while being written
POSITION_FILE = "curriculum.json"
#: in it: the tensor files of the checkpoint, which older ones do not list
FILES = "files"
#: what a file must say to be of use
SAID = {POSITION_FILE: ("stages", "identity"), "trainer_state.json": ("global_step",)}
#: what older checkpoints do not say, and what they had; ...: as now
JOINED_LATER = dict.fromkeys(
    ("lora_dropout", "use_rslora", "use_dora", "notes_weight", "load_in_4bit", "use_bnb_nested_quant", "dtype", "learning_rate",
     "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim"), ...
)  # fmt: skip
JOINED_LATER |= {"memory_handover": "identity", "memory_shift": False, "state_passing": 0.0, "memory_positions": False}


def find_checkpoint(output_dir: str | os.PathLike, wanted: str | bool | None) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, or true for the last whole one in `output_dir`.

    Raises:
        UsageError: the named one is missing or was cut off while being written, or there is none.
    """
    if wanted in (None, False, "", "false", "False"):
        return None
    if wanted in (True, "true", "True", "last"):
        steps = {
            int(p.name.split("-")[1]): p
            for p in Path(output_dir).glob("checkpoint-*")
            if p.name.split("-")[1].isdigit()
        }
        whole = [path for _, path in sorted(steps.items()) if _what_is_broken(path) is None]
        if not whole:
            raise UsageError(
                f"`--resume_from_checkpoint`: {output_dir} holds no whole checkpoint; name the folder of the run with "
                "`--output_dir`, or start without the flag"
            )
        return str(whole[-1])
    path = Path(wanted)
    if not path.is_dir():
        there = ", ".join(sorted(p.name for p in Path(output_dir).glob("checkpoint-*"))) or "no checkpoints"
        raise UsageError(f"`--resume_from_checkpoint` {wanted}: no such folder ({output_dir} holds {there})")
    if broken := _what_is_broken(path):
        raise UsageError(
            f"`--resume_from_checkpoint` {wanted}: half-written, {broken}; name an earlier one, or say true"
        )
    return str(path)


def check_optimizer_saved(checkpoint: str) -> None:
    """Raises `UsageError` where `--save_only_model` left the optimizer out: a run would go on along another curve."""
    path = Path(checkpoint)
    if not (path / "optimizer.pt").is_file() and not any(path.glob("global_step*")):
        raise UsageError(
            f"`--resume_from_checkpoint` {checkpoint}: saved without its optimizer (`--save_only_model`), so it cannot be gone "
            "on from; begin anew from its weights with `--init_adapter_path`"
        )


def tensor_files(checkpoint: Path) -> list[str]:
    """The files of weights, optimizer, schedule, random numbers and memories in a checkpoint, by their path in it."""
    found = [*checkpoint.glob("*"), *checkpoint.glob("global_step*/**/*")]
    return sorted(str(path.relative_to(checkpoint)) for path in found if path.suffix in (".safetensors", ".pt", ".pth"))


def _what_is_broken(checkpoint: Path) -> str | None:
    """What a checkpoint lacks that was cut off while being written, or on a disk that filled up."""
    names = [POSITION_FILE, *ADAPTER_FILES, "trainer_state.json", *tensor_files(checkpoint)]
    for name in names:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if name.endswith(".json"):
                content = json.loads(path.read_text())
                if not isinstance(content, dict) or any(content.get(key) is None for key in SAID.get(name, ())):
                    return f"{name} does not say what it should"
            elif name.endswith(".safetensors"):
                safe_open(path, "pt")
            else:  # the directory of an archive is its end
                zipfile.ZipFile(path).close()
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
            return f"{name} cannot be read"
        if name == POSITION_FILE:  # says what else must be there
            names += content.get(FILES, [])
    return None


def check_resumable(checkpoint: str, model: PeftModel, curriculum: Curriculum, identity: dict) -> None:
    """Raises `UsageError` if the checkpoint belongs to another curriculum, backbone, memory, LoRA, task or batch.

    Args:
        identity: what must be as it was, by name of the flag; the checkpoint keeps it beside the curriculum's position.
    """
    position = json.loads(Path(checkpoint, POSITION_FILE).read_text())
    replace(curriculum).load_state_dict(position)
    for name, value in identity.items():
        before = position["identity"].get(name, JOINED_LATER.get(name))
        before = value if before is ... else before
        if before != value:
            raise UsageError(
                f"`--resume_from_checkpoint` {checkpoint}: trained with {name} {before}; got `--{name}` {value}"
            )
    saved = json.loads(Path(checkpoint, "config.json").read_text())
    mine = model.get_base_model().config
    if saved.get("backbone_fingerprint") != mine.backbone_fingerprint:
        raise UsageError(
            f"`--resume_from_checkpoint` {checkpoint}: trained on another backbone ({saved['backbone_name']}) than "
            f"`--model_name_or_path` {mine.backbone_name}; name that one"
        )
