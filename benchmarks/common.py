"""What the benchmarks share: a random LLaMA, peak memory, fresh processes, tables."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, LlamaForCausalLM

from lrmt.models import METHODS

# glibc then maps each large block by itself and gives it back at once: the peak of a process is that of what it held
TIDY_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
MIB = 2**20


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_seconds(step, cpu_clock=time.perf_counter) -> float:
    """Of one call. `cpu_clock`: the clock without a GPU; `time.process_time` counts what neighbours on the machine do not take."""
    if not torch.cuda.is_available():
        begin = cpu_clock()
        step()
        return cpu_clock() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def best_in_turns(steps: dict, rounds: int, cpu_clock=time.perf_counter) -> dict:
    """Of each step the seconds of its fastest call; steps take turns, so that what else the machine does meets all of them."""
    seconds = [{name: measure_seconds(step, cpu_clock) for name, step in steps.items()} for _ in range(rounds)]
    return {name: min(found[name] for found in seconds) for name in steps}


def build_model(
    hidden_size: int, layers: int, segment_length: int, vocabulary: int, num_memory_tokens=16, method="rmt", tokens: int = 0,
    in_4bit: bool = False, **settings,
):  # fmt: skip
    """A method with LoRA (r = 8, every linear layer) over a random LLaMA; only LoRA and the memory train.

    In fp32, for `in_4bit` over NF4. Landmark attention has a context of `tokens`, in blocks of 64 or fewer.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it warns of what is not used here
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        max_position_embeddings=max(segment_length + 3 * num_memory_tokens, 2 * tokens),
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    backbone = LlamaForCausalLM(config).requires_grad_(False)
    if in_4bit:
        backbone = quantised(backbone)
    if method == "landmark":
        settings |= {"context_length": tokens, "block_length": min(64, tokens // 8)}
    else:
        settings |= {"num_memory_tokens": num_memory_tokens, "segment_length": segment_length}
    model = METHODS[method].from_backbone(backbone, **settings)
    lora = LoraConfig(r=8, target_modules=r"backbone\..*_proj", modules_to_save=model.memory_modules)
    return get_peft_model(model, lora).to(pick_device())


def quantised(backbone: LlamaForCausalLM):
    """The same in NF4."""
    from transformers import BitsAndBytesConfig

    from lrmt.adapters.backbone import load_backbone

    settings = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": backbone.dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        backbone.save_pretrained(folder)
        return load_backbone(
            folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings), dtype=backbone.dtype
        )


class PeakMemory(TorchDispatchMode):
    """Peak bytes of tensors while the context lasts: every live storage, counted once, those of `held` included.

    On CUDA the allocator's own count. `process_bytes()` is the peak of the whole process, libraries included.
    """

    def __init__(self, *held: torch.Tensor):
        super().__init__()
        self._live, self._peak, self._seen = 0, 0, {}
        for tensor in held:
            self._count(tensor)

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, out)
        return out

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._live += size
            self._peak = max(self._peak, self._live)
            self._seen[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key, size):
        del self._seen[key]
        self._live -= size

    def tensor_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._peak


def process_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_fresh(script: str, **settings) -> dict:
    """Runs `script --one SETTINGS` in a process of its own; returns the JSON that it prints last."""
    command = [sys.executable, script, "--one", json.dumps(settings)]
    done = subprocess.run(
        command, env={**os.environ, **TIDY_MALLOC, **QUIET}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_report(name: str, output_dir: str, settings: dict, rows: list[dict], chart=None, **figures) -> None:
    """Prints rows and figures, and writes them to `output_dir/name.json`; a `chart` of them, as of `draw_chart`, beside it."""
    print(format_table(rows))
    for key, value in figures.items():
        print(f"{key}: {value:.4g}")
    path = Path(output_dir, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    report = {"settings": settings, "device": device, "torch": torch.__version__, "rows": rows, **figures}
    path.write_text(json.dumps(report, indent=2) + "\n")
    if chart is not None:
        draw_chart(path.with_suffix(".png"), rows, *chart)
    print(f"written to {path}" + (f" and {path.stem}.png" if chart is not None else ""))


def draw_chart(path: Path, rows: list[dict], x: str, y: str, by: tuple[str, ...]) -> None:
    """A line of `y` against `x` for each combination of `by` in the rows."""
    from lrmt.evaluation.plots import draw_lines

    def label(row: dict) -> str:
        return ", ".join(row[key] if isinstance(row[key], str) else f"{key} {row[key]}" for key in by) or y

    path.write_bytes(draw_lines([(label(row), row[x], row[y]) for row in rows], x, y))


def format_table(rows: list[dict]) -> str:
    cells = [list(rows[0]), *([_show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def _show(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 100 else f"{value:.3f}"
    return f"{value:,}" if type(value) is int else str(value)
