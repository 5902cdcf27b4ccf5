"""One sample on the terminal: the facts, where they are, and what stands around them."""

import sys
from dataclasses import dataclass
from typing import ClassVar

from lrmt.data.write import GenerationSettings
from lrmt.errors import UsageError
from lrmt.flags import flag
from lrmt.tasks.haystack import Row

BOLD, PLAIN = "\033[1;33m", "\033[0m"
AROUND = 160  # characters shown of a stretch of background at each of its ends


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

    def __post_init__(self):
        super().__post_init__()
        if self.index < 0:
            raise UsageError(f"--index must not be negative; got {self.index}")


def show(settings: ShowSettings) -> None:
    """Print sample `settings.index` of the first task and length."""
    (task, *_), (length, *_) = settings.open_tasks().values(), settings.lengths
    row = task.row(settings.index, settings.context_length(length))
    print(f"{task.name} {length}, {settings.split} sample {settings.index}: {row.num_tokens:,} tokens\n")
    print(highlight(row, full=settings.full, colour=sys.stdout.isatty()))
    print(f"\nquestion  {row.question.strip()}\ntarget    {row.target}\n")
    print(f"{'token':>10}  {'depth':>6}  fact")
    for place, fact in zip(row.places, row.facts, strict=True):
        print(f"{place:>10,}  {place / row.num_tokens:>6.1%}  {fact.strip()}")


def highlight(row: Row, full: bool = False, colour: bool = False) -> str:
    """The input with its facts in colour, or in [[brackets]]; the middle of long background is left out unless `full`."""
    before, after = (BOLD, PLAIN) if colour else ("[[", "]]")
    parts = [row.opening]
    for number, stretch in enumerate(row.stretches):
        left_out = len(stretch) - 2 * AROUND
        if not full and left_out > 0:
            stretch = f"{stretch[:AROUND]} … {left_out:,} characters … {stretch[-AROUND:]}"
        parts.append(stretch)
        if number < len(row.facts):
            parts.append(f" {before}{row.facts[number].strip()}{after}")
    return "".join(parts).strip()
