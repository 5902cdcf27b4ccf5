"""Speed of reading, beside what its own matrix products alone allow, the straightforward wrapper, and full attention.

    python benchmarks/reading_speed.py
    python benchmarks/reading_speed.py --shape smollm2 --tokens 65536 --variants products rmt

`products`: the linear maps of all layers and the two products of attention that a segment of RMT takes, back to back, and nothing else.
`wrapper`: all logits and hidden states of all segments are kept, as public code of RMT has it. `full`: the bare backbone over all of the
text at once, logits of its last token. The variants take turns; where there is no GPU CPU time of the process counts, which
neighbours on the machine disturb least; the best of `--rounds`. `peak_mib`: of the tensors that reading makes, without weights and text.
"""

import argparse
import time

import torch
from common import MIB, PeakMemory, best_in_turns, pick_device, write_report
from transformers import LlamaConfig, LlamaForCausalLM

from lrmt.models import METHODS
from lrmt.models.weights import behind_attention, layers_of

SHAPES = {  # hidden size, MLP, layers, heads, those of keys, vocabulary
    "tiny": (64, 128, 2, 4, 2, 1024),
    "small": (256, 688, 5, 4, 4, 32_000),  # 12 million parameters
    "smollm2": (576, 1536, 30, 9, 3, 49_152),
    "llama-1b": (2048, 8192, 16, 32, 8, 128_256),
    "llama-8b": (4096, 14336, 32, 32, 8, 128_256),
}
VARIANTS = ("products", "rmt", "rmt_retrieval", "armt", "armt, diagonal", "wrapper", "full")


def build_backbone(shape: str, window: int, dtype: torch.dtype) -> LlamaForCausalLM:
    width, inner, layers, heads, keys, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, max_position_embeddings=window, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(pick_device()):
        return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def build_reader(variant: str, backbone: LlamaForCausalLM, ids: torch.Tensor, length: int, memory: int):
    """A function that reads the text once, in the way of a variant."""
    name, _, how = variant.partition(", ")
    if name in METHODS:
        settings = {"diagonal_batching": True} if how == "diagonal" else {}
        model = (
            METHODS[name].from_backbone(backbone, num_memory_tokens=memory, segment_length=length, **settings).eval()
        )
        return lambda: model.read(ids)
    if name == "full":
        return lambda: backbone(ids, logits_to_keep=1, use_cache=False)
    segments = ids.shape[1] // length
    if name == "products":
        return lambda: run_products(backbone, length + 2 * memory, memory, segments)
    return lambda: run_wrapper(backbone, ids, length, memory)


def run_products(backbone: LlamaForCausalLM, positions: int, memory: int, segments: int) -> None:
    config = backbone.config
    layers = layers_of(backbone)
    weights = [w for layer in layers for w in layer.parameters() if w.dim() == 2]
    spared = {id(w) for part in behind_attention(layers[-1]) for w in part.parameters()}
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    device, dtype = weights[0].device, weights[0].dtype
    inputs = {n: torch.randn(positions, n, device=device, dtype=dtype) for n in {w.shape[1] for w in weights}}
    query = torch.randn(heads, positions, size, device=device, dtype=dtype)
    share = torch.randn(heads, positions, positions, device=device, dtype=dtype)
    for _ in range(segments):
        for weight in weights:
            rows = inputs[weight.shape[1]]
            torch.mm(rows[:memory] if id(weight) in spared else rows, weight.t())
        for _ in range(config.num_hidden_layers):
            torch.bmm(query, query.transpose(1, 2))
            torch.bmm(share, query)


def run_wrapper(backbone: LlamaForCausalLM, ids: torch.Tensor, length: int, memory: int) -> list:
    kept, width = [], backbone.config.hidden_size
    state = torch.zeros(len(ids), memory, width, dtype=backbone.dtype, device=ids.device)
    for segment in ids.split(length, dim=1):
        embeds = torch.cat([state, backbone.get_input_embeddings()(segment), state], dim=1)
        output = backbone(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
        state = output.hidden_states[-1][:, -memory:]
        kept.append((output.logits, output.hidden_states))
    return kept


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--segment_length", type=int, default=512)
    parser.add_argument("--num_memory_tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32" if pick_device().type == "cpu" else "bfloat16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_dir", default="runs/benchmarks")
    options = vars(parser.parse_args(argv))
    output_dir, length, memory = (options[name] for name in ("output_dir", "segment_length", "num_memory_tokens"))
    window = max(*options["tokens"], length + 3 * memory) + 1
    backbone = build_backbone(options["shape"], window, getattr(torch, options["dtype"]))
    rows = []
    for tokens in options["tokens"]:
        generator, size = torch.Generator().manual_seed(0), (options["batch_size"], tokens + 1)  # all segments are over
        ids = torch.randint(0, backbone.config.vocab_size, size, generator=generator).to(backbone.device)
        readers = {variant: build_reader(variant, backbone, ids, length, memory) for variant in options["variants"]}
        peaks = {}
        for variant, read in readers.items():  # which warms up, too
            with PeakMemory() as peak:
                read()
            peaks[variant] = peak.tensor_bytes() / MIB
        best = best_in_turns(readers, options["rounds"], time.process_time)
        for variant, took in best.items():
            row = {
                "tokens": tokens,
                "variant": variant,
                "tokens_per_second": (ids.numel() - len(ids)) / took,
                "peak_mib": peaks[variant],
            }
            for other, name in (("products", "of_products"), ("wrapper", "of_wrapper"), ("full", "of_full")):
                row[name] = best[other] / took if other in best else None
            rows.append(row)
    write_report("reading_speed", output_dir, options, rows, chart=("tokens", "tokens_per_second", ("variant",)))


if __name__ == "__main__":
    main()
