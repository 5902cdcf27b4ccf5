"""`lrmt report`: results of several models side by side, with the published figures as reference rows."""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lrmt.errors import UsageError, one_line, suggest
from lrmt.evaluation.babilong.predictions import describe_variant
from lrmt.evaluation.babilong.published import MEAN, PAPERS, published_records
from lrmt.evaluation.babilong.rescoring import RULES
from lrmt.evaluation.metrics import TASK_LABELS
from lrmt.evaluation.results import PLACE, check_output, pool_depths
from lrmt.files import write_files
from lrmt.flags import flag
from lrmt.lengths import format_tokens, parse_tokens
from lrmt.tasks.names import GENERATED

FILES = ("results.json", "scores.json")
WRITTEN = ("report.png", "report.md", "report.csv")
MEAN_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
ORDER = (*GENERATED, MEAN, "dataset")
KEYS = ("model", "task", "length_tokens", "accuracy")

#: BABILong's lengths; a text within this share of one stands in its column
NOMINAL = tuple(parse_tokens(f"{2**n}k") for n in range(10)) + tuple(parse_tokens(f"{n}M") for n in (1, 2, 4, 8, 10))
TOLERANCE = 0.05


@dataclass(kw_only=True)
class ReportSettings:
    """What `lrmt report` is asked to do."""

    title: ClassVar[str] = "flags"
    description: ClassVar[str] = """\
Draws results of several models side by side, with BABILong's published figures as reference rows in italics:
report.png, report.md and report.csv, by task, model and context length. A text that was asked for by a name (4k), or is
within 5 % of one of BABILong's lengths, stands in its column; of several depths it is the mean; qa1-5 is the mean over
the five tasks.
"""
    examples: ClassVar[str] = """\
examples:
  lrmt report runs/qa1 runs/scores/scores.json --task qa1
  lrmt report runs/a/results.json runs/b/results.json --names small large --no_published --output_dir runs/both
"""

    paths: list[str] = flag(
        help="A results.json, a scores.json, or a folder that holds one.", metavar="PATH", positional=True
    )
    task: list[str] = flag([], "passkey, qa1, … qa20, qa1-5 or dataset (default: all).", "NAME")
    names: list[str] = flag([], "Of the paths, in their order (default: of the folders).", "NAME")
    scoring: str = flag("official", "Of scores.json: official, strict, contains.", "RULE")
    no_published: bool = flag(False, "Leave out the published figures.")
    output_dir: str = flag("runs/report", "Folder of the files.", "DIR")
    overwrite: bool = flag(False, "Replace the files of an earlier run in --output_dir.")


@dataclass
class Series:
    """One model's row in each task; `cells` are records by (task, length of the column). Published ones name a paper."""

    label: str
    cells: dict[tuple[str, int], dict]
    paper: str | None = None


def run_report(
    paths, task=(), names=(), scoring="official", no_published=False, output_dir="runs/report", overwrite=False
) -> list[Series]:
    """Writes report.png, report.md and report.csv, prints the table; returns the rows.

    Raises UsageError, before anything is written, for whatever cannot be shown.
    """
    check_request(paths, task, names, scoring)
    check_output(output_dir, overwrite, WRITTEN)
    series = []
    for path, name in zip(paths, names or [None] * len(paths), strict=True):
        series += read_series(Path(path), name, scoring)
    labels = [one.label for one in series]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise UsageError(f"two of the files call their models {min(repeated)!r}; give --names, one for each path")
    for one in series:
        add_mean(one)
    wanted = set(task) or {name for one in series for name, _ in one.cells}
    if not no_published:
        series += read_published()
    for one in series:
        one.cells = {key: record for key, record in one.cells.items() if key[0] in wanted}
    if not any(one.cells for one in series if one.paper is None):
        asked = f"--task {' '.join(task)}" if task else f"--scoring {scoring}"
        raise UsageError(f"{asked} is in none of {', '.join(map(str, paths))}; leave it out to see what there is")
    series = [one for one in series if one.cells]
    markdown = format_markdown(series, scoring)
    figure = draw_report(series)
    write_files(output_dir, dict(zip(WRITTEN, (figure, markdown, format_csv(series)), strict=True)))
    print(f"{markdown}\n{', '.join(WRITTEN)} are in {output_dir}")
    return series


