"""Everything that only a GPU can tell, in one call: is every path right on the device, and how fast is it?

    python benchmarks/gpu.py

Checks first: every method against the same computed plainly, in fp32 on the CPU or by another implementation; each gives the largest
difference, as a share of the largest value, and its bound. Then figures: a landmark training step beside full (flash) attention,
reading as a share of the device's matrix products in bf16, ARMT's diagonal batching beside its plain order, one more token after a
long text. Nothing is downloaded; what a package is missing for is skipped, and what fails is told and does not stop the rest. Exit
code 1 if anything failed. On a CPU, or with --tiny, sizes are such that all of it takes seconds: a rehearsal, whose speeds mean nothing.
"""

import argparse
import importlib.util
import math
import sys
import tempfile
import time
import traceback
from functools import lru_cache, partial
from pathlib import Path

import torch
from common import measure_seconds, pick_device, write_report
from landmark_read import decode_seconds
from landmark_throughput import build_step
from reading_speed import build_backbone, build_reader
from transformers import LlamaConfig, LlamaForCausalLM

from lrmt.adapters.backbone import copy_dequantised_
from lrmt.arguments import ModelArguments
from lrmt.models import METHODS, LandmarkForCausalLM, RmtForCausalLM
from lrmt.models.cost import shape_of
from lrmt.models.handover import states_and_embeddings
from lrmt.models.landmark.attention import landmark_attention
from lrmt.models.notes import Notes
from lrmt.progress import quiet_bars
from lrmt.training.build import build_model

FP32, BF16 = 2e-4, 4e-2  # bounds of differences: other kernels sum in other orders
PRECISIONS = (("fp32", torch.float32, FP32), ("bf16", torch.bfloat16, BF16))
SIZES = {
    "full": {
        "train_tokens": [8192, 16_384, 32_768], "train_hidden": 2048, "train_layers": 4, "rounds": 5, "matrix": 8192,
        "read_shape": "llama-8b", "segment_length": 1024, "batch": 8, "read_segments": 4,
        "armt_shape": "llama-1b", "armt_segments": 64,
        "decode_tokens": [16_384, 131_072], "decode_hidden": 2048, "decode_layers": 4,
    },
    "tiny": {
        "train_tokens": [512], "train_hidden": 64, "train_layers": 1, "rounds": 1, "matrix": 256,
        "read_shape": "tiny", "segment_length": 64, "batch": 2, "read_segments": 3,
        "armt_shape": "tiny", "armt_segments": 4,
        "decode_tokens": [256, 512], "decode_hidden": 64, "decode_layers": 1,
    },
}  # fmt: skip


class Skipped(Exception):
    """What this machine lacks for a check."""


