"""Predictions in the format of BABILong's public evaluations, one file a cell: written, found and read back.

<org>/<model>/<task>_<length>_instruction_{yes|no}_examples_{yes|no}_post_prompt_{yes|no}_chat_template_{yes|no}.csv has the
columns (unnamed index), target, output, question; a .json of the same stem holds `prompt` and `generate_kwargs`.
Files from before chat templates lack the last part of the name.
"""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lrmt.errors import UsageError, one_line
from lrmt.evaluation.metrics import TASK_LABELS, is_answer
from lrmt.files import to_json, write_whole
from lrmt.lengths import parse_tokens

COLUMNS = ("target", "output", "question")
PROMPT_PARTS = ("instruction", "examples", "post_prompt", "chat_template")
STEM = re.compile(
    r"(?P<task>qa[1-9]\d?)_(?P<length>\d+[kM]?)_"
    r"(?P<variant>instruction_(?:yes|no)_examples_(?:yes|no)_post_prompt_(?:yes|no)(?:_chat_template_(?:yes|no))?)"
)


@dataclass(frozen=True)
class Predictions:
    """One cell: what `model` ("org/name") answered to `task` at `length` ("4k"); `rows` are (target, output, question)."""

    model: str
    task: str
    length: str
    variant: str
    rows: list[tuple[str, str, str]]

    @property
    def length_tokens(self) -> int:
        return parse_tokens(self.length)


def build_variant(parts: Iterable[str]) -> str:
    """The part of a file's name that tells which of PROMPT_PARTS a prompt had."""
    parts = set(parts)
    if unknown := parts - set(PROMPT_PARTS):
        raise ValueError(f"parts of a prompt are {', '.join(PROMPT_PARTS)}; got {', '.join(sorted(unknown))}")
    return "_".join(f"{part}_{'yes' if part in parts else 'no'}" for part in PROMPT_PARTS)


def describe_variant(variant: str) -> str:
    """What a prompt had besides context and question, for people: "instruction + examples", "question only"."""
    had = [part.replace("_", " ") for part in PROMPT_PARTS if f"{part}_yes" in variant]
    return " + ".join(had) or "question only"


def write_predictions(root, predictions: Predictions, prompt: dict, generate_kwargs: dict) -> Path:
    """Writes one cell under `root` (…/babilong_evals), each file whole or not at all; returns the path of the CSV.

    A model named without an organisation goes under "local". Raises ValueError for a name that could not be read back,
    or an output that is None: a cell that failed has no predictions.
    """
    org, slash, name = predictions.model.partition("/")
    folder = Path(root, *((org, name.replace("/", "_")) if slash else ("local", org)))
    path = folder / f"{predictions.task}_{predictions.length}_{predictions.variant}.csv"
    if not STEM.fullmatch(path.stem):
        raise ValueError(f"{path.name} is no name of a cell; it should read as qa1_4k_{build_variant(())}.csv")
    if any(output is None for _, output, _ in predictions.rows):
        raise ValueError(f"{path.name}: an output is None; a cell that failed is not written")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["", *COLUMNS])
    writer.writerows([index, *row] for index, row in enumerate(predictions.rows))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".json"), to_json({"prompt": prompt, "generate_kwargs": generate_kwargs}))
    write_whole(path, table.getvalue())
    return path


def remove_predictions(root, models: Iterable[str]):
    """Removes the cells of `models` under `root`: of one named without an organisation, whatever run it is of."""
    for model in models:
        org, slash, name = model.partition("/")
        folders = [Path(root, org, name.replace("/", "_"))] if slash else [run / org for run in Path(root).glob("*")]
        for file in (file for folder in folders for file in folder.glob("*")):
            if STEM.fullmatch(file.stem) and file.suffix in (".csv", ".json"):
                file.unlink()


def find_predictions(folder) -> list[Path]:
    """The CSV files under `folder`, in the order of tasks and lengths. Raises UsageError where there is none, or another."""
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UsageError(f"FOLDER must be a folder of predictions; got {folder}")
    files = sorted(folder.rglob("*.csv"))
    if not files:
        raise UsageError(f"FOLDER {folder} holds no .csv file; name the one that holds <org>/<model>/qa1_4k_….csv")
    for path in files:
        match = STEM.fullmatch(path.stem)
        if match is None or match["task"] not in TASK_LABELS:
            wanted = "qa1_4k_instruction_yes_examples_yes_post_prompt_yes.csv"
            raise UsageError(f"{path} is not named after a cell, such as {wanted}; rename it or move it elsewhere")

    def order(path):
        match = STEM.fullmatch(path.stem)
        return path.parent, match["variant"], int(match["task"][2:]), parse_tokens(match["length"])

    return sorted(files, key=order)


def read_predictions(path: Path) -> Predictions:
    """One cell. An empty field (what pandas writes for NaN) is an empty answer. Raises UsageError for what cannot be scored."""
    match = STEM.fullmatch(path.stem)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            header, *lines = csv.reader(stream, strict=True)
    except ValueError as error:  # nothing to unpack, or not UTF-8
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "is empty"
        raise UsageError(f"{path} {reason}; write the cell again") from None
    except (OSError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as CSV ({one_line(error)}); write the cell again") from None
    for column in COLUMNS:
        if column not in header:
            there = ", ".join(name or "(unnamed)" for name in header)
            raise UsageError(f"{path} has no column {column!r}; it needs {', '.join(COLUMNS)}, found: {there}")
    if not lines:
        raise UsageError(f"{path} has a header and no rows; write the cell again")
    places = [header.index(column) for column in COLUMNS]
    rows = []
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise UsageError(
                f"{path} row {number} has {len(line)} fields, the header {len(header)}; write the cell again"
            )
        target, output, question = (line[place] for place in places)
        if not is_answer(target, match["task"]):
            labels = ", ".join(TASK_LABELS[match["task"]])
            raise UsageError(
                f"{path} row {number}: target {target!r} is no answer of {match['task']} ({labels}); correct it"
            )
        rows.append((target, output, question))
    model = f"{path.parent.parent.name}/{path.parent.name}"
    return Predictions(model, match["task"], match["length"], match["variant"], rows)
