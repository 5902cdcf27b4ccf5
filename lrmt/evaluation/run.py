"""`lrmt evaluate`: from settings to results.json, heatmap.png and a table."""

import contextlib
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

import lrmt
from lrmt.errors import UsageError, one_line
from lrmt.evaluation.baselines import build_contenders, build_endpoint_contender
from lrmt.evaluation.grid import measure_cell
from lrmt.evaluation.plots import draw_depths, draw_heatmap
from lrmt.evaluation.prompts import PARTS, TEMPLATE, prompt_parts
from lrmt.evaluation.results import ResultsFolder, format_table
from lrmt.evaluation.settings import READING, Cell, EvaluationSettings
from lrmt.evaluation.submission import Predictions, build_variant, write_predictions
from lrmt.labels import LABELS, TASK_LABELS
from lrmt.models import LongContextConfig
from lrmt.tasks import Background, build_task


def run_evaluation(settings: EvaluationSettings) -> list[dict]:
    """Measures every cell that `settings.folder` does not hold yet; returns all its records and prints their table.

    Whatever can be refused is refused before the model is loaded and before anything is written (UsageError). Under
    `accelerate launch` the ranks share the questions of each cell, and the first one writes.
    """
    ranks = PartialState()
    segment_length = read_segment_length(settings.adapter_path)
    cells = settings.cells(segment_length)
    folder = ResultsFolder(settings.folder, settings.identity(), settings.overwrite)
    tokenizer = load_tokenizer(settings.adapter_path)
    tasks = {
        depth: build_tasks(settings, tokenizer, segment_length, depth)
        for depth in dict.fromkeys(c.depth for c in cells)
    }

    def length_of(cell):
        return None if cell.segments is None else cell.segments * segment_length

    samples = {
        cell: count_samples(tasks[cell.depth][cell.task], length_of(cell) or 0, settings.num_samples) for cell in cells
    }
    shortest = {(cell.task, cell.depth): cell for cell in reversed(cells)}
    for (name, depth), cell in shortest.items():  # a length that nothing fits into is refused here
        tasks[depth][name].example(0, length_of(cell) or 0)

    max_new_tokens = max(task.max_new_tokens for of_depth in tasks.values() for task in of_depth.values())
    endpoint = build_endpoint_contender(settings, tokenizer) if settings.api_model else None
    model, contenders = open_contenders(settings, tokenizer, max_new_tokens)
    contenders += [endpoint] if endpoint else []
    ranks.wait_for_everyone()  # until all have read the folder
    if ranks.is_main_process:
        folder.prepare()
    pending = {cell: [c for c in contenders if not folder.find(c.name, *cell[:3])] for cell in cells}
    pending = {cell: todo for cell, todo in pending.items() if todo}
    if endpoint and (asked := [cell for cell, todo in pending.items() if endpoint in todo]) and ranks.is_main_process:
        typical = [(endpoint.prompt(tasks[c.depth][c.task].example(0, length_of(c) or 0)), samples[c]) for c in asked]
        prices = (settings.api_input_price, settings.api_output_price)
        print(f"{endpoint.name}: {endpoint.endpoint.estimate_cost(typical, max_new_tokens, *prices)}", flush=True)
    total = sum(samples[cell] * len(todo) for cell, todo in pending.items())
    with tqdm(total=total, unit="answer", smoothing=0.05, disable=not ranks.is_main_process) as bar:
        for cell, todo in pending.items():
            bar.set_description(cell.task if cell.segments is None else f"{cell.task}, {cell.segments} seg.")
            hopeless = [c for c in todo if is_hopeless(folder.records, c.name, cell, settings.stop_below)]
            bar.total -= samples[cell] * len(hopeless)
            todo = [contender for contender in todo if contender not in hopeless]
            if not todo:
                continue
            with refuse_too_large_batches(settings.batch_size):
                records, answers = measure_cell(
                    todo,
                    tasks[cell.depth][cell.task],
                    length_of(cell),
                    tokenizer=tokenizer,
                    segment_length=segment_length,
                    num_samples=samples[cell],
                    batch_size=settings.batch_size,
                    rule=settings.scoring,
                    device=model.device,
                    progress=bar,
                )
            if cell.depth is not None:
                records = [record | {"depth": cell.depth} for record in records]
            if ranks.is_main_process:
                keep_predictions(folder.path, settings, cell, answers)
            folder.add(records, write=ranks.is_main_process)
    if ranks.is_main_process:
        finish(folder, settings)
    return folder.records


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
        and r["segments"] < (cell.segments or 0)
        and r["ci_high"] < threshold
        for r in records
    )


