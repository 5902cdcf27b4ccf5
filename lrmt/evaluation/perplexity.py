"""`lrmt evaluate --task perplexity`: perplexity by context length, of the same tokens at every length."""

import numpy as np
import torch
from accelerate.utils import gather_object

from lrmt.errors import UsageError
from lrmt.evaluation.contenders import Contender
from lrmt.evaluation.grid import Advance, share_batches
from lrmt.evaluation.plots import draw_perplexity
from lrmt.evaluation.results import ResultsFolder, format_table
from lrmt.evaluation.run import load_tokenizer, open_contenders, read_segment_length, refuse_too_large_batches
from lrmt.evaluation.settings import EvaluationSettings
from lrmt.progress import progress
from lrmt.ranks import this_rank
from lrmt.tasks.registry import build_task

NUM_SAMPLES = 20


def run_perplexity(settings: EvaluationSettings) -> list[dict]:
    """Measures every length that `settings.folder` does not hold yet; returns all its records and prints their table.

    Whatever can be refused is refused before the model is loaded and before anything is written (UsageError). Under
    `accelerate launch` the ranks share the texts of each length, and the first one writes.
    """
    ranks = this_rank()
    segment_length, lengths = read_lengths(settings)
    # the longest text chooses the places: with another one, other tokens are scored
    identity = settings.identity() | {"longest of --lengths": lengths[-1]}
    folder = ResultsFolder(settings.folder, identity, settings.overwrite, "perplexity.json", settings.defaults())
    tokenizer = load_tokenizer(settings.adapter_path, settings.model_name_or_path)
    task = build_task("text", tokenizer, split=settings.split, seed=settings.seed, text_path=settings.text_path)
    task.example(0, lengths[-1] * segment_length)  # a text that is too short is refused here

    model, contenders = open_contenders(settings)
    ranks.wait_for_everyone()  # until all have read the folder
    if ranks.is_main_process:
        folder.prepare()
    pending = {n: [c for c in contenders if not folder.find(c.name, "perplexity", n * segment_length)] for n in lengths}
    measure_pending(
        pending, folder, task, settings, longest=lengths[-1], segment_length=segment_length, device=model.device
    )
    if ranks.is_main_process:
        finish(folder, segment_length)
    return folder.records


def read_lengths(settings: EvaluationSettings) -> tuple[int, list[int]]:
    """Tokens of a segment, and the lengths to measure in segments."""
    segment_length = read_segment_length(settings.adapter_path)
    if segment_length < 2:
        raise UsageError(f"--adapter_path {settings.adapter_path} has segments of 1 token; perplexity takes 2 or more")
    return segment_length, [cell.segments for cell in settings.cells(segment_length)]


def measure_pending(
    pending: dict[int, list[Contender]],
    folder: ResultsFolder,
    task,
    settings: EvaluationSettings,
    *,
    segment_length: int,
    **options,
) -> None:
    """Measures length by length, and keeps what each gave."""
    is_writer, num_samples = this_rank().is_main_process, settings.num_samples or NUM_SAMPLES
    total = sum(num_samples * len(todo) for todo in pending.values())
    with progress(total, "text", disable=not is_writer) as bar:
        for segments, todo in pending.items():
            if not todo:
                continue
            bar.set_description(f"perplexity, {segments} seg.")
            with refuse_too_large_batches(settings.batch_size):
                losses = measure_losses(
                    todo,
                    task,
                    segments,
                    segment_length=segment_length,
                    num_samples=num_samples,
                    batch_size=settings.batch_size,
                    progress=bar,
                    **options,
                )
            records = [build_record(c.name, segments * segment_length, segments, losses[c.name]) for c in todo]
            folder.add(records, write=is_writer)


def finish(folder: ResultsFolder, segment_length: int) -> None:
    """Draws what `folder` holds, and prints it."""
    folder.write("perplexity.png", draw_perplexity(folder.records))
    caption = f"of the last {segment_length // 2:,} tokens of a text, ± standard error"
    print(f"\n{format_table(folder.records, caption, format_cell)}\n")
    print(f"perplexity.json and perplexity.png are in {folder.path}")


@torch.no_grad()
def measure_losses(
    contenders: list[Contender],
    task,
    segments: int,
    *,
    longest: int,
    segment_length: int,
    num_samples: int,
    batch_size: int,
    device="cpu",
    progress=None,
) -> dict[str, np.ndarray]:
    """Mean negative log-likelihood, in nats a token, of each sample by contender: float64 [num_samples].

    Sample i is text i of `longest` segments; the last half segment of it is scored, after as much of its end as
    `segments` segments hold. So the scored tokens are the same whatever `segments` is. Under several ranks each takes every
    n-th batch, and all return the same.
    `progress` (tqdm, or None) advances by `num_samples` for each contender, in the end by those of other ranks.
    """
    length, count = segments * segment_length, segment_length // 2
    losses = {contender.name: [] for contender in contenders}
    advance = Advance(progress, num_samples * len(contenders))
    for batch in share_batches(num_samples, batch_size, length):
        examples = [task.example(index, longest * segment_length) for index in batch]
        texts = np.stack([np.concatenate([e.prompt_ids, e.answer_ids])[-length:] for e in examples])
        for contender in contenders:
            ids = torch.from_numpy(texts[:, -contender.window :] if contender.window else texts).to(device)
            losses[contender.name] += zip(batch, contender.loss(ids, count).tolist(), strict=True)
            advance(contender.name, len(batch))
    advance.finish()
    return {name: np.array([loss for _, loss in sorted(gather_object(of_rank))]) for name, of_rank in losses.items()}


def build_record(model: str, length_tokens: int, segments: int, losses: np.ndarray) -> dict:
    """One line of perplexity.json from the losses [n] of n samples; `nll_stderr` is null for a single one."""
    n, nll = len(losses), float(losses.mean())
    return {
        "model": model,
        "task": "perplexity",
        "length_tokens": length_tokens,
        "segments": segments,
        "perplexity": float(np.exp(nll)),
        "nll": nll,
        "nll_stderr": float(losses.std(ddof=1) / n**0.5) if n > 1 else None,
        "n": n,
    }


def format_cell(record: dict) -> str:
    error = record["nll_stderr"]
    spread = "" if error is None else f" ± {record['perplexity'] * error:.2f}"
    return f"{record['perplexity']:.2f}{spread}"
