"""Pretrain a tiny LLaMA or Mistral that reads English well enough for in-segment passkey and bAbI qa1.

    python scripts/pretrain_tiny.py --text_dir books --held_out moby_dick.txt --output_dir tiny-llama-1
    python scripts/pretrain_tiny.py --text_dir books --held_out moby_dick.txt --output_dir tiny-llama \\
        --init_from tiny-llama-1 --steps 600 --learning_rate 0.005 --nf4_share 1 --feedback_share 0.6
    python scripts/pretrain_tiny.py --text_dir books --held_out moby_dick.txt --output_dir tiny-mistral \\
        --backbone mistral --init_from tiny-llama --steps 300 --learning_rate 0.004 --nf4_share 1 --feedback_share 0.6

The result is a stock transformers checkpoint with its tokenizer and a card. A small language model left to itself
answers "Where is Mary?" by shortcuts and does not bind a place to the person some tokens back. Losses that are thrown
away after training teach it early: linear probes predict, at each place and each "?", whom the fact or question is
about, and at any token the two before it; and one layer's attention is pulled to the place that the answer can be
copied from. The last steps run on weights rounded to NF4, and the saved weights lie on that grid, so that quantising
them later changes next to nothing. With `--feedback_share` the model learns to read its own final hidden states in
place of token embeddings, which is what the hand-overs `identity` and `scaled` will feed it: without, such memory is
learnt about half as fast. The hand-over `tokens` feeds embeddings and needs none of it: SmolLM2, which was never
trained so, forms memory as fast. The losses that are thrown away are for answering within a segment, whatever the memory.
An interrupted run goes on from `<output_dir>.checkpoint.pt` when given the same command.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_text import ANSWER, MAX_LENGTH, READ, SKIP, Corpus, train_tokenizer
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lrmt.errors import UsageError
from lrmt.tasks.background import Background, ProceduralProse
from lrmt.tasks.registry import build_task

SHAPE = {  # 0.8 million parameters, the embedding tied
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
SLIDING_WINDOW = 256
EMBEDDING_SCALE = 0.2  # of input embeddings and final hidden states alike: memory tokens feed the latter back in
MAX_FEEDBACK_LENGTH = 256  # a text is read twice over
PREVIOUS_LAYER, SUBJECT_LAYER = 1, 2  # where the probes read
LOSS_WEIGHTS = {"read": 0.3, "answer": 1.0, "subject": 0.5, "previous": 1.0, "pointer": 0.5}
NF4 = torch.tensor(  # the 4-bit NormalFloat code, QLoRA (Dettmers et al. 2023), appendix E
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)


class Probes(torch.nn.Module):
    """Extra losses that make binding and copying form early; thrown away after training."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.subject, self.previous, self.second = (
            torch.nn.Linear(hidden_size, hidden_size, bias=False) for _ in "123"
        )

    def forward(self, model, hidden_states, ids, subjects, distances) -> dict[str, torch.Tensor]:
        embedding = model.get_input_embeddings().weight

        def name(probe, hidden, tokens):
            return F.cross_entropy(F.linear(probe(hidden), embedding).float() / 4, tokens)

        known = subjects >= 0
        some = torch.rand(len(ids), ids.shape[1] - 2) < 0.15
        early = hidden_states[PREVIOUS_LAYER][:, 2:][some]
        return {
            "subject": name(self.subject, hidden_states[SUBJECT_LAYER][known], subjects[known]),
            "previous": name(self.previous, early, ids[:, 1:-1][some])
            + name(self.second, early, ids[:, :-2][some]) / 2,
            "pointer": point(model, hidden_states[SUBJECT_LAYER], distances),
        }


