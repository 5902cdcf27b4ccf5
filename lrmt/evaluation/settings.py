"""What `lrmt evaluate` is asked to do, in each of its modes: every field is the flag of the same name, checked on construction."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

from lrmt import __version__
from lrmt.errors import UsageError
from lrmt.evaluation.groups import (
    BASELINES,
    DEFAULT_BASELINES,
    KNOWN_TASKS,
    BaselineFlags,
    DepthFlags,
    FewBaselineFlags,
    GeneratedTaskFlags,
    HarnessTaskFlags,
    LengthFlags,
    OutputFlags,
    PerplexityTaskFlags,
    RowTaskFlags,
    ScoredOutputFlags,
    check_least,
    check_rows,
    check_tasks,
    fingerprint_rows,
)
from lrmt.evaluation.opening import OpeningSettings, method_settings
from lrmt.files import fingerprint
from lrmt.flags import flag
from lrmt.lengths import parse_segments, parse_tokens, spell_length
from lrmt.tasks.names import GENERATED, split_mixture
from lrmt.tasks.options import check_choice

DEFAULT_LENGTHS = ("1", "2", "4", "8", "16", "32")
PERPLEXITY_LENGTHS = ("1", "2", "4", "8")

COLUMNS = f"""\
Accuracy with a 95 % confidence interval (Wilson), beside baselines measured in the same run (--baseline):
{chr(10).join(f"  {name:15} {what}" for name, what in BASELINES.items())}
"""


class Cell(NamedTuple):
    """One square of the grid. `segments`, `tokens`: length, None for own rows, 0 for facts without any background (0k).

    `depth`: share of the text before its first fact, None for anywhere. `name`: of the length, "4k" or tokens.
    """

    task: str
    segments: int | None
    depth: float | None = None
    name: str = ""
    tokens: int | None = None


# ---------------------------------------------------------------------- modes


@dataclass(kw_only=True)
class EvaluationSettings(OpeningSettings):
    """One evaluation, of the mode that its flags mean; raises UsageError, one line, for whatever cannot work."""

    #: where its files go by default, and the function that is called with the settings
    place_name: ClassVar[str] = "evaluation"
    function: ClassVar[str] = "lrmt.evaluation.run:run_evaluation"
    measures_perplexity: ClassVar[bool] = False

    batch_size: int = flag(8, "Texts at once.", "N")

    def __new__(cls, *given, **named):
        return super().__new__(cls.choose(named) if cls is EvaluationSettings else cls)

    @classmethod
    def modes(cls):
        return GridSettings, RowSettings, PerplexitySettings, HarnessSettings

    @classmethod
    def choose(cls, given: Mapping[str, object]) -> type:
        if given.keys() & {"harness", "harness_data", "harness_prompt"}:
            return HarnessSettings
        if "perplexity" in (given.get("task") or ()) or given.get("text_path") is not None:
            return PerplexitySettings
        own_rows = given.get("dataset_name") is not None and not given.get("task") and not given.get("lengths")
        return RowSettings if own_rows else GridSettings

    def check(self):
        check_least(self, "batch_size", 1)

    @property
    def folder(self) -> Path:
        """Where results.json, settings.json and heatmap.png go; perplexities have a folder of their own."""
        return self.place(self.output_dir, self.place_name)

    def identity(self) -> dict:
        """Whatever changes a measurement; two runs of one identity may share an output folder.

        Tasks, lengths and the endpoint's model are not part of it (they name cells), nor are the batch size and whether 4 bits are
        computed with as full weights.
        """
        reading = method_settings(self.adapter_path, self.reading, measured=True)
        identity = {
            "adapter": fingerprint(self.adapter_path),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "split": self.split,
            "scoring": self.scoring,
            "load_in_4bit": self.load_in_4bit,
            "model_name_or_path": fingerprint(self.model_name_or_path),
            **{name: self.reading.get(name) for name in reading},
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
        every = (field for mode in (EvaluationSettings, *cls.modes()) for field in fields(mode))
        return {field.name: field.default for field in every if field.default is not MISSING}


@dataclass(kw_only=True)
class GridSettings(EvaluationSettings, GeneratedTaskFlags, LengthFlags, DepthFlags, BaselineFlags, ScoredOutputFlags):
    """Generated tasks, or those of a public set, by length."""

    description: ClassVar[str] = f"""\
{COLUMNS}
Tasks are generated, or, with --dataset_name, those of a public set, in the schema that lrmt data build writes: a
configuration for each length and a split for each task. What else there is, with flags of its own that its help lists:
  lrmt evaluate --dataset_name NAME --help     rows of your own
  lrmt evaluate --task perplexity --help       perplexity by context length
  lrmt evaluate --harness --help               tasks of lm-evaluation-harness

Writes results.json (one record a cell: model, task, length_tokens, segments, accuracy, ci_low, ci_high, n; length, the
name that was asked for, and depth, where given; accuracy and interval in 0..1), heatmap.png, settings.json, and the
answers to bAbI tasks as BABILong's leaderboard takes them (babilong_evals). Started again with the same settings, it
keeps the finished cells and measures the others, further --lengths, --task and --baseline included. Under accelerate
launch the processes share the questions.
"""
    examples: ClassVar[str] = """\
