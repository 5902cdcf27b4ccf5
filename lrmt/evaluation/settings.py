"""What `lrmt evaluate` and `lrmt inspect` are asked to do: every field is the flag of the same name, checked on construction."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lrmt import __version__
from lrmt.errors import UsageError, suggest
from lrmt.evaluation.metrics import RULES, TASK_LABELS

NEEDLES = ("niah_single", "memorize", "detect_memorize", "reasoning")
TASKS = ("passkey", *sorted(TASK_LABELS, key=lambda name: int(name[2:])), *NEEDLES)
KNOWN_TASKS = f"passkey, qa1, … qa20, {', '.join(NEEDLES)}, perplexity"
SPLITS = ("train", "validation", "test")
DEFAULT_LENGTHS = ("1", "2", "4", "8", "16", "32")
PERPLEXITY_LENGTHS = ("1", "2", "4", "8")

#: how landmark attention reads, if otherwise than it was trained
READING = ("top_k", "retrieval", "offload_blocks")


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
    background_dir: str | None = None
    background_dataset: str | None = None
    num_digits: int = 5
    passkey_wording: str = "landmark"
    question_position: str = "last"
    max_n_facts: int | None = None
    load_in_4bit: bool | None = None
    top_k: int | None = None
    retrieval: str | None = None
    offload_blocks: bool | None = None
    scoring: str = "official"
    output_dir: str | None = None
    overwrite: bool = False

    def __post_init__(self):
        check_model_folder(self.adapter_path)
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
        for flag in ("babi_dir", "background_dir"):
            folder = getattr(self, flag)
            if folder is not None and not Path(folder).is_dir():
                raise UsageError(f"--{flag} must be a folder; got {folder}")
        if self.background_dir is not None and self.background_dataset is not None:
            raise UsageError(
                "--background_dir and --background_dataset exclude each other; "
                f"got {self.background_dir} and {self.background_dataset}. Name one"
            )
        if self.background_dir is not None and not any(Path(self.background_dir).rglob("*.txt")):
            raise UsageError(f"--background_dir {self.background_dir} holds no .txt file; name a folder of text books")
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"--output_dir must be a folder; {self.folder} is a file")

    def _check_generated_tasks(self):
        if not self.task:
            raise UsageError(f"give --task ({KNOWN_TASKS}) or --dataset_name (a .jsonl file of your own rows)")
        for name in self.task:
            if name not in TASKS:
                got = f"{name!r}{suggest(name, (*TASKS, 'perplexity'))}"
                raise UsageError(f"--task must be one of {KNOWN_TASKS}; got {got}")
        for length in self.lengths:
            parse_length(length)

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
            parse_length(length)

    def _check_dataset(self):
        if self.task or self.lengths:
            raise UsageError("--dataset_name takes the rows as they are; leave out --task and --lengths")
        if self.dataset_name.endswith((".jsonl", ".parquet")) and not Path(self.dataset_name).is_file():
            raise UsageError(f"--dataset_name {self.dataset_name} does not exist; its columns: input, question, target")

    @property
    def folder(self) -> Path:
        """Where results.json, settings.json and heatmap.png go; perplexities have a folder of their own."""
        name = "perplexity" if self.measures_perplexity else "evaluation"
        return Path(self.output_dir) if self.output_dir else Path(self.adapter_path) / name

    @property
    def measures_perplexity(self) -> bool:
        return "perplexity" in self.task

    def cells(self, segment_length: int) -> list[tuple[str, int | None]]:
        """The (task, segments) pairs to measure, without repeats; the user's own rows have no set length (None)."""
        if self.dataset_name:
            return [("dataset", None)]
        default = PERPLEXITY_LENGTHS if self.measures_perplexity else DEFAULT_LENGTHS
        segments = sorted({parse_length(text, segment_length) for text in self.lengths or default})
        return [(task, n) for task in dict.fromkeys(self.task) for n in segments]

    def identity(self) -> dict:
        """Whatever changes a measurement; two runs of one identity may share an output folder.

        Tasks and lengths are not part of it (they name cells), nor is the batch size.
        """
        return {
            "adapter": fingerprint(self.adapter_path),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "split": self.split,
            "scoring": self.scoring,
            "load_in_4bit": self.load_in_4bit,
            "top_k": self.top_k,
            "retrieval": self.retrieval,
            "dataset_name": fingerprint_text(self.dataset_name),
            "dataset_config": self.dataset_config,
            "dataset_split": self.dataset_split,
            "text_path": fingerprint_text(self.text_path),
            "babi_dir": resolve(self.babi_dir),
            "background_dir": resolve(self.background_dir),
            "background_dataset": self.background_dataset,
            "num_digits": self.num_digits,
            "passkey_wording": self.passkey_wording,
            "question_position": self.question_position,
            "max_n_facts": self.max_n_facts,
            "version": __version__,
        }


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


def parse_length(text: str, segment_length: int | None = None) -> int:
    """Segments in a length: "8" is 8 segments, "4k" or "1M" are tokens, rounded down to whole segments.

    Without `segment_length` only the spelling is checked, and a length in tokens counts as 1.
    """
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)([kKmM])", str(text))
    if match is None:
        raise UsageError(f"--lengths takes segments (8) or tokens (4k, 0.5M); got {text!r}")
    if match[1]:
        segments = int(match[1])
    elif segment_length is None:
        segments = 1 if float(match[2]) else 0
    else:
        tokens = round(float(match[2]) * (1_000 if match[3] in "kK" else 1_000_000))
        segments = tokens // segment_length
        if segments < 1:
            raise UsageError(f"--lengths {text} is less than one segment of {segment_length} tokens; ask for more")
    if segments < 1:
        raise UsageError(f"--lengths must be at least one segment; got {text!r}")
    return segments


def fingerprint(path) -> str | None:
    """A digest of the file, or of the weights and configurations in the folder; a name that is neither stays as it is."""
    if path is None or not Path(path).exists():
        return path
    path = Path(path)
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*config.json")])
    for file in files:
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def fingerprint_text(path) -> str | None:
    """A digest of the file; the place of a folder; a name that is neither stays as it is."""
    return resolve(path) if path is not None and Path(path).is_dir() else fingerprint(path)


def resolve(path) -> str | None:
    return None if path is None else str(Path(path).resolve())
