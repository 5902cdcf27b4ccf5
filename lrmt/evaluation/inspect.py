"""`lrmt inspect`: what a memory says while a text is read, and which blocks of it each token of the answer read, as passages."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from lrmt.errors import UsageError
from lrmt.evaluation.decoding import decode_answer, generating, greedy
from lrmt.evaluation.inspection import InspectionSettings
from lrmt.evaluation.plots import draw_retrieval
from lrmt.evaluation.rag import context_ids
from lrmt.evaluation.readable import tell_memory
from lrmt.evaluation.run import load_on_device, load_tokenizer, read_config
from lrmt.files import to_json, told_as, write_files
from lrmt.lengths import parse_segments
from lrmt.models import METHODS, LongContextConfig, Recording, RecurrentConfig, Span
from lrmt.progress import progress
from lrmt.tasks.base import Pieces
from lrmt.tasks.options import TaskOptions
from lrmt.tasks.registry import build_task

FILES = {"memory.json", "memory.png", "attention.png", "retrieval.json", "retrieval.png"}
LONGEST_PASSAGE = 100  # characters shown
SEGMENTS_AT_ONCE = 16  # read between two steps of the progress bar


def run_inspection(settings: InspectionSettings) -> None:
    """Reads, answers, prints and writes what was read and what the memory said.

    Whatever can be refused is refused before the model is loaded and before anything is written (UsageError).
    """
    config = read_recording_config(settings.adapter_path)
    tokenizer = load_tokenizer(settings.adapter_path, settings.model_name_or_path)
    if settings.task:
        document, prompt, notes = make_sample(settings, tokenizer, config.span_length)
    else:
        (document, prompt), notes = split_text(settings, tokenizer, config.span_length), settings.note or []
    model = load_on_device(settings)
    with told_as("--output_dir", settings.folder):
        settings.folder.mkdir(parents=True, exist_ok=True)
    answer, told = answer_and_record(model, tokenizer, document, prompt, settings.max_new_tokens)
    ids = document + prompt + answer
    print(f"answer: {decode_answer(answer, tokenizer)!r}\n")
    files = {}
    if told.written or told.looked:
        files |= tell_memory(told, ids, answer, tokenizer, notes, settings.top)
    if told.read:
        files |= tell_spans(told.read, ids, answer, tokenizer, config.num_reading_layers, settings.top)
    replace_files(settings.folder, files)
    print(f"{' and '.join(files)} {'are' if len(files) > 1 else 'is'} in {settings.folder}")


def tell_spans(steps: list[list[list[Span]]], ids, answer: list[int], tokenizer, num_layers: int, top: int) -> dict:
    """Prints what each answer token read of the text `ids`; the files, by name."""
    tokens = [tokenizer.decode([token]) for token in answer]
    records = build_records(steps, tokens)
    files = {"retrieval.json": to_json(records)}
    if not records:
        length = len(ids) - len(answer)
        print(f"no block was retrieved: the text, {length} tokens, is shorter than what is near\n")
        return files
    print(f"{format_tokens_read(records, tokens, num_layers, top)}\n")
    print(f"{format_passages(records, find_passages(steps, ids, tokenizer), num_layers, top)}\n")
    return files | {"retrieval.png": draw_retrieval(*average_shares(records, num_layers, len(answer)))}


def read_recording_config(path):
    """The config of a model that tells what it reads; UsageError for another."""
    config = read_config(path)
    if not METHODS[config.model_type].can_record:
        able = " or ".join(name for name, method in METHODS.items() if method.can_record)
        raise UsageError(
            f"--adapter_path {path} is a model of type {config.model_type}, which tells nothing; give a {able} adapter"
        )
    return config


def replace_files(folder: Path, files: dict[str, str | bytes]) -> None:
    """Writes them, and removes what an inspection that this one replaces has written and this one has not."""
    write_files(folder, files)
    with told_as("--output_dir", folder):
        for name in FILES - files.keys():
            (folder / name).unlink(missing_ok=True)


def split_text(settings: InspectionSettings, tokenizer, span_length: int) -> tuple[list[int], list[int]]:
    """Ids of the document and of the prompt, which is the question, or the last token of the text.

    One token, because all that a prompt holds is read at once: whatever stands in it is near, and not retrieved.
    """
    encode = Pieces(tokenizer).encode  # as in training
    document = encode([settings.text])[0].tolist()
    if len(document) < span_length:
        raise UsageError(
            f"--input {settings.input} is shorter than one block or segment: {len(document)} tokens, it holds "
            f"{span_length}; give a longer text"
        )
    if settings.question is not None:
        return document, encode([settings.question])[0].tolist()
    if len(document) == 1:
        raise UsageError(f"--input {settings.input} is a single token; give a longer text, or a --question")
    return document[:-1], document[-1:]


def make_sample(settings: InspectionSettings, tokenizer, span_length: int) -> tuple[list[int], list[int], list[str]]:
    """Ids of the document and of the question of a sample of a task, and its last notes; says what it asks for."""
    options = {"split": "test", "seed": settings.seed, "segment_length": span_length}
    task = build_task(settings.task, tokenizer, TaskOptions.of(settings), **options)
    example = task.example(0, parse_segments(settings.length, span_length, "--length") * span_length)
    pieces = Pieces(tokenizer)
    document = context_ids(example, pieces).tolist()
    if len(document) < span_length:
        raise UsageError(
            f"--length {settings.length} leaves {len(document)} tokens before the question, less than one block or segment of "
            f"{span_length}; ask for more"
        )
    print(f"question: {example.question!r}, target: {example.target!r}, {len(document)} tokens")
    notes = settings.note or [note.text for note in example.notes[-1:]]
    return document, pieces(example.question).tolist(), notes


def answer_and_record(
    model, tokenizer, document: list[int], prompt: list[int], max_new_tokens: int
) -> tuple[list[int], Recording]:
    """The ids of the greedy answer, and what was written on the way and read for each of them."""
    cuts, state = find_cuts(len(document), model.config), None
    with model.recording() as reading, progress(len(document), "token", "reading", unit_scale=True, leave=False) as bar:
        for begin, end in pairwise(cuts):
            state = model.read(torch.tensor([document[begin:end]], device=model.device), state=state)
            bar.update(end - begin)
    prompt_ids = torch.tensor([prompt], device=model.device)
    with model.recording() as told:
        ids = generating(model)(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            state=state,
            **greedy(tokenizer, max_new_tokens),
        )
    told.written[:0] = reading.written
    return ids[0, len(prompt) :].tolist(), told


def find_cuts(length: int, config: LongContextConfig) -> list[int]:
    """Where the pieces begin and end in which a text of this `length` is read as if all came at once: those of a recurrent model
    end where its segments do, however these are aligned; of another there is but one.
    """
    if not isinstance(config, RecurrentConfig):
        return [0, length]
    size = SEGMENTS_AT_ONCE * config.segment_length
    return [0, *range(min(length, config.segment_length + (length - config.segment_length) % size), length + 1, size)]


def build_records(steps: list[list[list[Span]]], tokens: list[str]) -> list[dict]:
    """One record for each answer token, layer and block that was read; `share` (0..1) is the mean over all heads.

    Args:
        steps: for each answer token the spans of each row, here of one at most. tokens: their texts.
    """
    return [
        {
            "answer_token": number,
            "text": token,
            "layer": span.layer,
            "block": span.number,
            "share": span.weight,
            "start_token": span.start,
        }
        for number, (token, rows) in enumerate(zip(tokens, steps, strict=True))
        for row in rows
        for span in row
    ]


def score_blocks(records: list[dict], num_layers: int) -> Counter:
    """Blocks with their shares, averaged over layers and heads and summed over the records' answer tokens."""
    scores = Counter()
    for record in records:
        scores[record["block"]] += record["share"] / num_layers
    return scores


