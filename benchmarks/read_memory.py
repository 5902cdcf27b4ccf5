"""Peak memory of `model.read` against the length of the text, given whole and given in pieces.

    python benchmarks/read_memory.py

Methods: RMT, RMT-R and ARMT (`--methods`). Each length runs in a process of its own, over a random one-layer LLaMA. `text_mib` is the
text itself, 8 bytes a token in `input_ids`; `read_mib` is the peak of all other live tensors (on CUDA, where the text stays on the CPU:
the allocator's peak); `state_mib` is what is kept of it, which with RMT-R grows; `process_mib` is the peak of the process, libraries
included. In pieces, `read` is called for every 4 segments with the state of the piece before, so that the whole text is never held.
"""

import argparse
import json

import torch
from common import MIB, PeakMemory, build_model, process_bytes, run_fresh, write_report
from torch.utils._pytree import tree_leaves


def measure_read(method: str, tokens: int, in_pieces: bool, **size) -> dict:
    """Peak MiB of reading a random text of `tokens` tokens."""
    model = build_model(method=method, **size).get_base_model().eval()
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(0, size["vocabulary"], (1, length), generator=generator)

    held = [] if in_pieces else [draw(tokens)]
    piece = 4 * size["segment_length"]
    pieces = held or (draw(min(piece, tokens - begin)) for begin in range(0, tokens, piece))
    state = None
    with PeakMemory(*model.parameters(), *model.buffers(), *held) as peak:
        for ids in pieces:
            state = model.read(ids, state=state)
    assert int(state.num_tokens) == tokens
    text_bytes = sum(ids.nbytes for ids in held)
    on_cpu = model.device.type == "cpu"  # else the text is not where the peak was measured
    return {
        "method": method,
        "in_pieces": in_pieces,
        "tokens": tokens,
        "text_mib": text_bytes / MIB,
        "read_mib": (peak.tensor_bytes() - text_bytes * on_cpu) / MIB,
        "state_mib": sum(tensor.nbytes for tensor in tree_leaves(state.memory)) / MIB,
        "process_mib": process_bytes() / MIB,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=("rmt", "rmt_retrieval", "armt"), default=["rmt"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--segment_length", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--output_dir", default="runs/benchmarks")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(argv))
    one, output_dir, lengths, methods = (options.pop(name) for name in ("one", "output_dir", "tokens", "methods"))
    if one is not None:
        print(json.dumps(measure_read(**json.loads(one))))
        return
    rows, growth = [], {}
    for method in methods:
        for in_pieces in (False, True):
            found = [run_fresh(__file__, method=method, tokens=n, in_pieces=in_pieces, **options) for n in lengths]
            for row in found:
                row["read_ratio"] = row["read_mib"] / found[0]["read_mib"]
                row["process_ratio"] = row["process_mib"] / found[0]["process_mib"]
            growth[f"growth_{method}_{'in_pieces' if in_pieces else 'whole'}"] = found[-1]["read_ratio"] - 1
            rows += found
    write_report(
        "read_memory", output_dir, options, rows, chart=("tokens", "read_mib", ("method", "in_pieces")), **growth
    )


if __name__ == "__main__":
    main()
