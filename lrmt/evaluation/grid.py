"""The measurement: every contender answers the same questions, task by task and length by length."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size

from lrmt.errors import UsageError, one_line
from lrmt.evaluation.babilong.prompts import count_new_tokens
from lrmt.evaluation.contenders import Contender, EndpointContender
from lrmt.evaluation.metrics import score
from lrmt.evaluation.results import build_failed_record, build_record
from lrmt.files import write_whole

# The token ids of one batch are held at once: 2**24 of them are 128 MB. Longer texts come in smaller batches.
MAX_BATCH_TOKENS = 2**24


class Answer(NamedTuple):
    """What a contender said to one example."""

    index: int
    target: str
    output: str
    question: str
    task: str


class KeptAnswers:
    """What an endpoint answered to a cell so far, by index: a line of `path` each, so that no answer is paid for twice.

    `fresh` forgets what is there. Only a process that is to `write` does so. Raises UsageError for a damaged file.
    """

    def __init__(self, path: Path, *, fresh: bool = False, write: bool = True):
        self.path, self.write, self.answers = path, write, {}
        if fresh and write:
            path.unlink(missing_ok=True)
        elif not fresh and path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
                self.answers = {answer.index: answer for answer in (Answer(**json.loads(line)) for line in lines)}
            except (OSError, ValueError, TypeError) as error:
                raise UsageError(f"{path} holds no answers ({one_line(error)}); remove it to ask again") from None

    def add(self, answers: Iterable[Answer]) -> None:
        self.answers |= {answer.index: answer for answer in answers}
        if self.write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(self.answers[index]._asdict()) + "\n" for index in sorted(self.answers)]
            write_whole(self.path, "".join(lines))


def measure_cell(
    contenders: list[Contender | EndpointContender],
    task,
    length: int | None,
    *,
    tokenizer,
    segment_length: int,
    num_samples: int,
    batch_size: int,
    rule: str = "official",
    device="cpu",
    progress=None,
    kept: KeptAnswers | None = None,
) -> tuple[list[dict], dict[str, list[Answer]]]:
    """Records (results.build_record), and the answers by name, of `contenders` on `num_samples` examples at `length` tokens
    (None: as long as they are; 0: facts alone).

    Examples are made batch by batch and answered by all contenders, so memory does not grow with their number; an endpoint
    is asked at its own pace, and not for what it has `kept`. A contender without an answer to each of them has a failed
    record. Under several ranks each takes every n-th batch, and all return the same. `progress` (tqdm, or None) advances by
    one for each answer of this rank.
    """
    state, new_tokens = PartialState(), count_new_tokens(task)
    batch_size = max(1, min(batch_size, MAX_BATCH_TOKENS // max(length or 0, 1)))
    starts = range(0, num_samples, batch_size)[state.process_index :: state.num_processes]
    batches = [range(start, min(start + batch_size, num_samples)) for start in starts]
    indices = [index for batch in batches for index in batch]
    sizes, due = {}, len(indices) * len(contenders)

    def make(index):
        example = task.example(index, length or 0)
        sizes[index] = len(example.prompt_ids) + len(example.answer_ids)
        return example

    def advance(name, count):
        nonlocal due
        due -= count
        if progress is not None:
            progress.set_postfix_str(name, refresh=False)
            progress.update(count)

    answers, failures = {contender.name: [] for contender in contenders}, {}
    local = [contender for contender in contenders if isinstance(contender, Contender)]
    at_once = {contender.name: batch_size for contender in local}
    for batch in batches if local else ():
        examples = [make(index) for index in batch]
        for name, contender in ((contender.name, contender) for contender in local):
            outputs, at_once[name] = answer_as_memory_allows(
                contender, examples, at_once[name], tokenizer, new_tokens, device
            )
            answers[name] += [
                Answer(index, example.target, output, example.question, example.task)
                for index, example, output in zip(batch, examples, outputs, strict=False)
            ]
            advance(name, len(outputs))
            if not at_once[name]:
                failures[name] = "out of memory, one text at a time"
    for contender in contenders:
        if contender not in local:
            before = {} if kept is None else kept.answers
            answers[contender.name] = [before[index] for index in indices if index in before]
            advance(contender.name, len(answers[contender.name]))
            missing = [index for index in indices if index not in before]
            keep = None if kept is None else kept.add
            given, failures[contender.name] = ask(contender, make, missing, new_tokens, keep, advance)
            answers[contender.name] += given
    advance("", due)

    tokens = []
    if length is None:
        for index in indices:
            if index not in sizes:  # nobody was asked
                make(index)
        tokens = [sizes[index] for index in indices]
    if state.num_processes > 1:
        tokens = gather_object(tokens)
        answers = {name: gather_object(of_rank) for name, of_rank in answers.items()}
        failures = {name: next(filter(None, gather_object([failures.get(name)])), None) for name in answers}
    mean_tokens = round(sum(tokens) / num_samples) if length is None else length
    cell = (task.name, mean_tokens, -(-mean_tokens // segment_length))
    records = []
    for name, given in answers.items():
        given.sort()
        if len(given) < num_samples:
            records.append(build_failed_record(name, *cell, num_samples, failures.get(name) or "no answer"))
        else:
            right = sum(score(a.target, a.output, a.question, a.task, rule) for a in given)
            records.append(build_record(name, *cell, right, num_samples))
    return records, answers


def answer_as_memory_allows(contender: Contender, examples: list, at_once: int, *arguments) -> tuple[list[str], int]:
    """The outputs of `contender`, `at_once` of them or, where memory is short, fewer; and how many it could be in the end.

    Where it cannot be one, outputs are missing.
    """
    outputs = []
    while at_once and len(outputs) < len(examples):
        part = examples[len(outputs) : len(outputs) + at_once]
        try:
            outputs += contender.answer(part, *arguments)
            continue
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
                raise
        at_once = len(part) // 2
        torch.cuda.empty_cache()
    return outputs, at_once


def ask(
    contender: EndpointContender,
    make: Callable,
    indices: list[int],
    new_tokens: int,
    keep: Callable[[list[Answer]], None] | None,
    advance: Callable[[str, int], None],
) -> tuple[list[Answer], str | None]:
    """What an endpoint answers to the examples `indices`, made as they can be asked, and why not to all."""
    asked, given = [], []

    def examples():
        for index in indices:
            example = make(index)
            asked.append(Answer(index, example.target, "", example.question, example.task))
            yield example

    def note(number, output):
        given.append(asked[number]._replace(output=output))
        if keep is not None:
            keep(given[-1:])
        advance(contender.name, 1)

    failure = contender.ask(examples(), new_tokens, note)
    return given, failure
