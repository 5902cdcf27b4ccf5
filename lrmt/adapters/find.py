"""Where an adapter or a backbone is: a folder, a Hub id, a GGUF, a name that ships with lrmt. Light: nothing heavy is imported."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

from safetensors import safe_open

from lrmt.adapters.gguf import PACKAGES, is_gguf, unpack
from lrmt.errors import UsageError, one_line
from lrmt.files import listing

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")
FLAG = "`--model_name_or_path`"
ASSETS = Path(str(files("lrmt"))) / "assets"
HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.md")  # of a repository
POINTER = b"version https://git-lfs"


def find_adapter(path_or_hub_id: str | os.PathLike, flag: str = "--adapter_path") -> Path:
    """The folder of an adapter or a merged checkpoint; one of the Hub is downloaded, or taken from the cache.

    Raises:
        UsageError: neither a folder nor on the Hub, or a folder without a config.json, or with pointers of git-lfs for files.
    """
    path = Path(path_or_hub_id).expanduser()
    try:
        if not path.exists() and str(path) in shipped_adapters():
            path = ASSETS / path
        if not path.exists() and is_hub_id(path_or_hub_id):
            path = _download(str(path_or_hub_id), flag)
        if not path.is_dir():
            parent = path.parent if path.parent.is_dir() else Path(".")
            there = (
                ", ".join(sorted(p.name for p in parent.iterdir() if p.is_dir() and p.name[0] != ".")[:8])
                or "no folders"
            )
            problem = "that is a file" if path.exists() else f"no such folder ({parent} holds {there})"
            raise UsageError(
                f"{flag} must be a folder that training or merging wrote, or a Hub id; got {path_or_hub_id}, which is no "
                f"adapter: {problem}"
            )
        missing = [name for name in ADAPTER_FILES if not (path / name).is_file()]
        if "config.json" in missing:
            raise UsageError(
                f"{flag} {path_or_hub_id} has no config.json, so it is no adapter that training wrote: not a whole adapter, "
                f"{' and '.join(missing)} missing (it holds: {listing(path)})"
            )
        check_files(path, flag, weights=False)
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # no permission, or a name that no file can have
        told, why = str(path_or_hub_id)[:200], getattr(error, "strerror", None) or error
        raise UsageError(
            f"{flag} {told} cannot be read ({why}); name a folder that training or merging wrote"
        ) from None
    return path


def is_adapter(folder: Path) -> bool:
    """Whether a folder that `find_adapter` found holds an adapter; else it is a merged checkpoint."""
    return any((folder / name).is_file() for name in ADAPTER_FILES[:2])


def check_whole(folder: Path, flag: str = "--adapter_path") -> None:
    """Raises `UsageError` unless all that is to be loaded from the folder is there, and whole."""
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if is_adapter(folder) and missing:
        raise UsageError(f"{flag} {folder}: not a whole adapter, {' and '.join(missing)} missing")
    check_files(folder, flag)


def check_files(folder: str | os.PathLike, flag: str, weights: bool = True) -> None:
    """Raises `UsageError` for a file that git-lfs left out, and for `weights` that were cut off; of a Hub id there is nothing to see."""
    kinds = (".json", ".model", ".safetensors", ".bin") if weights else (".json", ".model")
    for path in sorted(Path(folder).glob("*")):
        if path.suffix not in kinds or not path.is_file():
            continue
        try:
            with open(path, "rb") as file:
                start = file.read(len(POINTER))
            if start != POINTER and path.suffix == ".safetensors":
                with safe_open(path, "np"):
                    pass
        except Exception as error:
            raise UsageError(
                f"{flag} {folder} cannot be loaded ({path.name} is cut off or cannot be read, {one_line(error)}); copy or download it "
                "again"
            ) from None
        if start == POINTER:
            raise UsageError(
                f"{flag} {folder} cannot be loaded ({path.name} is a pointer of git-lfs, not the file itself: `git lfs pull`); name a "
                "folder or a Hub id that has it"
            )


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether it is spelled like one: organisation/model."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.gguf)", str(name)) is not None


def _download(hub_id: str, flag: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except Exception as error:
        raise UsageError(
            f"{flag} {hub_id} is no adapter: no such folder, and the Hub says: {one_line(error)}; name a folder that training "
            "wrote, or a Hub id"
        ) from None


# ---------------------------------------------------------------------- backbones


def shipped_backbones() -> list[str]:
    """Names of the tiny backbones that come with the package."""
    return sorted(p.name for p in ASSETS.glob("tiny-*") if (p / "config.json").exists())


def shipped_adapters() -> list[str]:
    """Names of the adapters that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/adapter_config.json"))


def is_named(name: str) -> bool:
    """Whether it is the name of a backbone, of those that ship or are in a package, rather than a place."""
    return name in PACKAGES or name in shipped_backbones()


def resolve_backbone(name: str | os.PathLike, flag: str = FLAG) -> str:
    """A shipped backbone's folder, that which a GGUF was de-quantised into, or the Hub id or folder as given.

    Raises `UsageError` for a folder without a model, and as `unpack` does.
    """
    name = os.path.expanduser(str(name)).rstrip("/") or str(name)
    if name in shipped_backbones():
        return str(ASSETS / name)
    path = Path(name)
    try:
        there = path.exists()
    except OSError as error:
        raise UsageError(f"{flag} {str(name)[:200]} cannot be read ({error.strerror}); name another folder") from None
    if is_gguf(name):
        return str(unpack(name, flag))
    if there and not (path / "config.json").is_file():
        found = listing(path) if path.is_dir() else "a file"
        raise UsageError(f"{flag} {name}: no config.json there (found: {found})")
    if not there and not is_hub_id(name):
        shipped, packaged = ", ".join(shipped_backbones()), ", ".join(PACKAGES)
        raise UsageError(
            f"{flag} {name}: no such folder, nor a backbone that ships with lrmt ({shipped}) or in a package ({packaged})"
        )
    return str(name)


def find_backbone(adapter: Path, name: str | None) -> str:
    """What `resolve_backbone` takes for the `name` that an adapter's config has of its backbone.

    A folder or GGUF that is not there seen from here is looked for from each folder above the adapter: training may have run in
    one.
    """
    if not isinstance(name, str):
        raise UsageError(f"--adapter_path {adapter}: config.json names no backbone; say where it is with {FLAG}")
    if not Path(name).expanduser().exists() and not is_named(name):
        for folder in adapter.resolve().parents:
            place = folder / name
            if (place / "config.json").is_file() or place.is_file() and is_gguf(str(place)):
                return str(place)
        if not is_hub_id(name):
            raise UsageError(f"--adapter_path {adapter}: its backbone {name} is not here; say where it is with {FLAG}")
    return name
