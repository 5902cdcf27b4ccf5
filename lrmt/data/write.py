"""Samples written to disk in the public BABILong schema, or as chats: one folder per length, one split per task."""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import lrmt
from lrmt.adapters.backbone import open_tokenizer
from lrmt.errors import UsageError, suggest
from lrmt.files import digest, replacing, to_json, write_whole
from lrmt.flags import flag
from lrmt.lengths import parse_tokens, spell_length
from lrmt.progress import progress
from lrmt.tasks.background import open_background
from lrmt.tasks.cache import fingerprint_tokenizer
from lrmt.tasks.haystack import HaystackTask, Row
from lrmt.tasks.names import KNOWN_HAYSTACKS, SPLITS
from lrmt.tasks.options import BackgroundOptions, QuestionOptions, RepeatOptions, SpanOptions, StoryOptions
from lrmt.tasks.registry import HAYSTACKS, build_task

FORMATS = {"parquet": "parquet", "jsonl": "jsonl", "chat": "jsonl"}  # and what their files end in
SHARD_TOKENS = 2**25  # of one file, and what one worker holds in memory
IDENTITY = "build.json"
TINY_TOKENIZER = Path(lrmt.__file__).parent / "assets" / "tiny-llama"


@dataclass(kw_only=True)
class GenerationSettings(StoryOptions, BackgroundOptions, RepeatOptions, SpanOptions):
    """What `lrmt data` makes samples of: every field is the flag of the same name.

    Raises UsageError, one line, for whatever cannot work.
    """

    title: ClassVar[str] = "samples"

    task: tuple[str, ...] = flag(help=KNOWN_HAYSTACKS, metavar="NAME")
    lengths: tuple[str, ...] = flag(help="In tokens: 0k, 1k, 4k, 1M, 10M, 1500 (1k = 1000).", metavar="N")
    tokenizer: str | None = flag(
        None, "That counts tokens: a folder or Hub id (default: that of the tiny LLaMA).", "NAME"
    )
    split: str = flag("test", "Of the bAbI files: train, validation or test.", "NAME")
    seed: int = flag(0, "Of stories, places and background.", "N")
    reserved_tokens: int = flag(
        300, "Of a length, kept for question and answer (default: 300, as in the public sets).", "N"
    )

    def __post_init__(self):
        for name in self.task:
            if name not in HAYSTACKS:
                known = "qa1, … qa20, niah_single, memorize, detect_memorize, reasoning"
                raise UsageError(f"--task must be one of {known}; got {name!r}{suggest(name, HAYSTACKS)}")
        if self.split not in SPLITS:
            got = f"{self.split!r}{suggest(self.split, SPLITS)}"
            raise UsageError(f"--split must be one of {', '.join(SPLITS)}; got {got}")
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

    def open_tasks(self) -> dict[str, HaystackTask]:
        """The tasks by name, over one background that is long enough for every length."""
        tokenizer = open_tokenizer(self.tokenizer or str(TINY_TOKENIZER))
        longest = max(map(self.context_length, self.lengths))
        background = open_background(
            tokenizer,
            background_dir=self.background_dir,
            background_dataset=self.background_dataset,
            split=self.split,
            seed=self.seed,
            longest=longest,
            repeat=self.repeat_background,
        )
        options = (
            "split",
            "seed",
            "babi_dir",
            "babi_vocabulary",
            "max_n_facts",
            "task_start_pct",
            "task_end_pct",
            "depth",
        )
        given = {name: getattr(self, name) for name in options}
        return {name: build_task(name, tokenizer, background=background, **given) for name in dict.fromkeys(self.task)}


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

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_samples", "num_workers"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1; got {getattr(self, name)}")
        if self.format not in FORMATS:
            got = f"{self.format!r}{suggest(self.format, FORMATS)}"
            raise UsageError(f"--format must be one of {', '.join(FORMATS)}; got {got}")
        if self.question_position not in CHATS:
            got = f"{self.question_position!r}{suggest(self.question_position, CHATS)}"
            raise UsageError(f"--question_position must be one of {', '.join(CHATS)}; got {got}")
        if self.question_position != "last" and self.format != "chat":
            raise UsageError(
                f"--question_position {self.question_position} is of --format chat; rows of --format {self.format} keep the "
                "question apart from the input. Leave it out"
            )


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `last` of a task and length, and their file, named as on the Hub."""

    task: str
    length: str
    first: int
    last: int
    path: Path


def build(settings: BuildSettings) -> list[Path]:
    """Write every file that `settings.output_dir` does not hold yet, and a card that lets `datasets` load the folder.

    Samples depend on seed, split, task, length and index alone. Whatever can be refused is refused before anything is
    written (UsageError). Returns the files of this build, also those that were there.
    """
    folder = Path(settings.output_dir)
    check_folder(folder)
    tasks = settings.open_tasks()
    identity = _identify(settings, next(iter(tasks.values())))
    _check_identity(folder, identity)
    shards = list(_divide(settings, tasks))
    for length in settings.lengths:
        for task in tasks.values():
            task.row(0, settings.context_length(length))  # what does not fit is refused here
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / IDENTITY, to_json(identity))
    missing = sorted((s for s in shards if not s.path.exists()), key=lambda s: -parse_tokens(s.length))
    with progress(sum(s.last - s.first for s in missing), "sample") as bar:
        for shard in _run(settings, tasks, missing):
            bar.update(shard.last - shard.first)
    write_whole(folder / "README.md", _card(folder, identity))
    return [shard.path for shard in shards]


def _divide(settings: BuildSettings, tasks: dict[str, HaystackTask]) -> Iterator[Shard]:
    """The files of a build: rows of a task and length, at most SHARD_TOKENS in one. Workers do not change them."""
    for length in dict.fromkeys(map(spell_length, settings.lengths)):
        tokens = settings.context_length(length)
        for name, task in tasks.items():
            available = None if settings.split == "train" else task.num_rows(tokens)
            rows = settings.num_samples if available is None else min(settings.num_samples, available)
            step = max(1, SHARD_TOKENS // max(1, tokens))
            count = -(-rows // step)
            for number in range(count):
                file = f"{name}-{number:05}-of-{count:05}.{FORMATS[settings.format]}"
                first = number * step
                yield Shard(name, length, first, min(rows, first + step), Path(settings.output_dir, length, file))


def _run(settings: BuildSettings, tasks: dict[str, HaystackTask], shards: list[Shard]) -> Iterator[Shard]:
    """Write shards, here or in other processes; each is told when it is done."""
    workers = min(settings.num_workers, len(shards))
    if workers < 2:
        for shard in shards:
            yield _write_shard(settings, tasks[shard.task], shard)
        return
    forks = sys.platform == "linux"  # elsewhere a worker opens the cached background by itself
    context = multiprocessing.get_context("fork" if forks else "spawn")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the tokenizer warns of the fork; a worker is one thread
    given = (settings, tasks if forks else None)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=given) as pool:
        try:
            for done in as_completed([pool.submit(_work, shard) for shard in shards]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(settings: BuildSettings, tasks: dict[str, HaystackTask] | None) -> None:
    global _settings, _tasks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is being written is finished, and nothing more begun
    _settings, _tasks = settings, tasks or settings.open_tasks()


def _work(shard: Shard) -> Shard:
    return _write_shard(_settings, _tasks[shard.task], shard)


def _write_shard(settings: BuildSettings, task: HaystackTask, shard: Shard) -> Shard:
    length = settings.context_length(shard.length)
    rows = (task.row(index, length) for index in range(shard.first, shard.last))
    if settings.format == "chat":
        records = ({"messages": chat(row, settings.question_position)} for row in rows)
    else:
        records = ({"input": row.input, "question": row.question, "target": row.target} for row in rows)
    shard.path.parent.mkdir(exist_ok=True)
    write = _write_parquet if settings.format == "parquet" else _write_jsonl
    with replacing(shard.path) as path:
        write(path, records)
    return shard


def _write_parquet(path: Path, records: Iterator[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(records)), path)


def _write_jsonl(path: Path, records: Iterator[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


CHATS = {  # what the user says, by --question_position
    "last": "<context>\n{context}\n</context>\n\nQuestion: {question}",
    "first": "Question: {question}\n\n<context>\n{context}\n</context>",
    "both": "Question: {question}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}",
}


def chat(row: Row, question_position: str = "last") -> list[dict]:
    """A row as the two messages of a chat, as hosted fine-tuning takes it."""
    said = CHATS[question_position].format(context=row.input, question=row.question.strip())
    return [{"role": "user", "content": said}, {"role": "assistant", "content": row.target}]


def check_folder(folder: Path) -> None:
    """Raises UsageError unless the folder is new, empty or of an earlier build."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir must be a folder; {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / IDENTITY).is_file():
        raise UsageError(f"--output_dir {folder} is not empty and holds no build; name another folder")


