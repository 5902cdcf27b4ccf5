"""What `lrmt evaluate` and `lrmt inspect` are asked to do: every field is the flag of the same name, checked on construction."""

from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from lrmt import __version__
from lrmt.errors import UsageError, suggest
from lrmt.evaluation.metrics import RULES
from lrmt.files import fingerprint
from lrmt.lengths import parse_segments, parse_tokens, spell_length
from lrmt.tasks.names import GENERATED, KNOWN_HAYSTACKS, SPLITS

KNOWN_TASKS = f"passkey, {KNOWN_HAYSTACKS}, perplexity"
DEFAULT_LENGTHS = ("1", "2", "4", "8", "16", "32")
PERPLEXITY_LENGTHS = ("1", "2", "4", "8")

#: `--baseline`, and what each is
BASELINES = {
    "untrained": "the same memory before training (the adapter disabled)",
    "backbone": "the bare model, shown as much of the END of the text as one segment holds",
    "full": "the bare model, shown all of the text, however long",
    "sliding_window": "the bare model, each token of the text seeing one segment's length back",
    "xl": "the bare model, each segment of the text seeing the one before too (Transformer-XL)",
    "rag": "the bare model, shown the passages that fit the question best (BM25, or --rag_model)",
    "api": "an OpenAI-compatible endpoint, shown all of the text (--api_model)",
}
DEFAULT_BASELINES = ("untrained", "backbone")
RAG_ORDERS = ("document", "similarity")

#: how landmark attention reads, if otherwise than it was trained
READING = ("top_k", "retrieval", "offload_blocks")


