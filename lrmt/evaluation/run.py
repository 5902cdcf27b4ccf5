"""`lrmt evaluate`: from settings to results.json, heatmap.png and a table."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import lrmt
from lrmt.adapters import backbone
from lrmt.adapters.adapter import read_config
from lrmt.adapters.find import find_backbone
from lrmt.errors import UsageError
from lrmt.evaluation import opening
from lrmt.evaluation.answers import Answer, KeptAnswers
from lrmt.evaluation.babilong.predictions import Predictions, build_variant, remove_predictions, write_predictions
from lrmt.evaluation.babilong.prompts import count_new_tokens
from lrmt.evaluation.contenders import Contender, EndpointContender, build_contenders, build_endpoint_contender
from lrmt.evaluation.grid import measure_cell
from lrmt.evaluation.plots import draw_depths, draw_heatmap
from lrmt.evaluation.results import ResultsFolder, format_table
from lrmt.evaluation.settings import Cell, EvaluationSettings
from lrmt.progress import progress
from lrmt.ranks import this_rank
from lrmt.tasks.background import Background, open_background
from lrmt.tasks.base import Example
from lrmt.tasks.dataset import DatasetTask, StoredTask
from lrmt.tasks.names import HAYSTACKS, LABELS, TASK_LABELS
from lrmt.tasks.options import TaskOptions
from lrmt.tasks.registry import build_task

PREDICTIONS = "babilong_evals"  # folder of the answers


def run_evaluation(settings: EvaluationSettings) -> list[dict]:
    """Measures every cell that `settings.folder` does not hold yet; returns all its records and prints their table.

    Whatever can be refused is refused before the model is loaded and before anything is written (UsageError). Under
    `accelerate launch` the ranks share the questions of each cell, and the first one writes.
    """
    ranks = this_rank()
    plan = make_plan(settings)
    shortest = try_lengths(plan)
    endpoint = build_endpoint_contender(settings, plan.tokenizer) if settings.api_model else None
    model, contenders = open_contenders(settings, plan.tokenizer)
    try_showing(contenders, shortest, plan)
    contenders += [endpoint] if endpoint else []
    ranks.wait_for_everyone()  # until all have read the folder
    if ranks.is_main_process:
        plan.folder.prepare()
        remove_predictions(plan.folder.path / PREDICTIONS, plan.folder.replaced)
    pending = find_pending(plan, contenders)
    kept = open_kept_answers(plan, pending, endpoint)
    if kept and ranks.is_main_process:
        print(f"{endpoint.name}: {estimate_cost(endpoint, kept, plan)}", flush=True)
    measure_pending(plan, pending, kept, model.device)
    if ranks.is_main_process:
        finish(plan.folder, settings)
    return plan.folder.records


@dataclass
class Plan:
    """What is to be measured: the cells, their tasks by depth and name, and how many samples each has."""

    settings: EvaluationSettings
    segment_length: int
    cells: list[Cell]
    folder: ResultsFolder
    tokenizer: object
    tasks: dict[float | None, dict]
    samples: dict[Cell, int]

    def task(self, cell: Cell):
        return self.tasks[cell.depth][cell.task]


def make_plan(settings: EvaluationSettings) -> Plan:
    """Opens all but the model."""
    segment_length = read_segment_length(settings.adapter_path)
    cells = settings.cells(segment_length)
    folder = ResultsFolder(settings.folder, settings.identity(), settings.overwrite, defaults=settings.defaults())
    tokenizer = load_tokenizer(settings.adapter_path, settings.model_name_or_path)
    background = build_background(settings, tokenizer, max(cell.tokens or 0 for cell in cells))
    tasks = {
        depth: build_tasks(settings, tokenizer, segment_length, depth, background)
        for depth in dict.fromkeys(cell.depth for cell in cells)
    }
    samples = {
        cell: count_samples(tasks[cell.depth][cell.task], cell.tokens or 0, settings.num_samples) for cell in cells
    }
    return Plan(settings, segment_length, cells, folder, tokenizer, tasks, samples)


def try_lengths(plan: Plan) -> dict[tuple, Example]:
    """The first example of the shortest text of each task and depth; a length that nothing fits into is refused here."""
    shortest = {}
    for cell in reversed(plan.cells) if plan.settings.dataset_name is None else ():
        shortest[cell.task, cell.depth] = plan.task(cell).example(0, cell.tokens)
    return shortest


def try_showing(contenders: list[Contender], shortest: dict[tuple, Example], plan: Plan) -> None:
    """Passages that do not fit are refused here."""
    for show in filter(None, (contender.show for contender in contenders)):
        for (name, depth), example in shortest.items():
            show(example, count_new_tokens(plan.tasks[depth][name]))


def find_pending(plan: Plan, contenders: list) -> dict[Cell, list]:
    """Who has to answer to which cell still."""
    find = plan.folder.find
    pending = {
        cell: [c for c in contenders if not find(c.name, cell.task, cell.tokens, cell.depth)] for cell in plan.cells
    }
    return {cell: todo for cell, todo in pending.items() if todo}


def open_kept_answers(plan: Plan, pending: dict[Cell, list], endpoint) -> dict[Cell, KeptAnswers]:
    """What the endpoint has answered before, of each cell for which it is due."""
    if endpoint is None:
        return {}
    folder = plan.folder.path / "answers" / endpoint.name.replace("/", "_")
    return {
        cell: KeptAnswers(
            folder / f"{name_file(cell)}.jsonl",
            fresh=not plan.folder.resumed,
            write=this_rank().is_main_process,
        )
        for cell, todo in pending.items()
        if endpoint in todo
    }


def measure_pending(plan: Plan, pending: dict[Cell, list], kept: dict[Cell, KeptAnswers], device) -> None:
    """Measures cell by cell, and keeps what each gave."""
    total = sum(plan.samples[cell] * len(todo) for cell, todo in pending.items())
    quiet = not this_rank().is_main_process
    with progress(total, "answer", disable=quiet) as bar:
        for cell, todo in pending.items():
            bar.set_description(cell.task if cell.segments is None else f"{cell.task}, {cell.segments} seg.")
            records, stop_below = plan.folder.records, plan.settings.stop_below
            hopeful = [c for c in todo if not is_hopeless(records, c.name, cell, stop_below)]
            bar.total -= plan.samples[cell] * (len(todo) - len(hopeful))
            if hopeful:
                measure(plan, cell, hopeful, kept.get(cell), device, bar)


def measure(plan: Plan, cell: Cell, contenders: list, kept: KeptAnswers | None, device, progress) -> None:
    """One cell, from its questions to what is on disk."""
    settings, is_writer = plan.settings, this_rank().is_main_process
    records, answers = measure_cell(
        contenders,
        plan.task(cell),
        cell.tokens,
        tokenizer=plan.tokenizer,
        segment_length=plan.segment_length,
        num_samples=plan.samples[cell],
        batch_size=settings.batch_size,
        rule=settings.scoring,
        device=device,
        progress=progress,
        kept=kept,
    )
    records = [record | describe_cell(cell) for record in records]
    for contender, record in zip(contenders, records, strict=True) if is_writer else ():
        if kept is not None and isinstance(contender, EndpointContender):
            kept.settle(answers[contender.name])
        if "error" not in record:
            keep_predictions(plan, cell, contender, answers[contender.name])
    plan.folder.add(records, write=is_writer)


def describe_cell(cell: Cell) -> dict:
    """What a record tells of its cell: the nominal length, its name where it has one, the depth."""
    told = {}
    if cell.tokens is not None:
        told = {"length_tokens": cell.tokens, "segments": cell.segments}
    if cell.name not in ("", str(cell.tokens)):
        told["length"] = cell.name
    return told if cell.depth is None else told | {"depth": cell.depth}


def estimate_cost(endpoint: EndpointContender, kept: dict[Cell, KeptAnswers], plan: Plan):
    """What asking the endpoint for the answers that are not `kept` would take, by a typical prompt of each cell."""
    typical = []
    for cell, answers in kept.items():
        task, missing = plan.task(cell), plan.samples[cell] - len(answers.answers)
        typical.append((task.example(0, cell.tokens or 0), missing, count_new_tokens(task)))
    return endpoint.estimate_cost(typical, plan.settings.api_input_price, plan.settings.api_output_price)


def finish(folder: ResultsFolder, settings: EvaluationSettings):
    """Draws what `folder` holds, and prints it."""
    drawn = ["results.json", "heatmap.png"]
    folder.write("heatmap.png", draw_heatmap(folder.records))
    if any(record.get("depth") is not None for record in folder.records):
        folder.write("depths.png", draw_depths(folder.records))
        drawn.append("depths.png")
    print(f"\n{format_table(folder.records)}\n")
    for record in folder.records:
        if "error" in record:
            print(f"{record['model']} failed on {record['task']}, {record['segments']} segments: {record['error']}")
    if any(record["task"] in LABELS for record in folder.records):
        print(f"scoring {settings.scoring}; ", end="")
    print(f"{' and '.join([', '.join(drawn[:-1]), drawn[-1]])} are in {folder.path}")


def is_hopeless(records: list[dict], model: str, cell: Cell, threshold: float | None) -> bool:
    """Whether the whole 95 % interval of a shorter text of the same task and depth lies below `threshold`."""
    return threshold is not None and any(
        (r["model"], r["task"], r.get("depth")) == (model, cell.task, cell.depth)
        and "error" not in r
        and r["length_tokens"] < (cell.tokens or 0)
        and r["ci_high"] < threshold
        for r in records
    )


def name_file(cell: Cell) -> str:
    """What the files of a cell are called: task, tokens ("rows" where each has its own length) and depth."""
    depth = "" if cell.depth is None else f"_depth_{cell.depth:g}"
    return f"{cell.task}_{'rows' if cell.tokens is None else cell.tokens}{depth}"


def keep_predictions(plan: Plan, cell: Cell, contender, answers: list[Answer]):
    """Writes a contender's answers to a bAbI task as BABILong's leaderboard takes them."""
    settings = plan.settings
    if cell.task not in TASK_LABELS or cell.depth is not None or settings.babi_vocabulary:
        return
    parts, prompt = contender.describe_prompt(cell.task, settings.question_position)
    of_endpoint = contender.name == settings.api_model
    run = "api" if of_endpoint else Path(settings.adapter_path).resolve().name
    predictions = Predictions(
        contender.name if of_endpoint and "/" in contender.name else f"{run}/{contender.name}",
        cell.task,
        cell.name,
        build_variant(parts),
        [(a.target, a.output, a.question) for a in answers],
    )
    generation = contender.describe_generation(count_new_tokens(plan.task(cell)))
    write_predictions(plan.folder.path / PREDICTIONS, predictions, prompt, generation)


@contextlib.contextmanager
def refuse_too_large_batches(batch_size: int):
    """Turns running out of memory into a UsageError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UsageError(
            f"--batch_size {batch_size} is too large for this device; lower it and start again: finished cells are kept"
        ) from None


