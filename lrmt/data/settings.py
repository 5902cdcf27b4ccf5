"""What `lrmt data` is asked to do: every field is the flag of the same name, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrmt.errors import UsageError, suggest
from lrmt.flags import flag
from lrmt.lengths import parse_tokens
from lrmt.tasks.names import HAYSTACKS, KNOWN_HAYSTACKS, SPLITS
from lrmt.tasks.options import (
    BackgroundOptions,
    QuestionOptions,
    RepeatOptions,
    SpanOptions,
    StoryOptions,
    check_choice,
)

FORMATS = {"parquet": "parquet", "jsonl": "jsonl", "chat": "jsonl"}  # and what their files end in


@dataclass(kw_only=True)
class GenerationSettings(StoryOptions, BackgroundOptions, RepeatOptions, SpanOptions):
    """What samples are made of. Raises UsageError, one line, for whatever cannot work."""

    title: ClassVar[str] = "samples"

    task: tuple[str, ...] = flag(help=f"{KNOWN_HAYSTACKS}.", metavar="NAME")
    lengths: tuple[str, ...] = flag(help="In tokens: 0k, 1k, 4k, 1M, 10M, 1500 (1k = 1000).", metavar="N")
    tokenizer: str | None = flag(
        None, "That counts tokens: a folder, GGUF or Hub id (default: that of the tiny LLaMA).", "NAME"
    )
    split: str = flag("test", "Of the bAbI files: train, validation or test.", "NAME")
    seed: int = flag(0, "Of stories, places and background.", "N")
    reserved_tokens: int = flag(
        300, "Of a length, kept for question and answer (default: 300, as in the public sets).", "N"
    )

    def check(self):
        for name in self.task:
            if name not in HAYSTACKS:
                known = f"{KNOWN_HAYSTACKS}; got {name!r}{suggest(name, HAYSTACKS)}"
                raise UsageError(f"--task must be one of {known}")
        check_choice("split", self.split, SPLITS)
        for name in ("seed", "reserved_tokens"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} must not be negative; got {getattr(self, name)}")
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

    title: ClassVar[str] = "flags"
    description: ClassVar[str] = """\
Writes samples with the columns input, question, target: facts of a question, in order, between sentences of background
text. Configuration = length, split = task, as the public sets have it:
  datasets.load_dataset(OUTPUT_DIR, "4k", split="qa1")

Facts and background have exactly --reserved_tokens tokens less than a length says, counted by --tokenizer; 0k is facts
alone. A sample depends on seed, split, task, length and index alone. Started again, it keeps the files that are there;
further --task and --lengths join them. The background is tokenised once, and cached in $LRMT_CACHE or ~/.cache/lrmt.
"""
    examples: ClassVar[str] = """\
examples:
  lrmt data build --task qa1 qa2 qa3 --lengths 0k 4k 128k 1M --background_dir books --output_dir data/babilong
  lrmt data build --task qa1 qa5 --lengths 4k --babi_dir tasks_1-20_v1-2/en-10k --tokenizer gpt2 --output_dir data/qa
  lrmt data build --task qa1 --lengths 4k --split train --num_samples 1000 --format chat --output_dir data/chat
"""

    output_dir: str = flag(help="New, empty, or of an earlier build with these settings.", metavar="DIR")
    num_samples: int = flag(
        100, "Samples of each task and length; of a bAbI file no more than it has, except for split train.", "N"
    )
    format: str = flag("parquet", "Format: parquet, jsonl or chat, which alone has a --question_position.", "NAME")
    num_workers: int = flag(1, "Processes; the files are the same.", "N")

    def check(self):
        for name in ("num_samples", "num_workers"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1; got {getattr(self, name)}")
        check_choice("format", self.format, FORMATS)
        if self.question_position != "last" and self.format != "chat":
            raise UsageError(
                f"--question_position {self.question_position} is of --format chat; rows of --format {self.format} keep the "
                "question apart from the input. Leave it out"
            )


@dataclass(kw_only=True)
class ShowSettings(GenerationSettings):
    """What `lrmt data show` is asked to do."""

    title: ClassVar[str] = "flags"
    description: ClassVar[str] = """\
Makes one sample, as lrmt data build would, and prints it with its facts highlighted and their positions in tokens.
"""
    examples: ClassVar[str] = """\
examples:
  lrmt data show --task qa2 --lengths 4k --background_dir books
  lrmt data show --task niah_single --lengths 16k --depth 0.5 --index 3 --full
"""

    index: int = flag(0, "Which sample.", "N")
    full: bool = flag(False, "All of the background, not only what is near the facts.")

    def check(self):
        if self.index < 0:
            raise UsageError(f"--index must not be negative; got {self.index}")
