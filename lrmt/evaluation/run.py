"""`lrmt evaluate`: from settings to results.json, heatmap.png and a table."""

import contextlib

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

import lrmt
from lrmt.errors import UsageError, one_line
from lrmt.evaluation.baselines import build_contenders
from lrmt.evaluation.grid import measure_cell
from lrmt.evaluation.plots import draw_heatmap
from lrmt.evaluation.results import ResultsFolder, format_table
from lrmt.evaluation.settings import READING, EvaluationSettings
from lrmt.models import LongContextConfig
from lrmt.tasks import Background, build_task


def run_evaluation(settings: EvaluationSettings) -> list[dict]:
    """Measures every cell that `settings.folder` does not hold yet; returns all its records and prints their table.

    Whatever can be refused is refused before the model is loaded and before anything is written (UsageError).
    """
    segment_length = read_segment_length(settings.adapter_path)
    cells = settings.cells(segment_length)
    folder = ResultsFolder(settings.folder, settings.identity(), settings.overwrite)
    tokenizer = load_tokenizer(settings.adapter_path)
    tasks = build_tasks(settings, tokenizer, segment_length)
    samples = {
        (name, segments): count_samples(tasks[name], (segments or 0) * segment_length, settings.num_samples)
        for name, segments in cells
    }
    for name, task in tasks.items():  # the shortest cell of each: a length that nothing fits into is refused here
        task.example(0, (next(segments for cell, segments in cells if cell == name) or 0) * segment_length)

    model, contenders = open_contenders(settings)
    folder.prepare()
    pending = [(cell, [c for c in contenders if not folder.has(c.name, *cell)]) for cell in cells]
    pending = [(cell, todo) for cell, todo in pending if todo]
    with tqdm(total=sum(samples[cell] * len(todo) for cell, todo in pending), unit="answer", smoothing=0.05) as bar:
        for (name, segments), todo in pending:
            bar.set_description(name if segments is None else f"{name}, {segments} seg.")
            with refuse_too_large_batches(settings.batch_size):
                records = measure_cell(
                    todo,
                    tasks[name],
                    (segments or 0) * segment_length,
                    tokenizer=tokenizer,
                    segment_length=segment_length,
                    num_samples=samples[name, segments],
                    batch_size=settings.batch_size,
                    rule=settings.scoring,
                    device=model.device,
                    progress=bar,
                )
            folder.add(records)
    folder.write("heatmap.png", draw_heatmap(folder.records))
    print(f"\n{format_table(folder.records)}\n")
    if any(task.startswith("qa") for task in tasks):
        print(f"scoring {settings.scoring}; ", end="")
    print(f"results.json and heatmap.png are in {folder.path}")
    return folder.records


@contextlib.contextmanager
def refuse_too_large_batches(batch_size: int):
    """Turns running out of memory into a UsageError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UsageError(
            f"--batch_size {batch_size} is too large for this device; lower it and start again: finished cells are kept"
        ) from None


def open_contenders(settings: EvaluationSettings) -> tuple:
    """The model and its contenders; says so when there is one only."""
    model = load_model(settings)
    contenders = build_contenders(model)
    if len(contenders) == 1:
        print("merged model: no adapter to disable, so the columns untrained and backbone are left out")
    return model, contenders


def load_model(settings: EvaluationSettings):
    """The model to evaluate, its untrained memory drawn from the seed."""
    torch.manual_seed(settings.seed)
    return load_on_device(settings)


def load_on_device(settings):
    """The model on the first GPU, or on the CPU where there is none."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    device_map = None if device == "cpu" else {"": device}
    reading = {name: getattr(settings, name) for name in READING if getattr(settings, name) is not None}
    model = lrmt.load(
        settings.adapter_path, load_in_4bit=settings.load_in_4bit, device_map=device_map, **reading
    ).eval()
    return model if hasattr(model, "disable_adapter") else model.to(device)


def build_tasks(settings: EvaluationSettings, tokenizer, segment_length: int) -> dict:
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
