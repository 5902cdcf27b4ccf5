"""A training step under landmark attention beside full attention (`sdpa`) on the same backbone and context: time and memory.

    python benchmarks/landmark_throughput.py

A random LLaMA with LoRA (r = 8, every linear layer), batch 1, every token scored; on a GPU in bf16. The variants take turns; the
best of `--rounds` steps counts. Memory is the peak of live tensors, weights included.
"""

import argparse

import torch
from common import MIB, PeakMemory, best_in_turns, pick_device, write_report
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lrmt.models import LandmarkForCausalLM


def build_step(variant: str, tokens: int, hidden_size: int, layers: int, block_length: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3 // 8 * 8, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64), max_position_embeddings=2 * tokens, use_cache=False, bos_token_id=None,
        eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    model, modules = LlamaForCausalLM(config).requires_grad_(False), None
    if variant == "landmark":
        model = LandmarkForCausalLM.from_backbone(model, block_length=block_length, context_length=tokens)
        modules = model.memory_modules
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", modules_to_save=modules)).train()
    model = model.to(pick_device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(0)).to(pick_device())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block_length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output_dir", default="runs/benchmarks")
    options = vars(parser.parse_args(argv))
    output_dir, lengths, rounds = (options.pop(name) for name in ("output_dir", "tokens", "rounds"))
    rows = []
    for tokens in lengths:
        built = {variant: build_step(variant, tokens, **options) for variant in ("full", "landmark")}
        steps = {variant: step for variant, (_, step) in built.items()}
        best_in_turns(steps, 1)  # warms up
        best = best_in_turns(steps, rounds)
        first = len(rows)
        for variant, (model, step) in built.items():
            with PeakMemory(*model.parameters(), *model.buffers()) as peak:
                step()
            speed = tokens / best[variant]
            rows.append(
                {"tokens": tokens, "attention": variant, "tokens_per_second": speed, "mib": peak.tensor_bytes() / MIB}
            )
            rows[-1]["speed_ratio"] = speed / rows[first]["tokens_per_second"]
            rows[-1]["memory_ratio"] = rows[-1]["mib"] / rows[first]["mib"]
    write_report(
        "landmark_throughput", output_dir, options, rows, chart=("tokens", "tokens_per_second", ("attention",))
    )


if __name__ == "__main__":
    main()
