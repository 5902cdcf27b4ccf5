"""What `lrmt data` is asked to do: every field is the flag of the same name, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass

from lrmt.errors import UsageError, suggest
from lrmt.lengths import parse_tokens
from lrmt.tasks.names import HAYSTACKS, KNOWN_HAYSTACKS, SPLITS
from lrmt.tasks.options import (
    BackgroundOptions,
    QuestionOptions,
    RepeatOptions,
    SpanOptions,
    StoryOptions,
    check_choice,
    option,
    required,
)

FORMATS = {"parquet": "parquet", "jsonl": "jsonl", "chat": "jsonl"}  # and what their files end in


@dataclass(kw_only=True)
class GenerationSettings(StoryOptions, BackgroundOptions, RepeatOptions, SpanOptions):
    """What samples are made of. Raises UsageError, one line, for whatever cannot work."""

    task: tuple[str, ...] = required("qa1, … qa20, niah_single, memorize, detect_memorize, reasoning.")
    lengths: tuple[str, ...] = required("In tokens: 0k, 1k, 4k, 1M, 10M, 1500 (1k = 1000).")
    tokenizer: str | None = option(None, "That counts tokens: a folder or Hub id; default: that of the tiny LLaMA.")
    split: str = option("test", "Of the bAbI files: train, validation or test.")
    seed: int = option(0, "Of stories, places and background.")
    reserved_tokens: int = option(
        300, "Of a length, kept for question and answer; the default is that of the public sets."
    )

    def check(self):
        for name in self.task:
            if name not in HAYSTACKS:
                known = f"{KNOWN_HAYSTACKS}; got {name!r}{suggest(name, HAYSTACKS)}"
                raise UsageError(f"--task must be one of {known}")
        check_choice("split", self.split, SPLITS)
        for flag in ("seed", "reserved_tokens"):
            if getattr(self, flag) < 0:
                raise UsageError(f"--{flag} must not be negative; got {getattr(self, flag)}")
        for length in self.lengths:
            self.context_length(length)

    def context_length(self, length: str) -> int:
        """Tokens of facts and background in a sample of this nominal length; 0 for facts alone."""
        tokens = parse_tokens(length)
        if tokens and tokens <= self.reserved_tokens:
            raise UsageError(
                f"--lengths {length} leaves no room beside --reserved_tokens {self.reserved_tokens}; ask for more, or "
                "reserve less for question and answer"
            )
        return max(0, tokens - self.reserved_tokens)


@dataclass(kw_only=True)
class BuildSettings(GenerationSettings, QuestionOptions):
    """What `lrmt data build` is asked to do."""

    output_dir: str = required("New, empty, or of an earlier build with these settings.")
    num_samples: int = option(
        100, "Samples of each task and length; of a bAbI file no more than it has, except for split train."
    )
    format: str = option("parquet", "parquet, jsonl or chat, which alone has a --question_position.")
    num_workers: int = option(1, "Processes; the files are the same.")

    def check(self):
        for flag in ("num_samples", "num_workers"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag} must be at least 1; got {getattr(self, flag)}")
        check_choice("format", self.format, FORMATS)
        if self.question_position != "last" and self.format != "chat":
            raise UsageError(
                f"--question_position {self.question_position} is of --format chat; rows of --format {self.format} keep the "
                "question apart from the input. Leave it out"
            )


@dataclass(kw_only=True)
class ShowSettings(GenerationSettings):
    """What `lrmt data show` is asked to do."""

    index: int = option(0, "Which sample.")
    full: bool = option(False, "All of the background, not only what is near the facts.")

    def check(self):
        if self.index < 0:
            raise UsageError(f"--index must not be negative; got {self.index}")
