"""A training step of every method beside the plain backbone on the same tokens: speed and memory, by segments, texts at once and bits.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --segments 2 4 8 16 --batch_sizes 1 4 --variants backbone rmt armt

The plain backbone has the same LoRA, no memory, and takes the segments one after another, each by itself; landmark attention takes the
whole text as one context. Every token is scored in all of them. `rmt, constant memory` computes segments again on the way back, `rmt,
4 bits` has its backbone in NF4; all else is in fp32. The variants take turns; the best of `--rounds` steps counts, which neighbours on
the machine disturb least. `mib` is the peak of live tensors, weights included; on a GPU, of all variants together.
"""

import argparse
import gc

import torch
from common import MIB, PeakMemory, best_in_turns, build_model, pick_device, write_report

VARIANTS = {
    "backbone": {"num_memory_tokens": 0},
    "rmt": {},
    "rmt, constant memory": {"checkpoint_segments": True},
    "rmt, 4 bits": {"in_4bit": True},
    "rmt_retrieval": {"method": "rmt_retrieval"},
    "armt": {"method": "armt"},
    "landmark": {"method": "landmark"},
}


def build_step(variant: str, segments: int, batch_size: int, **size):
    """A model, and a function that runs one training step of it."""
    length, settings = size["segment_length"], VARIANTS[variant]
    if settings.get("method") != "landmark":
        settings = {"checkpoint_segments": False} | settings
    model = build_model(**size, tokens=segments * length, **settings).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    generator, shape = torch.Generator().manual_seed(0), (batch_size, segments * length)
    ids = torch.randint(0, size["vocabulary"], shape, generator=generator).to(pick_device())
    texts = ids.split(length, dim=1) if variant == "backbone" else [ids]

    def step():
        for text in texts:
            model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def measure_steps(variants: list[str], rounds: int, segments: int, batch_size: int, **size) -> list[dict]:
    """A row for each variant."""
    built = {variant: build_step(variant, segments, batch_size, **size) for variant in variants}
    steps, rows = {variant: step for variant, (_, step) in built.items()}, []
    best_in_turns(steps, 1)  # warms up
    best = best_in_turns(steps, rounds)
    for variant, (model, step) in built.items():
        with PeakMemory(*model.parameters(), *model.buffers()) as peak:
            step()
        speed = batch_size * segments * size["segment_length"] / best[variant]
        row = {"segments": segments, "batch_size": batch_size, "variant": variant, "tokens_per_second": speed}
        rows.append(row | {"mib": peak.tensor_bytes() / MIB})
        for name in ("tokens_per_second", "mib"):
            rows[-1][f"{name}_ratio"] = rows[-1][name] / rows[0][name]
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="ratios are to the first"
    )
    parser.add_argument("--segments", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--segment_length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_dir", default="runs/benchmarks")
    options = vars(parser.parse_args(argv))
    settings = dict(options)
    output_dir, lengths, batches = (options.pop(name) for name in ("output_dir", "segments", "batch_sizes"))
    rows = []
    for batch_size in batches:
        for segments in lengths:
            rows += measure_steps(segments=segments, batch_size=batch_size, **options)
            gc.collect()
    chart = ("segments", "tokens_per_second", ("variant", "batch_size"))
    write_report("throughput", output_dir, settings, rows, chart=chart)


if __name__ == "__main__":
    main()
