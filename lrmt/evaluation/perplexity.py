"""`lrmt evaluate --task perplexity`: perplexity by context length, of the same tokens at every length."""

import numpy as np
import torch

from lrmt.errors import UsageError
from lrmt.evaluation.contenders import Contender
from lrmt.evaluation.grid import MAX_BATCH_TOKENS
from lrmt.evaluation.plots import draw_perplexity
from lrmt.evaluation.results import ResultsFolder, format_table
from lrmt.evaluation.run import load_tokenizer, open_contenders, read_segment_length, refuse_too_large_batches
from lrmt.evaluation.settings import EvaluationSettings
from lrmt.progress import progress
from lrmt.tasks.registry import build_task

NUM_SAMPLES = 20


def run_perplexity(settings: EvaluationSettings) -> list[dict]:
    """Measures every length that `settings.folder` does not hold yet; returns all its records and prints their table.

    Whatever can be refused is refused before the model is loaded and before anything is written (UsageError).
    """
    segment_length = read_segment_length(settings.adapter_path)
    if segment_length < 2:
        raise UsageError(f"--adapter_path {settings.adapter_path} has segments of 1 token; perplexity takes 2 or more")
    lengths = [cell.segments for cell in settings.cells(segment_length)]
    # the longest text chooses the places: with another one, other tokens are scored
    identity = settings.identity() | {"longest of --lengths": lengths[-1]}
    folder = ResultsFolder(settings.folder, identity, settings.overwrite, "perplexity.json", settings.defaults())
    tokenizer = load_tokenizer(settings.adapter_path)
    task = build_task("text", tokenizer, split=settings.split, seed=settings.seed, text_path=settings.text_path)
    task.example(0, lengths[-1] * segment_length)  # a text that is too short is refused here
    num_samples = settings.num_samples or NUM_SAMPLES

    model, contenders = open_contenders(settings)
    folder.prepare()
    pending = [
        (n, [c for c in contenders if not folder.find(c.name, "perplexity", n * segment_length)]) for n in lengths
    ]
    pending = [(n, todo) for n, todo in pending if todo]
    with progress(sum(num_samples * len(todo) for _, todo in pending), "text") as bar:
        for segments, todo in pending:
            bar.set_description(f"perplexity, {segments} seg.")
            with refuse_too_large_batches(settings.batch_size):
                losses = measure_losses(
                    todo,
                    task,
                    segments,
                    longest=lengths[-1],
                    segment_length=segment_length,
                    num_samples=num_samples,
                    batch_size=settings.batch_size,
                    device=model.device,
                    progress=bar,
                )
            folder.add([build_record(c.name, segments * segment_length, segments, losses[c.name]) for c in todo])
    folder.write("perplexity.png", draw_perplexity(folder.records))
    caption = f"of the last {segment_length // 2:,} tokens of a text, ± standard error"
    print(f"\n{format_table(folder.records, caption, format_cell)}\n")
    print(f"perplexity.json and perplexity.png are in {folder.path}")
    return folder.records


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
    `segments` segments hold. So the scored tokens are the same whatever `segments` is.
    `progress` (tqdm, or None) advances by one for each text.
    """
    length, count = segments * segment_length, segment_length // 2
    losses = {contender.name: [] for contender in contenders}
    batch_size = max(1, min(batch_size, MAX_BATCH_TOKENS // length))
    for start in range(0, num_samples, batch_size):
        indices = range(start, min(start + batch_size, num_samples))
        examples = [task.example(index, longest * segment_length) for index in indices]
        texts = np.stack([np.concatenate([e.prompt_ids, e.answer_ids])[-length:] for e in examples])
        for contender in contenders:
            ids = torch.from_numpy(texts[:, -contender.window :] if contender.window else texts).to(device)
            losses[contender.name] += contender.loss(ids, count).tolist()
            if progress is not None:
                progress.set_postfix_str(contender.name, refresh=False)
                progress.update(len(indices))
    return {name: np.array(values) for name, values in losses.items()}


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
