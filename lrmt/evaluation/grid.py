"""The measurement: every contender answers the same questions, task by task and length by length."""

from collections import Counter

from lrmt.evaluation.baselines import Contender, answer
from lrmt.evaluation.metrics import score
from lrmt.evaluation.results import build_record

# The token ids of one batch are held at once: 2**24 of them are 128 MB. Longer texts come in smaller batches.
MAX_BATCH_TOKENS = 2**24


def measure_cell(
    contenders: list[Contender],
    task,
    length: int,
    *,
    tokenizer,
    segment_length: int,
    num_samples: int,
    batch_size: int,
    rule: str = "official",
    device="cpu",
    progress=None,
) -> list[dict]:
    """Records (results.build_record) of `contenders` on `num_samples` examples of `task` at `length` tokens.

    Examples are made batch by batch and answered by all contenders, so memory does not grow with their number.
    `progress` (tqdm, or None) advances by one for each answer.
    """
    right, tokens = Counter(), 0
    batch_size = max(1, min(batch_size, MAX_BATCH_TOKENS // max(length, 1)))
    for start in range(0, num_samples, batch_size):
        examples = [task.example(index, length) for index in range(start, min(start + batch_size, num_samples))]
        tokens += sum(len(example.prompt_ids) + len(example.answer_ids) for example in examples)
        prompts = [example.prompt_ids for example in examples]
        for contender in contenders:
            if progress is not None:
                progress.set_postfix_str(contender.name, refresh=False)
            outputs = answer(contender, prompts, tokenizer, task.max_new_tokens, device)
            for example, output in zip(examples, outputs, strict=True):
                right[contender.name] += score(example.target, output, example.question, example.task, rule)
            if progress is not None:
                progress.update(len(examples))
    mean_tokens = round(tokens / num_samples)
    segments = -(-mean_tokens // segment_length)
    return [build_record(c.name, task.name, mean_tokens, segments, right[c.name], num_samples) for c in contenders]