def point(model, hidden: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """How far the attention of layer SUBJECT_LAYER, all heads together, is from the place to copy from.

    hidden [B, T, H] enters that layer; its queries and keys are computed a second time, as attention weights are not
    returned by the fast kernels.
    """
    layer, batch, length = model.model.layers[SUBJECT_LAYER], *hidden.shape[:2]
    normed = layer.input_layernorm(hidden)
    shape = (batch, length, -1, layer.self_attn.head_dim)
    queries, keys = (
        projection(normed).view(shape).transpose(1, 2)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    cos, sin = model.model.rotary_emb(hidden, torch.arange(length)[None])
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    row, position = torch.nonzero(distances > 0, as_tuple=True)
    source = position - distances[row, position]
    row, position, source = (x[source >= 0] for x in (row, position, source))
    scores = (queries @ keys.transpose(2, 3))[row, :, position].float() * layer.self_attn.scaling  # [N, heads, T]
    scores = scores.masked_fill(torch.arange(length) > position[:, None, None], -torch.inf)
    at_source = scores.log_softmax(-1).gather(2, source[:, None, None].expand(-1, scores.shape[1], 1)).squeeze(2)
    return -at_source.amax(1).mean()


class RoundToNF4(torch.nn.Module):
    """Weights as NF4 would store them, in blocks of 64; gradients pass straight through."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.detach().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-8)
        rounded = NF4[torch.bucketize(blocks / scale, (NF4[1:] + NF4[:-1]) / 2)] * scale
        return weight + (rounded.view_as(weight) - weight).detach()


def start_rounding(model) -> bool:
    for linear in linears(model):
        parametrize.register_parametrization(linear, "weight", RoundToNF4())
    return True


def linears(model) -> list[torch.nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]


def build_model(args, tokenizer):
    """A fresh model of SHAPE, or the one of `--init_from` under the wanted architecture."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    common = {**SHAPE, **ids, "vocab_size": len(tokenizer), "head_dim": 32}
    if args.backbone == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=SLIDING_WINDOW))
    if args.init_from:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(args.init_from, dtype=torch.float32).state_dict())
        return model
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, EMBEDDING_SCALE)
        model.model.norm.weight.fill_(EMBEDDING_SCALE)
        for layer in model.model.layers:  # start near the identity
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
    return model


@torch.no_grad()
def feed_back(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states `[B, T, d]` that predict each token, and where the prediction is right and chosen, `[B, T]`.

    They are read off the second of two copies of the text, where any token can be foreseen. A model that has learnt to
    take them in place of token embeddings can read what it has written itself.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=torch.cat([ids, ids], dim=1), use_cache=False).last_hidden_state
        hidden = hidden[:, ids.shape[1] - 1 : -1]
        right = model.lm_head(hidden).argmax(-1) == ids
    share = torch.rand(len(ids), 1)
    return hidden.float(), right & (torch.rand(ids.shape) < share)


def compute_losses(
    model, probes: Probes, batch: tuple[torch.Tensor, ...], feedback: bool = False
) -> dict[str, torch.Tensor]:
    ids, kinds, subjects, distances = batch
    embeds = model.get_input_embeddings()(ids)
    if feedback:
        hidden, chosen = feed_back(model, ids)
        embeds = torch.where(chosen[..., None], hidden, embeds)
    with torch.autocast("cpu", torch.bfloat16):
        output = model.model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
        scored = kinds[:, 1:] > SKIP
        logits = model.lm_head(output.last_hidden_state[:, :-1][scored])
        losses = probes(model, output.hidden_states, ids, subjects, distances)
    nll = F.cross_entropy(logits.float(), ids[:, 1:][scored], reduction="none")
    kinds = kinds[:, 1:][scored]
    return {"read": nll[kinds == READ].mean(), "answer": nll[kinds == ANSWER].mean(), **losses}


@torch.no_grad()
def measure_parts(model, corpus: Corpus, num_rows: int = 48) -> dict[str, float]:
    """Share of answer tokens right, in per cent, for each kind of row on held-out text."""
    result = {}
    for name in ("random", "clean", "hidden", "passkey", "copy"):
        rng, rows = random.Random(name), []
        for _ in range(num_rows):
            rows.append(corpus.sample(rng, 128, name))
            rows[-1].link(corpus.mark)
        ids, kinds = (torch.tensor([getattr(row, part) for row in rows]) for part in ("ids", "kinds"))
        with torch.autocast("cpu", torch.bfloat16):
            guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        scored = (kinds[:, 1:] == ANSWER) & (ids[:, 1:] != corpus.eos)
        result[name] = 100 * (guess == ids[:, 1:])[scored].float().mean().item()
    return result


@torch.no_grad()
def measure_task(model, task, num_samples: int = 200, length: int = 128) -> float:
    """Exact match of greedy answers including EOS, in per cent, teacher-forced (the same thing for exact match)."""
    correct = 0
    for index in range(num_samples):
        example = task.example(index, length)
        ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.answer_ids]))[None]
        guess = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1].argmax(-1)
        correct += torch.equal(guess, ids[0, len(example.prompt_ids) :])
    return 100 * correct / num_samples