def open_contenders(settings: EvaluationSettings, tokenizer=None) -> tuple:
    """The model and its contenders; says so when there is one only."""
    model = load_model(settings)
    contenders = build_contenders(model, settings.baseline, tokenizer=tokenizer, rag=settings.rag)
    if not hasattr(model, "disable_adapter") and this_rank().is_main_process:
        print("merged model: no adapter to disable, so the baselines on its backbone are left out")
    return model, contenders


def load_model(settings: EvaluationSettings):
    """The model to evaluate, its untrained memory drawn from the seed."""
    torch.manual_seed(settings.seed)
    return load_on_device(settings)


def load_on_device(settings):
    """The model on this rank's GPU, or on the CPU where there is none."""
    device = this_rank().device if torch.cuda.is_available() else torch.device("cpu")
    device_map = None if device.type == "cpu" else {"": device}
    model = lrmt.load(
        settings.adapter_path,
        load_in_4bit=settings.load_in_4bit,
        dequantize=settings.dequantize,
        model_name_or_path=settings.model_name_or_path,
        device_map=device_map,
        **settings.reading,
    ).eval()
    tell_of_full_weights(settings.adapter_path, settings.load_in_4bit, settings.model_name_or_path)
    return model if hasattr(model, "disable_adapter") else model.to(device)


