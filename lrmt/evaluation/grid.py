"""The measurement: every contender answers the same questions, task by task and length by length."""

from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object

from lrmt.evaluation.baselines import Contender, EndpointContender
from lrmt.evaluation.metrics import score
from lrmt.evaluation.results import build_failed_record, build_record

# The token ids of one batch are held at once: 2**24 of them are 128 MB. Longer texts come in smaller batches.
MAX_BATCH_TOKENS = 2**24


class Answer(NamedTuple):
    """What a contender said to one example; `output` None: it failed to answer."""

    index: int
    target: str
    output: str | None
    question: str
    task: str


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
) -> tuple[list[dict], dict[str, list[Answer]]]:
    """Records (results.build_record), and the answers by name, of `contenders` on `num_samples` examples at `length` tokens
    (None: as long as they are; 0: facts alone).

    Examples are made batch by batch and answered by all contenders, so memory does not grow with their number. Under several
    ranks each takes every n-th batch, and all return the same. `progress` (tqdm, or None) advances by one for each answer of
    this rank.
    """
    state = PartialState()
    answers, tokens = {contender.name: [] for contender in contenders}, []
    batch_size = max(1, min(batch_size, MAX_BATCH_TOKENS // max(length or 0, 1)))
    starts = range(0, num_samples, batch_size)
    for start in starts[state.process_index :: state.num_processes]:
        indices = range(start, min(start + batch_size, num_samples))
        examples = [task.example(index, length or 0) for index in indices]
        tokens += [len(example.prompt_ids) + len(example.answer_ids) for example in examples]
        for contender in contenders:
            if progress is not None:
                progress.set_postfix_str(contender.name, refresh=False)
            outputs = contender.answer(examples, tokenizer, task.max_new_tokens, device)
            answers[contender.name] += [
                Answer(i, e.target, output, e.question, e.task)
                for i, e, output in zip(indices, examples, outputs, strict=True)
            ]
            if progress is not None:
                progress.update(len(examples))
    failures = {contender.name: contender.failure() for contender in contenders}
    if state.num_processes > 1:
        tokens = gather_object(tokens)
        answers = {name: sorted(gather_object(of_rank)) for name, of_rank in answers.items()}
        failures = {name: next(filter(None, gather_object([one])), None) for name, one in failures.items()}
    mean_tokens = round(sum(tokens) / num_samples)
    cell = (task.name, mean_tokens, -(-mean_tokens // segment_length)) if length != 0 else (task.name, 0, 0)
    records = []
    for name, given in answers.items():
        if any(a.output is None for a in given):
            records.append(build_failed_record(name, *cell, num_samples, failures[name] or "no answer"))
        else:
            right = sum(score(a.target, a.output, a.question, a.task, rule) for a in given)
            records.append(build_record(name, *cell, right, num_samples))
    return records, answers
