"""Where an adapter or a backbone is: a folder, a Hub id, a name that ships with lrmt. Light: nothing heavy is imported."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

from lrmt.errors import UsageError, one_line
from lrmt.files import listing

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")


def find_adapter(path_or_hub_id: str | os.PathLike, flag: str = "--adapter_path") -> Path:
    """The folder of an adapter or a merged checkpoint; one of the Hub is downloaded, or taken from the cache.

    Raises:
        UsageError: neither a folder nor on the Hub, or a folder without a config.json.
    """
    path = Path(path_or_hub_id)
    if not path.exists() and is_hub_id(path_or_hub_id):
        path = _download(str(path_or_hub_id), flag)
    if not path.is_dir():
        parent = path.parent if path.parent.is_dir() else Path(".")
        there = ", ".join(sorted(p.name for p in parent.iterdir() if p.is_dir())[:8]) or "no folders"
        problem = "that is a file" if path.exists() else f"no such folder ({parent} holds {there})"
        raise UsageError(
            f"{flag} must be a folder that training or merging wrote, or a Hub id; got {path_or_hub_id}, which is no adapter: "
            f"{problem}"
        )
    if not (path / "config.json").is_file():
        raise UsageError(
            f"{flag} {path_or_hub_id} has no config.json, so it is no lrmt model: not a whole adapter, "
            f"{' and '.join(missing_files(path))} missing (it holds: {listing(path)})"
        )
    return path


def missing_files(folder: Path) -> list[str]:
    """Files that an adapter's folder lacks."""
    return [name for name in ADAPTER_FILES if not (folder / name).is_file()]


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether it is spelled like one: organisation/model."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name)) is not None


def _download(hub_id: str, flag: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.md"]))
    except Exception as error:
        raise UsageError(
            f"{flag} {hub_id} is no adapter: no such folder, and the Hub says: {one_line(error)}; name a folder that training "
            "wrote, or a Hub id"
        ) from None


def shipped_backbones() -> list[str]:
    """Names of the tiny backbones that come with the package."""
    return sorted(p.name for p in Path(str(files("lrmt") / "assets")).glob("tiny-*") if (p / "config.json").exists())


def resolve_backbone(name: str, flag: str = "`--model_name_or_path`") -> str:
    """A shipped backbone's folder, or the Hub id or folder as given; raises `UsageError` for a folder without a model."""
    if name in shipped_backbones():
        return str(files("lrmt") / "assets" / name)
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        there = listing(path) if path.is_dir() else "a file"
        raise UsageError(f"{flag} {name}: no config.json there (found: {there})")
    if not path.exists() and not is_hub_id(name):
        shipped = ", ".join(shipped_backbones())
        raise UsageError(f"{flag} {name}: no such folder, nor a backbone that ships with lrmt ({shipped})")
    return name
