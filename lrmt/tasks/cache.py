"""Arrays on disk, made once, written whole and mapped into memory."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lrmt.errors import UsageError
from lrmt.files import digest

Arrays = dict[str, np.ndarray]


def cache_folder(folder: str | Path | None = None) -> Path:
    """Where caches are: `folder`, else $LRMT_CACHE, else ~/.cache/lrmt."""
    return Path(folder or os.environ.get("LRMT_CACHE") or Path.home() / ".cache" / "lrmt")


def fingerprint_tokenizer(tokenizer) -> str:
    """A hash of the whole tokenizer, not only its name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())))


def load_or_make(folder: Path, tokenizer: str, make: Callable[[], Arrays], valid: Callable[[Arrays], bool]) -> Arrays:
    """The arrays of `folder`, read-only and mapped; made and stored there where they are absent or damaged.

    `tokenizer` is the fingerprint of the one that made them. Raises UsageError when another one did.
    """
    found = _load(folder, tokenizer, valid)
    if found is not None:
        return found
    arrays = make()
    if not valid(arrays):  # the caller tells what is wrong with it
        return arrays
    try:
        _save(folder, tokenizer, arrays, valid)
    except OSError as error:
        warnings.warn(f"background not cached in {folder.parent}: {error}", stacklevel=2)
        return arrays
    return _load(folder, tokenizer, valid) or arrays


def _load(folder: Path, tokenizer: str, valid) -> Arrays | None:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in meta["arrays"]}
        written_by = meta["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # absent or damaged: made again
        return None
    if written_by != tokenizer:
        raise UsageError(f"the cache {folder} was written by another tokenizer; remove it, or set LRMT_CACHE elsewhere")
    return arrays if valid(arrays) else None


def _save(folder: Path, tokenizer: str, arrays: Arrays, valid) -> None:
    """Write under a temporary name and rename, so that no reader and no crash meets half a cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        meta = json.dumps({"tokenizer": tokenizer, "arrays": list(arrays)})
        (temporary / "meta.json").write_text(meta, encoding="utf-8")
        if folder.exists() and _load(folder, tokenizer, valid) is None:
            shutil.rmtree(folder)
        if not folder.exists():  # or another process was faster
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