def keep_predictions(path, settings: EvaluationSettings, cell: Cell, answers: dict):
    """Writes the answers to a bAbI task as BABILong's leaderboard takes them, a file for each model that did not fail."""
    if cell.task not in TASK_LABELS or cell.depth is not None or settings.babi_vocabulary:
        return
    run = Path(settings.adapter_path).resolve().name
    for name, given in answers.items():
        if any(a.output is None for a in given):
            continue
        prompted = name == settings.api_model
        rows = [(a.target, a.output, a.question) for a in given]
        cell_of_model = Predictions(
            name if "/" in name else f"{run}/{name}",
            cell.task,
            cell.name,
            build_variant(PARTS if prompted else ()),
            rows,
        )
        prompt = prompt_parts(cell.task, PARTS if prompted else ()) | {
            "template": TEMPLATE if prompted else "{context} {question}"
        }
        write_predictions(path / "babilong_evals", cell_of_model, prompt, {"do_sample": False, "num_beams": 1})


@contextlib.contextmanager
def refuse_too_large_batches(batch_size: int):
    """Turns running out of memory into a UsageError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UsageError(
            f"--batch_size {batch_size} is too large for this device; lower it and start again: finished cells are kept"
        ) from None


def open_contenders(settings: EvaluationSettings, tokenizer=None, max_new_tokens: int = 20) -> tuple:
    """The model and its contenders; says so when there is one only."""
    model = load_model(settings)
    contenders = build_contenders(
        model, settings.baseline, tokenizer=tokenizer, rag=settings.rag, max_new_tokens=max_new_tokens
    )
    if len(contenders) == 1:
        print("merged model: no adapter to disable, so the baselines on its backbone are left out")
    return model, contenders


def load_model(settings: EvaluationSettings):
    """The model to evaluate, its untrained memory drawn from the seed."""
    torch.manual_seed(settings.seed)
    return load_on_device(settings)


def load_on_device(settings):
    """The model on this rank's GPU, or on the CPU where there is none."""
    device = PartialState().device if torch.cuda.is_available() else torch.device("cpu")
    device_map = None if device.type == "cpu" else {"": device}
    reading = {name: getattr(settings, name) for name in READING if getattr(settings, name) is not None}
    model = lrmt.load(
        settings.adapter_path, load_in_4bit=settings.load_in_4bit, device_map=device_map, **reading
    ).eval()
    return model if hasattr(model, "disable_adapter") else model.to(device)


def build_tasks(settings: EvaluationSettings, tokenizer, segment_length: int, depth: float | None = None) -> dict:
    """The tasks by name; they share one background, that of the first where none is named."""
    background = None if settings.background_dir is None else Background(settings.background_dir, tokenizer)
    tasks = {}
    for name in settings.task or ("dataset",):
        tasks[name] = build_task(
            name,
            tokenizer,
            split=settings.split,
            seed=settings.seed,
            babi_dir=settings.babi_dir,
            babi_vocabulary=settings.babi_vocabulary,
            background=background,
            background_dataset=None if background is not None else settings.background_dataset,
            segment_length=segment_length,
            dataset_path=settings.dataset_name,
            dataset_config=settings.dataset_config,
            dataset_split=settings.dataset_split,
            num_digits=settings.num_digits,
            passkey_wording=settings.passkey_wording,
            question_position=settings.question_position,
            max_n_facts=settings.max_n_facts,
            depth=depth,
        )
        background = getattr(tasks[name], "background", background)
    return tasks


def count_samples(task, length: int, num_samples: int | None) -> int:
    """As many as asked for and there are; by default 100 of a task, all of the user's own rows."""
    available = task.num_examples(length)
    if num_samples is None:
        num_samples = available if task.name == "dataset" else 100
    return num_samples if available is None else min(num_samples, available)


def read_segment_length(path) -> int:
    return read_config(path).segment_length


def read_config(path) -> LongContextConfig:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--adapter_path {path}: config.json cannot be read ({one_line(error)})") from None
    if not isinstance(config, LongContextConfig):
        raise UsageError(f"--adapter_path {path} is a {config.model_type}, not an lrmt model; give what training wrote")
    return config


def load_tokenizer(path):
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--adapter_path {path} has no tokenizer that can be read ({one_line(error)})") from None
