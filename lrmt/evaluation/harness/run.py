"""lm-evaluation-harness on an lrmt model: `lrmt evaluate --harness`, and `lm_eval` with the model `lrmt`."""

import json
import logging
import os
import random
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lrmt.adapters.find import find_adapter
from lrmt.errors import UsageError, exit_on_error, suggest
from lrmt.evaluation.harness.tasks import find_tasks, load_task
from lrmt.evaluation.results import build_record, check_output, format_table
from lrmt.evaluation.run import load_tokenizer, read_config, refuse_too_large_batches
from lrmt.files import to_json, write_files
from lrmt.tasks.base import Pieces

PROMPTS = ("trained", "public")


def run_harness(
    adapter_path: str,
    tasks,
    *,
    max_seq_lengths=(),
    num_samples: int | None = None,
    batch_size: int = 8,
    data_dir: str | None = None,
    prompt: str = "trained",
    output_dir: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    **loading,
) -> list[dict]:
    """Runs tasks of lm-evaluation-harness, writes results.json, predictions.jsonl and harness.json, prints a table.

    Args:
        adapter_path: folder that training or merging wrote. tasks: names of the harness' tasks, groups or tags.
        max_seq_lengths: as the tasks spell them, each a run of its own: "0k", "4k" of babilong_qa*; "4096" or "4k" (k = 1024)
            of niah_* and others that count tokens. Default: the task's own.
        num_samples: the first ones of each task (default: all). seed: of generated texts.
        data_dir: local files instead of the Hub: LENGTH/TASK or TASK/LENGTH, .json, .jsonl or .parquet, as the public data
            sets have them (data/qa1/4k.json, 4k/qa1-00000-of-00001.parquet); babilong_qa1 is qa1 there. Tasks without files
            generate or load their own, but for babilong_qa*, where a missing file is an error.
        prompt: of babilong_qa*. "trained": context and question as in training, and from local files an answer as long as
            `lrmt evaluate` takes, so that accuracy is that of `lrmt evaluate --scoring contains` on the same rows. "public":
            the harness' own instruction, two examples and 16 tokens.
        output_dir: default ADAPTER_PATH/harness. loading: `load_in_4bit`, `dequantize`, `model_name_or_path` and the reading settings of
            `lrmt.load`.

    Returns:
        The records of results.json (results.build_record), of tasks whose answers are right or wrong.

    Raises:
        UsageError: before the model is loaded and before anything is written.
    """
    require_harness()
    if (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise UsageError(
            f"--harness runs in one process; got {ranks}. Leave out accelerate launch, or say --num_processes 1"
        )
    find_adapter(adapter_path)
    folder = Path(output_dir) if output_dir else Path(adapter_path) / "harness"
    check_arguments(tasks, num_samples, batch_size, data_dir, prompt)
    check_output(folder, overwrite)
    quiet_harness()
    config, tokenizer = read_config(adapter_path), load_tokenizer(adapter_path, loading.get("model_name_or_path"))
    manager, names = find_tasks(tasks)
    answer = Pieces(tokenizer).answer
    loaded = load_tasks(
        manager,
        names,
        max_seq_lengths or (None,),
        seed,
        tokenizer=tokenizer.name_or_path,  # where it was found
        data_dir=data_dir,
        answer=answer if prompt == "trained" else None,
    )

    from lrmt.evaluation.harness.model import HarnessModel

    model = HarnessModel(adapter_path, batch_size=batch_size, **loading)
    records, predictions, reports = [], [], {}
    for length, of_length in loaded.items():
        report, samples = measure(model, of_length, manager, num_samples, batch_size)
        reports[length or "default"] = report
        predictions += [build_prediction(name, length, one) for name, of_task in samples.items() for one in of_task]
        found = build_records(samples, config, lambda sample: count_tokens(sample, model, answer))
        records += found
        if len(found) < len(of_length):  # metrics that are no accuracy are in the harness' own table only
            print_report(report)
    write_results(folder, records, predictions, reports)
    if records:
        print(f"\n{format_table(records)}\n")
    print(f"results.json, predictions.jsonl and harness.json are in {folder}")
    return records


def load_tasks(manager, names: list[str], lengths, seed: int, **options) -> dict[str | None, list]:
    """The harness' tasks with their rows, by length; each length draws the same texts whatever others there are."""
    loaded = {}
    with tempfile.TemporaryDirectory() as overrides:
        for length in lengths:
            random.seed(seed)
            loaded[length] = [load_task(manager, name, length, folder=Path(overrides), **options) for name in names]
    return loaded


def measure(model, tasks: list, manager, limit: int | None, batch_size: int) -> tuple[dict, dict[str, list[dict]]]:
    """The harness' own report, and the samples of each task under the first of its filters."""
    from lm_eval import simple_evaluate

    with refuse_too_large_batches(batch_size):
        report = simple_evaluate(model, tasks=tasks, task_manager=manager, limit=limit, batch_size=batch_size)
    samples = report.pop("samples").items()
    return report, {name: [one for one in found if one["filter"] == found[0]["filter"]] for name, found in samples}


def build_records(samples: dict[str, list[dict]], config, count: Callable[[dict], int]) -> list[dict]:
    """A record of results.json for each task whose answers are right or wrong; `count` tells the tokens of a sample."""
    records = []
    for name, of_task in samples.items():
        if (right := count_right(of_task)) is not None:
            tokens = round(sum(map(count, of_task)) / len(of_task))
            segments = -(-tokens // config.segment_length)
            records.append(build_record(config.model_type, name, tokens, segments, right, len(of_task)))
    return records


def print_report(report: dict) -> None:
    from lm_eval.utils import make_table

    print(make_table(report))


def write_results(folder: Path, records: list[dict], predictions: list[dict], reports: dict) -> None:
    from lm_eval.utils import handle_non_serializable

    files = {
        "results.json": to_json(records),
        "predictions.jsonl": "".join(json.dumps(row) + "\n" for row in predictions),
        "harness.json": json.dumps(reports, indent=2, default=handle_non_serializable) + "\n",
    }
    write_files(folder, files)


def require_harness():
    if find_spec("lm_eval") is None:
        raise UsageError("--harness needs lm-evaluation-harness, which is not installed: pip install lrmt[harness]")


def check_arguments(tasks, num_samples, batch_size, data_dir, prompt):
    if not tasks:
        raise UsageError("--harness names no task; give one such as babilong_qa1 or niah_single_1")
    for flag, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"--{flag} must be at least 1; got {value}")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"--harness_data must be a folder; got {data_dir}")
    if prompt not in PROMPTS:
        got = f"{prompt!r}{suggest(prompt, PROMPTS)}"
        raise UsageError(f"--harness_prompt must be one of {', '.join(PROMPTS)}; got {got}")