class Cell(NamedTuple):
    """One square of the grid. `segments`, `tokens`: length, None for own rows, 0 for facts without any background (0k).

    `depth`: share of the text before its first fact, None for anywhere. `name`: of the length, "4k" or tokens.
    """

    task: str
    segments: int | None
    depth: float | None = None
    name: str = ""
    tokens: int | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of one evaluation; raises UsageError, one line, for whatever cannot work."""

    adapter_path: str
    task: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    text_path: str | None = None
    num_samples: int | None = None
    batch_size: int = 8
    seed: int = 0
    split: str = "test"
    babi_dir: str | None = None
    babi_vocabulary: str | None = None
    background_dir: str | None = None
    background_dataset: str | None = None
    repeat_background: bool = False
    num_digits: int = 5
    passkey_wording: str = "plain"
    question_position: str = "last"
    max_n_facts: int | None = None
    load_in_4bit: bool | None = None
    top_k: int | None = None
    retrieval: str | None = None
    offload_blocks: bool | None = None
    scoring: str = "official"
    baseline: tuple[str, ...] = DEFAULT_BASELINES
    depths: tuple[float, ...] = ()
    stop_below: float | None = None
    rag_chunks: str = "sentences"
    rag_top_k: int = 5
    rag_order: str = "document"
    rag_model: str | None = None
    api_model: str | None = None
    api_concurrency: int = 8
    api_timeout: float = 120.0
    api_max_retries: int = 6
    api_max_tokens: int | None = field(
        default=None, metadata={"help": "of api: tokens an answer may have, thoughts included (default: as all models)"}
    )
    api_input_price: float | None = None
    api_output_price: float | None = None
    output_dir: str | None = None
    overwrite: bool = False
    model_name_or_path: str | None = None

    def __post_init__(self):
        check_model_folder(self.adapter_path)
        self._check_baselines()
        if self.measures_perplexity or self.text_path is not None:
            self._check_perplexity()
        elif self.dataset_name is None:
            self._check_generated_tasks()
        else:
            self._check_dataset()
        for flag in ("num_samples", "batch_size"):
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise UsageError(f"--{flag} must be at least 1; got {getattr(self, flag)}")
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative; got {self.seed}")
        if self.scoring not in RULES:
            got = f"{self.scoring!r}{suggest(self.scoring, RULES)}"
            raise UsageError(f"--scoring must be one of {', '.join(RULES)}; got {got}")
        if self.split not in SPLITS:
            got = f"{self.split!r}{suggest(self.split, SPLITS)}"
            raise UsageError(f"--split must be one of {', '.join(SPLITS)}; got {got}")
        if self.babi_vocabulary is not None and self.scoring in ("official", "strict"):
            raise UsageError(
                f"--scoring {self.scoring} knows the labels of the bAbI files only, not those of --babi_vocabulary "
                f"{self.babi_vocabulary}; give --scoring exact or contains"
            )
        if self.babi_dir is not None and not Path(self.babi_dir).is_dir():
            raise UsageError(f"--babi_dir must be a folder; got {self.babi_dir}")
        if self.background_dir is not None and self.background_dataset is not None:
            raise UsageError(
                "--background_dir and --background_dataset exclude each other; "
                f"got {self.background_dir} and {self.background_dataset}. Name one"
            )
        if self.background_dir is not None and not Path(self.background_dir).is_file():
            if not Path(self.background_dir).is_dir():
                raise UsageError(
                    f"--background_dir must be a folder of .txt, a .txt or .jsonl file; got {self.background_dir}"
                )
            if not any(Path(self.background_dir).rglob("*.txt")):
                raise UsageError(
                    f"--background_dir {self.background_dir} holds no .txt file; name a folder of text books"
                )
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"--output_dir must be a folder; {self.folder} is a file")

    def _check_baselines(self):
        for name in self.baseline:
            if name not in BASELINES:
                got = f"{name!r}{suggest(name, BASELINES)}"
                raise UsageError(f"--baseline must be one of {', '.join(BASELINES)}; got {got}")
        if self.measures_perplexity and (others := [n for n in self.baseline if n not in DEFAULT_BASELINES]):
            raise UsageError(f"--task perplexity has no --baseline {' '.join(others)}; leave it out")
        if ("api" in self.baseline) != (self.api_model is not None):
            got = "--baseline api alone" if self.api_model is None else f"--api_model {self.api_model} alone"
            raise UsageError(f"--baseline api and --api_model NAME belong together; got {got}. Give both or none")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise UsageError(f"--depths must lie in [0, 1] (0 = the beginning of the text); got {depth}")
        if self.stop_below is not None and not 0 < self.stop_below <= 1:
            raise UsageError(f"--stop_below must lie in (0, 1]; got {self.stop_below}")
        if self.rag_chunks != "sentences" and not (self.rag_chunks.isdigit() and int(self.rag_chunks) > 0):
            raise UsageError(f"--rag_chunks must be sentences, or tokens of a passage; got {self.rag_chunks!r}")
        for flag, least in (("rag_top_k", 1), ("api_concurrency", 1), ("api_max_retries", 0)):
            if getattr(self, flag) < least:
                raise UsageError(f"--{flag} must be at least {least}; got {getattr(self, flag)}")
        if self.api_max_tokens is not None and self.api_max_tokens < 1:
            raise UsageError(f"--api_max_tokens must be at least 1; got {self.api_max_tokens}")
        if not self.api_timeout > 0:
            raise UsageError(f"--api_timeout must be more than 0 seconds; got {self.api_timeout}")
        if self.rag_order not in RAG_ORDERS:
            got = f"{self.rag_order!r}{suggest(self.rag_order, RAG_ORDERS)}"
            raise UsageError(f"--rag_order must be one of {', '.join(RAG_ORDERS)}; got {got}")

    @property
    def reading(self) -> dict:
        """The reading settings that were given."""
        given = {"top_k": self.top_k, "retrieval": self.retrieval, "offload_blocks": self.offload_blocks}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def rag(self) -> dict:
        """Settings of baseline rag, as `baselines.build_contenders` takes them."""
        chunks = self.rag_chunks if self.rag_chunks == "sentences" else int(self.rag_chunks)
        return {"chunks": chunks, "top_k": self.rag_top_k, "order": self.rag_order, "model": self.rag_model}

    def _check_generated_tasks(self):
        if not self.task:
            raise UsageError(f"give --task ({KNOWN_TASKS}) or --dataset_name (a .jsonl file of your own rows)")
        self._check_tasks()
        for length in self.lengths:
            parse_segments(length)

    def _check_tasks(self):
        for name in self.task:
            if name not in GENERATED:
                got = f"{name!r}{suggest(name, (*GENERATED, 'perplexity'))}"
                raise UsageError(f"--task must be one of {KNOWN_TASKS}; got {got}")

    def _check_perplexity(self):
        if not self.measures_perplexity:
            got = f"--task {' '.join(self.task)}" if self.task else "no --task"
            raise UsageError(
                f"--text_path is of --task perplexity; got {got}. Leave --text_path out, or name that task"
            )
        others = [name for name in self.task if name != "perplexity"]
        others += ["--dataset_name"] if self.dataset_name is not None else []
        if others:
            raise UsageError(
                f"--task perplexity stands alone; got {' '.join(others)} too. Give it a command of its own"
            )
        if not self.text_path:
            raise UsageError(
                "--task perplexity needs --text_path; got none. Name a folder of .txt files, a .txt or .jsonl file or a Hub id"
            )
        for length in self.lengths:
            if parse_segments(length) == 0:
                raise UsageError(f"--lengths must be at least one segment for perplexity; got {length!r}")

    def _check_dataset(self):
        if self.depths:
            raise UsageError("--dataset_name takes the rows as they are; leave out --depths")
        of_one_file = self.dataset_name.endswith((".jsonl", ".parquet"))
        if of_one_file and not Path(self.dataset_name).is_file():
            raise UsageError(f"--dataset_name {self.dataset_name} does not exist; its columns: input, question, target")
        if bool(self.task) != bool(self.lengths):
            raise UsageError(
                "--task and --lengths name splits and configurations of --dataset_name (qa1, 4k); got "
                f"{'--task' if self.task else '--lengths'} alone. Give both, or none for rows of your own"
            )
        if self.task:
            self._check_tasks()
            if of_one_file or self.dataset_config or self.dataset_split:
                got = (
                    f"--dataset_name {self.dataset_name}" if of_one_file else "--dataset_config or --dataset_split too"
                )
                raise UsageError(
                    f"--task and --lengths choose from a Hub id or a folder with a configuration for each length; got {got}. "
                    "Leave out either"
                )
            for length in self.lengths:
                parse_tokens(length)
        elif self.dataset_split in GENERATED:
            raise UsageError(
                f"--dataset_split {self.dataset_split} is a task, and rows of your own are not scored as one; give --task "
                f"{self.dataset_split} --lengths {self.dataset_config or '4k'} instead"
            )

    @property
    def folder(self) -> Path:
        """Where results.json, settings.json and heatmap.png go; perplexities have a folder of their own."""
        name = "perplexity" if self.measures_perplexity else "evaluation"
        return Path(self.output_dir) if self.output_dir else Path(self.adapter_path) / name

    @property
    def measures_perplexity(self) -> bool:
        return "perplexity" in self.task

    def cells(self, segment_length: int) -> list[Cell]:
        """What to measure, without repeats, shorter texts first; the user's own rows have no set length (None)."""
        if self.dataset_name and not self.task:
            return [Cell("dataset", None)]
        default = PERPLEXITY_LENGTHS if self.measures_perplexity else DEFAULT_LENGTHS
        names = {}  # of lengths, by their tokens
        for text in self.lengths or default:
            if self.dataset_name:
                names[parse_tokens(text)] = spell_length(text)
            else:
                tokens = parse_segments(text, segment_length) * segment_length
                names[tokens] = str(tokens) if text.isdigit() else spell_length(text)
        return [
            Cell(task, -(-tokens // segment_length), depth, names[tokens], tokens)
            for task in dict.fromkeys(self.task)
            for depth in dict.fromkeys(self.depths or (None,))
            for tokens in sorted(names)
        ]

    def identity(self) -> dict:
        """Whatever changes a measurement; two runs of one identity may share an output folder.

        Tasks, lengths and the endpoint's model are not part of it (they name cells), nor is the batch size.
        """
        identity = {
            "adapter": fingerprint(self.adapter_path),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "split": self.split,
            "scoring": self.scoring,
            "load_in_4bit": self.load_in_4bit,
            "top_k": self.top_k,
            "retrieval": self.retrieval,
            "dataset_name": fingerprint_rows(self.dataset_name),
            "dataset_config": self.dataset_config,
            "dataset_split": self.dataset_split,
            "text_path": fingerprint(self.text_path, "**/*.txt"),
            "babi_dir": fingerprint(self.babi_dir, "*.txt"),
            "babi_vocabulary": fingerprint(self.babi_vocabulary),
            "background_dir": fingerprint(self.background_dir, "**/*.txt"),
            "background_dataset": self.background_dataset,
            "num_digits": self.num_digits,
            "passkey_wording": self.passkey_wording,
            "question_position": self.question_position,
            "max_n_facts": self.max_n_facts,
            "version": __version__,
        }
        if "rag" in self.baseline:
            identity["rag"] = self.rag
        if "api" in self.baseline:
            identity["api_max_tokens"] = self.api_max_tokens
        return identity

    @classmethod
    def defaults(cls) -> dict:
        """What a key of `identity` is where a folder from before it existed does not tell."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}


@dataclass(frozen=True)
class InspectionSettings:
    """Settings of one inspection; raises UsageError, one line, for whatever cannot work."""

    adapter_path: str
    input: str
    question: str | None = None
    max_new_tokens: int = 16
    top: int = 5
    load_in_4bit: bool | None = None
    top_k: int | None = None
    retrieval: str | None = None
    offload_blocks: bool | None = None
    output_dir: str | None = None
    overwrite: bool = False
    model_name_or_path: str | None = None

    def __post_init__(self):
        check_model_folder(self.adapter_path)
        for flag in ("max_new_tokens", "top"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag} must be at least 1; got {getattr(self, flag)}")
        if not self.text.strip():
            raise UsageError(f"--input {self.input} is empty; name a text file")
        if self.question is not None and not self.question.strip():
            raise UsageError("--question is empty; leave it out to let the text go on")
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"--output_dir must be a folder; {self.folder} is a file")
        if not self.overwrite and self.folder.is_dir() and any(self.folder.iterdir()):
            raise UsageError(f"--output_dir {self.folder} is not empty; name another, or give --overwrite")

    @property
    def reading(self) -> dict:
        """The reading settings that were given."""
        given = {"top_k": self.top_k, "retrieval": self.retrieval, "offload_blocks": self.offload_blocks}
        return {name: value for name, value in given.items() if value is not None}

    @cached_property
    def text(self) -> str:
        """What is to be read."""
        try:
            return Path(self.input).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--input {self.input} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv"
            ) from None
        except OSError as error:
            raise UsageError(f"--input {self.input} cannot be read ({error.strerror}); name a text file") from None

    @property
    def folder(self) -> Path:
        """Where retrieval.json and retrieval.png go."""
        return Path(self.output_dir) if self.output_dir else Path(self.adapter_path) / "inspection"


def check_model_folder(path: str):
    """Raises UsageError unless there is a folder with a config.json."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"--adapter_path must be a folder that training or merging wrote; got {path}")
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise UsageError(f"--adapter_path {folder} has no config.json, so it is no lrmt model; it holds: {there}")


def fingerprint_rows(path) -> str | None:
    """A digest of the file; of a folder, of what `lrmt data build` says of it, which further files do not change, or its place."""
    if path is None or not Path(path).is_dir():
        return fingerprint(path)
    build = Path(path) / "build.json"
    return fingerprint(build) if build.is_file() else str(Path(path).resolve())
