"""`lrmt score`: public predictions, scored again under every rule."""

from dataclasses import dataclass
from typing import ClassVar

from lrmt.evaluation.babilong.predictions import Predictions, describe_variant, find_predictions, read_predictions
from lrmt.evaluation.metrics import score
from lrmt.evaluation.results import align, build_record, check_output
from lrmt.files import to_json, write_files
from lrmt.flags import flag
from lrmt.lengths import format_tokens

RULES = ("official", "strict", "contains")


@dataclass(kw_only=True)
class ScoreSettings:
    """What `lrmt score` is asked to do."""

    title: ClassVar[str] = "flags"
    description: ClassVar[str] = """\
Scores public predictions again: a folder of <org>/<model>/<task>_<length>_instruction_….csv with the columns (index),
target, output, question, as BABILong's leaderboard takes them. Prints accuracy by task and length for each model,
prompt and rule: official (BABILong's), strict (whole words) and contains (lm-evaluation-harness's).

With --output_dir, writes scores.json (the records of results.json, with rule and variant) and heatmap_<rule>.png.
"""
    examples: ClassVar[str] = """\
examples:
  lrmt score babilong_evals
  lrmt score babilong_evals/microsoft --output_dir runs/scores
"""

    folder: str = flag(help="Predictions, at any depth.", metavar="FOLDER", positional=True)
    output_dir: str | None = flag(None, "Default: nothing is written.", "DIR")
    overwrite: bool = flag(False, "Replace the files of an earlier run in --output_dir.")


def score_folder(folder, output_dir=None, overwrite: bool = False) -> list[dict]:
    """Prints a table of tasks by lengths for each model, prompt and rule; returns the records, one a cell and rule.

    With `output_dir`, writes them as scores.json, and heatmap_<rule>.png of each rule. Raises UsageError, before anything
    is written, for whatever cannot be scored.
    """
    files = find_predictions(folder)
    names = ["scores.json", *(f"heatmap_{rule}.png" for rule in RULES)]
    if output_dir is not None:
        check_output(output_dir, overwrite, names)
    records = [record for path in files for record in score_cell(read_predictions(path))]
    print("\n\n".join(format_scores(table) for table in split_tables(records)))
    if output_dir is not None:
        figures = [draw_scores([r for r in records if r["rule"] == rule]) for rule in RULES]
        write_files(output_dir, dict(zip(names, [to_json(records), *figures], strict=True)))
        print(f"\n{', '.join(names)} are in {output_dir}")
    return records


def score_cell(cell: Predictions) -> list[dict]:
    """A record of results.json for each rule, with `variant` (of the prompt) and `rule` besides."""
    records = []
    for rule in RULES:
        right = sum(score(target, output, question, cell.task, rule) for target, output, question in cell.rows)
        record = build_record(cell.model, cell.task, cell.length_tokens, None, right, len(cell.rows))
        records.append(record | {"variant": cell.variant, "rule": rule})
    return records


def split_tables(records: list[dict]) -> list[list[dict]]:
    """The records by model, prompt and rule."""
    tables = {}
    for record in records:
        tables.setdefault((record["model"], record["variant"], RULES.index(record["rule"])), []).append(record)
    return [tables[key] for key in sorted(tables)]


def arrange(records: list[dict]) -> tuple[list[str], list[int], dict]:
    """Tasks and lengths of a table in their order, and its accuracies in 0..100 by (task, length)."""
    tasks = sorted({record["task"] for record in records}, key=lambda task: int(task[2:]))
    lengths = sorted({record["length_tokens"] for record in records})
    return tasks, lengths, {(r["task"], r["length_tokens"]): 100 * r["accuracy"] for r in records}


def format_title(record: dict) -> str:
    return f"{record['model']}\n{describe_variant(record['variant'])}, scored {record['rule']}"


def format_scores(table: list[dict]) -> str:
    tasks, lengths, cells = arrange(table)
    rows = [["task", *map(format_tokens, lengths)]]
    for task in tasks:
        rows.append([task, *(f"{cells[task, n]:.1f}" if (task, n) in cells else "-" for n in lengths)])
    counts = sorted({record["n"] for record in table})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{format_title(table[0])}: accuracy in %, n = {n}\n{align(rows)}"


def draw_scores(records: list[dict]) -> bytes:
    """A PNG of one rule's records: a heat map for each model and prompt."""
    import numpy as np

    from lrmt.evaluation.plots import Panel, draw_panels

    panels = []
    for table in split_tables(records):
        tasks, lengths, cells = arrange(table)
        values = np.array([[cells.get((task, n), np.nan) for n in lengths] for task in tasks])
        panels.append(Panel(tasks, [format_tokens(n) for n in lengths], values, format_title(table[0])))
    return draw_panels(panels)
