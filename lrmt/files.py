"""Files: read as UTF-8, written whole, told apart by their content, and what a folder holds."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from lrmt.errors import UsageError


def read_text(path: str | os.PathLike, flag: str) -> str:
    """The text of a UTF-8 file whatever the locale: a BOM is no text, and every end of a line is "\\n".

    Raises UsageError, naming `flag`, file, byte (from 0) and remedy, for another encoding, a NUL and a file that is not read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read ({error.strerror or error}); name a text file") from None
    try:
        text, bad = content.decode(), content.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad < 0:
        return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    wide = _guess_wide(content, bad)
    raise UsageError(
        f"{flag} {path} is not UTF-8 text (byte {bad}){f', but {wide[:6]} or no text' if wide else ''}; convert it: "
        f"iconv -f {wide or 'ENCODING'} -t UTF-8 FILE > NEW"
    )


def _guess_wide(content: bytes, bad: int) -> str:
    """UTF-16 or UTF-32, by its byte order mark or else by the place of the first NUL beside a letter of ASCII; "" for neither."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    return ("UTF-16BE", "UTF-16LE")[bad % 2] if content[bad] == 0 else ""


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to it at the end: a file that is there is whole.

    After an error nothing has changed, and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes text (as UTF-8) or bytes, so that a reader never sees half a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def filling(folder: str | os.PathLike, last: str | None = None) -> Iterator[Path]:
    """A temporary folder, whose files are moved into `folder` at the end, the one named `last` after all others.

    After an error while they are written `folder` is as it was.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # inside, where it is there already: it may be a file system of its own, which nothing can be renamed into
    temporary = Path(tempfile.mkdtemp(dir=folder if folder.is_dir() else folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
            if (folder / path.name).is_dir() and path.is_dir():  # which no rename replaces
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def told_as(flag: str, path: str | os.PathLike) -> Iterator[None]:
    """Turns a failure to write into one line that names the flag."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written ({error.strerror or error}); name another") from None


def check_writable(folder: str | os.PathLike, flag: str = "--output_dir") -> None:
    """Raises UsageError where `folder` could not be filled: before work is put into it. Nothing is left there."""
    folder = Path(folder).absolute()
    with told_as(flag, folder):
        place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryDirectory(dir=place):
            pass


def write_files(folder: str | os.PathLike, files: dict[str, str | bytes], flag: str = "--output_dir") -> None:
    """Writes each file whole into `folder`, made if need be. Raises UsageError where it cannot be written."""
    with told_as(flag, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(Path(folder) / name, content)


def to_json(value) -> str:
    """JSON with one line for each record or key."""
    if isinstance(value, list):
        return "[\n" + ",\n".join("  " + json.dumps(record) for record in value) + "\n]\n"
    return json.dumps(value, indent=2) + "\n"


def listing(folder: str | os.PathLike, pattern: str = "*", limit: int = 10, empty: str = "nothing") -> str:
    """What a folder holds, by name, for an error: the first few entries, or `empty`."""
    folder = Path(folder)
    names = (
        sorted(str(path.relative_to(folder)) for path in folder.glob(pattern) if path.name[0] != ".")
        if folder.is_dir()
        else []
    )
    return ", ".join(names[:limit]) or empty


# ---------------------------------------------------------------------- fingerprints


def digest(*parts: str | bytes) -> str:
    """A hash of texts or bytes, each as long as it likes: 32 hexadecimal digits."""
    return digest_each(parts)


def digest_each(parts: Iterable[str | bytes]) -> str:
    """`digest` of parts of which one is held at a time."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.encode("utf-8", "replace") if isinstance(part, str) else part
        whole.update(hashlib.blake2b(part).digest())
    return whole.hexdigest()


def fingerprint(path, *patterns: str) -> str | None:
    """A digest of the file, or of those of the folder (default: weights and configurations); other names stay as they are."""
    if path is None or not Path(path).exists():
        return path
    path, patterns = Path(path), patterns or ("*.safetensors", "*config.json")
    files = [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})
    whole = hashlib.sha256()
    for file in files:
        stat = file.stat()
        whole.update(file.name.encode() + digest_file(file, stat.st_mtime_ns, stat.st_size))
    return whole.hexdigest()[:16]


@cache
def digest_file(file: Path, *stamp) -> bytes:
    """A digest of the content; `stamp` tells it from what the file held before."""
    whole = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            whole.update(block)
    return whole.digest()
