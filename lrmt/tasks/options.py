"""Every option of every task, once: its name, default and help, and the flag of the same name wherever a command offers it.

A group is what belongs together, and checks its values; a command inherits the groups that it offers, and `TaskOptions.of`
makes the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lrmt.errors import UsageError, suggest
from lrmt.flags import flag
from lrmt.tasks.names import PASSKEY_WORDINGS, QUESTION_POSITIONS


def check_choice(name: str, value: str, known) -> None:
    """Raises UsageError for a value that is none of the `known`."""
    if value not in known:
        raise UsageError(f"--{name} must be one of {', '.join(known)}; got {value!r}{suggest(str(value), known)}")


def check_share(name: str, value: float | None, what: str = "") -> None:
    """Raises UsageError for a value that is no share, 0 to 1; None is none asked for."""
    if value is not None and not 0 <= value <= 1:
        raise UsageError(f"--{name} must lie in [0, 1]{what}; got {value}")


@dataclass(kw_only=True)
class Options:
    """Values that are checked when they are made: every class's own `check`, those that it inherits first."""

    def __post_init__(self):
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                group.check(self)


@dataclass(kw_only=True)
class StoryOptions(Options):
    """bAbI's stories."""

    babi_dir: str | None = flag(
        None, "Folder of official bAbI files (qa1_train.txt, qa1_test.txt, …); without it stories are simulated."
    )
    babi_vocabulary: str | None = flag(
        None, "YAML or JSON file of other people, rooms, objects, … for simulated stories."
    )
    max_n_facts: int | None = flag(None, "Leave out bAbI stories with more facts than this.")

    def check(self):
        if self.max_n_facts is not None and self.max_n_facts < 1:
            raise UsageError(f"--max_n_facts must be 1 or more, or left out; got {self.max_n_facts}")
        if self.babi_dir is not None and self.babi_vocabulary is not None:
            raise UsageError(
                "--babi_vocabulary is of simulated stories, and --babi_dir has its own; got "
                f"{self.babi_vocabulary} and {self.babi_dir}. Leave one out"
            )


@dataclass(kw_only=True)
class BackgroundOptions(Options):
    """The text that hides the facts."""

    background_dir: str | None = flag(
        None,
        "Books that hide the facts: a folder of .txt, a .txt or .jsonl file; other ones for evaluation than for training. "
        "Default: built-in prose.",
    )
    background_dataset: str | None = flag(
        None,
        "Books from a data set with column text instead: a Hub id, streamed, or a path; of its split of the same name, or of a "
        "tenth of train, which training leaves out.",
    )

    def check(self):
        if self.background_dir is not None and self.background_dataset is not None:
            raise UsageError(
                "--background_dir and --background_dataset exclude each other; got "
                f"{self.background_dir} and {self.background_dataset}. Name one"
            )


@dataclass(kw_only=True)
class RepeatOptions(Options):
    """Books that are shorter than a text. Training begins them again."""

    repeat_background: bool = flag(False, "Begin again where the books end before a text is full.")


@dataclass(kw_only=True)
class QuestionOptions(Options):
    """Where the question stands."""

    question_position: str = flag("last", "Where the question stands: last, first or both.")

    def check(self):
        check_choice("question_position", self.question_position, QUESTION_POSITIONS)


@dataclass(kw_only=True)
class SpanOptions(Options):
    """Where the facts lie."""

    task_start_pct: float = flag(0.0, "Facts lie after this share (0..1) of the background.")
    task_end_pct: float = flag(1.0, "Facts lie before this share (0..1) of the background.")
    depth: float | None = flag(None, "Share (0..1) of the background before the first fact; default: any.")

    def check(self):
        start, end = self.task_start_pct, self.task_end_pct
        if not 0 <= start <= end <= 1:
            raise UsageError(
                f"--task_start_pct and --task_end_pct must satisfy 0 <= start <= end <= 1; got {start} and {end}"
            )
        check_share("depth", self.depth, " (0 = the first fact at the top)")
        if self.depth is not None and (start, end) != (0, 1):
            raise UsageError(
                f"--depth {self.depth} says where the first fact lies; leave out --task_start_pct {start} and "
                f"--task_end_pct {end}"
            )


@dataclass(kw_only=True)
class EarlyOptions(Options):
    """Where the facts of training texts lie."""

    early_facts_share: float = flag(
        0.0, "Share (0..1) of training texts with all facts before the last segment: only memory finds them."
    )

    def check(self):
        check_share("early_facts_share", self.early_facts_share)


@dataclass(kw_only=True)
class PasskeyOptions(Options):
    """The pass key."""

    num_digits: int = flag(5, "Digits of a pass key, but for --passkey_wording landmark.")
    passkey_wording: str = flag(
        "plain", "Wording of the pass key task: plain, landmark (numbers 1 to 50000), longlora or infinitebench."
    )

    def check(self):
        if not 1 <= self.num_digits <= 18:
            raise UsageError(f"--num_digits must be 1..18; got {self.num_digits}")
        check_choice("passkey_wording", self.passkey_wording, PASSKEY_WORDINGS)


@dataclass(kw_only=True)
class RowOptions(Options):
    """Stored rows."""

    dataset_name: str | None = flag(
        None,
        "Stored rows with columns input, question, target: a .jsonl or .parquet file, a folder such as lrmt data build writes, "
        "or a Hub id.",
    )
    dataset_config: str | None = flag(None, "Configuration of --dataset_name.")
    dataset_split: str | None = flag(None, "Split of --dataset_name; default: test for evaluation, train for training.")


@dataclass(kw_only=True)
class TextOptions(Options):
    """Plain text."""

    text_path: str | None = flag(
        None,
        "Any text: a folder of .txt files, a .txt file, a .jsonl file with column text, or a Hub id; training leaves out its "
        "last tenth, which is validation.",
    )


@dataclass(kw_only=True)
class TaskOptions(
    StoryOptions,
    BackgroundOptions,
    RepeatOptions,
    QuestionOptions,
    SpanOptions,
    EarlyOptions,
    PasskeyOptions,
    RowOptions,
    TextOptions,
):
    """All of them: what `build_task` takes. A task reads those that concern it and leaves the others alone."""

    @classmethod
    def of(cls, settings: object, **changes) -> TaskOptions:
        """The options that `settings` has by name, the others at their defaults; `changes` win."""
        given = {f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name)}
        return cls(**given | changes)
