"""Speed of generation: one BABILong sample from the cached background, beside the plain algorithm, on one core.

    python benchmarks/babilong_generation.py --background_dir books

The plain algorithm takes the same books, already split into sentences, and tokenises them one by one for every sample.
"text" is the row that `lrmt data build` writes, "ids" the example that training reads. The best of `--rounds` samples
counts; the plain algorithm runs once, up to `--plain_tokens` tokens. Books shorter than a sample are repeated; without
books built-in prose is written.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, for both

import argparse
import time

import numpy as np
from common import write_report
from transformers import AutoTokenizer

from lrmt.data.samples import TINY_TOKENIZER
from lrmt.lengths import parse_tokens
from lrmt.tasks.background import Background, ProceduralProse
from lrmt.tasks.registry import build_task


def make_plainly(task, tokenizer, index: int, length: int) -> np.ndarray:
    """A sample as ids int64 [`length`]: sentence after sentence is tokenised until there are enough, then facts go between."""
    rng, background = np.random.default_rng(index), task.background
    sample = task.draw(index, length, whole=True)
    facts = [tokenizer(f" {fact}", add_special_tokens=False)["input_ids"] for fact in (*sample.facts, sample.question)]
    room, sentences = length - sum(map(len, facts)), []
    number = int(rng.integers(len(background.offsets) - 1))
    while room > 0:
        text = bytes(background.text[slice(*background.text_offsets[number : number + 2])]).decode()
        sentences.append(tokenizer(text, add_special_tokens=False)["input_ids"][:room])
        room -= len(sentences[-1])
        number = (number + 1) % (len(background.offsets) - 1)
    for gap, fact in zip(
        np.sort(rng.integers(len(sentences) + 1, size=len(facts) - 1))[::-1], facts[-2::-1], strict=True
    ):
        sentences.insert(gap, fact)
    return np.array([token for sentence in [*sentences, facts[-1]] for token in sentence])


def best_of(rounds: int, make) -> float:
    seconds = []
    for index in range(rounds):
        begin = time.perf_counter()
        make(index)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--background_dir")
    parser.add_argument("--tokenizer", default=str(TINY_TOKENIZER))
    parser.add_argument("--task", default="qa1")
    parser.add_argument("--lengths", nargs="+", default=["128k", "1M", "10M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain_tokens", type=int, default=10_000_000)
    parser.add_argument("--output_dir", default="runs/benchmarks")
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    begin = time.perf_counter()
    if options.background_dir:
        background = Background(options.background_dir, tokenizer)
    else:
        background = ProceduralProse(tokenizer, seed=0)
        background.reserve(max(map(parse_tokens, options.lengths)))
    opening = time.perf_counter() - begin
    task = build_task(options.task, tokenizer, split="test", background=background)
    rows = []
    for spelled in options.lengths:
        length = parse_tokens(spelled)
        ids = best_of(options.rounds, lambda index, length=length: task.example(index, length))
        text = best_of(options.rounds, lambda index, length=length: task.row(index, length).input)
        plain = float("nan")
        if length <= options.plain_tokens:
            plain = best_of(1, lambda index, length=length: make_plainly(task, tokenizer, index, length))
        rows.append({"tokens": length, "ids_seconds": ids, "text_seconds": text, "plain_seconds": plain})
        rows[-1]["speedup"] = plain / text
    settings = vars(options) | {"background_tokens": len(background.ids)}
    write_report("babilong_generation", options.output_dir, settings, rows, opening_seconds=opening)


if __name__ == "__main__":
    main()