def llama(hidden_size: int, layers: int, vocabulary: int = 1024, positions: int = 4096, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=max(2, hidden_size // 64), num_key_value_heads=max(1, hidden_size // 256),
        max_position_embeddings=positions, bos_token_id=None, eos_token_id=None, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest, as a share of the largest value; infinite where a value is not finite."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    share = (one - other).abs().max() / other.abs().max().clamp(min=1e-30)
    return float(share.nan_to_num(nan=math.inf))


# ------------------------------------------------------------------ checks


def memory_settings(handover: str) -> dict:
    """Of a small memory; with tokens, as the recipes have it."""
    alike = dict.fromkeys(("memory_shift", "memory_positions"), handover == "tokens")
    return {"num_memory_tokens": 4, "segment_length": 48, "memory_handover": handover} | alike


def memory_model(handover: str = "tokens", device="cpu") -> RmtForCausalLM:
    torch.manual_seed(1)
    model = RmtForCausalLM.from_backbone(llama(128, 2).requires_grad_(False), **memory_settings(handover)).eval()
    # from the CPU, for of a random head one of the likeliest tokens may be another on the device
    pairs = states_and_embeddings(model.backbone, texts(16, 100)) if handover == "aligned" else None
    model.to(device)
    if pairs is not None:
        model.handover.fit(*(side.to(device) for side in pairs))
    return model


def score(model, ids: torch.Tensor, mixed: bool = False, **inputs) -> list[torch.Tensor]:
    """A training step on the second half of a text, `mixed`: in bf16 where autocast has it so. Loss, notes included, logits, and the
    gradients of all that trains.
    """
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    model.zero_grad()
    with torch.autocast(pick_device().type, torch.bfloat16, enabled=mixed):
        output = model(input_ids=ids, labels=labels, **inputs)
    loss = output.loss if output.notes is None else output.loss + output.notes.loss / output.notes.count
    loss.backward()
    return [loss, output.logits, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def compare(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest difference of all."""
    return max(difference(one, other) for one, other in zip(got, want, strict=True))


def texts(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 1024, (rows, tokens), generator=torch.Generator().manual_seed(2))


def make_notes() -> Notes:
    """For two texts: what the memory should say from the start on, and from a token in their second or third segment."""
    return Notes(texts(2, 6).view(2, 2, 3), torch.tensor([[0, 100], [0, 60]]))


def check_rmt(handover: str, dtype: torch.dtype, notes: bool) -> float:
    """RMT on the device against fp32 on the CPU, over 5 segments."""
    ids, asked = texts(2, 230), {"notes": make_notes()} if notes else {}
    model = memory_model(handover, pick_device()).to(dtype)
    return compare(score(model, ids, **asked), score(memory_model(handover), ids, **asked))


def check_pieces() -> float:
    """A text read in pieces of any length, saved, loaded on the CPU and moved back, against the text at once."""
    model, ids = memory_model().to(pick_device()), texts(1, 230)
    whole = model(ids.to(model.device), logits_to_keep=1).logits
    state = None
    for piece in ids[:, :-7].split(31, dim=1):
        state = model.read(piece, state=state)
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder, "state.safetensors"))
        state = model.cpu().load_state(Path(folder, "state.safetensors"))
        model.to(pick_device())  # the state follows when it is used
        return difference(model(ids[:, -7:].to(model.device), state=state, logits_to_keep=1).logits, whole)


def check_checkpointing() -> float:
    """Constant-memory BPTT against all segments kept."""
    ids, model = texts(2, 230), memory_model(device=pick_device())
    model.config.checkpoint_segments = False
    want = score(model, ids)
    model.config.checkpoint_segments = True
    return compare(score(model, ids), want)


def check_nf4(handover: str, dtype: torch.dtype) -> float:
    """LoRA and memory over four-bit weights, built and trained as by the recipes, against the same weights in fp32 on the CPU."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")

    def build(folder, dtype: torch.dtype, device_map=None, **loading):
        arguments = ModelArguments(
            model_name_or_path=folder, dtype=str(dtype).removeprefix("torch."), lora_dropout=0.0, **loading
        )
        return build_model(RmtForCausalLM, arguments, memory_settings(handover), device_map=device_map).train()

    with tempfile.TemporaryDirectory() as folder:
        llama(128, 2).save_pretrained(folder)
        model = build(folder, dtype, {"": 0} if torch.cuda.is_available() else None)
        plain = build(folder, torch.float32, load_in_4bit=False)
    copy_dequantised_(plain.get_base_model().backbone, model.get_base_model().backbone)
    for (name, trained), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        if trained.requires_grad:
            if "lora_B" in name:  # which starts from 0
                torch.nn.init.normal_(trained, std=0.02)
            twin.data = trained.data.to(twin)
    ids, notes = texts(2, 230), make_notes()
    return compare(score(model, ids, mixed=dtype == torch.bfloat16, notes=notes), score(plain, ids, notes=notes))


def check_method(name: str, dtype: torch.dtype, notes: bool) -> float:
    """Another recurrent method on the device against fp32 on the CPU, over 5 segments, what training begins at zero drawn at random. In
    bf16 of ARMT loss and logits alone: gradients of its keys and queries are small sums of large terms, a sixth of them noise.
    """

    def build(device, dtype: torch.dtype):
        torch.manual_seed(1)
        settings = {"num_memory_tokens": 4, "segment_length": 48}
        model = METHODS[name].from_backbone(llama(128, 2).requires_grad_(False), **settings).eval()
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        model.backbone.to(dtype)  # what the method adds trains in fp32
        return model.to(device)

    ids, asked = texts(2, 230), {"notes": make_notes()} if notes else {}
    got, want = (score(model, ids, **asked) for model in (build(pick_device(), dtype), build("cpu", torch.float32)))
    compared = 2 if (name, dtype) == ("armt", torch.bfloat16) else len(want)
    return compare(got[:compared], want[:compared])


def check_diagonal() -> float:
    """ARMT reading along diagonals against segment by segment: the matrices of its layers."""
    torch.manual_seed(1)
    backbone, ids = llama(128, 2).to(pick_device()), texts(2, 230)
    states = []
    for diagonal in (False, True):
        torch.manual_seed(1)
        model = METHODS["armt"].from_backbone(
            backbone, num_memory_tokens=4, segment_length=48, diagonal_batching=diagonal
        )
        for value in model.writers.values:
            torch.nn.init.normal_(value.weight, std=0.02)
        states.append([part for one in model.to(pick_device()).eval().read(ids).memory for part in one])
    return compare(states[1], states[0])


def check_landmark(implementation: str, dtype: torch.dtype) -> float:
    """Grouped-query landmark attention against its definition, forward and backward, with padding and an unfinished block."""
    if implementation == "flex" and not torch.cuda.is_available():
        raise Skipped("FlexAttention has no backward pass on a CPU")
    return compare(attend(implementation, pick_device(), dtype), definition())


@lru_cache
def definition() -> list[torch.Tensor]:
    return attend("naive", "cpu", torch.float64)


def attend(implementation: str, device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of landmark attention on random inputs."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 75, dtype=torch.bool)
    mask[1, :20] = False
    mask = mask.to(device)
    inputs = [
        torch.randn(2, heads, 75, 64, generator=generator).to(device, dtype).requires_grad_() for heads in (4, 2, 2)
    ]
    out = landmark_attention(*inputs, block_length=8, key_mask=mask, implementation=implementation)
    out = out.where(mask[:, None, :, None], 0)
    out.float().pow(2).sum().backward()
    return [out, *(i.grad for i in inputs)]


def check_training(dtype: torch.dtype) -> float:
    """A training step of a landmark model on the device, one text padded, against fp32 on the CPU."""
    torch.manual_seed(1)
    model = LandmarkForCausalLM.from_backbone(llama(128, 2), block_length=16, context_length=240, top_k=2).train()
    ids, mask = texts(2, 230), torch.ones(2, 230, dtype=torch.bool)
    mask[1, :20] = False
    want = score(model, ids, attention_mask=mask)
    return compare(score(model.to(pick_device(), dtype), ids, attention_mask=mask), want)


def check_offloading() -> float:
    """Blocks in pinned CPU memory against blocks on the device: the state's answer after 30 blocks."""
    logits = []
    for offload in (False, True):
        torch.manual_seed(1)
        model = LandmarkForCausalLM.from_backbone(
            llama(128, 2), block_length=16, context_length=128, top_k=2, offload_blocks=offload
        )
        model = model.to(pick_device()).eval()
        state = model.read(texts(1, 450))
        tables = [table for level, *_ in state.blocks.levels for table in (*level.keys, *level.values)]
        place = ("cpu", torch.cuda.is_available()) if offload else (model.device.type, False)
        assert {(table.device.type, table.is_pinned()) for table in tables} == {place}, f"blocks are not in {place}"
        logits.append(model(texts(1, 5).to(model.device), state=state, logits_to_keep=1).logits)
    return difference(logits[1], logits[0])


CHECKS = {
    **{
        f"rmt {handover}{', notes' * notes} {name}": (partial(check_rmt, handover, dtype, notes), bound)
        for handover, notes in (("identity", False), ("scaled", False), ("aligned", True), ("tokens", True))
        for name, dtype, bound in PRECISIONS
        if (handover, name) != ("tokens", "bf16")  # of a random head the likeliest tokens are a toss-up in bf16
    },
    **{
        f"{method}{', notes' * notes} {name}": (partial(check_method, method, dtype, notes), bound)
        for method, notes in (("rmt_retrieval", True), ("armt", False))
        for name, dtype, bound in PRECISIONS
    },
    "armt diagonal batching": (check_diagonal, FP32),
    "rmt pieces, saved and moved": (check_pieces, FP32),
    "rmt constant-memory BPTT": (check_checkpointing, FP32),
    "rmt NF4 tokens, notes fp32": (partial(check_nf4, "tokens", torch.float32), FP32),
    "rmt NF4 scaled, notes bf16": (partial(check_nf4, "scaled", torch.bfloat16), BF16),
    **{
        f"landmark {implementation} {name}": (partial(check_landmark, implementation, dtype), bound)
        for implementation in ("naive", "sdpa", "flex")
        for name, dtype, bound in PRECISIONS
    },
    **{f"landmark training {name}": (partial(check_training, dtype), bound) for name, dtype, bound in PRECISIONS},
    "landmark offloaded blocks": (check_offloading, FP32),
}


def run_checks() -> list[dict]:
    rows = []
    for name, (check, bound) in CHECKS.items():
        begin = time.perf_counter()
        row = {"check": name, "difference": None, "bound": bound, "result": "", "seconds": 0.0}
        try:
            found = check()
            row["difference"] = found if math.isfinite(found) else None
            row["result"] = "ok" if found <= bound else "FAILED"
        except Skipped as reason:
            row["result"] = f"skipped: {reason}"
        except Exception as error:
            traceback.print_exc()
            row["result"] = f"FAILED: {type(error).__name__}"
        row["seconds"] = time.perf_counter() - begin
        rows.append(row)
    return rows


# ------------------------------------------------------------------ figures


def matrix_peak(size: int) -> float:
    """FLOP/s of bf16 matrix products, the best of a few."""
    a = torch.randn(size, size, device=pick_device(), dtype=torch.bfloat16)
    return 2 * size**3 / min(measure_seconds(lambda: a @ a) for _ in range(10))


def measure_training(sizes: dict) -> list[dict]:
    """A landmark training step as a share of the speed of full attention."""
    rows = []
    for tokens in sizes["train_tokens"]:
        shape = {"hidden_size": sizes["train_hidden"], "layers": sizes["train_layers"], "block_length": 64}
        steps = {variant: build_step(variant, tokens, **shape)[1] for variant in ("full", "landmark")}
        for step in steps.values():
            step()  # compiles
        best = {variant: min(measure_seconds(step) for _ in range(sizes["rounds"])) for variant, step in steps.items()}
        for variant, seconds in best.items():
            rows.append(
                {
                    "figure": f"training step, {variant}", "tokens": tokens, "value": tokens / seconds, "unit": "tokens/s",
                    "ratio": best["full"] / seconds,
                }
            )  # fmt: skip
    return rows


@torch.no_grad()
def measure_reading(sizes: dict) -> list[dict]:
    """RMT's reading as a share of what the device's matrix products alone allow."""
    length = sizes["segment_length"]
    backbone = build_backbone(sizes["read_shape"], length + 32, torch.bfloat16)
    model = RmtForCausalLM.from_backbone(
        backbone, num_memory_tokens=16, segment_length=length, memory_handover="tokens"
    )
    model = model.to(pick_device()).eval()
    ids = texts(sizes["batch"], sizes["read_segments"] * length + 1).to(model.device)  # the last segment stays open
    tokens = ids.numel() - len(ids)
    seconds = min(measure_seconds(lambda: model.read(ids)) for _ in range(3))
    flops = len(ids) * model.config.read_flops(shape_of(backbone), tokens // len(ids)) / seconds
    peak = matrix_peak(sizes["matrix"])
    return [
        {"figure": "bf16 matrix product", "tokens": 0, "value": peak / 1e12, "unit": "TFLOP/s", "ratio": 1.0},
        {
            "figure": "reading, RMT", "tokens": tokens, "value": tokens / seconds, "unit": "tokens/s",
            "ratio": flops / peak,
        },
    ]  # fmt: skip


@torch.no_grad()
def measure_diagonals(sizes: dict) -> list[dict]:
    """ARMT's reading along diagonals as a share of its speed segment by segment."""
    length = sizes["segment_length"]
    backbone = build_backbone(sizes["armt_shape"], length + 32, torch.bfloat16)
    ids = texts(1, sizes["armt_segments"] * length + 1).to(pick_device())
    readers = {name: build_reader(name, backbone, ids, length, 16) for name in ("armt", "armt, diagonal")}
    for read in readers.values():
        read()
    best = {name: min(measure_seconds(read) for _ in range(3)) for name, read in readers.items()}
    return [
        {
            "figure": f"reading, {name}", "tokens": ids.numel() - 1, "value": (ids.numel() - 1) / seconds, "unit": "tokens/s",
            "ratio": best["armt"] / seconds,
        }
        for name, seconds in best.items()
    ]  # fmt: skip


@torch.no_grad()
def measure_decoding(sizes: dict) -> list[dict]:
    """One more token after a long text, landmark attention with offloaded blocks."""
    torch.manual_seed(1)
    model = LandmarkForCausalLM.from_backbone(
        llama(sizes["decode_hidden"], sizes["decode_layers"]), block_length=64, context_length=1024, top_k=4, offload_blocks=True
    )  # fmt: skip
    model = model.to(pick_device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32).eval()
    states = {n: model.read(texts(1, n)) for n in sizes["decode_tokens"]}
    best = {n: min(decode_seconds(model, state) for _ in range(10)) for n, state in states.items()}
    first = next(iter(best.values()))
    return [
        {"figure": "one more token, landmark", "tokens": n, "value": 1000 * s, "unit": "ms", "ratio": s / first}
        for n, s in best.items()
    ]


def run_figures(sizes: dict) -> list[dict]:
    rows = []
    for measure in (measure_reading, measure_diagonals, measure_decoding, measure_training):
        try:
            rows += measure(sizes)
        except Exception as error:
            traceback.print_exc()
            failed = f"FAILED: {type(error).__name__}"
            rows.append({"figure": measure.__name__, "tokens": 0, "value": None, "unit": failed, "ratio": None})
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes on a GPU too")
    parser.add_argument("--output_dir", default="runs/benchmarks")
    options = vars(parser.parse_args(argv))
    size = "tiny" if options["tiny"] or not torch.cuda.is_available() else "full"
    quiet_bars()
    checks = run_checks()
    write_report("gpu_checks", options["output_dir"], {"size": size}, checks)
    figures = run_figures(SIZES[size])
    write_report("gpu_speed", options["output_dir"], SIZES[size], figures)
    failed = [row["result"].startswith("FAILED") for row in checks] + [row["value"] is None for row in figures]
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
