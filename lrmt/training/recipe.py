"""What a recipe calls: flags in, an adapter out."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lrmt.arguments import CurriculumArguments, ModelArguments, TaskArguments, TrainingArguments
from lrmt.errors import exit_on_error
from lrmt.flags import Group, parse_arguments
from lrmt.models import METHODS
from lrmt.training.run import train
from lrmt.training.trainer import LongContextTrainer


def run_recipe(
    method: str, *, default_config: str | os.PathLike, description: str, args: Sequence[str] | None = None
) -> LongContextTrainer | None:
    """Trains a method of METHODS as the command line says, and ends the program with one line where it cannot."""
    with exit_on_error():
        return train(*parse_recipe(method, default_config=default_config, description=description, args=args))


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
    return model_class, settings, model, task, curriculum, training
