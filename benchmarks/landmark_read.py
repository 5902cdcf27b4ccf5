"""Landmark attention at length: peak memory of reading, and the cost of one more token, against the length of the text.

    python benchmarks/landmark_read.py

A random LLaMA in fp32, `--top_k` blocks, blocks offloaded to CPU memory. `near_mib` is the peak of all live tensors (weights
included) but the stored blocks and their landmark keys, which are given beside it: `blocks_mib` lies in CPU memory, `landmarks_mib`
on the GPU. `decode_ms` is the best of `--rounds` tokens after the text, all lengths in one process and in turns.
"""

import argparse
import time
import weakref

import torch
from common import MIB, PeakMemory, pick_device, write_report
from torch.utils._python_dispatch import _disable_current_modes
from transformers import LlamaConfig, LlamaForCausalLM

from lrmt.models import LandmarkForCausalLM
from lrmt.models.landmark import cache


def build(size: dict) -> LandmarkForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=size["hidden_size"], intermediate_size=2 * size["hidden_size"], num_hidden_layers=size["layers"],
        num_attention_heads=size["hidden_size"] // 32, num_key_value_heads=max(1, size["hidden_size"] // 64),
        max_position_embeddings=2 * size["context_length"], bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LandmarkForCausalLM.from_backbone(
        LlamaForCausalLM(config), block_length=size["block_length"], context_length=size["context_length"], top_k=size["top_k"],
        offload_blocks=True, retrieval=size["retrieval"],
    ).to(pick_device()).eval()  # fmt: skip


def stored(state) -> tuple[int, int]:
    """Bytes of blocks and of landmark keys."""
    levels = [level for level, _, _ in state.blocks.levels]
    blocks = sum(t.nbytes for level in levels for table in (level.keys, level.values) for t in table if t is not None)
    return blocks, sum(t.nbytes for level in levels for t in level.landmarks if t is not None)


class PeakOfTheRest(PeakMemory):
    """Peak bytes of live tensors but the tables of stored blocks and landmarks, which `cache._grown` makes."""

    def __enter__(self):
        self._make, cache._grown = cache._grown, self._grown
        return super().__enter__()

    def __exit__(self, *error):
        cache._grown = self._make
        return super().__exit__(*error)

    def _grown(self, *args, **options):
        with _disable_current_modes():
            table = self._make(*args, **options)
        key = table.untyped_storage()._cdata
        self._seen[key] = weakref.ref(table.untyped_storage(), lambda _: self._seen.pop(key, None))
        return table


@torch.no_grad()
def read(model, tokens: int):
    """The state after a random text, given in pieces of 8192 tokens, and its row of the report."""
    generator = torch.Generator().manual_seed(0)
    state, begin = None, time.perf_counter()
    with PeakOfTheRest(*model.parameters(), *model.buffers()) as peak:
        for at in range(0, tokens, 8192):
            text = torch.randint(0, 1024, (1, min(8192, tokens - at)), generator=generator)
            state = model.read(text, state=state)
    seconds = time.perf_counter() - begin
    blocks, landmarks = stored(state)
    return state, {
        "tokens": tokens, "near_mib": peak.tensor_bytes() / MIB, "blocks_mib": blocks / MIB, "landmarks_mib": landmarks / MIB,
        "read_tokens_per_second": tokens / seconds,
    }  # fmt: skip


@torch.no_grad()
def decode_seconds(model, state) -> float:
    begin = time.perf_counter()
    model(torch.tensor([[7]]), state=state, logits_to_keep=1)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 131_072, 1_048_576])
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block_length", type=int, default=64)
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--top_k", type=int, default=4)
    parser.add_argument(
        "--retrieval", default="chunk", help="while reading; a single token chooses by itself either way"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/benchmarks")
    options = vars(parser.parse_args(argv))
    output_dir, lengths, rounds = (options.pop(name) for name in ("output_dir", "tokens", "rounds"))
    model = build(options)
    states, rows = zip(*(read(model, n) for n in lengths), strict=True)
    seconds = [[decode_seconds(model, state) for state in states] for _ in range(rounds)]
    for row, times in zip(rows, zip(*seconds, strict=True), strict=True):
        row["decode_ms"] = 1000 * min(times)
        row["near_ratio"] = row["near_mib"] / rows[0]["near_mib"]
        row["decode_ratio"] = row["decode_ms"] / rows[0]["decode_ms"]
    write_report("landmark_read", output_dir, options, list(rows), chart=("tokens", "near_mib", ()))


if __name__ == "__main__":
    main()