examples:
  lrmt evaluate --adapter_path runs/passkey --task passkey --lengths 1 2 4 8 16 32
  lrmt evaluate --adapter_path runs/qa1 --task qa1 qa2 --lengths 4k 16k 64k --background_dir books
  lrmt evaluate --adapter_path runs/qa1 --task qa1 --babi_dir tasks_1-20_v1-2/en-valid-10k --num_samples 1000
  lrmt evaluate --adapter_path runs/qa1 --task qa1 qa2 qa3 --lengths 1 2 4 8 --baseline backbone sliding_window xl rag
  lrmt evaluate --adapter_path runs/passkey --task passkey --lengths 4 8 16 --depths 0 0.25 0.5 0.75 1
  lrmt evaluate --adapter_path runs/qa1 --dataset_name RMT-team/babilong --task qa1 qa2 --lengths 0k 4k 128k
"""

    def check(self):
        self.task = tuple(name for names in self.task for name in split_mixture(names) if name)
        if self.dataset_name is None:
            self._check_generated()
        else:
            self._check_public_set()
        self._check_texts()

    def _check_generated(self):
        if not self.task:
            raise UsageError(f"give --task ({KNOWN_TASKS}) or --dataset_name (a .jsonl file of your own rows)")
        check_tasks(self.task)
        for length in self.lengths:
            parse_segments(length)

    def _check_public_set(self):
        if self.depths:
            raise UsageError("--dataset_name takes the rows as they are; leave out --depths")
        of_one_file = check_rows(self.dataset_name)
        if bool(self.task) != bool(self.lengths):
            raise UsageError(
                "--task and --lengths name splits and configurations of --dataset_name (qa1, 4k); got "
                f"{'--task' if self.task else '--lengths'} alone. Give both, or none for rows of your own"
            )
        check_tasks(self.task)
        if of_one_file or self.dataset_config or self.dataset_split:
            got = f"--dataset_name {self.dataset_name}" if of_one_file else "--dataset_config or --dataset_split too"
            raise UsageError(
                f"--task and --lengths choose from a Hub id or a folder with a configuration for each length; got {got}. "
                "Leave out either"
            )
        for length in self.lengths:
            parse_tokens(length)

    def _check_texts(self):
        if self.babi_vocabulary is not None and self.scoring in ("official", "strict"):
            raise UsageError(
                f"--scoring {self.scoring} knows the labels of the bAbI files only, not those of --babi_vocabulary "
                f"{self.babi_vocabulary}; give --scoring exact or contains"
            )
        if self.babi_dir is not None and not Path(self.babi_dir).is_dir():
            raise UsageError(f"--babi_dir must be a folder; got {self.babi_dir}")
        if self.background_dir is not None and not Path(self.background_dir).is_file():
            if not Path(self.background_dir).is_dir():
                raise UsageError(
                    f"--background_dir must be a folder of .txt, a .txt or .jsonl file; got {self.background_dir}"
                )
            if not any(Path(self.background_dir).rglob("*.txt")):
                raise UsageError(
                    f"--background_dir {self.background_dir} holds no .txt file; name a folder of text books"
                )

    def cells(self, segment_length: int) -> list[Cell]:
        """What to measure, without repeats, shorter texts first."""
        names = {}  # of lengths, by their tokens
        for text in self.lengths or DEFAULT_LENGTHS:
            if self.dataset_name:
                names[parse_tokens(text)] = spell_length(text)
            else:
                tokens, name = name_length(text, segment_length)
                names[tokens] = name
        return [
            Cell(task, -(-tokens // segment_length), depth, names[tokens], tokens)
            for task in dict.fromkeys(self.task)
            for depth in dict.fromkeys(self.depths or (None,))
            for tokens in sorted(names)
        ]


@dataclass(kw_only=True)
class RowSettings(EvaluationSettings, RowTaskFlags, BaselineFlags, ScoredOutputFlags):
    """Rows of one's own, each of its own length."""

    description: ClassVar[str] = f"""\
{COLUMNS}
Rows of your own, a .jsonl or .parquet file or a Hub id: right is what equals the target (as many lines, case ignored; or
--scoring contains), and length_tokens is the mean. Writes results.json, heatmap.png and settings.json.
"""
    examples: ClassVar[str] = """\
example:
  lrmt evaluate --adapter_path runs/mine --dataset_name questions.jsonl
"""

    @classmethod
    def refuse(cls, others):
        if others:
            raise UsageError(f"--dataset_name takes the rows as they are; leave out {', '.join(others)}")

    def check(self):
        check_rows(self.dataset_name)
        if self.dataset_split in GENERATED:
            raise UsageError(
                f"--dataset_split {self.dataset_split} is a task, and rows of your own are not scored as one; give --task "
                f"{self.dataset_split} --lengths {self.dataset_config or '4k'} instead"
            )

    def cells(self, segment_length: int) -> list[Cell]:
        """One, of no set length."""
        return [Cell("dataset", None)]


