"""Every option of every task, once: its name, default and help, and the flag of the same name wherever a command offers it.

A group is what belongs together; a command inherits the groups that it offers, and `TaskOptions.of` makes the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields


def option(default, help: str):
    """A dataclass field that is a flag too."""
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class StoryOptions:
    """bAbI's stories."""

    babi_dir: str | None = option(
        None, "Folder of official bAbI files (qa1_train.txt, qa1_test.txt, …); without it stories are simulated."
    )
    babi_vocabulary: str | None = option(
        None, "YAML or JSON file of other people, rooms, objects, … for simulated stories."
    )
    max_n_facts: int | None = option(None, "Leave out bAbI stories with more facts than this.")


@dataclass(kw_only=True)
class BackgroundOptions:
    """The text that hides the facts."""

    background_dir: str | None = option(
        None,
        "Books that hide the facts: a folder of .txt, a .txt or .jsonl file; other ones for evaluation than for training. "
        "Default: built-in prose.",
    )
    background_dataset: str | None = option(
        None,
        "Books from a data set with column text instead: a Hub id, streamed, or a path; of its split of the same name, or of a "
        "tenth of train, which training leaves out.",
    )


@dataclass(kw_only=True)
class RepeatOptions:
    """Books that are shorter than a text. Training begins them again."""

    repeat_background: bool = option(False, "Begin again where the books end before a text is full.")


@dataclass(kw_only=True)
class QuestionOptions:
    """Where the question stands."""

    question_position: str = option("last", "Where the question stands: last, first or both.")


@dataclass(kw_only=True)
class SpanOptions:
    """Where the facts lie."""

    task_start_pct: float = option(0.0, "Facts lie after this share (0..1) of the background.")
    task_end_pct: float = option(1.0, "Facts lie before this share (0..1) of the background.")
    depth: float | None = option(None, "Share (0..1) of the background before the first fact; default: any.")


@dataclass(kw_only=True)
class EarlyOptions:
    """Where the facts of training texts lie."""

    early_facts_share: float = option(
        0.0, "Share (0..1) of training texts with all facts before the last segment: only memory finds them."
    )


@dataclass(kw_only=True)
class PasskeyOptions:
    """The pass key."""

    num_digits: int = option(5, "Digits of a pass key, but for --passkey_wording landmark.")
    passkey_wording: str = option(
        "plain", "Wording of the pass key task: plain, landmark (numbers 1 to 50000), longlora or infinitebench."
    )


@dataclass(kw_only=True)
class RowOptions:
    """Stored rows."""

    dataset_name: str | None = option(
        None,
        "Stored rows with columns input, question, target: a .jsonl or .parquet file, a folder such as lrmt data build writes, "
        "or a Hub id.",
    )
    dataset_config: str | None = option(None, "Configuration of --dataset_name.")
    dataset_split: str | None = option(
        None, "Split of --dataset_name; default: test for evaluation, train for training."
    )


@dataclass(kw_only=True)
class TextOptions:
    """Plain text."""

    text_path: str | None = option(
        None,
        "Any text: a folder of .txt files, a .txt file, a .jsonl file with column text, or a Hub id; training leaves out its "
        "last tenth, which is validation.",
    )


@dataclass
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