def check_request(paths, task, names, scoring):
    if names and len(names) != len(paths):
        raise UsageError(f"--names takes one name for each path; got {len(names)} for {len(paths)}")
    for name in task:
        if name not in ORDER:
            got = f"{name!r}{suggest(name, ORDER)}"
            raise UsageError(f"--task must be one of passkey, qa1, … qa20, {MEAN}, dataset; got {got}")
    if scoring not in RULES:
        raise UsageError(f"--scoring must be one of {', '.join(RULES)}; got {scoring!r}{suggest(scoring, RULES)}")


def read_length(record: dict) -> int:
    """The length that was asked for, by its name where it has one: "4k" is 4000 tokens, if fewer were left of it."""
    return parse_tokens(record["length"]) if "length" in record else record["length_tokens"]


def find_column(tokens: int) -> int:
    """BABILong's own length where `tokens` is near one, else `tokens`."""
    return next((length for length in NOMINAL if abs(tokens - length) <= TOLERANCE * length), tokens)


def read_series(path: Path, name: str | None, scoring: str) -> list[Series]:
    """The models of one results.json or scores.json, or of a folder that holds either, or both.

    `name` stands for the run of a results.json (else that of its folder) and for the model of a scores.json; where that
    holds several, before them.
    """
    if path.is_dir():
        files = [path / file for file in FILES if (path / file).is_file()]
        if not files:
            there = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
            raise UsageError(
                f"{path} holds no {' or '.join(FILES)}; lrmt evaluate or score writes one; it holds: {there}"
            )
        return [one for file in files for one in read_series(file, name, scoring)]
    records = read_records(path)
    if "rule" in records[0]:
        records = [record for record in records if record["rule"] == scoring]
        models, variants = ({record.get(key, "") for record in records} for key in ("model", "variant"))

        def label(record):
            model = record["model"] if name is None else name if len(models) == 1 else f"{name} {record['model']}"
            return f"{model} ({describe_variant(record['variant'])})" if len(variants) > 1 else model

    else:
        rule, records = read_rule(path), pool_depths(records)

        def label(record):
            suffix = f" ({rule})" if rule not in (None, scoring) and record["task"] in TASK_LABELS else ""
            return f"{name or name_run(path)} {record['model']}{suffix}"

    return build_series(records, label)


def build_series(records: list[dict], label) -> list[Series]:
    """The records by `label(record)`, each in the column of BABILong's length that it is near.

    Of two texts near one length the nearer has its column, and the other one of its own.
    """
    found = {}
    for record in records:
        found.setdefault(label(record), []).append(record)
    series = []
    for name, group in found.items():
        cells = {}
        for record in sorted(group, key=lambda r: abs(read_length(r) - find_column(read_length(r)))):
            task, column = record["task"], find_column(read_length(record))
            cells[task, record["length_tokens"] if (task, column) in cells else column] = record
        series.append(Series(name, cells, group[0].get("paper")))
    return series


def read_records(path: Path) -> list[dict]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); name a results.json or scores.json") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({one_line(error)}); write it again") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UsageError(f"{path} is no list of records; name a results.json or scores.json")
    if not records:
        raise UsageError(f"{path} holds no record yet; finish the evaluation, or leave it out")
    for number, record in enumerate(records, 1):
        for key in (*KEYS, *PLACE, "n") if "depth" in record else KEYS:
            if key not in record:
                raise UsageError(f"{path} record {number} has no {key!r}; name a results.json or scores.json")
        if record["task"] not in ORDER:
            raise UsageError(f"{path} record {number}: task {record['task']!r} is unknown; write the file again")
        if not isinstance(record["length_tokens"], int):
            raise UsageError(
                f"{path} record {number}: length_tokens {record['length_tokens']!r} is no number; write the file again"
            )
        if "length" in record and not re.fullmatch(r"\d+[kM]?", str(record["length"])):
            raise UsageError(f"{path} record {number}: length {record['length']!r} is no length; write the file again")
        accuracy = record["accuracy"]  # None: the cell failed
        if accuracy is not None and not (isinstance(accuracy, int | float) and 0 <= accuracy <= 1):
            raise UsageError(f"{path} record {number}: accuracy {accuracy!r} is not in 0..1; write the file again")
    return records


