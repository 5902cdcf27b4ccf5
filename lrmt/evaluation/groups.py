"""Flags that several modes of `lrmt evaluate` have, in the groups of its help, and what they may be."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lrmt.errors import UsageError, suggest
from lrmt.evaluation.metrics import RULES
from lrmt.files import fingerprint
from lrmt.flags import flag
from lrmt.tasks.names import GENERATED, KNOWN_HAYSTACKS, SPLITS
from lrmt.tasks.options import (
    BackgroundOptions,
    PasskeyOptions,
    QuestionOptions,
    RepeatOptions,
    RowOptions,
    StoryOptions,
    TextOptions,
    check_choice,
    check_share,
)

KNOWN_TASKS = f"passkey, {KNOWN_HAYSTACKS}, perplexity"

#: `--baseline`, and what each is
BASELINES = {
    "untrained": "the method untrained, its memory drawn afresh from --seed (the adapter disabled)",
    "backbone": "the bare model, shown as much of the END of the text as one segment holds",
    "full": "the bare model, shown all of the text, however long",
    "sliding_window": "the bare model, each token of the text seeing one segment's length back",
    "xl": "the bare model, each segment of the text seeing the one before too (Transformer-XL)",
    "rag": "the bare model, shown the passages that fit the question best (BM25, or --rag_model)",
    "api": "an OpenAI-compatible endpoint, shown all of the text (--api_model)",
}
DEFAULT_BASELINES = ("untrained", "backbone")
RAG_ORDERS = ("document", "similarity")


@dataclass(kw_only=True)
class SampleFlags:
    """What is asked."""

    title: ClassVar[str] = "task"

    num_samples: int | None = flag(
        None,
        "Questions a cell (default: 100; all of stored rows and of --harness), or texts of perplexity (default: 20).",
        "N",
    )
    seed: int = flag(0, "Of generated questions and drawn places.", "N")

    def check(self):
        check_least(self, "num_samples", 1)
        check_seed(self.seed)


@dataclass(kw_only=True)
class SplitFlags(SampleFlags):
    """Of what."""

    split: str = flag(
        "test",
        "Split: train, validation or test (default: test; of a --babi_dir without test files, its validation files).",
        "NAME",
    )

    def check(self):
        check_choice("split", self.split, SPLITS)


@dataclass(kw_only=True)
class GeneratedTaskFlags(
    SplitFlags, StoryOptions, BackgroundOptions, RepeatOptions, QuestionOptions, PasskeyOptions, RowOptions
):
    """Tasks of the grid."""

    task: tuple[str, ...] = flag((), f"Tasks, several make a grid: passkey, {KNOWN_HAYSTACKS}; or perplexity.", "NAME")


@dataclass(kw_only=True)
class RowTaskFlags(SplitFlags, RowOptions):
    """Rows of one's own."""


@dataclass(kw_only=True)
class PerplexityTaskFlags(SplitFlags, TextOptions):
    """Any text."""

    task: tuple[str, ...] = flag((), "Is perplexity here.", "NAME")


@dataclass(kw_only=True)
class HarnessTaskFlags(SampleFlags):
    """Tasks of lm-evaluation-harness."""

    harness: tuple[str, ...] = flag(
        (),
        "Tasks of lm-evaluation-harness: babilong_qa1, niah_single_1, …; --lengths are then theirs.",
        "NAME",
    )
    harness_data: str | None = flag(None, "Local files instead of the Hub, LENGTH/qa1.jsonl.", "DIR")
    harness_prompt: str = flag(
        "trained", "Of babilong_*: trained (context, question) or public (the harness' own).", "HOW"
    )


@dataclass(kw_only=True)
class LengthFlags:
    """How long the texts are."""

    title: ClassVar[str] = "lengths"

    lengths: tuple[str, ...] = flag(
        (),
        "Segments as plain numbers (8); tokens with k or M (4k, 1M; 1k = 1000), rounded down to whole segments so that the question "
        "lies in the last one; 0k: facts without background (default: 1 2 4 8 16 32; of perplexity 1 2 4 8); with --dataset_name, "
        "its configurations; with --harness, as its tasks spell them.",
        "N",
    )


@dataclass(kw_only=True)
class DepthFlags:
    """Where the facts lie, and when to stop."""

    title: ClassVar[str] = "lengths"

    depths: tuple[float, ...] = flag(
        (),
        "Shares 0..1 of the text before the first fact, each measured by itself, and drawn in depths.png (default: any).",
        "X",
    )
    stop_below: float | None = flag(
        None, "Do not measure a model on longer texts of a task once its whole interval lies below this (0..1).", "X"
    )

    def check(self):
        for depth in self.depths:
            check_share("depths", depth, " (0 = the beginning of the text)")
        if self.stop_below is not None and not 0 < self.stop_below <= 1:
            raise UsageError(f"--stop_below must lie in (0, 1]; got {self.stop_below}")


@dataclass(kw_only=True)
class FewBaselineFlags:
    """What stands beside the model."""

    title: ClassVar[str] = "baselines"

    rag: ClassVar[dict] = {}

    baseline: tuple[str, ...] = flag(DEFAULT_BASELINES, f"Any of {', '.join(DEFAULT_BASELINES)}.", "NAME", nargs="*")