def tell_of_full_weights(adapter_path: str, load_in_4bit: bool | None, model_name_or_path: str | None) -> None:
    """Says so where an adapter that was trained over 4 bits was opened over other values than these stand for."""
    config = opening.read_config(adapter_path)
    if load_in_4bit is not False or config.get("backbone_quantization") is None or not this_rank().is_main_process:
        return
    place = model_name_or_path or find_backbone(Path(adapter_path), config.get("backbone_name"))
    if backbone.quantization_of(backbone.read_backbone_config(place, revision=config.get("backbone_revision"))) is None:
        print(
            f"`--load_in_4bit false`: {adapter_path} was trained over 4 bits, and may forget over the full weights; "
            "`--dequantize true` keeps the values that it was trained over",
            file=sys.stderr,
            flush=True,
        )


def build_background(settings: EvaluationSettings, tokenizer, longest: int) -> Background | None:
    """What hides the facts in all tasks; None where none has any. UsageError where it is too short for `longest` tokens."""
    if settings.dataset_name or not set(HAYSTACKS) & set(settings.task):
        return None
    options = TaskOptions.of(settings)
    return open_background(tokenizer, options, split=settings.split, seed=settings.seed, longest=longest)


def build_tasks(
    settings: EvaluationSettings,
    tokenizer,
    segment_length: int,
    depth: float | None = None,
    background: Background | None = None,
) -> dict:
    """The tasks by name."""
    common = {"split": settings.split, "seed": settings.seed, "segment_length": segment_length}
    options = TaskOptions.of(settings, depth=depth)
    if settings.dataset_name and settings.task:
        stored = dict.fromkeys(settings.task)
        return {name: StoredTask(name, tokenizer, options, settings.lengths, **common) for name in stored}
    return {
        name: build_task(name, tokenizer, options, background=background, **common)
        for name in settings.task or ("dataset",)
    }


def count_samples(task, length: int, num_samples: int | None) -> int:
    """As many as asked for and there are; by default 100 of a generated task, and all stored rows."""
    available = task.num_examples(length)
    if num_samples is None:
        num_samples = available if isinstance(task, DatasetTask | StoredTask) else 100
    return num_samples if available is None else min(num_samples, available)


def read_segment_length(path) -> int:
    return read_config(path).segment_length


def load_tokenizer(path, model_name_or_path: str | None = None):
    """That of an adapter, which may be its backbone's; `model_name_or_path`: another place of this."""
    return backbone.load_tokenizer(path, flag="--adapter_path", backbone=model_name_or_path)
