"""The records of an evaluation: on disk, and as a table."""

import json
from collections.abc import Iterable
from pathlib import Path

from lrmt.errors import UsageError
from lrmt.evaluation.metrics import wilson_interval
from lrmt.files import to_json, told_as, write_whole

PLACE = ("model", "task", "length_tokens", "segments")

#: keys of an identity that may come later, for they change no column that is there: settings of one baseline
JOINING = ("rag",)

#: keys of an identity that may be raised: what was cut short has failed, and is asked again
RAISED = ("api_max_tokens",)


def build_record(model: str, task: str, length_tokens: int, segments: int, successes: int, n: int) -> dict:
    """One line of results.json; `accuracy`, `ci_low` and `ci_high` (95 %, Wilson) are in 0..1."""
    low, high = wilson_interval(successes, n)
    return {
        "model": model,
        "task": task,
        "length_tokens": length_tokens,
        "segments": segments,
        "accuracy": successes / n,
        "ci_low": low,
        "ci_high": high,
        "n": n,
    }


def build_failed_record(model: str, task: str, length_tokens: int, segments: int, n: int, error: str) -> dict:
    """One line of results.json for a cell without a score; measured again by the next run."""
    unknown = dict.fromkeys(("accuracy", "ci_low", "ci_high"))
    shape = {"model": model, "task": task, "length_tokens": length_tokens, "segments": segments}
    return shape | unknown | {"n": n, "error": error}


def pool_depths(records: list[dict]) -> list[dict]:
    """The records, but one for all depths of a model, task and length: the mean, its interval from all answers.

    A depth that failed fails its cell.
    """
    cells = {}
    for record in records:
        cells.setdefault(tuple(record[key] for key in PLACE), []).append(record)
    return [cell[0] if len(cell) == 1 else _pool(place, cell) for place, cell in cells.items()]


def _pool(place, cell: list[dict]) -> dict:
    n, failed = sum(record["n"] for record in cell), [record for record in cell if record["accuracy"] is None]
    if failed:
        whole = build_failed_record(*place, n, failed[0].get("error", ""))
    else:
        whole = build_record(*place, round(sum(record["accuracy"] * record["n"] for record in cell)), n)
    return {key: value for key, value in cell[0].items() if key != "depth"} | whole


class ResultsFolder:
    """An output folder: records (`name`), a figure, and settings.json, which says of which evaluation they are.

    Opening reads and checks but writes nothing. A key of the identity that settings.json lacks is what `defaults` says, but
    one of JOINING may come later. Raises UsageError for a folder that holds anything else, unless `overwrite`, when
    `replaced` are the models of the records that are lost; other files are never touched.
    """

    def __init__(self, path, identity: dict, overwrite=False, name="results.json", defaults: dict | None = None):
        self.path, self.identity, self.name, self.records = Path(path), identity, name, []
        self.defaults, self.replaced = defaults or {}, self._read_models() if overwrite else ()
        self.resumed = not overwrite and self._read()

    def _read_models(self) -> tuple[str, ...]:
        try:
            return tuple(
                {record["model"] for record in json.loads((self.path / self.name).read_text(encoding="utf-8"))}
            )
        except (OSError, ValueError, KeyError, TypeError):
            return ()

    def _read(self) -> bool:
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return False
        remedy = "name another --output_dir, or give --overwrite"
        try:
            found = json.loads((self.path / "settings.json").read_text(encoding="utf-8"))
            self.records = json.loads((self.path / self.name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError(f"--output_dir {self.path} is not empty and holds no evaluation; {remedy}") from None
        for key, value in self.identity.items():
            before = found.get(key, value if key in JOINING else self.defaults.get(key))
            if before != value and not (key in RAISED and (before or 0) < (value or 0)):
                was, now = json.dumps(before), json.dumps(value)
                raise UsageError(
                    f"--output_dir {self.path} holds another evaluation ({key} {was}, now {now}); {remedy}"
                )
        self.identity = found | self.identity
        return True

    def prepare(self):
        """Creates the folder and, unless resumed, starts an empty result file in it."""
        with told_as("--output_dir", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.resumed:
                self.write(self.name, to_json([]))
            self.write("settings.json", to_json(self.identity))

    def find(self, model: str, task: str, tokens: int | None, depth: float | None = None) -> dict | None:
        """The record of a cell that is finished; `tokens` None means any length."""
        for record in self.records:
            place = (record["model"], record["task"], record.get("depth"))
            if place == (model, task, depth) and tokens in (None, record["length_tokens"]) and "error" not in record:
                return record
        return None

    def add(self, records: list[dict], write: bool = True):
        """Keeps new records, on disk too if this process is to `write`; one of a cell that failed takes the other's place."""

        def place(record):
            return tuple(record.get(key) for key in ("model", "task", "length_tokens", "depth"))

        new = {place(record) for record in records}
        self.records = [record for record in self.records if place(record) not in new] + records
        if write:
            self.write(self.name, to_json(self.records))

    def write(self, name: str, content: str | bytes):
        write_whole(self.path / name, content)


def check_output(folder, overwrite: bool, names: Iterable[str] | None = None):
    """Raises UsageError where `--output_dir` is a file, or holds what may not be lost: one of `names`, or anything at all."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir must be a folder; {folder} is a file")
    if overwrite or not folder.is_dir():
        return
    if names is None and any(folder.iterdir()):
        raise UsageError(f"--output_dir {folder} is not empty; name another, or give --overwrite")
    if there := [name for name in names or () if (folder / name).exists()]:
        raise UsageError(f"--output_dir {folder} holds {there[0]} already; name another, or give --overwrite")


def format_cell(record: dict) -> str:
    if record["accuracy"] is None:
        return "failed"
    accuracy, low, high = (100 * record[key] for key in ("accuracy", "ci_low", "ci_high"))
    return f"{accuracy:5.1f} [{low:4.1f}, {high:5.1f}]"


def format_table(records: list[dict], caption: str = "accuracy in %, 95 % interval", format_cell=format_cell) -> str:
    """The records as plain text: for each task a block with a row for each length and a column for each model."""
    models = list(dict.fromkeys(record["model"] for record in records))
    blocks = []
    for task, depth in dict.fromkeys((record["task"], record.get("depth")) for record in records):
        rows = [["segments", "tokens", *models]]
        of_task = {
            (r["length_tokens"], r["segments"], r["model"]): r
            for r in records
            if (r["task"], r.get("depth")) == (task, depth)
        }
        for tokens, segments in sorted({key[:2] for key in of_task}):
            found = [of_task.get((tokens, segments, model)) for model in models]
            rows.append([str(segments), f"{tokens:,}", *("-" if r is None else format_cell(r) for r in found)])
        n = "/".join(str(n) for n in sorted({r["n"] for r in of_task.values()}))
        title = task if depth is None else f"{task} at depth {depth:.0%}"
        blocks.append(f"{title}: {caption}, n = {n}\n{align(rows)}")
    return "\n\n".join(blocks)


def align(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