def _check_identity(folder: Path, identity: dict) -> None:
    """Raises UsageError when the folder holds a build of other settings."""
    if not (folder / IDENTITY).is_file():
        return
    try:
        there = json.loads((folder / IDENTITY).read_text())
    except ValueError:
        raise UsageError(f"--output_dir {folder}: {IDENTITY} is no JSON; name another folder") from None
    other = [name for name in identity if there.get(name) != identity[name]]
    if other:
        was = ", ".join(f"{name} {there.get(name)} instead of {identity[name]}" for name in other)
        raise UsageError(f"--output_dir {folder} holds another build: {was}; name another folder, or the same settings")


def _identify(settings: BuildSettings, task: HaystackTask) -> dict:
    """Whatever changes a sample or a file's rows; tasks and lengths name files, so that more may join them."""
    left_out = ("task", "lengths", "output_dir", "num_workers", "background_dir", "background_dataset", "tokenizer")
    kept = {k: v for k, v in dataclasses.asdict(settings).items() if k not in left_out}
    return kept | {
        "babi_dir": settings.babi_dir
        and digest(*(p.read_text() for p in sorted(Path(settings.babi_dir).glob("*.txt")))),
        "babi_vocabulary": settings.babi_vocabulary and digest(Path(settings.babi_vocabulary).read_text()),
        "background": task.background.fingerprint,
        "tokenizer": fingerprint_tokenizer(task.pieces.tokenizer),
        "version": lrmt.__version__,
    }


def _card(folder: Path, identity: dict) -> str:
    """The README that tells `datasets` which files make up which configuration and split."""
    cells: dict[str, set[str]] = {}
    for path in folder.glob(f"*/*-of-*.{FORMATS[identity['format']]}"):
        cells.setdefault(path.parent.name, set()).add(path.name.split("-")[0])
    lines = ["---", "configs:"]
    for length in sorted(cells, key=parse_tokens):
        lines += [f'- config_name: "{length}"', "  data_files:"]
        for task in sorted(cells[length], key=lambda name: (len(name), name)):
            lines += [f"  - split: {task}", f'    path: "{length}/{task}-*"']
    counted = f"{identity['reserved_tokens']} tokens less than the name says"
    lines += [
        "---",
        "",
        "# Long-context questions",
        "",
        "Facts hidden in background text, made with `lrmt data build`. Configuration = length, split = task. The input has",
        f"{counted}, facts and background together; 0k is facts alone.",
        "",
        *(f"- {name}: {value}" for name, value in identity.items()),
        "",
    ]
    return "\n".join(lines)
