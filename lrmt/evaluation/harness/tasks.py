"""Tasks of lm-evaluation-harness: found by name, with rows from local files and with the prompts of training."""

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from lrmt.errors import UsageError, one_line, suggest
from lrmt.evaluation.babilong.prompts import NEW_TOKENS
from lrmt.lengths import parse_tokens
from lrmt.tasks.dataset import COLUMNS, SUFFIXES, find_files

#: the harness' folders of long texts: reading these takes no time, reading all of them half a minute
LONG_CONTEXT = ("babilong", "ruler", "infinitebench", "longbench", "longbench2")


def find_tasks(wanted) -> tuple:
    """The harness' TaskManager, and the names of single tasks, groups and tags taken apart; UsageError for unknown ones."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[folder / name for name in LONG_CONTEXT])
    if any(name not in manager.task_index for name in wanted):
        manager = lm_eval.tasks.TaskManager()
    return manager, list(dict.fromkeys(leaf for name in wanted for leaf in take_apart(name, manager.task_index)))


def take_apart(name: str, index: dict) -> list[str]:
    if name not in index:
        raise UsageError(f"--harness {name!r} is no task of lm-evaluation-harness{suggest(name, index)}")
    entry = index[name]
    if entry.yaml_path is None:  # a tag
        return sorted(entry.tags)
    if "group" not in entry.cfg:
        return [name]
    if not all(isinstance(child, str) for child in entry.cfg["task"]):
        raise UsageError(f"--harness {name} is a group that changes its tasks; name the tasks themselves")
    return [leaf for child in entry.cfg["task"] for leaf in take_apart(child, index)]


def load_task(
    manager,
    name: str,
    length: str | None,
    *,
    folder: Path,
    tokenizer: str,
    data_dir: str | None,
    answer: Callable | None,
):
    """The harness' Task with its rows, read from a file in `folder` that includes the harness' own and changes some keys.

    Args:
        length: as run_harness takes it. tokenizer: folder of it, for tasks that generate texts of a length.
        answer: ids of an answer with EOS; None leaves babilong its public prompt.
    """
    original = manager.task_index[name]
    try:
        config = override(name, original, length, tokenizer, data_dir, answer)
        lines = [f"include: {json.dumps(str(original.yaml_path))}"]
        if "dataset_kwargs" in config:
            lines.append(f"custom_dataset: !function {__name__}.{read_rows.__name__}")
        path = folder / f"{name}_{length}.yaml"
        lines += [f"{key}: {json.dumps(value)}" for key, value in config.items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return manager.load([str(path)])["tasks"][name]
    except UsageError:
        raise
    except Exception as error:  # whatever the Hub, the network or a generator has to say
        raise UsageError(
            f"--harness {name} cannot load its data ({one_line(error)}); give files of it with --harness_data"
        ) from None


def override(name, original, length, tokenizer, data_dir, answer) -> dict:
    """What a task is told otherwise than its own YAML file says."""
    is_babilong = original.yaml_path.parent.name == "babilong"
    as_trained = is_babilong and answer is not None
    config = {"metadata": {**(original.cfg.get("metadata") or {}), "tokenizer": tokenizer}}
    if length is not None:
        config["metadata"]["max_seq_lengths"] = length if is_babilong else [count_tokens(length)]
    if as_trained:
        config |= {"description": "", "num_fewshot": 0, "doc_to_text": "{{input.strip()}} {{question.strip()}}"}
    if data_dir is None:
        return config
    key, label = (name.removeprefix("babilong_"), length or "0k") if is_babilong else (name, length)
    files = require_files(Path(data_dir), key, label, required=is_babilong)
    if files:
        split = original.cfg["test_split"]
        config["dataset_kwargs"] = {"files": files, "split": split}
        if as_trained:
            longest = max(NEW_TOKENS, *(len(answer(target)) for target in read_columns(files, split)["target"]))
            config["generation_kwargs"] = original.cfg["generation_kwargs"] | {"max_gen_toks": longest}
    return config


def count_tokens(length: str) -> int:
    """Tokens in a length as the harness' tasks spell it, where k is 1024."""
    if not re.fullmatch(r"\d+[kK]?", str(length)):
        raise UsageError(
            f"--lengths of the harness' tasks are tokens (4096, 4k), of babilong 0k, 4k, 1M; got {length!r}"
        )
    return parse_tokens(length, thousand=1024)


def require_files(folder: Path, key: str, label: str | None, required: bool) -> list[str]:
    """`find_files`; UsageError where there is none and one is required."""
    files = find_files(folder, key, label)
    if required and not files:
        found = (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES)
        there = (
            ", ".join(str(path.relative_to(folder)) for path in islice(found, 12))
            or "no .json, .jsonl or .parquet file"
        )
        raise UsageError(f"--harness_data {folder} has no {label}/{key}.jsonl; it holds: {there}")
    return files


def read_rows(files: list[str], split: str, **metadata) -> dict:
    """Local rows as the harness' `custom_dataset`: `{split: Dataset}`."""
    from datasets import load_dataset

    kind = "parquet" if files[0].endswith(".parquet") else "json"
    try:
        return {split: load_dataset(kind, data_files=files, split="train")}
    except Exception as error:
        raise UsageError(f"{files[0]} cannot be read ({one_line(error)})") from None


def read_columns(files: list[str], split: str):
    """Rows of babilong; UsageError if a column is missing."""
    rows = read_rows(files, split)[split]
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        raise UsageError(f"{files[0]} has no column {missing[0]}; its columns must be {', '.join(COLUMNS)}")
    return rows
