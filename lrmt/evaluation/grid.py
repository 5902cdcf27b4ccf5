"""The measurement: every contender answers the same questions, and the ranks share them."""

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size

from lrmt.evaluation.answers import Answer, KeptAnswers, to_answer
from lrmt.evaluation.babilong.prompts import count_new_tokens
from lrmt.evaluation.contenders import Contender, EndpointContender
from lrmt.evaluation.metrics import score
from lrmt.evaluation.results import build_failed_record, build_record
from lrmt.ranks import this_rank
from lrmt.tasks.base import Example

# The token ids of one batch are held at once: 2**24 of them are 128 MB. Longer texts come in smaller batches.
MAX_BATCH_TOKENS = 2**24


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
    one for each answer of this rank, and in the end by those of the others.
    """
    questions, new_tokens = Questions(task, length, num_samples, batch_size), count_new_tokens(task)
    advance = Advance(progress, num_samples * len(contenders))
    local = [contender for contender in contenders if isinstance(contender, Contender)]
    answers = {contender.name: [] for contender in contenders}
    failures = answer_locally(local, questions, answers, tokenizer, new_tokens, device, advance)
    for contender in contenders:
        if contender not in local:
            failures[contender.name] = ask(contender, questions, answers[contender.name], new_tokens, kept, advance)
    advance.finish()
    mean_tokens = length if length is not None else questions.mean_tokens()
    answers, failures = gather(answers, failures)
    cell = (task.name, mean_tokens, -(-mean_tokens // segment_length))
    records = [
        build_cell_record(name, cell, given, num_samples, rule, failures.get(name)) for name, given in answers.items()
    ]
    return records, answers


def share_batches(num_samples: int, batch_size: int, length: int) -> list[range]:
    """The indices of this rank's batches: every n-th batch of all, smaller ones where texts of `length` tokens are long."""
    ranks = this_rank()
    batch_size = max(1, min(batch_size, MAX_BATCH_TOKENS // max(length, 1)))
    starts = range(0, num_samples, batch_size)[ranks.process_index :: ranks.num_processes]
    return [range(start, min(start + batch_size, num_samples)) for start in starts]


class Questions:
    """This rank's share of a cell's examples, made when they are asked for, and how long they are."""

    def __init__(self, task, length: int | None, num_samples: int, batch_size: int):
        self.task, self.length, self.num_samples = task, length, num_samples
        self.batches = share_batches(num_samples, batch_size, length or 0)
        self.indices = [index for batch in self.batches for index in batch]
        self.sizes: dict[int, int] = {}

    def make(self, index: int) -> Example:
        example = self.task.example(index, self.length or 0)
        self.sizes[index] = len(example.prompt_ids) + len(example.answer_ids)
        return example

    def mean_tokens(self) -> int:
        """Of the examples of all ranks, those included that nobody was asked."""
        for index in self.indices:
            if index not in self.sizes:
                self.make(index)
        return round(sum(gather_object([self.sizes[index] for index in self.indices])) / self.num_samples)


class Advance:
    """Moves `progress` (tqdm, or None) on by `due` answers in all, whoever gives them and however many are missing."""

    def __init__(self, progress, due: int):
        self.progress, self.due = progress, due

    def __call__(self, name: str, count: int) -> None:
        self.due -= count
        if self.progress is not None:
            self.progress.set_postfix_str(name, refresh=False)
            self.progress.update(count)

    def finish(self) -> None:
        self("", self.due)


def answer_locally(
    contenders: list[Contender],
    questions: Questions,
    answers: dict,
    tokenizer,
    new_tokens: int,
    device,
    advance: Advance,
) -> dict[str, str]:
    """Adds to `answers` what the models here say, batch by batch; returns why one could not, by name."""
    at_once = {contender.name: max(map(len, questions.batches), default=1) for contender in contenders}
    for batch in questions.batches if contenders else ():
        examples = [questions.make(index) for index in batch]
        for contender in contenders:
            name = contender.name
            outputs, at_once[name] = answer_as_memory_allows(
                contender, examples, at_once[name], tokenizer, new_tokens, device
            )
            answers[name] += map(to_answer, batch, examples, outputs)
            advance(name, len(outputs))
    return {name: "out of memory, one text at a time" for name, size in at_once.items() if not size}


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
    questions: Questions,
    given: list[Answer],
    new_tokens: int,
    kept: KeptAnswers | None,
    advance: Advance,
) -> str | None:
    """Adds to `given` what an endpoint has answered before, and what it answers now to the others; returns why not to all."""
    before = {} if kept is None else dict(kept.answers)
    given += [before[index] for index in questions.indices if index in before]
    advance(contender.name, len(given))
    asked = []

    def examples():
        for index in questions.indices:
            if index not in before:
                example = questions.make(index)
                asked.append(to_answer(index, example))
                yield example

    def note(number, output):
        given.append(asked[number]._replace(output=output))
        if kept is not None:
            kept.add(given[-1:])
        advance(contender.name, 1)

    return contender.ask(examples(), new_tokens, note)


def gather(answers: dict[str, list[Answer]], failures: dict[str, str | None]) -> tuple[dict, dict]:
    """The answers of all ranks, by index, and why some are missing, from the first rank that tells."""
    whole = {name: sorted(gather_object(given)) for name, given in answers.items()}
    return whole, {name: next(filter(None, gather_object([failures.get(name)])), None) for name in answers}


def build_cell_record(
    name: str, cell: tuple, answers: list[Answer], num_samples: int, rule: str, failure: str | None
) -> dict:
    """The record of `cell` (task, tokens, segments); a failed one where answers are missing."""
    if len(answers) < num_samples:
        return build_failed_record(name, *cell, num_samples, failure or "no answer")
    right = sum(score(a.target, a.output, a.question, a.task, rule) for a in answers)
    return build_record(name, *cell, right, num_samples)