@dataclass(kw_only=True)
class PerplexitySettings(EvaluationSettings, PerplexityTaskFlags, LengthFlags, FewBaselineFlags, OutputFlags):
    """Perplexity by context length."""

    place_name: ClassVar[str] = "perplexity"
    function: ClassVar[str] = "lrmt.evaluation.perplexity:run_perplexity"
    measures_perplexity: ClassVar[bool] = True
    description: ClassVar[str] = """\
Perplexity by context length, of the model, the method untrained, and the backbone, on the same tokens: the last half
segment before a drawn place of --text_path, after 1, 2, 4, … segments that end there. Split test is all of the text,
validation the last tenth, which training on it leaves out.

Writes perplexity.json (model, task, length_tokens, segments, perplexity, nll, nll_stderr, n), perplexity.png and
settings.json.
"""
    examples: ClassVar[str] = """\
example:
  lrmt evaluate --adapter_path runs/books --task perplexity --text_path books --split validation --lengths 1 2 4 8
"""

    @classmethod
    def refuse(cls, others):
        if others:
            raise UsageError(
                f"--task perplexity stands alone; got {' '.join(others)} too. Give it a command of its own"
            )

    def check(self):
        for name in self.baseline:
            check_choice("baseline", name, BASELINES)
        if others := [name for name in self.baseline if name not in DEFAULT_BASELINES]:
            raise UsageError(f"--task perplexity has no --baseline {' '.join(others)}; leave it out")
        if "perplexity" not in self.task:
            got = f"--task {' '.join(self.task)}" if self.task else "no --task"
            raise UsageError(
                f"--text_path is of --task perplexity; got {got}. Leave --text_path out, or name that task"
            )
        self.refuse([name for name in self.task if name != "perplexity"])
        if not self.text_path:
            raise UsageError(
                "--task perplexity needs --text_path; got none. Name a folder of .txt files, a .txt or .jsonl file or a Hub id"
            )
        for length in self.lengths:
            if parse_segments(length) == 0:
                raise UsageError(f"--lengths must be at least one segment for perplexity; got {length!r}")

    def cells(self, segment_length: int) -> list[Cell]:
        """The lengths without repeats, shorter ones first."""
        names = dict(name_length(text, segment_length) for text in self.lengths or PERPLEXITY_LENGTHS)
        return [Cell("perplexity", n // segment_length, None, names[n], n) for n in sorted(names)]


@dataclass(kw_only=True)
class HarnessSettings(EvaluationSettings, HarnessTaskFlags, LengthFlags, OutputFlags):
    """Tasks of lm-evaluation-harness."""

    place_name: ClassVar[str] = "harness"
    function: ClassVar[str] = "lrmt.evaluation.harness.run:run_harness"
    description: ClassVar[str] = """\
Runs tasks of lm-evaluation-harness (extra harness) on the model, texts uncut, in one process. Writes results.json (as
lrmt evaluate does, of tasks whose answers are right or wrong), predictions.jsonl and harness.json, the harness' own figures.
"""
    examples: ClassVar[str] = """\
example:
  lrmt evaluate --adapter_path runs/qa1 --harness babilong_qa1 --lengths 0k 4k --harness_data data/babilong
"""

    @classmethod
    def refuse(cls, others):
        if others:
            cls._refuse(f"{', '.join(others)} too")

    @classmethod
    def _refuse(cls, got: str):
        own = [f.name for f in fields(cls) if "help" in f.metadata and not f.name.startswith("harness")]
        raise UsageError(
            f"--harness NAME… stands alone, with --harness_data, --harness_prompt and {', '.join(own)}; got {got}"
        )

    def check(self):
        if not self.harness:
            self._refuse("--harness_data or --harness_prompt alone")

    def options(self) -> dict:
        """What `run_harness` takes."""
        loading = {
            "load_in_4bit": self.load_in_4bit,
            "dequantize": self.dequantize or None,
            "model_name_or_path": self.model_name_or_path,
        } | self.reading
        return {
            "adapter_path": self.adapter_path,
            "tasks": self.harness,
            "max_seq_lengths": self.lengths,
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "data_dir": self.harness_data,
            "prompt": self.harness_prompt,
            "output_dir": str(self.folder),
            "overwrite": self.overwrite,
            "seed": self.seed,
            **{name: value for name, value in loading.items() if value is not None},
        }


#: what a mode does not offer stands at its default
for _name, _default in EvaluationSettings.defaults().items():
    if not hasattr(EvaluationSettings, _name):
        setattr(EvaluationSettings, _name, _default)


def name_length(text: str, segment_length: int) -> tuple[int, str]:
    """Tokens of a length in whole segments, and its name."""
    tokens = parse_segments(text, segment_length) * segment_length
    return tokens, str(tokens) if text.isdigit() else spell_length(text)