def read_rule(path: Path) -> str | None:
    """How the answers of a results.json were scored, if settings.json beside it tells."""
    try:
        return json.loads((path.parent / "settings.json").read_text(encoding="utf-8"))["scoring"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def name_run(path: Path) -> str:
    """The folder's name; that of the adapter for an evaluation inside it."""
    folder = path.resolve().parent
    return folder.parent.name if folder.name == "evaluation" else folder.name


def add_mean(one: Series):
    """Adds the mean over qa1 … qa5 where all five were measured."""
    for length in sorted({length for _, length in one.cells}):
        accuracies = [one.cells.get((task, length), {}).get("accuracy") for task in MEAN_TASKS]
        if None not in accuracies:
            one.cells[MEAN, length] = {"accuracy": sum(accuracies) / len(accuracies)}


def read_published() -> list[Series]:
    return build_series(published_records(), lambda record: f"{record['model']}, published")


def arrange(series: list[Series]) -> tuple[list[tuple[str, Series]], list[int]]:
    """The (task, model) of each row and the length of each column."""
    tasks = sorted({task for one in series for task, _ in one.cells}, key=ORDER.index)
    rows = [(task, one) for task in tasks for one in series if any(of == task for of, _ in one.cells)]
    return rows, sorted({length for one in series for _, length in one.cells})


def format_accuracy(record: dict | None) -> str:
    if record is None:
        return ""
    return "failed" if record["accuracy"] is None else f"{100 * record['accuracy']:.1f}".removesuffix(".0")


def format_markdown(series: list[Series], scoring: str) -> str:
    """A table of task and model by length, and the papers of its published rows."""
    rows, lengths = arrange(series)
    lines = [
        f"Accuracy in %, of several depths the mean; scored predictions under the rule `{scoring}`.",
        "",
        "| task | model | " + " | ".join(map(format_tokens, lengths)) + " |",
        "|---|---|" + "---:|" * len(lengths),
    ]
    for task, one in rows:
        label = f"*{one.label}*" if one.paper else one.label
        lines.append(
            f"| {task} | {label} | "
            + " | ".join(format_accuracy(one.cells.get((task, length))) for length in lengths)
            + " |"
        )
    for paper in dict.fromkeys(one.paper for one in series if one.paper):
        models = ", ".join(one.label.removesuffix(", published") for one in series if one.paper == paper)
        lines += ["", f"{models}: {PAPERS[paper]}."]
    return "\n".join(lines) + "\n"


def format_csv(series: list[Series]) -> str:
    """The same table, accuracy in %, with the source of each row."""
    rows, lengths = arrange(series)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["task", "model", "source", *lengths])
    for task, one in rows:
        source = f"arXiv:{one.paper}" if one.paper else "measured"
        writer.writerow([task, one.label, source, *(format_accuracy(one.cells.get((task, n))) for n in lengths)])
    return table.getvalue()


def draw_report(series: list[Series]) -> bytes:
    """The same table as a heat map, published rows in italics."""
    import numpy as np

    from lrmt.evaluation.plots import Panel, draw_panels

    rows, lengths = arrange(series)
    values = np.full((len(rows), len(lengths)), np.nan)
    for y, (task, one) in enumerate(rows):
        for x, length in enumerate(lengths):
            accuracy = one.cells.get((task, length), {}).get("accuracy")
            values[y, x] = np.nan if accuracy is None else 100 * accuracy
    return draw_panels(
        [
            Panel(
                rows=[f"{task} · {one.label}" for task, one in rows],
                columns=[format_tokens(length) for length in lengths],
                values=values,
                groups=[task for task, _ in rows],
                italic=frozenset(y for y, (_, one) in enumerate(rows) if one.paper),
            )
        ]
    )
