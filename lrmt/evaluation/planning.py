"""What `lrmt plan` is asked to do."""

from dataclasses import dataclass
from typing import ClassVar

from lrmt.errors import UsageError
from lrmt.evaluation.groups import check_least
from lrmt.flags import flag
from lrmt.lengths import parse_tokens


@dataclass(kw_only=True)
class PlanSettings:
    """Of which backbone, and how it reads; raises UsageError, one line, for whatever cannot work."""

    title: ClassVar[str] = "flags"
    description: ClassVar[str] = """\
What it costs to read a text, by method and length, beside full attention: FLOPs of matrix products, as torch's counter
has them, the state that is kept, and time at a given rate. Loads a config, no weights; the formulae are in
docs/method.md. With --output_dir also cost.json and cost.png, FLOPs against length.
"""
    examples: ClassVar[str] = """\
examples:
  lrmt plan --model smollm2-135m --length 8k 64k 1M
  lrmt plan --model meta-llama/Llama-3.1-8B --method rmt armt --length 1M --rate 400 --training --output_dir runs/cost
"""

    model: str = flag(help="Hub id, folder, GGUF file or shipped backbone.", metavar="PATH")
    method: list[str] | None = flag(
        None, "full (attention), or what a recipe trains: rmt, rmt_retrieval, armt, landmark; default: all.", "NAME"
    )
    length: list[str] = flag(["8k", "64k", "1M"], "Tokens: 4096, 8k, 1M (1k = 1000).", "N")
    training: bool = flag(False, "A training step of one text instead: LoRA over a frozen backbone.")
    rate: float | None = flag(
        None, "Matrix products that the machine does, in TFLOP/s: the time that they take.", "TFLOPS"
    )
    load_in_4bit: bool = flag(False, "Weights in 4 bits; else in 16.")
    segment_length: int | None = flag(
        None, "Tokens per segment of recurrent methods; default: 1024, or what the backbone's window holds.", "L"
    )
    num_memory_tokens: int = flag(16, "Of recurrent methods.", "m")
    memory_handover: str = flag("identity", "Of RMT and RMT-R: identity, scaled, aligned, tokens.", "KIND")
    checkpoint_segments: bool = flag(True, "In training recurrent methods run each segment once more.")
    association_dim: int = flag(64, "Of ARMT.", "N")
    block_length: int = flag(64, "Of landmark attention.", "K")
    context_length: int | None = flag(
        None, "Of landmark attention: tokens of a training text; default: 2048, or what the window holds.", "N"
    )
    top_k: int = flag(4, "Of landmark attention: blocks read.", "K")
    output_dir: str | None = flag(None, "Folder of cost.json and cost.png (default: neither is written).", "DIR")

    def __post_init__(self):
        if self.rate is not None and not self.rate > 0:
            raise UsageError(f"--rate must be more than 0; got {self.rate}")
        for name in ("segment_length", "num_memory_tokens", "association_dim", "context_length", "top_k"):
            if getattr(self, name) is not None:
                check_least(self, name, 1)
        check_least(self, "block_length", 2)
        if not self.tokens[0]:
            raise UsageError("--length must be 1 token or more; got 0k")

    @property
    def tokens(self) -> list[int]:
        """Of each length, shortest first."""
        return sorted({parse_tokens(length, flag="--length") for length in self.length})