def quiet_harness():
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def build_prediction(task: str, length: str | None, sample: dict) -> dict:
    """One line of predictions.jsonl; `output` is a list where the harness asked several times."""
    outputs = [responses[0] for responses in sample["resps"]]
    return {
        "task": task,
        "length": length,
        "doc_id": sample["doc_id"],
        "target": sample["target"],
        "output": outputs[0] if len(outputs) == 1 else outputs,
        **{name: sample[name] for name in sample["metrics"]},
    }


def count_right(samples: list[dict]) -> int | None:
    """How many answers are right; None where the task's metric is not right or wrong."""
    metrics = samples[0]["metrics"]
    # niah_* have a metric for each length, -1 but for that of the sample
    metric = "acc" if "acc" in metrics else next((name for name in metrics if samples[0][name] != -1), None)
    values = [sample.get(metric) for sample in samples]
    return round(sum(values)) if all(value in (0, 1) for value in values) else None


def count_tokens(sample: dict, model, answer) -> int:
    """Tokens of prompt, answer and EOS, as `lrmt evaluate` counts them."""
    target = sample["target"]
    target = target[0] if isinstance(target, list) else target
    return len(model.tok_encode(sample["arguments"][0][0])) + len(answer(str(target)))


def main():
    """`lm_eval` itself, which then knows the model `lrmt`."""
    with exit_on_error():
        require_harness()
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry

        if "lrmt" not in model_registry:  # later versions find it by its entry point
            model_registry.register("lrmt", target="lrmt.evaluation.harness.model:HarnessModel")
        cli_evaluate()