def measure(path: Path, tokenizer, args) -> dict[str, dict[str, float]]:
    """In-segment passkey and qa1 accuracy of a saved model, fp32 and NF4."""
    background = str(Path(args.text_dir) / args.held_out) if args.held_out else None
    options = {"split": "validation", "seed": args.seed, "segment_length": 128}
    tasks = {
        "passkey": build_task("passkey", tokenizer, **options),
        "qa1": build_task("qa1", tokenizer, babi_dir=args.babi_dir, background_dir=background, **options),
    }
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loading = {"fp32": {"dtype": torch.float32}, "NF4": {"quantization_config": nf4, "dtype": torch.bfloat16}}
    result = {}
    for name, options in loading.items():
        model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
        result[name] = {task: measure_task(model, tasks[task]) for task in tasks}
    return result


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rates: warm-up, plateau, linear decay over the second half."""
    return min(1.0, step / 50) * min(1.0, 0.02 + 2 * (1 - step / steps))


def train(args, model, corpus: Corpus, held_out: Corpus) -> dict:
    """Train in place; returns the smoothed final losses and the seconds taken."""
    probes = Probes(SHAPE["hidden_size"])
    matrices = [linear.weight for linear in linears(model)]
    inside = {id(weight) for weight in matrices}
    others = [p for p in model.parameters() if id(p) not in inside] + list(probes.parameters())
    optimizers = [
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate / 3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    weights = dict(LOSS_WEIGHTS)
    if args.init_from:  # binding is there, and fresh probes would only shake the weights
        del weights["subject"], weights["previous"]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    parts = {"model": model, "probes": probes, "muon": optimizers[0], "adamw": optimizers[1]}
    window = SLIDING_WINDOW if args.backbone == "mistral" else MAX_LENGTH
    checkpoint = Path(f"{args.output_dir}.checkpoint.pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    command = {name: value for name, value in vars(args).items() if name not in ("overwrite", "num_threads")}
    done, smooth, seconds, rounding = 0, {}, 0.0, False
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["command"] != command:
            raise UsageError(f"{checkpoint} is of another command; give that one again, or delete the file")
        if saved["rounding"]:
            rounding = start_rounding(model)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done, smooth, seconds = saved["step"], saved["smooth"], saved["seconds"]
    began = time.monotonic() - seconds
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, desc=f"tiny {args.backbone}", mininterval=5)
    for step in bar:
        if not rounding and step >= args.steps * (1 - args.nf4_share):
            rounding = start_rounding(model)
        factor = schedule(step + 1, args.steps)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        rng = random.Random(f"{args.seed} {step}")  # each step has its own stream: a resumed run is the same run
        torch.manual_seed(args.seed * 1_000_003 + step)
        length = rng.choice([128] * 6 + [256] + [512])
        batch = corpus.batch(rng, args.batch_tokens // length, length, window)
        feedback = length <= MAX_FEEDBACK_LENGTH and rng.random() < args.feedback_share
        losses = compute_losses(model, probes, batch, feedback)
        losses = {name: losses[name] for name in weights}
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, loss in losses.items():
            smooth[name] = 0.97 * smooth.get(name, loss.item()) + 0.03 * loss.item()
        bar.set_postfix({name: f"{value:.2f}" for name, value in smooth.items()}, refresh=False)
        if (step + 1) % args.eval_steps == 0:
            model.eval()
            scores = " ".join(f"{name} {value:.1f}" for name, value in measure_parts(model, held_out).items())
            model.train()
            tqdm.write(f"step {step + 1}, {time.monotonic() - began:.0f} s, {describe(smooth)} | right (%): {scores}")
            sys.stdout.flush()
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "smooth": smooth, "seconds": time.monotonic() - began}
            torch.save(state | {"command": command, "rounding": rounding}, f"{checkpoint}.tmp")
            os.replace(f"{checkpoint}.tmp", checkpoint)
    if rounding:  # keep the rounded weights
        for linear in linears(model):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    return {"losses": smooth, "seconds": time.monotonic() - began}


def describe(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in losses.items())


def write_card(folder: Path, args, model, outcome: dict, scores: dict, files: list[str]) -> None:
    config = model.config
    table = "\n".join(f"| {name} | {row['passkey']:.1f} | {row['qa1']:.1f} |" for name, row in scores.items())
    start = f"the weights of `{Path(args.init_from).name}`" if args.init_from else "random weights"
    if args.init_from and args.backbone == "mistral":
        start += " (same shapes; the architectures differ by the sliding window)"
    feedback = ""
    if args.feedback_share:
        feedback = f"\n- In {args.feedback_share:.0%} of the steps some tokens are read as the final hidden states that predict them."
    window = f", sliding window {config.sliding_window}" if args.backbone == "mistral" else ""
    facts = "the official bAbI qa1 validation file" if args.babi_dir else "simulated bAbI qa1 stories"
    prose = f"`{args.held_out}`, never trained on" if args.held_out else "built-in prose"
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
library_name: transformers
---
# tiny {args.backbone}

A stock `{type(model).__name__}` of {model.num_parameters():,} parameters for demonstrations and tests on a CPU: reads
simple English, copies, and answers passkey and bAbI qa1 questions within a segment. It is not of use beyond that.

- Shape: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads, \
MLP {config.intermediate_size}, tied embeddings, {config.vocab_size} tokens (byte-fallback BPE){window}.
- Data: {", ".join(files)}; built-in prose; generated facts and questions, pass keys, random chunks to copy, \
simulated bAbI stories.
- Losses: {", ".join(outcome["losses"])} (see `scripts/pretrain_tiny.py`).
- Training: from {start}; {args.steps} steps of {args.batch_tokens} tokens, seed {args.seed}, Muon and AdamW, \
{outcome["seconds"] / 60:.0f} minutes on {args.num_threads} CPU thread(s), the last {args.nf4_share:.0%} of the steps \
on weights rounded to NF4. The saved matrices lie on the NF4 grid.{feedback}
- Final losses (nats): {describe(outcome["losses"])}.
- Command: `{args.command}`

Exact match in per cent, 200 samples each, 128 tokens in all, greedy, no fine-tuning. qa1: {facts}, the facts
between sentences of {prose}.

| | passkey | qa1 |
|---|---|---|
{table}
""",
        encoding="utf-8",
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_dir", required=True, help="folder of .txt files with ordinary English to train on")
    parser.add_argument("--held_out", help="file of that folder to keep for measuring, not for training")
    parser.add_argument("--babi_dir", help="folder with qa1_valid.txt to measure on (default: simulated stories)")
    parser.add_argument("--output_dir", required=True, help="folder to write; must not exist without --overwrite")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder once training is done")
    parser.add_argument("--backbone", choices=["llama", "mistral"], default="llama", help="default: %(default)s")
    parser.add_argument("--init_from", help="tiny backbone to go on from, with its tokenizer (default: from scratch)")
    parser.add_argument("--tokenizer", help="folder of a tokenizer to use (default: that of --init_from, or a new one)")
    parser.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens per step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=0.015, help="Muon's; AdamW's is a third (%(default)s)")
    parser.add_argument("--nf4_share", type=float, default=0.25, help="last share of steps in NF4 (%(default)s)")
    parser.add_argument(
        "--feedback_share",
        type=float,
        default=0.0,
        help="share of steps that read some tokens as the final hidden states predicting them (default: %(default)s)",
    )
    parser.add_argument(
        "--eval_steps", type=int, default=100, help="measure and checkpoint every N steps (%(default)s)"
    )
    parser.add_argument("--num_threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    output = Path(args.output_dir)
    if output.exists() and not args.overwrite:
        raise UsageError(f"--output_dir {output} exists; add --overwrite to replace it, or give another")
    if not Path(args.text_dir).is_dir() or not any(Path(args.text_dir).glob("*.txt")):
        raise UsageError(f"--text_dir {args.text_dir} has no .txt file; give a folder with English prose")
    if args.steps < 1 or args.batch_tokens < 512:
        raise UsageError(f"--steps must be 1+ and --batch_tokens 512+; got {args.steps} and {args.batch_tokens}")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    files = sorted(path for path in Path(args.text_dir).glob("*.txt") if path.name != args.held_out)
    known = args.tokenizer or args.init_from
    texts = (path.read_text(encoding="utf-8-sig") for path in files)
    tokenizer = AutoTokenizer.from_pretrained(known) if known else train_tokenizer(list(texts))
    prose = ProceduralProse(tokenizer, seed=args.seed)
    corpus = Corpus(tokenizer, [Background(files, tokenizer), prose], args.seed)
    unseen = Background(Path(args.text_dir) / args.held_out, tokenizer) if args.held_out else prose
    held_out = Corpus(tokenizer, [unseen], args.seed + 1)
    model = build_model(args, tokenizer).train()
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    outcome = train(args, model, corpus, held_out)
    output = Path(args.output_dir)
    draft = output.with_name(output.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    model.eval().save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    scores = measure(draft, tokenizer, args)
    print(json.dumps(scores), flush=True)
    args.command = "python " + " ".join([f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    write_card(draft, args, model, outcome, scores, [path.name for path in files])
    if output.exists():
        shutil.rmtree(output)
    os.replace(draft, output)
    Path(f"{output}.checkpoint.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"pretrain_tiny.py: {error}")
