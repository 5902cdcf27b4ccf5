"""From the name of a task to the task."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lrmt.errors import UsageError, suggest
from lrmt.tasks import names
from lrmt.tasks.babi.vocabulary import Vocabulary
from lrmt.tasks.babilong import BabilongTask
from lrmt.tasks.background import Background, open_background
from lrmt.tasks.base import Example, Task, derive_rng
from lrmt.tasks.dataset import DatasetTask, check_file, is_file_of_rows, looks_local
from lrmt.tasks.documents import text_files
from lrmt.tasks.needles import MemoryTask, NeedleTask
from lrmt.tasks.options import TaskOptions
from lrmt.tasks.passkey import PasskeyTask
from lrmt.tasks.text import TextTask

_HAYSTACKS = dict.fromkeys(names.BABI, BabilongTask) | dict.fromkeys(names.MEMORIES, MemoryTask)
_HAYSTACKS["niah_single"] = NeedleTask
_OTHERS = {"passkey": PasskeyTask, "dataset": DatasetTask, "text": TextTask}


class MixedTask(Task):
    """Several tasks in one stream: each index draws its task uniformly. Before a text tells anything nobody can know of which task it
    is, so notes of all begin alike, and those that say who is where have a place for whoever can be in any of them.
    """

    def __init__(self, tasks: Sequence[Task], *, split: str, seed: int):
        self.tasks, self.split, self.seed = list(tasks), split, seed
        self.name = ",".join(task.name for task in tasks)
        self.max_new_tokens = max(task.max_new_tokens for task in tasks)
        stories = [task for task in tasks if getattr(task, "cast", ())]
        cast: dict[str, str] = {}
        for name, empty in (place for task in stories for place in task.cast.items()):
            cast[name] = max(cast.get(name, ""), empty, key=len)  # the room of the task that says most of it
        rooms = list(dict.fromkeys(name for task in stories for name in task.rooms))
        for task in stories:
            task.set_cast(cast, rooms)
        self.first_note = max((task.first_note for task in tasks), key=len)

    def example(self, index: int, length: int) -> Example:
        rng = derive_rng(self.seed, self.split, self.name, length, index)
        example = self.tasks[int(rng.integers(len(self.tasks)))].example(index, length)
        return replace(example, first_note=self.first_note)


def build_task(
    name: str,
    tokenizer,
    options: TaskOptions | None = None,
    *,
    split: str = "train",
    seed: int = 0,
    segment_length: int | None = None,
    background: Background | None = None,
    **changes,
) -> Task:
    """Build a task by name: passkey, qa1..qa20, niah_single, memorize, detect_memorize, reasoning, dataset, text, or a
    mixture such as "qa1,qa2".

    `changes` are fields of `options` (default: their defaults); those that a task does not know are left alone. `background`
    is one that is open already; else it is opened as the options say. Raises UsageError for an unknown name or split, and for
    bad options.
    """
    options = replace(options or TaskOptions(), **changes)
    if split not in names.SPLITS:
        raise UsageError(f"split must be one of {', '.join(names.SPLITS)}; got {split!r}{suggest(split, names.SPLITS)}")
    parts = check_sources(name, options)
    if background is None and not _HAYSTACKS.keys().isdisjoint(parts):
        background = open_background(tokenizer, options, split=split, seed=seed)
    common = {"split": split, "seed": seed, "segment_length": segment_length}
    tasks = [
        _HAYSTACKS[part](part, tokenizer, background, options, **common)
        if part in _HAYSTACKS
        else _OTHERS[part](tokenizer, options, **common)
        for part in parts
    ]
    return tasks[0] if len(tasks) == 1 else MixedTask(tasks, split=split, seed=seed)


def check_sources(name: str, options: TaskOptions) -> list[str]:
    """The tasks of a mixture. Raises UsageError for an unknown one, and where files of rows or texts are not there: what shows at once."""
    parts = names.split_mixture(name)
    for part in parts:
        if part not in names.TASKS:
            known = f"{names.KNOWN_TASKS}{suggest(part.lower(), names.TASKS)}"
            raise UsageError(f"--task {part!r} is unknown; known: {known}")
    if options.babi_dir is not None and not Path(options.babi_dir).is_dir():  # whatever reads it
        raise UsageError(f"--babi_dir {options.babi_dir} is not a folder; give the one with the bAbI text files")
    if options.babi_vocabulary is not None:
        Vocabulary.load(options.babi_vocabulary)
    if "dataset" in parts and options.dataset_name and is_file_of_rows(options):
        check_file(Path(options.dataset_name).expanduser())
    if "text" in parts and options.text_path and looks_local(options.text_path):
        text_files([Path(options.text_path).expanduser()], flag="--text_path")
    return parts
