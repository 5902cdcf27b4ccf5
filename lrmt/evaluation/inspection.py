"""What `lrmt inspect` is asked to do."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from lrmt.errors import UsageError
from lrmt.evaluation.groups import OutputFlags, check_least, check_seed
from lrmt.evaluation.opening import OpeningSettings
from lrmt.files import read_text
from lrmt.flags import flag
from lrmt.lengths import parse_segments
from lrmt.tasks.names import GENERATED, split_mixture
from lrmt.tasks.options import BackgroundOptions, PasskeyOptions, StoryOptions, check_choice

OF_SAMPLES = (StoryOptions, BackgroundOptions, PasskeyOptions)  # with --length and --seed


@dataclass(kw_only=True)
class InspectionSettings(OpeningSettings, *OF_SAMPLES, OutputFlags):
    """Settings of one inspection; raises UsageError, one line, for whatever cannot work."""

    title: ClassVar[str] = "text"
    description: ClassVar[str] = """\
Reads a text, answers, and tells what the memory held on the way.

Of a recurrent memory: what each of its vectors says after every segment, by the backbone's own head, where that was
said first and where it was lost, and how the answer looked at it. Memories say something readable where they were
trained with --notes_weight. Vectors are numbered as the next segment reads them: with --memory_shift the first, which
is that of before anything was read, says nothing. Writes memory.json (every segment: each vector's likeliest token, its
probability, and the tokens of the segment that its position looked at), memory.png (vectors by segments) and
attention.png (what the write positions looked at where something new was said, and the answer tokens at the memory),
as far as there are such vectors.

Of landmark attention: which blocks of the text each answer token read beyond what is always near: the passages, and
their share of the attention, averaged over layers and heads. Writes retrieval.json (one record for each answer token,
layer and block: share of the attention in 0..1, averaged over heads; start_token, where the block's passage begins)
and retrieval.png (layers by blocks, averaged over answer tokens).
"""
    examples: ClassVar[str] = """\
examples:
  lrmt inspect --adapter_path runs/demo --input book.txt --question "What is the pass key? The pass key is" --note 48213
  lrmt inspect --adapter_path runs/demo --task passkey --length 100k --output_dir reading
  lrmt inspect --adapter_path runs/landmark --input book.txt --max_new_tokens 4 --top 3 --output_dir reading
"""

    input: str | None = flag(None, "Text to read, UTF-8.", "FILE")
    question: str | None = flag(None, "Asked after the text (default: none, the text goes on).", "TEXT")
    task: str | None = flag(
        None,
        "Instead of a text and a question, a sample of this task: passkey, qa1, …, or of one of several, as trained: qa1,qa2; its last "
        "notes are followed.",
        "NAME",
    )
    length: str = flag("16", "Of a sample: segments or blocks, or tokens with k or M (100k).")
    seed: int = flag(0, "Of a sample.", "N")
    max_new_tokens: int = flag(16, "Longest answer.", "N")
    note: list[str] | None = flag(
        None, "What the memory should have kept: told is where it was said, and where lost.", "TEXT"
    )
    top: int = flag(5, "Blocks, vectors or tokens shown, the best.", "N")

    def __post_init__(self):
        super().__post_init__()
        if not self.overwrite and self.folder.is_dir() and any(self.folder.iterdir()):
            raise UsageError(f"--output_dir {self.folder} is not empty; name another, or give --overwrite")

    def check(self):
        for name in ("max_new_tokens", "top"):
            check_least(self, name, 1)
        check_seed(self.seed)
        parse_segments(self.length, flag="--length")
        if (self.input is None) == (self.task is None):
            raise UsageError(
                f"give either --input, a text, or --task, of which a sample is made; got {self.input} and {self.task}"
            )
        if self.task is not None:
            for part in split_mixture(self.task):
                check_choice("task", part, GENERATED)
            if self.question is not None:
                raise UsageError(
                    f"--question {self.question!r} is of a text; a sample of --task has its own, leave it out"
                )
        else:
            self._check_input()
        if self.question is not None and not self.question.strip():
            raise UsageError("--question is empty; leave it out to let the text go on")
        if not all(note.strip() for note in self.note or []):
            raise UsageError("--note is empty; give what the memory should have kept, or leave it out")

    def _check_input(self):
        of_samples = {"length", "seed"} | {f.name for options in OF_SAMPLES for f in fields(options)}
        given = [f"--{f.name}" for f in fields(self) if f.name in of_samples and getattr(self, f.name) != f.default]
        if given:
            raise UsageError(
                f"--input {self.input} is a text, and no sample of a task; leave out {', '.join(sorted(given))}"
            )
        if not self.text.strip():
            raise UsageError(f"--input {self.input} is empty; name a text file")

    @cached_property
    def text(self) -> str:
        """What is to be read."""
        return read_text(self.input, "--input")

    @property
    def folder(self) -> Path:
        """Where files go."""
        return self.place(self.output_dir, "inspection")
