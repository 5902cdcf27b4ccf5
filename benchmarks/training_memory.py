"""Peak memory of a training step against the number of segments, with constant-memory BPTT and without.

    python benchmarks/training_memory.py

Each configuration runs in a process of its own: forward, backward and AdamW step of LoRA and memory over a random LLaMA, one
answer scored at the end of the text. `tensor_mib` counts live tensors exactly (on CUDA: the allocator's peak); `process_mib`
is the peak of the process, libraries included.
"""

import argparse
import json

import torch
from common import MIB, PeakMemory, build_model, pick_device, process_bytes, run_fresh, write_report


def measure_step(segments: int, checkpoint_segments: bool, **size) -> dict:
    """Peak MiB of one training step, on texts of `segments` segments."""
    model = build_model(checkpoint_segments=checkpoint_segments, **size).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    ids = torch.randint(0, size["vocabulary"], (1, segments * size["segment_length"]), device=pick_device())
    labels = torch.full_like(ids, -100)
    labels[:, -8:] = ids[:, -8:]
    before = process_bytes()
    with PeakMemory(*model.parameters(), *model.buffers(), ids, labels) as peak:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    total = process_bytes()
    return {
        "checkpoint_segments": checkpoint_segments,
        "segments": segments,
        "tokens": ids.numel(),
        "tensor_mib": peak.tensor_bytes() / MIB,
        "process_mib": total / MIB,
        "process_mib_of_step": (total - before) / MIB,
    }


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--segment_length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--output_dir", default="runs/benchmarks")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(argv))
    one, output_dir, segments = (options.pop(name) for name in ("one", "output_dir", "segments"))
    if one is not None:
        return print(json.dumps(measure_step(**json.loads(one))))
    rows, growth = [], {}
    for checkpointed in (True, False):
        found = [run_fresh(__file__, segments=n, checkpoint_segments=checkpointed, **options) for n in segments]
        for row in found:
            row["tensor_ratio"] = row["tensor_mib"] / found[0]["tensor_mib"]
            row["process_ratio"] = row["process_mib"] / found[0]["process_mib"]
        growth[checkpointed] = found[-1]["tensor_ratio"] - 1
        rows += found
    grown = {"growth_checkpointed": growth[True], "growth_plain": growth[False]}
    write_report(
        "training_memory",
        output_dir,
        options,
        rows,
        chart=("segments", "tensor_mib", ("checkpoint_segments",)),
        **grown,
    )


if __name__ == "__main__":
    main()
