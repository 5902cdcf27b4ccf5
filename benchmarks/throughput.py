"""Speed of a training step: RMT with and without constant-memory BPTT, beside the plain backbone on the same tokens.

    python benchmarks/throughput.py

The plain backbone has the same LoRA, no memory, and takes the segments one after another, each by itself. Every token is scored
in all three. The variants take turns; the best of `--rounds` steps counts, which neighbours on the machine disturb least.
"""

import argparse

import torch
from common import build_model, measure_seconds, pick_device, write_report


def build_step(variant: str, segments: int, **size):
    """A function that runs one training step, and the number of its tokens."""
    memory = 0 if variant == "backbone" else 16
    model = build_model(num_memory_tokens=memory, checkpoint_segments=variant == "rmt, constant memory", **size).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    length = size["segment_length"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size["vocabulary"], (1, segments * length), generator=generator).to(pick_device())
    texts = ids.split(length, dim=1) if variant == "backbone" else [ids]

    def step():
        for text in texts:
            model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, ids.numel()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--segment_length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output_dir", default="runs/benchmarks")
    options = vars(parser.parse_args(argv))
    output_dir = options.pop("output_dir")
    settings = dict(options)
    rounds = options.pop("rounds")
    steps = {variant: build_step(variant, **options) for variant in ("backbone", "rmt", "rmt, constant memory")}
    seconds = {variant: [] for variant in steps}
    for _ in range(rounds + 1):
        for variant, (step, _) in steps.items():
            seconds[variant].append(measure_seconds(step))
    rows = []
    for variant, (_, tokens) in steps.items():
        speed = tokens / min(seconds[variant][1:])  # the first round warms up
        rows.append({"variant": variant, "tokens_per_second": speed})
        rows[-1]["ratio"] = speed / rows[0]["tokens_per_second"]
    write_report("throughput", output_dir, settings, rows)


if __name__ == "__main__":
    main()