def average_shares(records: list[dict], num_layers: int, num_tokens: int) -> tuple[np.ndarray, list[int]]:
    """Shares `[layers, blocks]`, averaged over heads and answer tokens, and the numbers of the blocks, those read only."""
    blocks = sorted({record["block"] for record in records})
    column = {block: i for i, block in enumerate(blocks)}
    shares = np.zeros((num_layers, len(blocks)))
    for record in records:
        shares[record["layer"], column[record["block"]]] += record["share"] / num_tokens
    return shares, blocks


def format_tokens_read(records: list[dict], tokens: list[str], num_layers: int, top: int) -> str:
    """A line for each answer token: its best blocks, each with its score."""
    shown = [repr(token) for token in tokens]
    width = max(map(len, shown))
    lines = ["blocks that each answer token read: share of its attention in %, mean over layers and heads"]
    for number, token in enumerate(shown):
        scores = score_blocks([r for r in records if r["answer_token"] == number], num_layers)
        best = "   ".join(f"{block}: {100 * score:.1f}" for block, score in scores.most_common(top))
        lines.append(f"  {token:<{width}}   {best or 'none'}")
    return "\n".join(lines)


def find_passages(steps: list[list[list[Span]]], ids: list[int], tokenizer) -> dict[int, str]:
    """The text of every block that was read, by its number, from the ids of the whole text."""
    spans = {span.number: span for rows in steps for row in rows for span in row}
    return {number: tokenizer.decode(ids[span.start : span.end]) for number, span in spans.items()}


def format_passages(records: list[dict], passages: dict[int, str], num_layers: int, top: int) -> str:
    """The best blocks of the whole answer, their scores summed over its tokens, and their passages."""
    lines = ["the same, summed over the answer"]
    for block, score in score_blocks(records, num_layers).most_common(top):
        lines.append(f"{block:>8}: {100 * score:<6.1f}  {shorten(passages[block])}")
    return "\n".join(lines)


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_PASSAGE else text[: LONGEST_PASSAGE - 1] + "…"