@dataclass(kw_only=True)
class BaselineFlags(FewBaselineFlags):
    """What stands beside the model, and its settings."""

    baseline: tuple[str, ...] = flag(DEFAULT_BASELINES, f"Any of {', '.join(BASELINES)}.", "NAME", nargs="*")
    rag_chunks: str = flag("sentences", "Of rag: sentences, or tokens a passage, 512.", "N")
    rag_top_k: int = flag(5, "Of rag: passages shown.", "N")
    rag_order: str = flag("document", "Of rag: document or similarity.", "HOW")
    rag_model: str | None = flag(None, "Of rag: a sentence-transformers model ranks instead of BM25.", "NAME")
    api_model: str | None = flag(None, "Of api: model at $OPENAI_BASE_URL, asked with $OPENAI_API_KEY.", "NAME")
    api_concurrency: int = flag(8, "Of api: prompts in flight.", "N")
    api_timeout: float = flag(120.0, "Of api: seconds for an answer.", "S")
    api_max_retries: int = flag(6, "Of api: tries after the first.", "N")
    api_max_tokens: int | None = flag(
        None, "Of api: tokens an answer may have, thoughts included (default: as all models).", "N"
    )
    api_input_price: float | None = flag(None, "Of api: of a million tokens in, for the cost estimate.", "X")
    api_output_price: float | None = flag(None, "Of api: of a million tokens out, for the cost estimate.", "X")

    @property
    def rag(self) -> dict:
        """Settings of baseline rag, as `contenders.build_contenders` takes them."""
        chunks = self.rag_chunks if self.rag_chunks == "sentences" else int(self.rag_chunks)
        return {"chunks": chunks, "top_k": self.rag_top_k, "order": self.rag_order, "model": self.rag_model}

    def check(self):
        for name in self.baseline:
            check_choice("baseline", name, BASELINES)
        if ("api" in self.baseline) != (self.api_model is not None):
            got = "--baseline api alone" if self.api_model is None else f"--api_model {self.api_model} alone"
            raise UsageError(f"--baseline api and --api_model NAME belong together; got {got}. Give both or none")
        if self.rag_chunks != "sentences" and not (self.rag_chunks.isdigit() and int(self.rag_chunks) > 0):
            raise UsageError(f"--rag_chunks must be sentences, or tokens of a passage; got {self.rag_chunks!r}")
        for name, least in (("rag_top_k", 1), ("api_concurrency", 1), ("api_max_retries", 0), ("api_max_tokens", 1)):
            check_least(self, name, least)
        if not self.api_timeout > 0:
            raise UsageError(f"--api_timeout must be more than 0 seconds; got {self.api_timeout}")
        check_choice("rag_order", self.rag_order, RAG_ORDERS)


@dataclass(kw_only=True)
class OutputFlags:
    """Where it goes."""

    title: ClassVar[str] = "output"

    output_dir: str | None = flag(
        None,
        "Folder of the files (default: evaluation, perplexity, harness or inspection in the adapter's; of one of the Hub, in runs/NAME).",
        "DIR",
    )
    overwrite: bool = flag(False, "Replace what of other settings is in --output_dir.")

    def check(self):
        if self.output_dir is not None and Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise UsageError(f"--output_dir must be a folder; {self.output_dir} is a file")


@dataclass(kw_only=True)
class ScoredOutputFlags(OutputFlags):
    """What counts as right, and where it goes."""

    scoring: str = flag(
        "official",
        "Of qa1 … qa20, memorize, detect_memorize, reasoning: official (BABILong's, where a target 'none' of qa7 never "
        "scores), strict (whole words, mends that), contains, exact (default: official); of a number (passkey): the first integer.",
        "RULE",
    )

    def check(self):
        check_choice("scoring", self.scoring, RULES)


# ---------------------------------------------------------------------- checks


def check_least(settings, name: str, least: int):
    """Raises UsageError for a number that is too small; None is none."""
    value = getattr(settings, name)
    if value is not None and value < least:
        raise UsageError(f"--{name} must be at least {least}; got {value}")


def check_seed(seed: int):
    """Raises UsageError for what is no seed of torch."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must {'not be negative' if seed < 0 else 'be less than 2**63'}; got {seed}")


def check_tasks(tasks):
    for name in tasks:
        if name not in GENERATED:
            got = f"{name!r}{suggest(name, (*GENERATED, 'perplexity'))}"
            raise UsageError(f"--task must be one of {KNOWN_TASKS}; got {got}")


def check_rows(dataset_name: str) -> bool:
    """Whether the name is of one file; raises UsageError for one that does not exist."""
    of_one_file = dataset_name.endswith((".jsonl", ".parquet"))
    if of_one_file and not Path(dataset_name).is_file():
        raise UsageError(f"--dataset_name {dataset_name} does not exist; its columns: input, question, target")
    return of_one_file


def fingerprint_rows(path) -> str | None:
    """A digest of the file; of a folder, of what `lrmt data build` says of it, which further files do not change, or its place."""
    if path is None or not Path(path).is_dir():
        return fingerprint(path)
    build = Path(path) / "build.json"
    return fingerprint(build) if build.is_file() else str(Path(path).resolve())
