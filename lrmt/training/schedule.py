"""The learning rate of a stage, and an optimizer that can take it: checked before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Trainer, get_scheduler

from lrmt.arguments import TrainingArguments
from lrmt.errors import UsageError, one_line


def build_schedule(args: TrainingArguments, limit: int, peak: float = 1.0) -> Callable[[int], float]:
    """What `--learning_rate` is multiplied by at each step of a stage: `--lr_scheduler_type` with its warm-up.

    Args:
        limit: steps of the stage. peak: its highest learning rate as a share of `--learning_rate`.

    Raises:
        UsageError: `--lr_scheduler_kwargs` do not make such a schedule of so many steps.
    """
    warmup, settings = args.get_warmup_steps(limit), args.lr_scheduler_kwargs or {}
    name, flag = args.lr_scheduler_type.value, f"`--lr_scheduler_kwargs` {settings}"
    settings = {key: _as_number(value) for key, value in settings.items()}
    # the optimizer tells the schedule the peak, to which floors such as min_lr are relative
    rate = (args.learning_rate or 1.0) * peak
    if settings and name.startswith("constant"):
        raise UsageError(f"{flag} do not fit `--lr_scheduler_type` {name}, which takes none: leave them out")
    try:
        schedule = get_scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=rate), warmup, limit, settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{flag} do not fit `--lr_scheduler_type` {name}: {one_line(error)}") from None
    if (settings.get("min_lr") or 0) > rate:
        raise UsageError(
            f"{flag}: min_lr exceeds {rate:g}, the peak of a stage (`--learning_rate`, `--stage_lr_decay`)"
        )
    named = sum(settings.get(steps) or 0 for steps in ("num_stable_steps", "num_decay_steps"))
    if named and warmup + named > limit:
        raise UsageError(
            f"{flag} and a warm-up of {warmup} steps are more than the {limit} of a stage; lower them, or raise "
            "`--stage_max_steps`"
        )
    return lambda step: peak * schedule.lr_lambdas[0](step)


def _as_number(value):
    """YAML reads 1e-4 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def build_schedules(args: TrainingArguments, limits: list[int], decay: float) -> list[Callable[[int], float]]:
    """The schedule of each stage; `decay` is the peak of one as a share of that of the stage before."""
    return [build_schedule(args, limit, decay**stage) for stage, limit in enumerate(limits)]


def check_optimizer(args: TrainingArguments) -> None:
    """Takes one step with `--optim` on a weight of no matter. Raises `UsageError` if it is not installed or cannot run here."""
    weight = torch.nn.Parameter(torch.zeros(8192, device=args.device))  # 8-bit optimizers leave smaller ones alone
    weight.grad = torch.zeros_like(weight)
    flag = f"`--optim` {args.optim.value}"
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer_class([weight], **settings).step()
    except Exception as error:
        raise UsageError(f"{flag} cannot be used here: {one_line(error)}; choose another, say adamw_torch") from None
