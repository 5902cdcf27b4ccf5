"""One training run, from parsed arguments to a saved adapter."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from lrmt.adapters.backbone import load_tokenizer
from lrmt.arguments import CurriculumArguments, ModelArguments, TaskArguments, TrainingArguments, as_dict
from lrmt.errors import UsageError, one_line
from lrmt.files import check_writable, told_as, write_files
from lrmt.models.base import LongContextConfig, LongContextModel
from lrmt.progress import quiet_bars
from lrmt.ranks import this_rank
from lrmt.tasks.base import Pieces
from lrmt.tasks.names import BABI, split_mixture
from lrmt.tasks.options import TaskOptions
from lrmt.tasks.registry import build_task, check_sources
from lrmt.training.build import build_empty_model, build_model, trainable_names
from lrmt.training.checkpoint import check_optimizer_saved, check_resumable, find_checkpoint
from lrmt.training.curriculum import Curriculum
from lrmt.training.hub import open_repository
from lrmt.training.notes import spell
from lrmt.training.plan import describe_plan
from lrmt.training.schedule import build_schedules, check_optimizer
from lrmt.training.texts import draw_texts
from lrmt.training.trainer import LongContextTrainer
from lrmt.unsupported import TRAINING

LOOKED_AT = 16  #: training texts of a task, of which one must have notes where they are scored


def train(
    model_class: type[LongContextModel],
    settings: dict,
    model_args: ModelArguments,
    task_args: TaskArguments,
    curriculum_args: CurriculumArguments,
    training_args: TrainingArguments,
) -> LongContextTrainer | None:
    """Trains a memory adapter through its curriculum and saves it to `output_dir`.

    Args:
        model_class: the memory method. settings: fields of its config class.

    Returns:
        The trainer, or None after `--dry_run`.

    Raises:
        UsageError: bad input, found before anything is written.
    """
    curriculum = _build_curriculum(curriculum_args, training_args.seed)
    quiet_bars()
    _check_passing(settings.get("state_passing", 0.0), task_args.task)
    if training_args.deepspeed_plugin is not None:
        _check_precision(model_args, training_args)
    # what can be wrong shows here, before texts are made and weights are loaded; of a dry run the folder does not matter
    checkpoint, goes_on = (None, False) if training_args.dry_run else _check_folders(training_args)
    _check_training(training_args, curriculum_args, curriculum)
    empty = _check_method(model_class, settings, model_args, task_args, curriculum, training_args)
    config = empty.get_base_model().config
    notes_weight = _check_notes_weight(curriculum_args.notes_weight, config, curriculum, task_args.task)
    check_sources(task_args.task, TaskOptions.of(task_args))
    if training_args.dry_run:
        if this_rank().is_main_process:
            print(describe_plan(empty, settings, model_args, task_args, curriculum, training_args))
        return None
    arguments = _arguments(settings, model_args, task_args, curriculum_args, training_args)
    identity = _identity(config, model_args, task_args, training_args) | {"notes_weight": notes_weight}

    set_seed(training_args.seed)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    tasks = _open_texts(task_args, tokenizer, config.segment_length, curriculum, training_args)
    _check_notes(curriculum_args.notes_weight, config, curriculum, tasks)
    if training_args.push_to_hub and this_rank().is_main_process:
        open_repository(training_args)
    model = _build(model_class, settings, model_args, training_args)
    if model_args.init_adapter_path is None:
        told = model.get_base_model().fit(lambda: draw_texts(tokenizer))
        if told and this_rank().is_main_process:
            print(told)
        if any(curriculum_args.notes_weight):
            first, _ = spell([tasks["train"].first_note], Pieces(tokenizer), config.note_length)
            model.get_base_model().begin_with(first[0])
    trainer = LongContextTrainer(
        model,
        training_args,
        curriculum=curriculum,
        train_task=tasks["train"],
        eval_task=tasks["validation"],
        tokenizer=tokenizer,
        eval_samples=curriculum_args.eval_samples,
        stage_lr_decay=curriculum_args.stage_lr_decay,
        notes_weight=curriculum_args.notes_weight,
        identity=identity,
    )
    if checkpoint is not None:
        check_resumable(checkpoint, model, curriculum, identity)
    if trainer.is_world_process_zero():
        _begin_folder(training_args.output_dir, arguments, goes_on)
        what = " and ".join(["LoRA"] * model_args.use_peft + model_class.trained_modules(settings))
        print(f"{len(trainable_names(model))} trainable tensors ({what}); saving to {training_args.output_dir}")
    this_rank().wait_for_everyone()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # and pushes it, with `--push_to_hub`
    return trainer


def _build_curriculum(args: CurriculumArguments, seed: int) -> Curriculum:
    return Curriculum(
        stages=args.curriculum_stages,
        max_steps=args.stage_max_steps,
        promotion_accuracy=args.promotion_accuracy,
        vary_lengths=args.vary_lengths,
        min_segments=args.min_segments,
        seed=seed,
    )


# ---------------------------------------------------------------------- checks


def _check_precision(model_args: ModelArguments, training_args: TrainingArguments) -> None:
    """DeepSpeed casts every parameter to its own precision, which would garble 4-bit weights stored in another."""
    # its collectives go by names that torch renames: one warning per call
    warnings.filterwarnings("ignore", message="`torch.distributed.*deprecated", category=FutureWarning)
    precision = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    if model_args.dtype != precision:
        flags = {"bfloat16": "--bf16 true", "float16": "--fp16 true --bf16 false", "float32": "--bf16 false"}
        raise UsageError(
            f"`--dtype` must be the precision that DeepSpeed trains in; got {model_args.dtype} and {precision}. "
            f"Set `--dtype {precision}` or `{flags[model_args.dtype]}`"
        )


def _check_folders(training_args: TrainingArguments) -> tuple[str | None, bool]:
    """The checkpoint to go on from, and whether the run goes on where it was."""
    checkpoint = find_checkpoint(training_args.output_dir, training_args.resume_from_checkpoint)
    if checkpoint is not None:
        check_optimizer_saved(checkpoint)
    return checkpoint, _check_output_dir(training_args, checkpoint)


def _check_output_dir(training_args: TrainingArguments, checkpoint: str | None) -> bool:
    """Refuses to write over anything that this run did not make; tells whether the run goes on where it was."""
    path = Path(training_args.output_dir)
    with told_as("`--output_dir`", path):
        occupied = path.is_dir() and any(path.iterdir())
    this_rank().wait_for_everyone()  # or a fast rank's first file would stop a slow one
    goes_on = checkpoint is not None and Path(checkpoint).resolve().parent == path.resolve()
    if path.exists() and not path.is_dir():
        raise UsageError(f"`--output_dir` {path} is a file; name a folder")
    if occupied and not goes_on and not training_args.overwrite_output_dir:
        raise UsageError(
            f"`--output_dir` {path} is not empty; name another, go on with `--resume_from_checkpoint true`, or replace what "
            "is there with `--overwrite_output_dir`"
        )
    check_writable(path, "`--output_dir`")
    return goes_on


def _check_training(
    training_args: TrainingArguments, curriculum_args: CurriculumArguments, curriculum: Curriculum
) -> None:
    """Raises `UsageError` if there is no such schedule, optimizer or log."""
    build_schedules(training_args, curriculum.max_steps, curriculum_args.stage_lr_decay)
    check_optimizer(training_args)
    for name in training_args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise UsageError(f"`--report_to` {name}: {one_line(error)}") from None


def _is_sharded(training_args: TrainingArguments) -> bool:
    return is_deepspeed_zero3_enabled() or training_args.deepspeed_plugin is not None


def _check_method(
    model_class: type[LongContextModel],
    settings: dict,
    model_args: ModelArguments,
    task_args: TaskArguments,
    curriculum: Curriculum,
    training_args: TrainingArguments,
) -> PeftModel:
    """The model without weights, if it can be built and trained so."""
    empty = build_empty_model(model_class, model_args, settings, sharded=_is_sharded(training_args))
    config = empty.get_base_model().config
    config.check_training(
        max(curriculum.stages),
        num_ranks=training_args.world_size,
        task=task_args.task,
        use_peft=model_args.use_peft,
        gradient_checkpointing=training_args.gradient_checkpointing or training_args.activation_checkpointing,
    )
    curriculum.slack = config.length_slack
    return empty


def _check_passing(share: float, task: str) -> None:
    """Raises `UsageError` for texts that would go on from the memory of another: with that, answers and notes of some are others."""
    parts = split_mixture(task)
    stories = [part for part in parts if part in BABI]
    kinds = [f"a story of {', '.join(stories)}"] * bool(stories) + ["a row of --dataset_name"] * ("dataset" in parts)
    if share and kinds:
        raise UsageError(
            f"`--state_passing` {share:g}: what is true at the end of {' or '.join(kinds)} depends on all of it, so none "
            "can go on from the memory of another; set `--state_passing 0`"
        )


def _check_notes_weight(
    weights: list[float], config: LongContextConfig, curriculum: Curriculum, task: str
) -> list[float]:
    """What notes weigh in each stage. Raises `UsageError` if they are to be scored and cannot be, whatever the texts say."""
    of_stages = curriculum.per_stage("notes_weight", weights)
    if not any(of_stages):
        return of_stages
    if not config.note_length:
        raise UsageError(
            f"{_tell(weights)}: {config.model_type} writes no memory tokens that could say them; leave it out"
        )
    if curriculum.stages[-1] == 1 and "dataset" not in split_mixture(task):  # whose rows may be longer
        raise UsageError(
            f"{_tell(weights)}: no text of one segment hands on a memory, which notes are of; got `--curriculum_stages` "
            f"{curriculum.stages}. Train on longer texts, or leave it out"
        )
    return of_stages


def _tell(weights: list[float]) -> str:
    return f"`--notes_weight` {' '.join(f'{weight:g}' for weight in weights)}"


def _check_notes(weights: list[float], config: LongContextConfig, curriculum: Curriculum, tasks: dict) -> None:
    """Raises `UsageError` if notes are to be scored of which the task makes none."""
    told = _tell(weights)
    if not any(weights):
        return
    longest, train = curriculum.stages[-1] * config.segment_length, tasks["train"]
    for task in (part for split in tasks.values() for part in getattr(split, "tasks", [split])):
        if error := getattr(task, "wrong_notes", None):
            raise error
    written = longest - config.segment_length  # by the last segment that hands anything on
    texts = [train.example(index, longest) for index in range(LOOKED_AT * len(getattr(train, "tasks", [train])))]
    if not any(
        0 < note.end <= max(written, len(text.prompt_ids) - config.segment_length)
        for text in texts
        for note in text.notes
    ):
        raise UsageError(
            f"{told}: the first texts of task {train.name} have nothing to note before their last segment; leave it out, train on longer "
            "texts, or give rows a column `notes`, or targets that their input says"
        )
    rows = [text for text in texts if text.task == "dataset"]
    without = sum(not row.notes for row in rows)
    if without and this_rank().is_main_process:
        print(f"{told}: {without} of the first {len(rows)} rows have neither notes nor a target that their input says")


# ---------------------------------------------------------------------- texts and model


def _open_texts(
    task_args: TaskArguments, tokenizer, length: int, curriculum: Curriculum, training_args: TrainingArguments
) -> dict:
    """The task of each split. Raises `UsageError` if texts of the shortest or longest stage cannot be made."""
    tasks = {
        split: _build_task(task_args, tokenizer, split, length, training_args) for split in ("train", "validation")
    }
    shortest = min(curriculum.min_segments, curriculum.stages[0]) if curriculum.vary_lengths else curriculum.stages[0]
    longest = [(split, curriculum.stages[-1]) for split in tasks]  # which --text_path may be too short for
    slack = curriculum.slack if curriculum.vary_lengths else 0
    for split, segments in [("train", shortest), ("validation", curriculum.stages[0]), *longest]:
        for task in getattr(tasks[split], "tasks", [tasks[split]]):
            task.example(0, segments * length - (slack if split == "train" else 0))
    return tasks


def _build_task(task_args: TaskArguments, tokenizer, split: str, segment_length: int, training_args: TrainingArguments):
    return build_task(
        task_args.task,
        tokenizer,
        TaskOptions.of(task_args),
        split=split,
        seed=training_args.seed,
        segment_length=segment_length,
    )


def _build(
    model_class: type[LongContextModel], settings: dict, model_args: ModelArguments, training_args: TrainingArguments
) -> PeftModel:
    on_gpu = torch.cuda.is_available() and not training_args.use_cpu
    return build_model(
        model_class,
        model_args,
        settings,
        sharded=_is_sharded(training_args),
        # bitsandbytes quantises on the device that it runs on; ZeRO-3 places its own shards
        device_map={"": this_rank().local_process_index} if on_gpu and not is_deepspeed_zero3_enabled() else None,
    )


# ---------------------------------------------------------------------- what is written


def _begin_folder(output_dir: str, arguments: dict, goes_on: bool) -> None:
    """Writes the arguments, and takes away checkpoints of another run, or a later resume would take one up."""
    if not goes_on:
        for old in Path(output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)
    write_files(output_dir, {"arguments.yaml": yaml.safe_dump(arguments, sort_keys=True)}, "`--output_dir`")


OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def _identity(
    config: LongContextConfig, model_args: ModelArguments, task_args: TaskArguments, training: TrainingArguments
) -> dict:
    """What makes the batches and the weights of a run: a resumed one must have the same."""
    kinds = ("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "lora_dropout", "use_rslora", "use_dora")
    lora = {name: getattr(model_args, name) for name in kinds}
    weights = {name: getattr(model_args, name) for name in ("load_in_4bit", "use_bnb_nested_quant", "dtype")}
    # the optimizer goes on with its own, whatever a flag says
    optimizer = {name: getattr(training, name) for name in OPTIMIZER} | {
        "optim": getattr(training.optim, "value", training.optim)
    }
    task = as_dict(task_args)
    for name in (
        "babi_dir",
        "babi_vocabulary",
        "background_dir",
        "background_dataset",
        "dataset_name",
        "text_path",
    ):  # data may move; another name is another text
        task[name] = task[name] and Path(task[name]).name
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    run = config.matters_to_training() | lora | task | weights | optimizer
    return run | {"per_device_train_batch_size × accumulation × ranks": batch}


def _arguments(settings: dict, model_args, task_args, curriculum_args, training_args: TrainingArguments) -> dict:
    """Every setting that is not a default of transformers' own, readable and usable as `--config`."""
    given = settings | as_dict(model_args, task_args, curriculum_args)
    of_this_start = [
        "output_dir",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "dry_run",
        "hub_token",
        "use_cpu",
        "deepspeed",
    ]
    for field in dataclasses.fields(training_args):
        value = getattr(training_args, field.name, None)
        value = getattr(value, "value", value)  # an enum's
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        of_no_matter = not field.init or field.name in of_this_start or field.name in TRAINING
        if not of_no_matter and value != getattr(default, "value", default):
            given[field.name] = value
    plain = (str, int, float, list, dict, type(None))
    return {name: value for name, value in given.items() if isinstance(value, plain)}
