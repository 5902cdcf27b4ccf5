"""What a recipe calls: flags in, an adapter out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lrmt.arguments import CurriculumArguments, ModelArguments, TaskArguments, TrainingArguments
from lrmt.errors import UsageError, exit_on_error
from lrmt.flags import Group, parse_arguments
from lrmt.models import METHODS
from lrmt.ranks import this_rank
from lrmt.training.run import train
from lrmt.training.trainer import LongContextTrainer


def run_recipe(
    method: str, *, default_config: str | os.PathLike, description: str, args: Sequence[str] | None = None
) -> LongContextTrainer | None:
    """Trains a method of METHODS as the command line says, and ends the program with one line where it cannot."""
    try:
        with exit_on_error():
            return train(*parse_recipe(method, default_config=default_config, description=description, args=args))
    except KeyboardInterrupt:
        if this_rank().is_main_process:
            print(
                "lrmt: interrupted; once there is a checkpoint in --output_dir, --resume_from_checkpoint true goes on from it",
                file=sys.stderr,
            )
        sys.exit(130)


def parse_recipe(
    method: str, *, default_config: str | os.PathLike, description: str = "", args: Sequence[str] | None = None
) -> tuple:
    """What `train` takes: the class, its settings, and the arguments of backbone, task, curriculum and training.

    Args:
        default_config: the YAML file used where no `--config` is given. args: of the command line; default: the program's.

    Raises:
        UsageError: see `parse_arguments`.
    """
    model_class = METHODS[method]
    config = model_class.config_class
    model, task, settings, curriculum, training = parse_arguments(
        ModelArguments,
        TaskArguments,
        Group(f"The method: {method}", config, config.own_settings()),
        CurriculumArguments,
        TrainingArguments,
        default_config=default_config,
        description=description,
        args=args,
    )
    _check_task(task, sys.argv[1:] if args is None else args)
    return model_class, settings, model, task, curriculum, training


def _check_task(task: TaskArguments, words: Sequence[str]) -> None:
    """Raises `UsageError` for a task of the command line, unlike one of a file, whose place a path would take."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", default=task.task)
    asked = parser.parse_known_args(words)[0].task
    if asked != task.task:
        path = f"--text_path {task.text_path}" if task.task == "text" else f"--dataset_name {task.dataset_name}"
        raise UsageError(
            f"`--task {asked}` is another task than `{path}`; leave one of them out, or mix them: `--task {asked},{task.task}`"
        )
