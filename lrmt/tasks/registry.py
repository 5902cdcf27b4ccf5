"""From the name of a task to the task."""

from collections.abc import Sequence
from pathlib import Path

from lrmt.errors import UsageError, suggest
from lrmt.tasks.babilong import BabilongTask
from lrmt.tasks.background import Background, open_background
from lrmt.tasks.base import Example, Task, derive_rng
from lrmt.tasks.dataset import DatasetTask
from lrmt.tasks.names import SPLITS
from lrmt.tasks.needles import MemoryTask, NeedleTask
from lrmt.tasks.passkey import PasskeyTask
from lrmt.tasks.text import TextTask


def _passkey(name, tokenizer, options):
    given = _only(options, "split seed segment_length num_digits depth early_facts_share")
    return PasskeyTask(tokenizer, wording=options["passkey_wording"], **given)


def _dataset(name, tokenizer, options):
    return DatasetTask(
        tokenizer, **_only(options, "dataset_path split seed segment_length dataset_config dataset_split")
    )


def _text(name, tokenizer, options):
    return TextTask(tokenizer, **_only(options, "text_path split seed dataset_config dataset_split"))


_HAYSTACK = "split seed segment_length question_position task_start_pct task_end_pct depth early_facts_share"


def _babilong(name, tokenizer, options):
    given = _only(options, f"{_HAYSTACK} babi_dir babi_vocabulary max_n_facts")
    return BabilongTask(name, tokenizer, _background(tokenizer, options), **given)


def _needle(name, tokenizer, options):
    return NeedleTask(name, tokenizer, _background(tokenizer, options), **_only(options, _HAYSTACK))


def _memory(name, tokenizer, options):
    return MemoryTask(name, tokenizer, _background(tokenizer, options), **_only(options, _HAYSTACK))


def _background(tokenizer, options) -> Background:
    """What is asked for; the tasks of a mixture share it."""
    background, dataset = options["background"], options["background_dataset"]
    if not isinstance(background, Background) or dataset is not None:
        given = {"background_dir": background, "background_dataset": dataset} | _only(options, "split seed")
        background = open_background(tokenizer, **given)
    options |= {"background": background, "background_dataset": None}
    return background


def _only(options: dict, names: str) -> dict:
    return {name: options[name] for name in names.split()}


HAYSTACKS = {f"qa{n}": _babilong for n in range(1, 21)} | {
    "niah_single": _needle,
    **dict.fromkeys(("memorize", "detect_memorize", "reasoning"), _memory),
}
TASKS = {"passkey": _passkey, "dataset": _dataset, "text": _text} | HAYSTACKS


class MixedTask(Task):
    """Several tasks in one stream: each index draws its task uniformly."""

    def __init__(self, tasks: Sequence[Task], *, split: str, seed: int):
        self.tasks, self.split, self.seed = list(tasks), split, seed
        self.name = ",".join(task.name for task in tasks)
        self.max_new_tokens = max(task.max_new_tokens for task in tasks)

    def example(self, index: int, length: int) -> Example:
        rng = derive_rng(self.seed, self.split, self.name, length, index)
        return self.tasks[int(rng.integers(len(self.tasks)))].example(index, length)


def build_task(
    name: str,
    tokenizer,
    *,
    split: str = "train",
    seed: int = 0,
    babi_dir: str | Path | None = None,
    babi_vocabulary: str | Path | None = None,
    background: Background | str | Path | Sequence[str | Path] | None = None,
    background_dataset: str | None = None,
    segment_length: int | None = None,
    dataset_path: str | Path | None = None,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    text_path: str | Path | None = None,
    num_digits: int = 5,
    passkey_wording: str = "plain",
    depth: float | None = None,
    max_n_facts: int | None = None,
    question_position: str = "last",
    task_start_pct: float = 0.0,
    task_end_pct: float = 1.0,
    early_facts_share: float = 0.0,
) -> Task:
    """Build a task by name: passkey, qa1..qa20, niah_single, memorize, detect_memorize, reasoning, dataset, text, or a
    mixture such as "qa1,qa2".

    `background` is a Background, a text file, a folder or a list of them; `background_dataset` a data set with column
    text instead; built-in prose when both are None. `depth` (0..1) is where the first fact lies, anywhere when None.
    Options that a task does not know are left alone. Raises UsageError for an unknown name or split, and for bad options.
    """
    options = dict(locals())
    if split not in SPLITS:
        raise UsageError(f"split must be one of {', '.join(SPLITS)}; got {split!r}{suggest(split, SPLITS)}")
    if not 0 <= early_facts_share <= 1:
        raise UsageError(f"--early_facts_share must lie in [0, 1]; got {early_facts_share}")
    names = [part.strip() for part in name.split(",")]
    for part in names:
        if part not in TASKS:
            known = "passkey, qa1..qa20, dataset, text, niah_single, memorize, detect_memorize, reasoning"
            raise UsageError(f"--task {part!r} is unknown; known: {known}{suggest(part.lower(), TASKS)}")
    tasks = [TASKS[part](part, tokenizer, options) for part in names]
    return tasks[0] if len(tasks) == 1 else MixedTask(tasks, split=split, seed=seed)
